"""One sequence's tokens become text: detokenized, cut at stop strings, with log-probabilities in text form."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from tenora.control.inference.records import Delta, GenerationRequest, LogprobEntry
from tenora.control.inference.stops import Stops, StopScanner
from tenora.engine.messages import FinishReason, SequenceOutput, TokenLogprob
from tenora.model.tokenizer import Detokenizer, beginning

if TYPE_CHECKING:
    from tenora.model.tokenizer import Tokenizer


class _Token(NamedTuple):
    """A token whose text, [start, end) in characters of the whole text, was not passed on yet."""

    token_id: int
    logprob: LogprobEntry | None
    start: int
    end: int


class ChoiceStream:
    """Turns the engine's outputs for one choice into deltas.

    Tokens travel with their text: while a stop string may have begun, its tokens wait, and if it is found those that
    lie wholly behind the end of the text are not handed out.

    Attributes:
        stops: what ends the text; its tokens are for the engine to stop at.
        finished: the last delta was made.
    """

    def __init__(self, index: int, request: GenerationRequest, tokenizer: Tokenizer) -> None:
        self.finished = False
        self._index = index
        self._request = request
        self._prompt_tokens = len(request.prompt_token_ids)
        self.stops = Stops.of(request, tokenizer)
        self._tokenizer = tokenizer
        self._detokenizer = Detokenizer(tokenizer, skip_special_tokens=request.skip_special_tokens)
        self._scanner = StopScanner(self.stops.strings, include=request.include_stop)
        self._waiting: deque[_Token] = deque()
        self._produced = 0  # characters that the detokenizer gave
        self._passed = 0  # characters that were passed on
        self._completion_tokens = 0
        self._cached_tokens = 0
        self._queue_seconds: float | None = None
        self._prompt_logprobs: Sequence[LogprobEntry | None] | None = None
        self._plain = not self.stops.strings and request.sampling.logprobs is None

    def push(self, output: SequenceOutput) -> Delta | None:
        """Take the next output; None if there is nothing to show yet."""
        if self._plain and not self._waiting and _is_one_token(output):
            return self._pass_on(output.token_ids[0])
        self._cached_tokens = max(self._cached_tokens, output.cached_tokens)
        if output.queue_seconds is not None:
            self._queue_seconds = output.queue_seconds
        if output.prompt_logprobs is not None:
            self._prompt_logprobs = [None if entry is None else self._entry(entry) for entry in output.prompt_logprobs]
        text = self._read(output)
        finish, reason = self._finish(output)
        if finish is not None and self._scanner.matched is None:
            text += self._scanner.feed(self._detokenizer.flush())
            # The detokenizer's last characters may complete a stop string.
            finish, reason = self._finish(output)
            if self._scanner.matched is None:
                text += self._scanner.flush()
            if isinstance(reason, str) and self._scanner.matched is None and self._request.include_stop:
                text += reason  # a stop string that is a special token: the engine keeps the token to itself
        self._passed += len(text)
        self.finished = finish is not None
        tokens = self._release()
        if not (text or tokens or self.finished or self._prompt_logprobs is not None):
            return None
        prompt_logprobs, self._prompt_logprobs = self._prompt_logprobs, None
        return self._delta(
            text,
            [token.token_id for token in tokens],
            None if self._request.sampling.logprobs is None else _entries(tokens),
            prompt_logprobs,
            finish,
            reason,
        )

    def _pass_on(self, token_id: int) -> Delta | None:
        """The same for a token that nothing can end and nobody asks more of, as most are: its text is its delta."""
        piece = self._detokenizer.push((token_id,))
        self._completion_tokens += 1
        if not piece:
            self._waiting.append(_Token(token_id, None, self._produced, self._produced + 1))
            return None
        self._produced += len(piece)
        self._passed = self._produced
        return self._delta(piece, (token_id,))

    def _delta(
        self,
        text: str,
        token_ids: Sequence[int],
        logprobs: Sequence[LogprobEntry] | None = None,
        prompt_logprobs: Sequence[LogprobEntry | None] | None = None,
        finish: FinishReason | None = None,
        reason: int | str | None = None,
    ) -> Delta:
        return Delta(
            index=self._index,
            text=text,
            token_ids=token_ids,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            finish_reason=finish,
            stop_reason=reason,
            prompt_tokens=self._prompt_tokens,
            cached_tokens=self._cached_tokens,
            queue_seconds=self._queue_seconds,
            completion_tokens=self._completion_tokens,
        )

    def _read(self, output: SequenceOutput) -> str:
        """The text of the output's tokens that can be shown."""
        shown: list[str] = []
        for position, token_id in enumerate(output.token_ids):
            piece = self._detokenizer.push([token_id])
            logprob = None if output.logprobs is None else self._entry(output.logprobs[position], piece)
            # A token without text is part of the next character (or special): it travels with what comes next.
            self._waiting.append(_Token(token_id, logprob, self._produced, self._produced + max(len(piece), 1)))
            self._produced += len(piece)
            self._completion_tokens += 1
            if self._completion_tokens <= self._request.sampling.min_tokens:
                shown.append(self._scanner.skip(piece))
                continue
            shown.append(self._scanner.feed(piece))
            if self._scanner.matched is not None:
                break
        else:
            # The stop token is not among the tokens, but it was generated and is billed.
            self._completion_tokens += output.stop_token_id is not None
        return "".join(shown)

    def _finish(self, output: SequenceOutput) -> tuple[FinishReason | None, int | str | None]:
        if self._scanner.matched is not None:
            return "stop", self._scanner.matched
        stop = output.stop_token_id
        return output.finish_reason, None if stop is None else self.stops.tokens.get(stop)

    def _release(self) -> list[_Token]:
        """The waiting tokens whose text was passed on; at the end all, except those behind a stop string."""
        everything = self.finished and self._scanner.matched is None
        released: list[_Token] = []
        while self._waiting:
            token = self._waiting[0]
            begun = self.finished and token.start < self._passed
            if not (everything or begun or token.end <= self._passed):
                break
            released.append(self._waiting.popleft())
        return released

    def _entry(self, token: TokenLogprob, piece: str = "") -> LogprobEntry:
        """A token in text form; `piece` is the text that came with it, still to be counted."""
        text, raw = self._tokenizer.token_text, self._tokenizer.token_bytes
        return LogprobEntry(
            token_id=token.token_id,
            token=text(token.token_id),
            bytes=tuple(raw(token.token_id)),
            logprob=token.logprob,
            top=tuple((other, text(other), tuple(raw(other)), logprob) for other, logprob in token.top),
            offset=self._produced + beginning(piece, text(token.token_id)),
        )


def _entries(tokens: Sequence[_Token]) -> list[LogprobEntry]:
    return [token.logprob for token in tokens if token.logprob is not None]


def _is_one_token(output: SequenceOutput) -> bool:
    """Whether it tells one token and nothing else."""
    told = output.finish_reason or output.prompt_logprobs is not None or output.queue_seconds is not None
    return not told and not output.cached_tokens and len(output.token_ids) == 1
