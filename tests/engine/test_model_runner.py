"""What a step prepares for the model, and what it keeps from the step before."""

from __future__ import annotations

from typing import Any

import pytest

from tenora.adapters.ref import AdapterRef
from tenora.engine.messages import Abort
from tenora_kernels import layout
from tests.engine.driver import MakeDriver
from tests.engine.requests import generate, prompt, sampling


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of rows of each grouping by slot that was made."""
    made: list[int] = []
    build = layout.build_segments

    def counting(slots: Any, **given: Any) -> Any:
        made.append(len(slots))
        return build(slots, **given)

    monkeypatch.setattr("tenora.model.executors.adapters.build_segments", counting)
    return made


def test_rows_are_grouped_anew_only_when_they_change(
    driver: MakeDriver, adapters: list[AdapterRef], built: list[int]
) -> None:
    tiny = driver()
    requests = [
        generate(prompt(6, seed), sampling(max_tokens=40), adapter=adapters[seed % 3] if seed % 4 else None)
        for seed in range(6)
    ]
    for request in requests:
        tiny.add(request)
    while len(tiny.engine.scheduler.running) < 6 or any(s.remaining > 1 for s in tiny.engine.scheduler.running):
        tiny.step()
    tiny.step()
    before = len(built)
    for _ in range(10):
        tiny.step()
    assert len(built) == before
    tiny.engine.add(Abort(requests[1].request_id))
    tiny.step()
    assert built[before:] == [5]
    tiny.engine.pool.tables.version += 1  # an adapter was moved
    tiny.step()
    tiny.step()
    assert built[before:] == [5, 5]


def test_the_wait_for_admission_is_told_once(driver: MakeDriver) -> None:
    tiny = driver(max_num_seqs=1)
    first, second = tiny.run(*(generate(prompt(5, seed), sampling(max_tokens=5)) for seed in range(2)))
    waits = [[output.queue_seconds for output in answer.outputs] for answer in (first, second)]
    assert [wait[1:] for wait in waits] == [[None] * 4] * 2
    (one, *_), (two, *_) = waits
    assert one is not None
    assert two is not None
    assert two > one >= 0
