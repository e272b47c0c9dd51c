"""Block tables as arrays, built once."""

from __future__ import annotations

from itertools import count
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tenora.engine.block_tables import BlockTables


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
        tables.check_integrity()


class Watched(list[int]):
    """A table that knows how many of its entries were read."""

    read = 0

    def __getitem__(self, index: Any) -> Any:
        got = super().__getitem__(index)
        self.read += len(got) if isinstance(index, slice) else 1
        return got


def test_a_row_is_built_once_however_often_others_come_and_go() -> None:
    blocks = count(1)
    rows = [Watched(next(blocks) for _ in range(100)) for _ in range(8)]
    tables = BlockTables()
    tables.update(list(rows))
    for turn in range(20):
        left = rows.pop(turn % 8)
        left.clear()
        rows.insert((3 * turn) % 8, Watched(next(blocks) for _ in range(100)))
        rows[5].append(next(blocks))
        got = tables.update(list(rows))
        assert [[*row, *[0] * (got.shape[1] - len(row))] for row in rows] == got.tolist()
    assert all(row.read == len(row) for row in rows)
    assert len(tables._held) <= 16, "rows of those that went are used again"


def test_the_blocks_of_one_place_lie_side_by_side_as_a_captured_step_reads_them() -> None:
    """Turning the tables of 256 rows around took longer than everything else that is done for them."""
    rows, tables = [list(range(1, 30)) for _ in range(5)], BlockTables()
    for change in (lambda: None, lambda: rows[2].append(7), lambda: rows[2].extend(range(100)), rows.pop, rows.reverse):
        change()
        assert tables.update(list(rows)).T.flags.c_contiguous


def test_a_row_that_is_not_in_a_step_is_not_built_again() -> None:
    rows = [Watched(range(1, 50)) for _ in range(4)]
    tables = BlockTables()
    for chosen in (rows, rows[:2], rows[2:], rows[::-1]):
        got = tables.update(list(chosen))
        assert got[:, :49].tolist() == [list(range(1, 50))] * len(chosen)
    assert [row.read for row in rows] == [49] * 4


def test_a_row_that_says_something_else_than_its_table_is_found() -> None:
    tables, row = BlockTables(), [3, 4, 5]
    tables.update([row])
    tables.check_integrity()
    row[1] = 9
    with pytest.raises(RuntimeError, match="not what its table says"):
        tables.check_integrity()
