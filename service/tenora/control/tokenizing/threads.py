"""Where text becomes tokens: on threads of its own, so that nobody's long text holds up another's short one.

What needs no more than a moment has threads of its own, and so have uploads, questions about training files, and jobs,
which take minutes: of theirs a tenant has one at a time.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from tenora.control.tokenizing.fair_threads import Check, FairThreads

if TYPE_CHECKING:
    from tenora.model.tokenizer import Tokenizer

T = TypeVar("T")
SHORT = 64 * 2**10  # characters, which take some 50 ms
_MOST_THREADS = 4
_FILES_AT_ONCE = 2
_UPLOADS_AT_ONCE = 4


class Tokenizing:
    """The threads. All work is given a tokenizer that raises as soon as nobody waits for the result.

    Attributes:
        tokenizer: the same without that.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        threads = max(1, min(_MOST_THREADS, (os.cpu_count() or 1) // 4))
        self._short = FairThreads("tokenize-short", threads)
        self._long = FairThreads("tokenize-long", threads)
        self._uploads = FairThreads("check-uploads", _UPLOADS_AT_ONCE, per_share_group=1)
        self._files = FairThreads("tokenize-files", _FILES_AT_ONCE, per_share_group=1)
        self._jobs = FairThreads("tokenize-jobs", _FILES_AT_ONCE, per_share_group=1)
        self._baselines = FairThreads("tokenize-baselines", 1)

    async def prompt(self, share_group: str, characters: int, work: Callable[[Tokenizer], T]) -> T:
        """The result of `work` on text of so many characters, for a share group (a tenant).

        Raises:
            RateLimitedError: too much of the share group's work waits.
            UnavailableError: the service ends.
        """
        threads = self._short if characters <= SHORT else self._long
        return await threads.run(share_group, self._watched(work))

    async def upload(self, share_group: str, work: Callable[[Tokenizer], T]) -> T:
        """The same for the check of a file that was sent."""
        return await self._uploads.run(share_group, self._watched(work))

    async def file(self, share_group: str, work: Callable[[Tokenizer], T]) -> T:
        """The same for the rows of a training file that somebody asks about."""
        return await self._files.run(share_group, self._watched(work))

    async def job(self, share_group: str, work: Callable[[Tokenizer], T]) -> T:
        """The same for the rows of a job, which may take minutes and for which nobody waits at a connection."""
        return await self._jobs.run(share_group, self._watched(work))

    async def baseline(self, share_group: str, work: Callable[[Tokenizer], T]) -> T:
        """The same for what a running job is held against: it waits for no other job's rows, and none waits for it."""
        return await self._baselines.run(share_group, self._watched(work))

    def close(self) -> None:
        """Take nothing more and leave what runs."""
        for threads in (self._short, self._long, self._uploads, self._files, self._jobs, self._baselines):
            threads.close()

    def _watched(self, work: Callable[[Tokenizer], T]) -> Callable[[Check], T]:
        return lambda check: work(self.tokenizer.watched(check))
