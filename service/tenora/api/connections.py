"""Which connections are open, and who goes when there are too many: those that wait, the longest first.

Whoever holds a connection without a request needs no key for it. So there is a bound, and with it in reach a connection
that waits (idle, or in the middle of its headers) gives its place to a newcomer. A few places beyond the bound are kept
for the probes: an orchestrator must not restart a server because it is busy.
"""

from __future__ import annotations

import resource
from collections.abc import Callable

RESERVE = 32  # places beyond the bound, in which only the probes are answered
FILE_SHARE = 0.75  # of the process's open files; the rest is the database's, the adapters' and the uploads'
MOST_FILES = 2**16  # as many as the process asks the system for


class Connections:
    """The open connections of one server.

    Attributes:
        limit: from this many on a newcomer takes the place of one that waits, or one of the reserve.
    """

    def __init__(self, limit: int, reserve: int = RESERVE) -> None:
        self.limit = limit
        self._reserve = reserve
        self._busy: set[object] = set()
        self._waiting: dict[object, Callable[[], None]] = {}  # in the order in which they began to wait

    def __len__(self) -> int:
        return len(self._busy) + len(self._waiting)

    @property
    def crowded(self) -> bool:
        """Whether more are open than `limit`, so that only the probes are answered."""
        return len(self) > self.limit

    def admit(self, connection: object, drop: Callable[[], None]) -> bool:
        """Take a new connection, which waits, and drop the one that waits longest if there are too many.

        Args:
            connection: whatever stands for it.
            drop: closes it at once; called when it gives its place to another.

        Returns:
            False if there is no place: it has to be closed.
        """
        if len(self) >= self.limit and self._waiting:
            oldest = next(iter(self._waiting))
            self._waiting.pop(oldest)()
        if len(self) >= self.limit + self._reserve:
            return False
        self._waiting[connection] = drop
        return True

    def busy(self, connection: object) -> None:
        """It has sent a request, so it keeps its place."""
        if self._waiting.pop(connection, None) is not None:
            self._busy.add(connection)

    def waits(self, connection: object, drop: Callable[[], None]) -> None:
        """Its request is answered: it is the newest of those that wait."""
        if connection in self._busy:
            self._busy.discard(connection)
            self._waiting[connection] = drop

    def closed(self, connection: object) -> None:
        """It is gone."""
        self._busy.discard(connection)
        self._waiting.pop(connection, None)


def connection_limit(wanted: int) -> int:
    """`wanted`, or what the process's open files leave room for, if that is less.

    The soft limit of open files, 1,024 on most systems, is raised towards the hard one first.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        soft = most
    files = MOST_FILES if soft == resource.RLIM_INFINITY else soft
    return max(1, min(wanted, int(files * FILE_SHARE) - RESERVE))
