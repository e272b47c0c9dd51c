"""What a step prepares for the model, and what it keeps from the step before."""

from __future__ import annotations

from itertools import count
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tenora.adapters.ref import AdapterRef
from tenora.engine.messages import Abort
from tenora.engine.runner import BlockTables
from tenora_kernels import layout
from tests.engine.driver import MakeDriver
from tests.engine.requests import generate, prompt, sampling


def expected(tables: list[list[int]]) -> list[list[int]]:
    width = max(len(table) for table in tables)
    return [table + [0] * (width - len(table)) for table in tables]


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("grow"), st.integers(0, 5), st.integers(1, 12)),
            st.tuples(st.just("leave"), st.integers(0, 5), st.just(0)),
            st.tuples(st.just("join"), st.integers(0, 3), st.just(0)),
            st.tuples(st.just("restart"), st.integers(0, 5), st.integers(1, 3)),
        ),
        max_size=30,
    )
)
def test_block_tables_are_what_the_lists_say(changes: list[tuple[str, int, int]]) -> None:
    blocks = count(1)
    tables, rows = BlockTables(), [[next(blocks)]]
    for change, index, number in changes:
        at = index % len(rows)
        if change == "grow":
            rows[at] += [next(blocks) for _ in range(number)]
        elif change == "leave" and len(rows) > 1:
            del rows[at]
        elif change == "join":
            rows.insert(at, [next(blocks)])
        elif change == "restart":  # preempted and admitted again: its old list was emptied
            rows[at].clear()
            rows[at] = [next(blocks) for _ in range(number)]
        wanted = np.array(expected(rows))
        got = tables.update(list(rows))
        np.testing.assert_array_equal(got[:, : wanted.shape[1]], wanted)
        assert not got[:, wanted.shape[1] :].any()


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of rows of each grouping by slot that was made."""
    made: list[int] = []
    build = layout.build_segments

    def counting(slots: Any, **given: Any) -> Any:
        made.append(len(slots))
        return build(slots, **given)

    monkeypatch.setattr("tenora.engine.runner.build_segments", counting)
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
