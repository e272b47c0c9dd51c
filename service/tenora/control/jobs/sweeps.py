"""Which settings a sweep tries.

All trials train in one fused batch, so none of them can learn from another's result: a sampler that models results,
such as Optuna's TPE, would be asked for every trial before it is told of the first, and draws at random then. What is
left to choose is how to cover the space, and for that a Latin hypercube (McKay et al. 1979) is better than independent
draws: with N trials each of N equal shares of every range is tried once. It is twenty lines and needs no dependency.
Where results pay here is in stopping the worse trials early, by successive halving.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tenora.control.jobs.field_checks import flag, known_fields, whole
from tenora.control.jobs.shape import Limits
from tenora.errors import InvalidRequestError
from tenora.training.spec import SWEPT, TRIAL

SAMPLERS = ("grid", "random")
MAX_TRIALS = 64
USUAL_TRIALS = 12
TRIAL_COLUMNS = ("trial", *TRIAL, "status", "step", "total_steps", "valid_loss", "winner", "reason")
Value = int | float


@dataclass(frozen=True, slots=True)
class Choices:
    """Values of a dimension, one by one."""

    values: tuple[Value, ...]

    def at(self, share: float) -> Value:
        """The value at `share` in [0, 1) of the way."""
        return self.values[int(share * len(self.values))]


@dataclass(frozen=True, slots=True)
class Range:
    """Values of a dimension from `low` to `high`; even steps of `share` are even in the logarithm with `log`."""

    low: Value
    high: Value
    log: bool
    whole: bool

    def at(self, share: float) -> Value:
        """The value at `share` in [0, 1) of the way; whole numbers up to and including `high`."""
        low, high = float(self.low), float(self.high) + (1.0 if self.whole else 0.0)
        value = low * (high / low) ** share if self.log else low + share * (high - low)
        return min(int(value), int(self.high)) if self.whole else value


def check_sweep(given: Mapping[str, Any], limits: Limits) -> dict[str, Choices | Range]:
    """The dimensions of a sweep.

    Args:
        given: of those settings that can be swept, each a list of values or `{min, max, log?}`; `sampler` (grid: every
            point of the lists; random: a Latin hypercube) and `trials`.
        limits: of the service.

    Raises:
        InvalidRequestError: `param` names the field.
    """
    known_fields(given, (*SWEPT, "sampler", "trials"), "sweep")
    space = {name: _dimension(name, given[name], limits) for name in SWEPT if given.get(name) is not None}
    if not space:
        raise InvalidRequestError(f"sweep needs values for one of {', '.join(SWEPT)}.", param="sweep")
    sampler, trials = given.get("sampler"), given.get("trials")
    if sampler == "tpe":
        raise InvalidRequestError(
            "sweep.sampler tpe learns from finished trials, and here all trials train at the same time; use random, "
            "which spreads them evenly, or grid.",
            param="sweep.sampler",
        )
    if sampler is not None and sampler not in SAMPLERS:
        raise InvalidRequestError(f"sweep.sampler must be one of {', '.join(SAMPLERS)}.", param="sweep.sampler")
    if trials is not None:
        whole(trials, "sweep.trials", 2, MAX_TRIALS)
    ranges = [name for name, values in space.items() if isinstance(values, Range)]
    if ranges and sampler == "grid":
        raise InvalidRequestError(
            f"sweep.{ranges[0]} is a range, which has no grid; list its values, or use the sampler random.",
            param="sweep.sampler",
        )
    size = math.inf if ranges else math.prod(len(one.values) for one in space.values() if isinstance(one, Choices))
    if size < 2:
        raise InvalidRequestError("A sweep needs two settings to compare; add values.", param="sweep")
    if sampler == "grid" and trials is not None and trials < size:
        raise InvalidRequestError(
            f"A grid has all {size} settings, and sweep.trials asks for {trials} of them; leave sweep.trials out, or "
            "use the sampler random.",
            param="sweep.trials",
        )
    if trials is None and sampler != "random" and not ranges and size > MAX_TRIALS:
        raise InvalidRequestError(
            f"The sweep's lists make {size} settings and may make {MAX_TRIALS}; shorten them, or set sweep.trials to "
            "have so many of them drawn.",
            param="sweep.trials",
        )
    return space


def swept_ranks(given: Mapping[str, Any], limits: Limits) -> tuple[int, ...]:
    """The lowest and the highest rank that a sweep may try, whatever it draws; none if it tries no ranks."""
    if given.get("rank") is None:
        return ()
    space = _dimension("rank", given["rank"], limits)
    ends = space.values if isinstance(space, Choices) else (space.low, space.high)
    return int(min(ends)), int(max(ends))


def points(given: Mapping[str, Any], limits: Limits, seed: int) -> list[dict[str, Value]]:
    """The settings to try, in the order of trials, each once: equal requests and seeds give equal ones."""
    space = check_sweep(given, limits)
    trials: int | None = given.get("trials") or (USUAL_TRIALS if given.get("sampler") == "random" else None)
    random = np.random.default_rng(seed)
    lists = [values.values for values in space.values() if isinstance(values, Choices)]
    if len(lists) == len(space):
        sizes = [len(values) for values in lists]
        size = math.prod(sizes)
        # Four lists have millions of points: only those that are drawn are ever made.
        every = trials is None or trials >= size
        drawn = range(size) if every else sorted(random.choice(size, trials, replace=False).tolist())
        places = [np.unravel_index(index, sizes) for index in drawn]
        return [
            dict(zip(space, (values[at] for values, at in zip(lists, place, strict=True)), strict=True))
            for place in places
        ]
    count = trials or USUAL_TRIALS
    shares = {name: (random.permutation(count) + random.random(count)) / count for name in space}
    found = [{name: values.at(float(shares[name][index])) for name, values in space.items()} for index in range(count)]
    return [point for index, point in enumerate(found) if point not in found[:index]]


def trials_csv(results: Sequence[Mapping[str, Any]]) -> bytes:
    """The table of a sweep as a CSV file with a row per trial."""
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, TRIAL_COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: value for name, value in row.items() if value is not None} for row in results)
    return out.getvalue().encode()


def _dimension(name: str, given: Any, limits: Limits) -> Choices | Range:
    param = f"sweep.{name}"
    if isinstance(given, list | tuple):
        if not 1 <= len(given) <= MAX_TRIALS:
            raise InvalidRequestError(f"{param} must list 1 to {MAX_TRIALS} values.", param=param)
        values = tuple(_value(name, value, param, limits) for value in given)
        if len(set(values)) < len(values):
            raise InvalidRequestError(f"{param} lists a value twice.", param=param)
        return Choices(values)
    if not isinstance(given, Mapping):
        raise InvalidRequestError(f'{param} must be a list of values or {{"min", "max"}}.', param=param)
    known_fields(given, ("min", "max", "log"), param)
    low = _value(name, given.get("min"), f"{param}.min", limits)
    high = _value(name, given.get("max"), f"{param}.max", limits)
    if low >= high:
        raise InvalidRequestError(f"{param}.min must be below {param}.max.", param=f"{param}.min")
    log = given.get("log")
    is_log = SWEPT[name].log if log is None else flag(log, f"{param}.log")
    return Range(low, high, log=is_log, whole=SWEPT[name].kind is int)


def _value(name: str, value: Any, param: str, limits: Limits) -> Value:
    found: Value = replace(limits.of(SWEPT[name]), auto="").check(value, param)
    return found
