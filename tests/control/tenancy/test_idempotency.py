"""The same key and payload get the first answer; anything else is refused."""

from __future__ import annotations

import asyncio

import pytest
from sqlalchemy.ext.asyncio import AsyncSession

from tenora.control.control import Control
from tenora.control.jobs.records import JobRecord, JobRequest
from tenora.control.tenancy.idempotency import KEPT_SECONDS, Receipt, StoredAnswer
from tenora.control.tenancy.records import Principal
from tenora.errors import ConflictError, InvalidRequestError
from tests.control.conftest import BASE, OpenControl, tenant, upload

ANSWER = StoredAnswer(201, b'{"id":"file-1"}')


async def keep(control: Control, who: Principal, route: str, key: str) -> None:
    """What a use case does: write the receipt in its transaction."""
    receipt: Receipt[bytes] = control.idempotency.receipt(who, route, key, lambda made: StoredAnswer(201, made))
    async with control._registry.database.write() as session:
        await receipt.write(session, ANSWER.body)
    assert receipt.answer == ANSWER


async def test_the_first_answer_again(control: Control, acme: Principal, umbrella: Principal) -> None:
    store = control.idempotency
    assert await store.begin(acme, "POST /v1/files", "k", b"payload") is None
    await keep(control, acme, "POST /v1/files", "k")
    assert await store.begin(acme, "POST /v1/files", "k", b"payload") == ANSWER
    with pytest.raises(InvalidRequestError) as caught:
        await store.begin(acme, "POST /v1/files", "k", b"another payload")
    assert caught.value.code == "idempotency_mismatch"
    # Another route, another key and another tenant are other requests.
    assert await store.begin(acme, "POST /v1/adapters", "k", b"payload") is None
    assert await store.begin(acme, "POST /v1/files", "k2", b"payload") is None
    assert await store.begin(umbrella, "POST /v1/files", "k", b"other") is None


async def test_one_of_two_at_once_works(control: Control, acme: Principal) -> None:
    store = control.idempotency
    got = await asyncio.gather(*(store.begin(acme, "r", "k", b"p") for _ in range(5)), return_exceptions=True)
    assert got.count(None) == 1
    refused = [one for one in got if one is not None]
    assert all(isinstance(one, ConflictError) and one.code == "idempotency_in_progress" for one in refused)
    with pytest.raises(InvalidRequestError):  # the payload is compared even then
        await store.begin(acme, "r", "k", b"q")


async def test_a_failed_attempt_may_be_repeated(control: Control, acme: Principal) -> None:
    store = control.idempotency
    await store.begin(acme, "r", "k", b"p")
    await store.abandon(acme, "r", "k")
    assert await store.begin(acme, "r", "k", b"p") is None
    await keep(control, acme, "r", "k")
    await store.abandon(acme, "r", "k")
    assert await store.begin(acme, "r", "k", b"p") == ANSWER


async def test_an_answer_is_kept_only_with_the_work(control: Control, acme: Principal) -> None:
    """A job whose transaction fails leaves no answer behind, and its key may be used again."""
    await control.idempotency.begin(acme, "r", "k", b"p")
    receipt: Receipt[JobRecord] = control.idempotency.receipt(acme, "r", "k", lambda job: StoredAnswer(200, b"{}"))
    write = receipt.write

    async def write_and_fail(session: AsyncSession, made: JobRecord) -> None:
        await write(session, made)
        raise ConflictError("no")

    receipt.write = write_and_fail  # type: ignore[method-assign]
    file = await upload(control, acme)
    with pytest.raises(ConflictError, match="no"):
        await control.jobs.create(acme, JobRequest(model=BASE, training_file=file.id), receipt)
    assert (await control.jobs.list(acme)).items == []
    await control.idempotency.abandon(acme, "r", "k")
    assert await control.idempotency.begin(acme, "r", "k", b"p") is None


async def test_answers_outlive_a_restart_and_reservations_do_not(open_control: OpenControl) -> None:
    control = await open_control()
    acme = await tenant(control, "acme")
    await control.idempotency.begin(acme, "r", "done", b"p")
    await keep(control, acme, "r", "done")
    await control.idempotency.begin(acme, "r", "open", b"p")
    await control.close()
    control = await open_control()
    assert await control.idempotency.begin(acme, "r", "done", b"p") == ANSWER
    assert await control.idempotency.begin(acme, "r", "open", b"p") is None


async def test_answers_are_kept_a_day(control: Control, acme: Principal, monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    await control.idempotency.begin(acme, "r", "k", b"p")
    await keep(control, acme, "r", "k")
    later = int(time.time()) + KEPT_SECONDS + 1
    monkeypatch.setattr("tenora.control.tenancy.idempotency.unix_now", lambda: later)
    assert await control.idempotency.begin(acme, "r", "k", b"q") is None


@pytest.mark.parametrize("key", ["", "k" * 256])
async def test_keys_have_a_length(control: Control, acme: Principal, key: str) -> None:
    with pytest.raises(InvalidRequestError):
        await control.idempotency.begin(acme, "r", key, b"p")
