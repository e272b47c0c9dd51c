"""Whether a name means a job's result, over HTTP and the real engine on a tiny base."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx

from tests.api.conftest import Service, upload
from tests.api.test_real_engine import base, service, settings

__all__ = ["base", "service", "settings"]  # fixtures


async def finished(client: httpx.AsyncClient, **fields: Any) -> dict[str, Any]:
    """A job that has ended."""
    made = await client.post("/v1/fine_tuning/jobs", json=fields)
    assert made.status_code == 200, made.text
    while True:
        job: dict[str, Any] = (await client.get(f"/v1/fine_tuning/jobs/{made.json()['id']}")).json()
        if job["finished_at"] is not None:
            return job
        await asyncio.sleep(0.05)


async def test_a_worse_result_does_not_take_the_name_over(service: Service, base_id: str) -> None:
    """From the request to the tokens: the name answers as before, the withheld result by its own name."""
    client = service.client()
    rows = "".join(
        json.dumps(
            {"messages": [{"role": "user", "content": f"Define {i}."}, {"role": "assistant", "content": "Fox."}]}
        )
        + "\n"
        for i in range(60)
    )
    file = (await upload(client, rows)).json()["id"]
    asked = {"model": base_id, "training_file": file, "name": "desk", "seed": 1}
    good = await finished(client, **asked, n_epochs=2, learning_rate=5e-3)
    bad = await finished(client, **asked, n_epochs=1, learning_rate=1.0, lora={"rank": 1, "alpha": 4096})
    assert (good["status"], bad["status"]) == ("succeeded", "succeeded")
    assert (good["publish"], good["min_gain"], good["published"]["alias_moved"]) == ("if_better", 0.0, True)
    said = bad["published"]
    assert (said["alias_moved"], said["code"], said["replaced"]["version"]) == (False, "not_better", 1)
    assert said["replaced"]["comparison"]["verdict"] == "worse"
    assert bad["evaluation"]["verdicts"]["replaced"]["verdict"] == "worse"
    adapter = (await client.get("/v1/adapters/desk")).json()
    assert (adapter["version"], adapter["job_id"]) == (1, good["id"])
    events = (await client.get(f"/v1/fine_tuning/jobs/{bad['id']}/events", params={"limit": 100})).json()["data"]
    assert any("desk still means version 1" in event["message"] for event in events if event["level"] == "warn")

    async def scores(model: str) -> list[float]:
        # Whatever was trained may end at once, and then there would be nothing to compare.
        asked = {"prompt": "Define 3.", "max_tokens": 6, "temperature": 0, "logprobs": 1, "ignore_eos": True}
        body = {"model": model, **asked}
        answer = (await client.post("/v1/completions", json=body)).json()
        found: list[float] = answer["choices"][0]["logprobs"]["token_logprobs"]
        return found

    withheld = f"desk@{said['digest'][:12]}"
    assert await scores("desk") == await scores(good["fine_tuned_model"])
    assert await scores(withheld) == await scores(bad["fine_tuned_model"]) != await scores("desk")
    moved = await client.post("/v1/adapters/desk/rollback", json={"version": said["version"]})
    assert moved.json()["digest"] == said["digest"]
    assert await scores("desk") == await scores(withheld)


async def test_what_a_job_asks_of_its_name_is_echoed_and_checked(service: Service, base_id: str) -> None:
    client = service.client()
    file = (await upload(client)).json()["id"]
    body = {"model": base_id, "training_file": file, "publish": "if_better", "min_gain": 0.25}
    found = (await client.post("/v1/fine_tuning/estimate", json={**body, "name": "desk"})).json()
    assert (found["publish"], found["min_gain"], found["replaces"]) == ("if_better", 0.25, None)
    made = (await client.post("/v1/fine_tuning/jobs", json=body)).json()
    assert (made["publish"], made["min_gain"], made["published"]) == ("if_better", 0.25, None)
    await client.post(f"/v1/fine_tuning/jobs/{made['id']}/cancel")
    for wrong, param in (
        ({"publish": "perhaps"}, "publish"),
        ({"min_gain": -0.1}, "min_gain"),
        ({"publish": "always", "min_gain": 0.1}, "min_gain"),
    ):
        refused = await client.post("/v1/fine_tuning/jobs", json={**body, **wrong})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)
