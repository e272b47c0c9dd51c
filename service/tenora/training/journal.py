"""What a run has said and its follower has not recorded: kept beside the saved states, so that no state is ahead of it.

    <workdir>/unacknowledged.msgpack     the events, oldest first

A follower records events some time after it has heard them, and it or the engine may die before. States are saved
meanwhile, the last one when the follower is gone, and the run goes on from the latest: what was said before that would
never be said again. So every state is saved after the journal, which ends no earlier than the state.
"""

from __future__ import annotations

from collections import deque
from pathlib import Path

import msgspec

from tenora.adapters.atomic import replace_file
from tenora.errors import TrainingError
from tenora.training.events import Recorded, TrainEvent

MAX_EVENTS = 10_000
"""Of more than so many that nobody acknowledges the oldest are given up: as many steps as a job's log keeps at most."""

_decoder: msgspec.msgpack.Decoder[list[Recorded]] = msgspec.msgpack.Decoder(list[Recorded])


class Journal:
    """The unacknowledged events of one run, in the order they were said."""

    def __init__(self, workdir: Path, *, keeps: bool) -> None:
        """Nothing is read before `restore`. `keeps` is False for a run whose follower acknowledges nothing."""
        self._path = workdir / "unacknowledged.msgpack"
        self._keeps = keeps
        self._events: deque[Recorded] = deque()
        self._gone = 0  # events since the start of this attempt that are no longer held
        self._is_saved = True

    def restore(self) -> list[Recorded]:
        """Take up what an earlier attempt has left; it is held until it is acknowledged.

        Raises:
            TrainingError: the file cannot be read.
        """
        if not self._keeps or not self._path.exists():
            return []
        try:
            found = _decoder.decode(self._path.read_bytes())
        except (OSError, msgspec.DecodeError) as error:
            raise TrainingError(
                f"The saved events cannot be read ({error}); start a new job.", code="resume_unreadable"
            ) from error
        self._events.extend(found)
        return found

    def note(self, item: TrainEvent | None) -> None:
        """Hold what the run says next, if it is something to record."""
        if not self._keeps or not isinstance(item, Recorded):
            return
        if len(self._events) == MAX_EVENTS:
            self._give_up_oldest()
        self._events.append(item)
        self._is_saved = False

    def acknowledge(self, count: int) -> None:
        """Let go of the first `count` events since the start of this attempt."""
        while self._events and self._gone < count:
            self._give_up_oldest()

    def save(self, *, upcoming: Recorded | None = None) -> None:
        """Write what is held durably, and what the run says next, if that must not be lost any more.

        Raises:
            OSError: the disk is full, for one; the old file is then still there.
        """
        if not self._keeps or (self._is_saved and upcoming is None):
            return
        events = [*self._events] if upcoming is None else [*self._events, upcoming]
        replace_file(self._path, msgspec.msgpack.encode(events))
        self._is_saved = upcoming is None

    def _give_up_oldest(self) -> None:
        self._events.popleft()
        self._gone += 1
        self._is_saved = False
