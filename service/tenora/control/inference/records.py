"""A generation as it is asked for, and the pieces of text that come back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from tenora.adapters.composition import DEFAULT_DENSITY
from tenora.adapters.ref import Combination, MajoritySign
from tenora.control.adapters.records import Target
from tenora.engine.messages import SamplingParams


@dataclass(frozen=True, slots=True)
class LogprobEntry:
    """A token in text form: `logprob` natural log, `top` best first.

    Attributes:
        offset: of a generated token, the character of the generated text at which it begins; the parts of a character
            all begin at it.
    """

    token_id: int
    token: str
    bytes: Sequence[int]
    logprob: float
    top: Sequence[tuple[int, str, Sequence[int], float]] = ()
    offset: int = 0


class Delta(msgspec.Struct, frozen=True, kw_only=True):  # made for each token, five times as fast as a dataclass
    """New text of one choice. The last one of a choice has a finish_reason.

    Attributes:
        prompt_tokens, cached_tokens: on every delta, for usage.
        completion_tokens: generated so far by this choice, what `usage` bills.
        prompt_logprobs: on the first delta if asked for.
        queue_seconds: on every delta, how long the request waited for the engine to begin with it; None if unknown.
    """

    index: int
    text: str
    token_ids: Sequence[int]
    logprobs: Sequence[LogprobEntry] | None
    prompt_logprobs: Sequence[LogprobEntry | None] | None
    finish_reason: Literal["stop", "length"] | None
    stop_reason: int | str | None
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    queue_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages for the base's chat template, each with `role` and `content`.

    Attributes:
        whole: it is read as it is, and no answer is asked for.
    """

    messages: Sequence[Mapping[str, Any]]
    whole: bool = False


Prompt = Conversation | str | Sequence[int]
"""What is to be answered or continued: a conversation, a text, or tokens."""


@dataclass(frozen=True, slots=True)
class AskedComposition:
    """Adapters that are to act as one (`tenora.adapters.composition`).

    Attributes:
        adapters: by any of their names, each with its weight; none: the one that `model` or `adapter_id` names.
        scale: of all of it.
    """

    adapters: Sequence[tuple[str, float]] = ()
    combination: Combination = "cat"
    density: float = DEFAULT_DENSITY
    majority_sign_method: MajoritySign = "total"
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class InferenceRequest:
    """What a client asks for, before anything is known of the model that it names.

    Attributes:
        model, adapter_id: the base, or an adapter by any of its names.
        composition: several adapters, or one scaled.
        prompts: all are completed `n` times.
        max_tokens: of a completion; None means as many as the context holds.
        sampling: how tokens are chosen, of completions of so many tokens; raises InvalidRequestError.
        echo: the prompts are wanted as text; with `echo_offsets` also where their tokens begin.
        stop, include_stop, ignore_eos, skip_special_tokens, priority, at_once: as of a `GenerationRequest`.
    """

    model: str | None
    adapter_id: str | None
    prompts: Sequence[Prompt]
    max_tokens: int | None
    sampling: Callable[[int], SamplingParams]
    composition: AskedComposition | None = None
    n: int = 1
    echo: bool = False
    echo_offsets: bool = False
    stop: Sequence[str] = ()
    include_stop: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    priority: int = 0
    at_once: bool = True


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One prompt, already tokenized, to be completed `n` times.

    Attributes:
        stop: stop strings; the text ends before the first match (after it with `include_stop`).
        ignore_eos: the model's own end tokens end nothing.
        skip_special_tokens: they are left out of the text.
        at_once: each token is wanted as soon as it is there; else several may come as one delta, which costs less.
    """

    target: Target
    prompt_token_ids: Sequence[int]
    sampling: SamplingParams
    n: int = 1
    stop: Sequence[str] = ()
    include_stop: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    priority: int = 0
    at_once: bool = True
