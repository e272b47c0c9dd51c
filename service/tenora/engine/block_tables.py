"""The block tables of running sequences as arrays: a row is written once, and then only what it has grown by.

In memory the blocks of one place lie side by side, as a captured decode step reads them: to turn a large table around
costs more than everything else that is done for it.
"""

from __future__ import annotations

from operator import is_

import numpy as np
import numpy.typing as npt

_WIDTH = 8  # the array of a step grows by so many blocks at a time
_Array = npt.NDArray[np.int32]


class BlockTables:
    """The block tables of a step's rows as one array [rows, width], zeros beyond the end of a row.

    Every table has a row of its own from the first step that it is in until it is emptied. So a sequence that comes or
    goes costs what its own row costs, and the rows of the others are copied, not built.
    """

    def __init__(self) -> None:
        self._rows: _Array = np.zeros((0, 0), dtype=np.int32).T  # what is written of each table
        self._held: list[list[int] | None] = []  # by row; kept, so that no other list gets its id
        self._written: list[int] = []  # entries, by row
        self._row_of: dict[int, int] = {}  # by id of the table
        self._free: list[int] = []
        self._tables: list[list[int]] = []  # of the last step
        self._places: list[int] = []  # their rows
        self._array = self._rows  # what was given for them

    def update(self, tables: list[list[int]]) -> _Array:
        """The array for these tables, in Fortran's order. It is valid until the next call.

        Args:
            tables: one per row. A sequence has a new list whenever it is admitted; a list only ever grows while it
                runs and is emptied when it does not any more, so the same list means the same row.
        """
        longest = max(map(len, tables))
        same = len(tables) == len(self._tables) and all(map(is_, tables, self._tables))
        if not same:
            self._tables, self._places = tables, [self._place(table) for table in tables]
        self._reserve(longest)
        kept = same and longest <= self._array.shape[1]
        for at, (row, table) in enumerate(zip(self._places, tables, strict=True)):
            written, length = self._written[row], len(table)
            if written < length:
                new = self._rows[row, written:length] = table[written:]
                self._written[row] = length
                if kept:
                    self._array[at, written:length] = new
        if not kept:
            width = -(-longest // _WIDTH) * _WIDTH
            self._array = self._rows.T[:width].take(self._places, axis=1, mode="clip").T
        return self._array

    def check_integrity(self) -> None:
        """Raise RuntimeError unless every row holds what its table says, and every other row is free and empty."""
        for row, table in enumerate(self._held):
            written = self._written[row]
            known = table is not None and self._row_of.get(id(table)) == row
            if known == (row in self._free) or (not known and written):
                raise RuntimeError(f"row {row} of the block tables is neither free nor a table's")
            if table and table[:written] != self._rows[row, :written].tolist():
                raise RuntimeError(f"row {row} of the block tables is not what its table says")
            if self._rows[row, written:].any():
                raise RuntimeError(f"row {row} of the block tables does not end where its table does")
        if len(self._row_of) + len(self._free) != len(self._held):
            raise RuntimeError("the block tables have lost a row")

    def _place(self, table: list[int]) -> int:
        """The row of a table; one of its own if it is new."""
        row = self._row_of.get(id(table))
        if row is None:
            if not self._free:
                self._collect()
            row = self._row_of[id(table)] = self._free.pop()
            self._held[row] = table
        return row

    def _collect(self) -> None:
        """Take back the rows of tables that were emptied; make more if there are none."""
        for row, table in enumerate(self._held):
            if table is not None and len(table) < self._written[row]:
                self._rows[row, : self._written[row]] = 0
                self._written[row], self._held[row] = 0, None
                del self._row_of[id(table)]
                self._free.append(row)
        if not self._free:
            more = max(_WIDTH, len(self._held))
            self._free += range(len(self._held), len(self._held) + more)
            self._held += [None] * more
            self._written += [0] * more

    def _reserve(self, width: int) -> None:
        """Make room for all rows, and for tables of `width` blocks."""
        rows, room = self._rows.shape
        if len(self._held) > rows or width > room:
            larger = np.zeros((room if width <= room else max(width, 2 * room), len(self._held)), dtype=np.int32).T
            larger[:rows, :room] = self._rows
            self._rows = larger
