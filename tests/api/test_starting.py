from __future__ import annotations

import httpx
from starlette.responses import PlainTextResponse

from tenora.api.start_state import StartState
from tenora.api.starting import Starting


async def test_probes_say_how_far_the_start_is_and_everything_else_is_told_to_come_back() -> None:
    state = StartState()
    front = Starting(state)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(front), base_url="http://test") as client:
        assert (await client.get("/livez")).status_code == 200
        state.phase, state.done, state.total, state.found = "kernels", 42, 140, 38
        answer = await client.get("/readyz")
        assert answer.status_code == 503
        assert answer.json() == {
            "status": "starting",
            "phase": "kernels",
            "done": 42,
            "total": 140,
            "found": 38,
            "message": "compiling kernels 42 of 140, 38 of them found in the cache",
        }
        refused = await client.post("/v1/chat/completions", json={})
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "starting"
        assert "42 of 140" in refused.json()["error"]["message"]
        assert int(refused.headers["retry-after"]) > 0
        front.app = PlainTextResponse("served")  # a response is an ASGI application
        assert (await client.get("/readyz")).text == "served"


def test_each_phase_in_words() -> None:
    assert StartState().text == "starting the engine"
    assert StartState("weights", 60, 100).text == "loading weights 60 %"
    assert StartState("download", 0, 0).text == "downloading the base"
    assert StartState("kernels", 3, 0).text == "compiling kernels, 3 so far"
    assert StartState("kernels", 42, 140).text == "compiling kernels 42 of 140"
