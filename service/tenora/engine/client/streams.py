"""What waits in the API process for an engine's answers: one buffer per request, one per training run."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

from tenora.engine.messages import SequenceFailed, SequenceOutput
from tenora.errors import (
    AdapterDamagedError,
    AdapterFormatError,
    CompositionError,
    ConflictError,
    ContextLengthError,
    InvalidRequestError,
    TenoraError,
    UnavailableError,
)
from tenora.training.events import FailedEvent, FinishedEvent, StoppedEvent, TrainEvent

OF_THE_ADAPTER: Mapping[str, type[TenoraError]] = {
    "invalid_adapter": AdapterFormatError,
    "adapter_too_large": AdapterFormatError,
    "adapter_overflow": AdapterFormatError,
    "adapter_damaged": AdapterDamagedError,
    "adapters_pinned": ConflictError,
}
"""Codes of failures that do not pass by themselves; every other one but those of a bad request does."""
_KINDS: Mapping[str, type[TenoraError]] = {
    "invalid_request": InvalidRequestError,
    "context_length_exceeded": ContextLengthError,
    "adapters_do_not_compose": CompositionError,
    **OF_THE_ADAPTER,
}


class SequenceStream:
    """Outputs of one sequence between the engine and a consumer that may be slow: bounded, then cut off.

    A consumer that comes late gets all that waits as one output, so that it costs less the further it is behind. One
    that is in no hurry gets the first output when it comes, then `batch` of them at a time.

    Attributes:
        started: whether anything has come from the engine.
        ended: whether the last output or an error has come; nothing follows.
    """

    def __init__(self, limit: int, batch: int = 1) -> None:
        self.started = False
        self.ended = False
        self._limit = limit
        self._batch = batch
        self._wanted = 1  # outputs for which the reader is woken
        self._outputs: list[SequenceOutput] = []
        self._error: TenoraError | None = None
        self._reader: asyncio.Future[None] | None = None

    def put(self, output: SequenceOutput) -> bool:
        """Add an output. False: the consumer is too far behind, the stream has failed, abort the sequence."""
        if self.ended:
            return True
        self.started = True
        if len(self._outputs) >= self._limit:
            self.fail(
                UnavailableError(
                    f"The reader fell {self._limit} outputs behind and was cut off; read faster.", code="slow_reader"
                )
            )
            return False
        self.ended = output.finish_reason is not None
        self._outputs.append(output)
        self._wake()
        return True

    def fail_as(self, failed: SequenceFailed) -> None:
        """End it with the engine's error."""
        kind = _KINDS.get(failed.code, UnavailableError)
        error = kind(failed.message, code=None if failed.code == "invalid_request" else failed.code)
        if failed.code in OF_THE_ADAPTER:
            error.param = "model"
        elif isinstance(error, CompositionError):
            error.param = "adapters"
        self.fail(error)

    def fail(self, error: TenoraError) -> None:
        """End it with an error, after what is in the buffer."""
        if not self.ended:
            self.started = self.ended = True
            self._error = error
            self._wake()

    async def get(self) -> SequenceOutput:
        """What has come since the last call, as one output; waits if that is nothing. For one reader.

        Raises the error that ended the stream once everything before it was read.
        """
        while not self.ended and len(self._outputs) < self._wanted:
            self._reader = asyncio.get_running_loop().create_future()
            await self._reader
        if not self._outputs and self._error is not None:
            raise self._error
        outputs, self._outputs = self._outputs, []
        self._wanted = self._batch
        return outputs[0] if len(outputs) == 1 else joined(outputs)

    def _wake(self) -> None:
        enough = self.ended or len(self._outputs) >= self._wanted
        if enough and self._reader is not None and not self._reader.done():
            self._reader.set_result(None)


def joined(outputs: Sequence[SequenceOutput]) -> SequenceOutput:
    """Consecutive outputs of a sequence as one."""
    first, last = outputs[0], outputs[-1]
    logprobs = None
    if any(output.logprobs is not None for output in outputs):
        logprobs = [entry for output in outputs for entry in output.logprobs or ()]
    return SequenceOutput(
        request_id=first.request_id,
        token_ids=[token for output in outputs for token in output.token_ids],
        logprobs=logprobs,
        prompt_logprobs=first.prompt_logprobs,
        cached_tokens=first.cached_tokens,
        finish_reason=last.finish_reason,
        stop_token_id=last.stop_token_id,
        queue_seconds=first.queue_seconds,
    )


class RunStream:
    """Events of one training run. Few, so the buffer has no bound.

    Attributes:
        abandoned: the consumer has left.
        over: the terminal event has come, or the engine is gone.
        acknowledged: how many events its consumer has recorded.
    """

    def __init__(self) -> None:
        self.acknowledged = 0
        self.abandoned = False
        self.over = asyncio.Event()
        self._queue: asyncio.Queue[TrainEvent | TenoraError] = asyncio.Queue()

    @staticmethod
    def is_terminal(event: TrainEvent) -> bool:
        """Whether no event can follow this one."""
        return isinstance(event, FinishedEvent | StoppedEvent | FailedEvent)

    def put(self, event: TrainEvent) -> None:
        """Add an event."""
        self._queue.put_nowait(event)
        if self.is_terminal(event):
            self.over.set()

    def fail(self, error: TenoraError) -> None:
        """End it: the engine is gone."""
        self._queue.put_nowait(error)
        self.over.set()

    async def get(self) -> TrainEvent:
        """The next event; raises the error that ended the stream."""
        item = await self._queue.get()
        if isinstance(item, TenoraError):
            raise item
        return item
