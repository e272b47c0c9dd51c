"""Named places where a test can kill the process, to prove that a crash there leaves nothing half-done.

Armed by `TENORA_FAILPOINTS="publish.before_commit=kill,files.before_rename=error"`; otherwise a point costs one dict
look-up.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from typing import Literal, cast, get_args

from tenora.errors import ConfigurationError, TenoraError

Action = Literal["kill", "error"]
POINTS: frozenset[str] = frozenset(
    {
        "files.before_rename",  # the upload is complete in staging
        "files.after_rename",  # the blob has its name, the row does not exist
        "files.after_create",  # the row exists, the caller has no answer
        "files.after_delete",  # the row is gone, the blob is not
        "jobs.after_create",  # the row exists, the caller has no answer
        "jobs.after_prepare",  # tokenized, not yet queued
        "jobs.after_checkpoint_blob",  # a checkpoint's blob is stored, its row is not
        "publish.before_blob",  # training is finished, nothing is stored
        "publish.after_blob",  # the adapter's blob is stored, no row names it
        "publish.after_result_file",  # the metrics file has its name, no row names it
        "publish.before_commit",  # every row is written, inside the open transaction
        "publish.after_commit",  # published; the work directory still lies there
        "adapters.after_blob",  # an import's blob is stored, no row names it
        "adapters.after_create",  # the version is published, the caller has no answer
        "adapters.after_delete",  # the rows are gone, the blob is not
    }
)


class InjectedError(TenoraError):
    """Raised by a failpoint that is armed with `error`."""

    code = "failpoint"


class Failpoints:
    """The armed points of one process, from `name=action,name=action`."""

    def __init__(self, armed: Mapping[str, Action] | None = None) -> None:
        self.armed: Mapping[str, Action] = dict(armed or {})

    @classmethod
    def parse(cls, text: str) -> Failpoints:
        """Read the setting; ConfigurationError names an unknown point or action."""
        armed: dict[str, Action] = {}
        for item in filter(None, (part.strip() for part in text.split(","))):
            name, _, action = item.partition("=")
            if name not in POINTS:
                raise ConfigurationError(f"There is no failpoint {name!r}; choose among {', '.join(sorted(POINTS))}.")
            if action not in get_args(Action):
                raise ConfigurationError(f"The failpoint {name!r} takes kill or error, not {action!r}.")
            armed[name] = cast("Action", action)
        return cls(armed)

    def hit(self, name: str) -> None:
        """Do what the point is armed with; nothing if it is not. `kill` is SIGKILL: no handler and no flush runs."""
        action = self.armed.get(name)
        if action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif action == "error":
            raise InjectedError(f"The failpoint {name} is armed.")
