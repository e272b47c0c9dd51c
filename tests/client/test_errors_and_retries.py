"""Errors of the wire as errors of the tree, and when a request is sent again."""

from __future__ import annotations

import random
import re
from typing import Any

import httpx
import pytest

import tenora_client as tc
from tests.client.fake import COMPLETION, FILE, Script, failure, job, reply

MESSAGES = [{"role": "user", "content": "Hello?"}]
REFUSED = httpx.ConnectError("refused")
BROKEN = httpx.ReadError("broken")
SLOW = httpx.ReadTimeout("slow")


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, tc.BadRequestError),
        (401, tc.AuthenticationError),
        (403, tc.PermissionDeniedError),
        (404, tc.NotFoundError),
        (409, tc.ConflictError),
        (413, tc.PayloadTooLargeError),
        (418, tc.StatusError),
        (422, tc.UnprocessableError),
        (429, tc.RateLimitedError),
        (500, tc.ServerError),
        (502, tc.ServerError),
        (503, tc.UnavailableError),
        (507, tc.StorageFullError),
    ],
)
def test_each_status_has_its_error_with_everything_that_the_server_said(
    status: int, kind: type[tc.StatusError]
) -> None:
    script = Script(failure(status, x_request_id="req-9", retry_after="7"))
    with script.client(retries=tc.RetryPolicy(max_retries=0)) as client, pytest.raises(tc.StatusError) as raised:
        client.chat.create(MESSAGES, model="nope")
    error = raised.value
    assert type(error) is kind
    assert (error.status_code, error.code, error.type, error.param) == (status, "some_code", "some_type", "model")
    assert (error.message, error.request_id, error.retry_after) == ("It went wrong; do that.", "req-9", 7.0)
    assert "req-9" in str(error)


@pytest.mark.parametrize(
    ("given", "place"),
    [
        ({"learning_rate": float("inf")}, "learning_rate"),
        ({"lora": {"alpha": float("nan")}}, "lora.alpha"),
        ({"sweep": {"learning_rate": [1e-3, float("nan")]}}, "sweep.learning_rate[1]"),
        ({"name": "\ud800"}, "name"),
    ],
)
def test_what_json_cannot_carry_is_named_and_nothing_is_sent(given: dict[str, Any], place: str) -> None:
    script = Script()
    with (
        script.client() as client,
        pytest.raises(tc.RequestError, match=f"^{re.escape(place)} cannot be sent: ") as told,
    ):
        client.jobs.create(training_file="file-1", model="tiny", **given)
    assert isinstance(told.value, (tc.TenoraError, ValueError))
    assert script.requests == []


@pytest.mark.parametrize("body", [b"", b"<html>Bad gateway</html>", b"[1]", b'{"error": "text"}', b"\xff"])
def test_an_error_that_is_not_in_our_shape(body: bytes) -> None:
    script = Script(httpx.Response(500, content=body))
    with script.client() as client, pytest.raises(tc.ServerError, match="HTTP 500 from GET /v1/files/f"):
        client.files.get("f")


def test_an_answer_that_is_not_the_api() -> None:
    with Script(reply({"hello": "world"})).client() as client, pytest.raises(tc.ResponseError, match="Tenora server"):
        client.files.get("f")


def test_a_redirect_is_an_error_and_never_sends_the_key_elsewhere() -> None:
    script = Script(httpx.Response(307, headers={"location": "http://elsewhere/"}))
    with script.client() as client, pytest.raises(tc.StatusError):
        client.files.get("f")
    assert len(script.requests) == 1


@pytest.mark.parametrize("first", [failure(429, retry_after="3"), failure(503, retry_after="3")], ids=["429", "503"])
def test_contention_is_retried_after_what_the_server_says(first: httpx.Response) -> None:
    script = Script(first, reply(COMPLETION))
    with script.client() as client:
        assert client.chat.create(MESSAGES, model="pubmed").text == "Hello"
    assert script.slept == [3.0]


def test_a_long_retry_after_is_the_callers_decision() -> None:
    script = Script(failure(429, retry_after="121"))
    with script.client() as client, pytest.raises(tc.RateLimitedError):
        client.chat.create(MESSAGES)
    assert script.slept == []


def test_a_server_that_forbids_a_retry_is_believed() -> None:
    script = Script(failure(503, x_should_retry="false"))
    with script.client() as client, pytest.raises(tc.UnavailableError):
        client.chat.create(MESSAGES)


@pytest.mark.parametrize("status", [400, 401, 403, 404, 409, 422, 500, 507])
def test_what_will_not_get_better_is_not_retried(status: int) -> None:
    script = Script(failure(status, retry_after="1"))
    with script.client() as client, pytest.raises(tc.StatusError):
        client.files.get("f")
    assert script.slept == []


def test_no_connection_is_retried_for_everything_and_backs_off() -> None:
    script = Script(REFUSED, REFUSED, REFUSED, REFUSED)
    policy = tc.RetryPolicy(max_retries=3, base=1.0, cap=3.0, random=random.Random(0))
    with script.client(retries=policy) as client, pytest.raises(tc.TransportError, match="tenora serve") as raised:
        client.chat.create(MESSAGES)
    assert not raised.value.sent
    for slept, ceiling in zip(script.slept, [1.0, 2.0, 3.0], strict=True):
        assert ceiling / 2 <= slept <= ceiling


@pytest.mark.parametrize("error", [BROKEN, SLOW, failure(502), failure(504)], ids=["broken", "slow", "502", "504"])
def test_work_that_may_have_been_done_is_repeated_only_if_that_is_harmless(error: httpx.Response | Exception) -> None:
    script = Script(error, reply(FILE))
    with script.client() as client:
        assert client.files.get("file-1").id == "file-1"  # a GET

    script = Script(error, reply(job()))
    with script.client() as client:
        client.jobs.create("file-1", model="smollm2-135m")  # carries an Idempotency-Key
    keys = {request.headers["idempotency-key"] for request in script.requests}
    assert len(script.requests) == 2
    assert len(keys) == 1

    script = Script(error)
    with script.client() as client, pytest.raises((tc.TransportError, tc.ServerError)):
        client.chat.create(MESSAGES)


def test_a_timeout_says_so() -> None:
    script = Script(SLOW)
    with script.client() as client, pytest.raises(tc.RequestTimeoutError, match="timeout"):
        client.chat.create(MESSAGES)


async def test_the_async_client_retries_likewise() -> None:
    script = Script(REFUSED, failure(503, retry_after="2"), failure(409))
    async with script.async_client() as client:
        with pytest.raises(tc.ConflictError):
            await client.adapters.rollback("pubmed", 1)
    assert len(script.slept) == 2
    assert script.slept[1] == 2.0
