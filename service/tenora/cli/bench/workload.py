"""What the load generator sends: who asks which adapter, with which prompt, and when. Equal seeds, equal workloads."""

from __future__ import annotations

import random
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

from tenora.errors import InvalidRequestError

Kind = Literal["base", "identical", "distinct", "uniform", "zipf"]
FIRST_TOKEN = 100
"""Prompts are drawn from here on: lower ids are special tokens in many vocabularies."""


@dataclass(frozen=True, slots=True)
class Distribution:
    """How requests spread over adapters.

    Attributes:
        kind: base: no adapter; identical: all the first; distinct: each the next one, round and round; uniform: drawn,
            each equally likely; zipf: drawn, the k-th with a probability in proportion to k to the power of -exponent.
        exponent: of zipf.
    """

    kind: Kind
    exponent: float = 0.0

    @classmethod
    def parse(cls, text: str) -> Distribution:
        """Read `base`, `identical`, `distinct`, `uniform` or `zipf:EXPONENT`.

        Raises:
            InvalidRequestError: if it is none of them.
        """
        name, _, number = text.partition(":")
        if name == "zipf":
            try:
                exponent = float(number)
            except ValueError:
                exponent = -1.0
            if 0 < exponent < 100:
                return cls("zipf", exponent)
        plain: dict[str, Kind] = {kind: kind for kind in ("base", "identical", "distinct", "uniform")}
        if name in plain and not number:
            return cls(plain[name])
        raise InvalidRequestError(
            f"{text!r} is not a distribution; use base, identical, distinct, uniform or zipf:S, as in zipf:1.1."
        )

    def draw(self, adapters: int, requests: int, seed: int) -> list[int | None]:
        """Which of `adapters` each of `requests` asks, by index; None is the base.

        Raises:
            InvalidRequestError: if the distribution needs adapters and there are none.
        """
        if self.kind == "base":
            return [None] * requests
        if adapters < 1:
            raise InvalidRequestError(f"The distribution {self.kind} needs at least one adapter.")
        if self.kind == "identical":
            return [0] * requests
        if self.kind == "distinct":
            return [index % adapters for index in range(requests)]
        source = random.Random(seed)  # noqa: S311 - not a secret
        if self.kind == "uniform":
            return [source.randrange(adapters) for _ in range(requests)]
        bounds = list(accumulate((k + 1) ** -self.exponent for k in range(adapters)))
        return [min(bisect_left(bounds, source.random() * bounds[-1]), adapters - 1) for _ in range(requests)]


@dataclass(frozen=True, slots=True)
class Ask:
    """One request.

    Attributes:
        model: name of the base or of an adapter.
        prompt: token ids.
        max_tokens: exactly as many are generated.
        at: seconds after the start before which it is not sent.
        group: what its figures are collected under.
    """

    model: str
    prompt: tuple[int, ...]
    max_tokens: int
    at: float = 0.0
    group: str = ""


def prompts(count: int, length: int, *, vocabulary: int, seed: int) -> list[tuple[int, ...]]:
    """Random prompts of `length` tokens, no two alike from the first tokens on, so that no prefix is shared."""
    source = random.Random(seed)  # noqa: S311 - not a secret
    first = min(FIRST_TOKEN, vocabulary // 2)
    return [tuple(source.randrange(first, vocabulary) for _ in range(length)) for _ in range(count)]


def arrivals(count: int, rate: float, seed: int) -> list[float]:
    """Seconds at which requests of a Poisson process of `rate` per second come; all 0 without a rate."""
    if rate <= 0:
        return [0.0] * count
    source = random.Random(seed)  # noqa: S311 - not a secret
    return list(accumulate(source.expovariate(rate) for _ in range(count)))


def asks(
    models: Sequence[str], prompt_ids: Sequence[tuple[int, ...]], max_tokens: int, times: Sequence[float]
) -> list[Ask]:
    """One request per model name."""
    return [Ask(model, prompt, max_tokens, at) for model, prompt, at in zip(models, prompt_ids, times, strict=True)]
