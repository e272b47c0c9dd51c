"""Probes, metrics and logs: what operators see, and what nobody may see."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tenora.config import Settings
from tenora.errors import ConflictError
from tenora.telemetry import logs
from tests.api.conftest import Service, upload
from tests.support.hanging import impatient

BODY = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}
NAMES = {
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:kv_cache_usage_perc",
    "vllm:lora_requests_info",
    "vllm:cache_config_info",
    "vllm:time_to_first_token_seconds_bucket",
    "vllm:request_time_per_output_token_seconds_bucket",
    "vllm:e2e_request_latency_seconds_bucket",
    "vllm:request_queue_time_seconds_bucket",
    "vllm:request_prefill_time_seconds_bucket",
    "vllm:request_decode_time_seconds_bucket",
    "vllm:request_prompt_tokens_bucket",
    "vllm:request_generation_tokens_bucket",
    "vllm:request_success_total",
    "vllm:prompt_tokens_total",
    "vllm:generation_tokens_total",
    "vllm:prefix_cache_queries_total",
    "vllm:prefix_cache_hits_total",
    "tenora_adapter_loads_total",
    "tenora_adapter_evictions_total",
    "tenora_adapter_load_failures_total",
    "tenora_adapter_load_seconds_sum",
    "tenora_adapters_resident",
    "tenora_engine_last_step_timestamp_seconds",
    "tenora_rejected_total",
    "tenora_refused_actions_total",
    "tenora_jobs",
    "tenora_train_tokens_total",
    "tenora_job_lease_lost_total",
    "tenora_worker_up",
    "tenora_draining",
}


async def scrape(service: Service) -> dict[str, float]:
    """Every sample by its name and labels."""
    response = await service.client("infer").get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    samples = [line.rpartition(" ") for line in response.text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in samples}


async def test_every_promised_metric_is_there(service: Service, base_id: str) -> None:
    await service.client("infer").get("/v1/models/none")
    await service.client("infer").get("/v1/files")
    samples = await scrape(service)
    present = {name.partition("{")[0] for name in samples}
    assert NAMES - present == set()
    assert len([name for name in samples if name.startswith("vllm:lora_requests_info")]) == 1
    for name in samples:
        if name.startswith("vllm:") and not name.startswith("vllm:lora_requests_info"):
            assert f'model_name="{base_id}"' in name


async def test_requests_are_counted_and_timed(service: Service, base_id: str) -> None:
    client = service.client("infer")
    await client.post("/v1/chat/completions", json={**BODY, "model": service.control.inference.base_id})
    await client.post(
        "/v1/chat/completions", json={**BODY, "model": service.control.inference.base_id, "stream": True, "n": 2}
    )
    samples = await scrape(service)
    label = f'{{model_name="{base_id}"}}'
    assert samples[f"vllm:time_to_first_token_seconds_count{label}"] == 2
    assert samples[f"vllm:request_queue_time_seconds_count{label}"] == 2
    assert samples[f"vllm:e2e_request_latency_seconds_count{label}"] == 2
    assert samples[f"vllm:request_generation_tokens_sum{label}"] == 9
    assert samples[f'vllm:request_success_total{{finished_reason="length",model_name="{base_id}"}}'] == 3


async def test_jobs_are_counted_by_status(service: Service, base_id: str) -> None:
    """Of all tenants, and from the registry: the engine knows only those that run."""
    for tenant in ("default", "other"):
        client = service.client("train", tenant)
        file_id = (await upload(client)).json()["id"]
        made = await client.post("/v1/fine_tuning/jobs", json={"model": base_id, "training_file": file_id})
        await client.post(f"/v1/fine_tuning/jobs/{made.json()['id']}/cancel")
    samples = await scrape(service)
    jobs = {name: value for name, value in samples.items() if name.startswith("tenora_jobs")}
    assert jobs.pop('tenora_jobs{state="cancelled"}') == 2
    assert len(jobs) == 6
    assert set(jobs.values()) == {0.0}


async def test_lost_leases_are_counted(service: Service) -> None:
    assert (await scrape(service))["tenora_job_lease_lost_total"] == 0
    service.control._runner.leases_lost += 1
    assert (await scrape(service))["tenora_job_lease_lost_total"] == 1


async def test_refusals_are_counted_by_reason(service: Service) -> None:
    await service.client_with(None).get("/v1/models")
    await service.client("infer").get("/v1/files")
    await service.client("infer").post("/v1/chat/completions", json={**BODY, "model": "none"})
    samples = await scrape(service)
    for reason in ("invalid_api_key", "insufficient_scope", "model_not_found"):
        assert samples[f'tenora_rejected_total{{reason="{reason}"}}'] == 1
    assert samples['tenora_refused_actions_total{action="files.list"}'] == 1


async def test_no_tenants_names_in_metrics(service: Service) -> None:
    """Any valid key may read them."""
    await service.client("infer").post("/v1/chat/completions", json={**BODY, "model": "secret-name"})
    response = await service.client("infer", "other").get("/metrics")
    assert "secret-name" not in response.text
    assert "other" not in re.sub(r"# .*", "", response.text)


async def test_probes(service: Service) -> None:
    nobody = service.client_with(None)
    assert (await nobody.get("/livez")).json() == {"status": "ok"}
    assert (await nobody.get("/readyz")).json() == {"status": "ok"}
    assert (await service.client("infer").get("/health")).status_code == 200


async def test_a_hanging_engine_ends_what_waits_for_it_and_fails_the_probes(service: Service) -> None:
    nobody, client = service.client_with(None), service.client("infer")
    body = {**BODY, "model": service.control.inference.base_id}
    assert (await nobody.get("/livez")).status_code == 200
    service.script.hang.set()
    asked = asyncio.create_task(client.post("/v1/chat/completions", json=body))
    await service.script.until(lambda: len(service.script.requests) == 1)
    with impatient(service.control.engine):
        waiting = await asked
    assert (waiting.status_code, waiting.json()["error"]["code"]) == (503, "engine_lost")
    refused = await client.post("/v1/chat/completions", json=body)
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "2")
    assert (await nobody.get("/livez")).status_code == 503  # the tests' engine is a thread, which cannot be killed
    assert (await nobody.get("/readyz")).status_code == 503
    service.script.hang.clear()
    service.script.released.set()
    await service.control.engine.wait_alive()
    assert (await nobody.get("/livez")).status_code == 200
    assert (await client.post("/v1/chat/completions", json=body)).status_code == 200


class TestTraining:
    @pytest.fixture
    def settings(self, tmp_path: Path) -> Settings:
        return Settings(home=tmp_path / "home", device="cpu", dtype="float32", threads=1, role="train")

    async def test_a_service_that_only_trains_takes_no_inference(self, service: Service) -> None:
        body = {**BODY, "model": service.control.inference.base_id}
        assert (await service.client().post("/v1/chat/completions", json=body)).status_code == 404
        assert (await service.client().get("/v1/fine_tuning/jobs")).status_code == 200


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    """What `configure` writes; the root logger is put back afterwards."""
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    stream = io.StringIO()
    logs.configure("debug", stream)
    yield stream
    root.handlers[:] = before
    root.setLevel(level)


def lines(stream: io.StringIO) -> list[dict[str, object]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


async def test_a_request_is_one_line(service: Service, stream: io.StringIO) -> None:
    await service.client("train").get("/v1/files/file-secret", headers={"x-request-id": "req-12345678"})
    [line] = [line for line in lines(stream) if line["logger"] == "tenora.access"]
    expected = {"method": "GET", "route": "/v1/files/{file_id}", "status": 404, "request_id": "req-12345678"}
    assert {name: line.get(name) for name in expected} == expected
    assert line["tenant"]
    assert line["key"]


async def test_canaries_are_found_nowhere(service: Service, stream: io.StringIO) -> None:
    """Keys, prompts, completions and names of files: not in logs, errors or metrics."""
    prompt = "CANARY the prompt"
    secret = service.keys["default"]["admin"]
    client = service.client("admin")
    body = {
        "model": service.control.inference.base_id,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": 5,
    }
    answers = [
        await client.post("/v1/chat/completions", json={**body, "temperature": prompt}),
        await client.post("/v1/chat/completions", json={**body, prompt: 1, "messages": 5}),
        await client.post("/v1/chat/completions", content=f'{{"messages": "{prompt}'.encode()),
        await upload(client, f'{{"messages": "{prompt}"}}\n'),
        await service.client_with(secret + "x").get("/v1/models"),
        await client.get("/metrics"),
    ]
    service.script.fail_after = 1
    await client.post("/v1/chat/completions", json=body)
    await client.post("/v1/chat/completions", json={**body, "stream": True})

    @service.app.post("/broken")
    async def broken() -> None:
        raise RuntimeError(prompt)

    await client.post("/broken")
    for text in [stream.getvalue(), *(answer.text for answer in answers[2:])]:
        assert secret not in text
        assert "CANARY" not in text
    assert "RuntimeError" in stream.getvalue()


def test_redaction() -> None:
    secret = "tk-0123456789ab-" + "Ab_-" * 10
    assert logs.redact(f"key={secret} Authorization: Bearer abc.def") == "key=[key] Authorization: [key]"


def fail() -> None:
    try:
        int("CANARY")
    except ValueError as error:
        raise ConflictError("Say what to do.") from error


def test_exceptions_are_placed_and_not_quoted(stream: io.StringIO) -> None:
    try:
        fail()
    except ConflictError:
        logging.getLogger("x").exception("it failed")
    [line] = lines(stream)
    error = line["error"]
    assert isinstance(error, dict)
    told = (error["class"], error["message"], error["cause"]["class"])
    assert told == ("ConflictError", "Say what to do.", "ValueError")
    assert "CANARY" not in stream.getvalue()
    assert error["frames"][-1].endswith(" fail")


def test_the_text_form_for_terminals() -> None:
    record = logging.LogRecord("a.b", logging.WARNING, "", 0, "it %s", ("happened",), None)
    record.count = 3
    assert re.fullmatch(r"\d\d:\d\d:\d\d warning a\.b: it happened count=3", logs.TextFormatter().format(record))
