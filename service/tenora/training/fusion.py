"""Trains the adapters of all runs at once on the resident base.

Runs are coroutines: each says which rows it wants passed through the base (`Work`) and goes on when they were. This is
the loop between them: let every run go on as far as it can, choose parts of works that make a good pass, run that pass
in slices that end at every layer, hand out the losses. A pass holds rows of many adapters, of any rank and targets
(mLoRA, Ye et al. 2023): small jobs share products that are as fast as those of one large job.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch

from tenora.model.decoder import Decoder
from tenora.model.device import survive
from tenora.model.executors.choice import release_buffers
from tenora.model.executors.layers import Keep
from tenora.model.spec import table_rows
from tenora.training.arena import Base, TrainingArena
from tenora.training.commands import Refused, RunCommand
from tenora.training.events import FailedEvent, FinishedEvent, Items, StoppedEvent, TrainEvent
from tenora.training.failures import explain
from tenora.training.pass_queue import Work, WorkQueue
from tenora.training.resident_base import TrainingHost
from tenora.training.run import JobRun
from tenora.training.samples import NoSampler, Sampler
from tenora.training.spec import SessionSpec, TrainSpec
from tenora.training.step import TokenLosses, forward, forward_backward, load_pass

_log = logging.getLogger(__name__)


class Run(Protocol):
    """What is hosted; `tenora.training.run.JobRun` is one."""

    def __iter__(self) -> Iterator[TrainEvent | None]:
        """Events, and None where it waits for its works or something else may be done in between."""
        ...

    def stop(self, *, pause: bool) -> None:
        """End at the next item; a StoppedEvent is the last one then."""
        ...

    def put(self, command: RunCommand) -> Refused | None:
        """Take a command, to be answered by an event; or say at once why not."""
        ...

    def acknowledge(self, count: int) -> None:
        """Of its `Recorded` events since it was started here, the first `count` are recorded."""
        ...


@dataclass(frozen=True, slots=True)
class _Hosted:
    """A run that has not ended, and where it is."""

    spec: TrainSpec | SessionSpec
    run: Run
    items: Iterator[TrainEvent | None]


class FusedTraining:
    """All the training of one base. Single-threaded; nothing happens but in `advance`."""

    def __init__(
        self,
        decoder: Decoder,
        *,
        tokens_per_pass: int = 2048,
        memory: int = 0,
        sampler: Sampler | None = None,
        start: Callable[[TrainingHost, TrainSpec | SessionSpec], Run] = JobRun,
    ) -> None:
        """Take no memory yet.

        Args:
            decoder: the base; its weights are only read.
            tokens_per_pass: most tokens of a pass.
            memory: bytes of the device that all of it may take; 0: what is usual for its kind.
            sampler: generates with adapters in training; None: nobody does.
            start: makes a run.
        """
        arena = TrainingArena(table_rows(decoder.spec), device=decoder.device, dtype=decoder.dtype, base=Base(decoder))
        self.host = TrainingHost(decoder, arena, WorkQueue(), tokens_per_pass, memory, sampler or NoSampler())
        self._start = start
        self._runs: dict[str, _Hosted] = {}
        self._told: list[TrainEvent] = []  # by nobody's coroutine
        self._items: Items | None = None
        self._passing: list[Work] = []

    @property
    def active(self) -> int:
        """Runs that have not ended, and events that nobody has taken yet."""
        return len(self._runs) + len(self._told)

    @property
    def busy(self) -> bool:
        """Whether `advance` gets anything done now: not if all runs wait for commands, or for sequences."""
        waits = self.host.queue.waits
        return bool(self._told or self._items or self.host.queue.has_work) or not all(map(waits, self._runs))

    @property
    def trained_tokens(self) -> int:
        """Learned tokens that had a gradient, over all runs since the start."""
        return self.host.queue.trained_tokens

    def start(self, spec: TrainSpec | SessionSpec) -> None:
        """Begin or resume a run. Ignored if it is in progress."""
        if spec.run_id in self._runs:
            return
        try:
            run = self._start(self.host, spec)
            self._runs[spec.run_id] = _Hosted(spec, run, iter(run))
        except Exception as error:  # noqa: BLE001  # concerns this run alone, which reports it
            self._told.append(self._failure(spec.run_id, error))

    def put(self, run_id: str, command: RunCommand) -> None:
        """Tell a run to do something. What is wrong with that comes as an event."""
        refused: Refused | None = Refused(
            run_id=run_id, command_id=command.command_id, code="unknown_run", message="No such run is in progress."
        )
        if (hosted := self._runs.get(run_id)) is not None:
            refused = hosted.run.put(command)
        if refused is not None:
            self._told.append(refused)

    def acknowledge(self, run_id: str, count: int) -> None:
        """Tell a run what of its events is recorded. Unknown ids are ignored: it may have ended meanwhile."""
        if (hosted := self._runs.get(run_id)) is not None:
            hosted.run.acknowledge(count)

    def stop(self, run_id: str, *, pause: bool) -> None:
        """Ask a run to end. Unknown ids are ignored: it may have ended meanwhile.

        A pass that others take part in is run to its end first; one that nobody wants any more is left where it is.
        """
        if (hosted := self._runs.get(run_id)) is None:
            return
        hosted.run.stop(pause=pause)
        self.host.queue.abandon(run_id)
        self.host.sampler.cancel(run_id)
        if self._passing and self._items is not None and not any(self.host.queue.holds(w) for w in self._passing):
            self._items.close()
            self._items, self._passing = None, []

    def stop_all(self, *, pause: bool) -> None:
        """Ask every run to end."""
        for run_id in list(self._runs):
            self.stop(run_id, pause=pause)

    def advance(self) -> TrainEvent | None:
        """Work up to the next event, or to the next layer boundary, where anything else may be done: None."""
        # The caller's gradient and inference modes hold between two items, ours within one.
        with torch.inference_mode(mode=False), torch.no_grad():
            while self.busy:
                if self._items is None:
                    self._items = self._round()
                try:
                    return next(self._items)
                except StopIteration:
                    self._items = None
        return None

    def __iter__(self) -> Iterator[TrainEvent | None]:
        """What `advance` gives, until all runs have ended."""
        while self.active:
            yield self.advance()

    def _round(self) -> Items:
        """Every run goes as far as it can; then one pass."""
        while self._told:
            yield self._told.pop(0)
        for run_id in list(self._runs):
            if not self.host.queue.waits(run_id):
                yield from self._advance(run_id)
        works = self.host.queue.choose(self.host.capacity)
        if works:
            yield from self._pass(works)
        elif not all(map(self.host.queue.waits, self._runs)):
            yield None

    def _advance(self, run_id: str) -> Items:
        """A run's events up to where it waits."""
        self.host.queue.collect(run_id)
        while True:
            try:
                event = next(self._runs[run_id].items)
            except StopIteration:
                self._end(run_id)
                return
            except Exception as error:  # noqa: BLE001  # concerns this run alone, which reports it
                event = self._failure(run_id, error)
            if event is None:
                return
            over = isinstance(event, FinishedEvent | StoppedEvent | FailedEvent)
            if over:
                self._end(run_id)
            yield event
            if over:
                return

    def _pass(self, works: list[Work]) -> Items:
        """Run the next part of each work. What goes wrong is tried again work by work, and then ends the guilty one."""
        self._passing = works
        try:
            losses = yield from self._run(works)
        except Exception as error:  # noqa: BLE001  # a run's error must not reach the engine or the other runs
            survive(error, self.host.decoder.device)
            if len(works) == 1:
                works[0].error = error
                return
            _log.warning("a fused training pass failed; its parts are run one by one", exc_info=error)
            for work in works:
                work.restart()
            return
        finally:
            self._passing = []
        for work, found in zip(works, losses, strict=True):
            self.host.queue.finished(work, found)

    def _run(self, works: list[Work]) -> Generator[None, None, list[TokenLosses]]:
        decoder = self.host.decoder
        for work in works:
            if not work.results:
                work.begin()
        parts = [work.part(len(work.results)) for work in works]
        batch = load_pass(decoder, parts, self.host.arena.tables, works[0].readout)
        if works[0].objective is None:
            found = yield from forward(decoder, batch)
        else:
            fits = batch.tokens <= self.host.kept_tokens

            def coefficients(known: TokenLosses | None) -> torch.Tensor:
                """Of every part of the pass, side by side."""
                empty = torch.zeros(len(batch.targets), device=decoder.device)
                losses = empty if known is None else known.loss
                pieces = [
                    work.objective.coefficients(work.parts[len(work.results)], losses[span])
                    for work, span in zip(works, batch.learned, strict=True)
                    if work.objective is not None
                ]
                return torch.cat(pieces)

            found = yield from forward_backward(
                decoder,
                batch,
                coefficients if works[0].objective.needs_losses else coefficients(None),
                keep=Keep.ALL if fits and not any(work.recompute for work in works) else Keep.INPUTS,
            )
        return [found.part(span) for span in batch.learned]

    def _end(self, run_id: str) -> None:
        share_group = self._runs.pop(run_id).spec.share_group
        alone = all(other.spec.share_group != share_group for other in self._runs.values())
        self.host.sampler.cancel(run_id)
        self.host.queue.forget(run_id, share_group, share_group_is_gone=alone)
        if not self._runs:
            release_buffers(self.host.decoder)

    def _failure(self, run_id: str, error: Exception) -> FailedEvent:
        survive(error, self.host.decoder.device)
        _log.warning("a training run failed", extra={"run": run_id}, exc_info=error)
        code, message = explain(error, 0)
        return FailedEvent(run_id=run_id, code=code, message=message)
