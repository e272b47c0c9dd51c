"""One training run as the engine hosts it: an iterator of events that can be stopped and never raises.

The run knows rows, weights and files of its own directory; of jobs, tenants and HTTP it knows nothing. It shares its
process with serving, so it hands control back at every layer boundary (an item that is None), moves no global state
(random numbers, gradient mode) and never raises: whatever goes wrong with it ends it with a FailedEvent.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Iterator

import torch

from tenora.errors import TenoraError
from tenora.model.decoder import Decoder
from tenora.training.loop import Items, TrainingLoop
from tenora.training.spec import FailedEvent, FinishedEvent, StoppedEvent, TrainEvent, TrainSpec

logger = logging.getLogger(__name__)


class TrainingRun:
    """Trains one adapter on the resident, frozen base.

    Iterate it: None items are layer boundaries, at which the caller may do anything else, events are `TrainEvent`s, and
    the last item is a FinishedEvent, StoppedEvent or FailedEvent. If `spec.workdir` holds the state of an earlier run
    with this spec, iterating goes on from there and, in float32 on one CPU thread, gives the bits of an uninterrupted
    run; events since the state was saved are given again. An evaluation at step 0 measures the base. Checkpoints older
    than the latest three are removed unless they are the best.

    Args:
        decoder: the base; its weights are only read.
        spec: what to do, all resolved.
    """

    def __init__(self, decoder: Decoder, spec: TrainSpec) -> None:
        self._decoder, self._spec = decoder, spec
        self._stopping = False
        self._pausing = False
        self._loop: TrainingLoop | None = None

    def stop(self, *, pause: bool) -> None:
        """End the run at the next item boundary; its last item is then a StoppedEvent.

        The optimizer step in progress is given up. With `pause` the state after the last whole step is saved.
        """
        self._stopping, self._pausing = True, pause

    def __iter__(self) -> Iterator[TrainEvent | None]:
        """Run, or go on. Generators of one run must not be mixed."""
        items = self._run()
        try:
            while True:
                # The caller's gradient and inference modes hold between two items, ours within one.
                with torch.inference_mode(mode=False), torch.no_grad():
                    try:
                        item = next(items)
                    except StopIteration:
                        return
                yield item
        finally:
            items.close()

    def _run(self) -> Items:
        work = self._work()
        try:
            yield from self._until_stopped(work)
        except Exception as error:  # noqa: BLE001  # the engine serves others: no error of a run may reach it
            failed = self._failed(error)
        else:
            return
        finally:
            work.close()
            self._loop = None
        # Said outside the handler: the traceback is gone by now, and with it the last hold on the run's tensors.
        yield failed

    def _until_stopped(self, work: Items) -> Items:
        while not self._stopping:
            item = next(work, None)
            yield item
            if isinstance(item, FinishedEvent):
                return
        work.close()
        if self._pausing and self._loop is not None:
            self._loop.save()
        step = 0 if self._loop is None else self._loop.progress.step
        yield StoppedEvent(run_id=self._spec.run_id, step=step, paused=self._pausing)

    def _work(self) -> Items:
        self._loop = TrainingLoop(self._decoder, self._spec)
        yield from self._loop.items()

    def _failed(self, error: Exception) -> FailedEvent:
        step = 0 if self._loop is None else self._loop.progress.step
        if isinstance(error, TenoraError):
            code, message = error.code or "training_failed", error.message
        elif _is_out_of_memory(error):
            code = "out_of_memory"
            message = f"Memory ran out at step {step + 1}; use a smaller rank, shorter rows or a smaller batch_size."
        elif isinstance(error, OSError):
            code = "storage_full" if error.errno == errno.ENOSPC else "storage_error"
            message = f"A file of the run could not be read or written after step {step}: {error.strerror or error}."
        else:
            code, message = "internal_error", f"The run stopped after step {step} with an unexpected error: {error}"
        logger.error("training run %s failed: %s", self._spec.run_id, message, exc_info=error)
        return FailedEvent(run_id=self._spec.run_id, code=code, message=message)


def _is_out_of_memory(error: Exception) -> bool:
    """Accelerators raise a type of their own; torch's CPU allocator raises a RuntimeError with these words."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)
