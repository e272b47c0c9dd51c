"""Which parts of a flat storage are free: first fit, neighbours joined. Free of torch."""

from __future__ import annotations

from bisect import bisect_left, bisect_right


class FreeList:
    """Allocates ranges of `[0, size)`. Every range starts at, and takes, a multiple of `alignment`."""

    def __init__(self, size: int, alignment: int = 1) -> None:
        self.alignment = alignment
        self.capacity = size - size % alignment
        # Disjoint, ascending and never adjacent: [start, stop) of every hole.
        self._holes: list[tuple[int, int]] = [(0, self.capacity)] if self.capacity else []

    @property
    def free(self) -> int:
        """Elements that no range takes."""
        return sum(stop - start for start, stop in self._holes)

    @property
    def holes(self) -> tuple[tuple[int, int], ...]:
        """[start, stop) of every hole, ascending."""
        return tuple(self._holes)

    def rounded(self, size: int) -> int:
        """What a range of `size` elements takes."""
        return -(-size // self.alignment) * self.alignment

    def allocate(self, size: int) -> int | None:
        """The start of a new range in the first hole that holds it, or None if no hole does."""
        size = self.rounded(size)
        for i, (start, stop) in enumerate(self._holes):
            if stop - start >= size:
                self._holes[i : i + 1] = [(start + size, stop)] if stop - start > size else []
                return start
        return None

    def take(self, start: int, size: int) -> None:
        """Take the range of `size` elements that begins at `start`. ValueError if a part of it is not free."""
        stop = start + self.rounded(size)
        i = bisect_right(self._holes, (start, self.capacity)) - 1
        if i < 0 or start % self.alignment or self._holes[i][1] < stop:
            raise ValueError(f"[{start}, {stop}) is not free.")
        first, last = self._holes[i]
        self._holes[i : i + 1] = [hole for hole in ((first, start), (stop, last)) if hole[0] < hole[1]]

    def release(self, start: int, size: int) -> None:
        """Give a range back. ValueError if a part of it is free already or lies outside."""
        stop = start + self.rounded(size)
        i = bisect_left(self._holes, (start, stop))
        before = self._holes[i - 1] if i > 0 else (-1, -1)
        after = self._holes[i] if i < len(self._holes) else (self.capacity + 1, self.capacity + 1)
        if start < 0 or stop > self.capacity or start < before[1] or stop > after[0]:
            raise ValueError(f"[{start}, {stop}) is not an allocated range.")
        first, last = i, i
        if before[1] == start:
            first, start = i - 1, before[0]
        if after[0] == stop:
            last, stop = i + 1, after[1]
        self._holes[first:last] = [(start, stop)] if stop > start else []
