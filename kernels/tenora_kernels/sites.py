"""Where a layer's ops act: which rows of the tables, and which columns."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt


class HostRecord(NamedTuple):
    """int64 numbers and addresses that a compiled kernel on the host reads; made once, where they are known.

    Attributes:
        values: the numbers.
        address: where they lie; an integer is the cheapest argument of a compiled function.
    """

    values: npt.NDArray[np.int64]
    address: int

    @classmethod
    def of(cls, *values: int | npt.NDArray[Any]) -> HostRecord:
        """A record of numbers, with the address of each array's first element in its place."""
        numbers = [v if isinstance(v, int) else v.__array_interface__["data"][0] for v in values]
        array = np.array(numbers, dtype=np.int64)
        return cls(array, array.__array_interface__["data"][0])


@dataclass(frozen=True, slots=True)
class LoraSite:
    """One site of one layer: modules that share their input x and write column slices of one output y.

    Attributes:
        row: row of the first slice in the tables; slice j is row `row + j`.
        in_features: columns of x.
        slices: `[start, stop)` columns of y per module: q, k, v | gate, up | o | down.
        scale_row: row of the first slice's scale in the tables, that of slice j is row `scale_row + j`; None if the
            tables have no scales.
        record: row, in_features, the number of slices, then start and stop of each.
    """

    row: int
    in_features: int
    slices: tuple[tuple[int, int], ...]
    scale_row: int | None = None
    record: HostRecord = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        bounds = [bound for columns in self.slices for bound in columns]
        record = HostRecord.of(self.row, self.in_features, len(self.slices), *bounds)
        object.__setattr__(self, "record", record)


@dataclass(frozen=True, slots=True)
class BottleneckSite:
    """Where bottlenecks act: on the output y [T, H] of one block of a layer, before it is added to the residual.

    Attributes:
        row: row of the two matrices in the tables, down [r, H] and up, transposed, [r, H].
        outer_row: row of the bias [H] after the second one.
        inner_row: row of the bias, a column [r, 1], after the first one.
        features: H.
    """

    row: int
    outer_row: int
    inner_row: int
    features: int
