"""One training run as it is hosted: an iterator of events that can be stopped and never raises.

The run knows rows, weights and files of its own directory; of jobs, tenants and HTTP it knows nothing. It shares its
process with serving and the base with other runs, so it yields None where it waits for its rows to pass through the
base, moves no global state (random numbers, gradient mode) and never raises: whatever goes wrong with it ends it with a
FailedEvent.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Protocol

from tenora.model.device import survive
from tenora.training.commands import Refused, RunCommand
from tenora.training.events import FailedEvent, FinishedEvent, Items, RetoldEvent, StoppedEvent, TrainEvent
from tenora.training.failures import explain
from tenora.training.inbox import Inbox
from tenora.training.journal import Journal
from tenora.training.methods.table import find_method
from tenora.training.plans.features import FeaturesPlan
from tenora.training.plans.folds import FoldsPlan
from tenora.training.plans.session import SessionPlan
from tenora.training.plans.single import PlainPlan
from tenora.training.plans.sweep import SweepPlan
from tenora.training.resident_base import TrainingHost
from tenora.training.spec import SessionSpec, TrainSpec

_log = logging.getLogger(__name__)


class Plan(Protocol):
    """How learners are put together to a run."""

    @property
    def step(self) -> int:
        """Optimizer steps done, for messages."""

    def items(self) -> Items:
        """Events, and None where it waits, up to the FinishedEvent."""

    def save(self) -> None:
        """Write the state after the last whole step."""

    def close(self) -> None:
        """Free the room of all adapters."""


class JobRun:
    """Trains the adapter, or the adapters, of one job or session on the resident, frozen base.

    Iterate it: events are `TrainEvent`s, and the last item is a FinishedEvent, StoppedEvent or FailedEvent. If
    `spec.workdir` holds the state of an earlier run with this spec, iterating goes on from there and, in float32 on one
    CPU thread, gives the bits of an uninterrupted run. Events since the state was saved are given again, and with
    `spec.acknowledged` first those that are older and that nobody has acknowledged (RetoldEvent). An evaluation at
    step 0 measures the base. Checkpoints older than the latest three are removed unless they are the best.
    """

    def __init__(
        self, host: TrainingHost, spec: TrainSpec | SessionSpec, plan: Callable[[Journal], Plan] | None = None
    ) -> None:
        """Nothing happens before it is iterated.

        Args:
            host: the base that it shares with others, and their queue.
            spec: what to do, all resolved.
            plan: makes the plan, over the run's journal; None makes the one that the spec asks for.
        """
        self._make_plan = plan
        self._host, self._spec = host, spec
        self._inbox = Inbox(spec.run_id)
        keeps = isinstance(spec, TrainSpec) and spec.acknowledged
        self._journal = Journal(Path(spec.workdir), keeps=keeps)
        self._stopping = False
        self._pausing = False
        self._plan: Plan | None = None

    def stop(self, *, pause: bool) -> None:
        """End the run at the next item; its last item is then a StoppedEvent.

        The optimizer step in progress is given up. With `pause` the state after the last whole step is saved.
        """
        self._stopping, self._pausing = True, pause

    def put(self, command: RunCommand) -> Refused | None:
        """Take a command, to be answered by an event in its turn; or say at once why not."""
        if isinstance(self._spec, SessionSpec):
            return self._inbox.put(command)
        message = "The run follows a plan of its own; only a session takes commands."
        return Refused(run_id=self._spec.run_id, command_id=command.command_id, code="no_commands", message=message)

    def acknowledge(self, count: int) -> None:
        """Of its `Recorded` events since it was started here, the first `count` are recorded; retold ones are first."""
        self._journal.acknowledge(count)

    def __iter__(self) -> Iterator[TrainEvent | None]:
        """Run, or go on."""
        work = self._work()
        try:
            yield from self._until_stopped(work)
        except Exception as error:  # noqa: BLE001  # the engine serves others: no error of a run may reach it
            survive(error, self._host.decoder.device)
            failed = self._failed(error)
        else:
            return
        finally:
            work.close()
            self._plan = None
        # Said outside the handler: the traceback is gone by now, and with it the last hold on the run's tensors.
        yield failed

    def _until_stopped(self, work: Items) -> Items:
        while not self._stopping:
            item = next(work, None)
            if isinstance(item, FinishedEvent):
                work.close()  # before it is told: whoever hears of it may count on the memory
                yield item
                return
            yield item
        step = 0 if self._plan is None else self._plan.step
        if self._pausing and self._plan is not None:
            self._plan.save()
        work.close()
        yield StoppedEvent(run_id=self._spec.run_id, step=step, paused=self._pausing)

    def _work(self) -> Items:
        self._plan = plan = self._take_up()
        try:
            if retold := self._journal.restore():
                yield RetoldEvent(run_id=self._spec.run_id, events=retold)
            with closing(plan.items()) as items:
                for item in items:
                    self._journal.note(item)
                    yield item
        finally:
            plan.close()

    def _take_up(self) -> Plan:
        host, spec, journal = self._host, self._spec, self._journal
        if self._make_plan is not None:
            return self._make_plan(journal)
        if isinstance(spec, SessionSpec):
            return SessionPlan(host, spec, self._inbox)
        method = find_method(spec.method)
        if method.is_frozen(method.own_settings(spec.method_settings)):
            return FeaturesPlan(host, spec, journal)
        if spec.trials:
            return SweepPlan(host, spec, journal)
        return FoldsPlan(host, spec, journal) if spec.folds else PlainPlan(host, spec, journal)

    def _failed(self, error: Exception) -> FailedEvent:
        step = 0 if self._plan is None else self._plan.step
        code, message = explain(error, step)
        _log.error("training run %s failed: %s", self._spec.run_id, message, exc_info=error)
        return FailedEvent(run_id=self._spec.run_id, code=code, message=message)
