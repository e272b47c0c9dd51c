from __future__ import annotations

import pytest

from tenora.adapters.free_list import FreeList


def test_free_list() -> None:
    free = FreeList(100, alignment=8)
    assert (free.capacity, free.free, free.holes) == (96, 96, ((0, 96),))
    first, second, third = free.allocate(9), free.allocate(8), free.allocate(1)
    assert (first, second, third, free.holes) == (0, 16, 24, ((32, 96),))
    free.release(16, 8)
    assert free.holes == ((16, 24), (32, 96))
    assert free.allocate(65) is None
    for start, size in ((16, 8), (8, 16), (32, 8), (-8, 8), (88, 16), (24, 16)):
        with pytest.raises(ValueError, match="is not an allocated range"):
            free.release(start, size)
    free.release(24, 1)
    assert free.holes == ((16, 96),)
    free.release(0, 9)
    assert free.holes == ((0, 96),)
    assert FreeList(7, alignment=8).allocate(1) is None


def test_a_given_range_is_taken_out_of_its_hole() -> None:
    free = FreeList(64, alignment=8)
    free.take(16, 12)
    assert free.holes == ((0, 16), (32, 64))
    free.take(0, 16)
    free.take(56, 8)
    assert free.holes == ((32, 56),)
    for start, size in ((48, 16), (0, 8), (36, 8), (64, 8)):
        with pytest.raises(ValueError, match="is not free"):
            free.take(start, size)
    assert free.holes == ((32, 56),)
