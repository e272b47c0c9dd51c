"""Whether a result takes its name over: the rule, and what the job says of it.

A name is what requests are answered by, so by default (`if_better`) a result takes over only where it is better on
held-out rows than the version that the name means. The point estimate decides, and `min_gain` says by how much; an
interval that leaves out 0 is not asked for, since with a few dozen held-out rows it seldom does, and a newer adapter
that is better as far as can be seen should not wait for rows that nobody has. What could not be compared does not take
over. A new name means its first version, whatever that is worth, unless `min_gain` asks for a gain over the base.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from tenora.control.gate.card import Comparison, Replaced
from tenora.training.settings import Publish

Code = Literal[
    "first_version",
    "better",
    "always",
    "never",
    "not_better",
    "below_min_gain",
    "same_weights",
    "not_measured",
]
"""The name means the result with the first three, and does not with the others."""


class Published(msgspec.Struct, frozen=True, kw_only=True):
    """What became of a result, for its job. The version is stored and callable by id in any case.

    Attributes:
        alias_moved: the name means it now.
        version, digest: of the result.
        code, reason: why, as a word and as a sentence.
        replaced: what the name meant before, or means still; None if it meant nothing.
    """

    alias_moved: bool
    version: int
    digest: str
    code: Code
    reason: str
    replaced: Replaced | None


class Decision(msgspec.Struct, frozen=True, kw_only=True):
    """What the rule says. `warns`: its owner should hear of it."""

    moves: bool
    code: Code
    reason: str
    warns: bool = False


def decide(
    publish: Publish,
    min_gain: float,
    *,
    digest: str,
    replaced: Replaced | None,
    base: Comparison | None,
    why_not: str | None,
    note: str | None = None,
) -> Decision:
    """Apply the rule.

    Args:
        min_gain: that is asked for, in the unit of the comparison.
        digest: of the result.
        replaced: what its name means now; None if it means nothing.
        base: the result beside the base.
        why_not: the reason why there is no comparison with `replaced`.
        note: what is to be known of the comparison; said where it keeps the name.
    """
    if publish == "never":
        return Decision(moves=False, code="never", reason="publish is never, so no name means it.")
    if replaced is None:
        return _first(publish, min_gain, base)
    if publish == "always":
        return _always(replaced, why_not)
    return _if_better(replaced, min_gain, digest, base, why_not, note)


def _always(replaced: Replaced, why_not: str | None) -> Decision:
    reason = f"publish is always; {replaced.name} meant version {replaced.version}"
    if replaced.comparison is None:
        reason = f"{reason}, with which it could not be compared: {why_not}"
        return Decision(moves=True, code="always", reason=reason, warns=True)
    worse = not _gain(replaced.comparison) > 0.0
    return Decision(moves=True, code="always", reason=f"{reason}: {replaced.comparison}.", warns=worse)


def _if_better(
    replaced: Replaced,
    min_gain: float,
    digest: str,
    base: Comparison | None,
    why_not: str | None,
    note: str | None,
) -> Decision:
    stays = f"{replaced.name} still means version {replaced.version}"
    code: Code | None
    if replaced.digest == digest:
        code, reason = "same_weights", f"{stays}, whose weights are the same."
    elif replaced.comparison is None:
        code, reason = "not_measured", f"{stays}, because the two could not be compared: {why_not}"
    else:
        code = _lacking(replaced.comparison, min_gain)
        reason = f"{stays}, than which it is {_less(code, min_gain)}: {replaced.comparison}."
        reason += f" {note}" if note else ""
    if code is not None:
        return Decision(moves=False, code=code, reason=reason, warns=True)
    reason = f"{replaced.name} meant version {replaced.version}: {replaced.comparison}."
    worse = base is not None and not _gain(base) > 0.0
    if worse:
        reason += f" It is not better than the base: {base}."
    return Decision(moves=True, code="better", reason=reason, warns=worse)


def _first(publish: Publish, min_gain: float, base: Comparison | None) -> Decision:
    """Of a name that means nothing yet."""
    if publish == "if_better" and min_gain > 0.0:
        if base is None:
            reason = "The name is new, and min_gain asks for a gain over the base, which was not measured."
            return Decision(moves=False, code="not_measured", reason=reason, warns=True)
        code = _lacking(base, min_gain)
        if code is not None:
            reason = f"The name is new and means nothing yet: it is {_less(code, min_gain)} than the base: {base}."
            return Decision(moves=False, code=code, reason=reason, warns=True)
    if base is not None and not _gain(base) > 0.0:
        reason = f"The name is new, so it means this version, although that is not better than the base: {base}."
        return Decision(moves=True, code="first_version", reason=reason, warns=True)
    return Decision(
        moves=True, code="first_version", reason="The name is new." + (f" Beside the base: {base}." if base else "")
    )


def _gain(comparison: Comparison) -> float:
    return -comparison.difference


def _lacking(comparison: Comparison, min_gain: float) -> Literal["not_better", "below_min_gain"] | None:
    """What a result lacks; a difference that is not a number is no gain."""
    gain = _gain(comparison)
    if not gain > 0.0:
        return "not_better"
    return None if gain >= min_gain else "below_min_gain"


def _less(code: str | None, min_gain: float) -> str:
    return "not better" if code == "not_better" else f"not better by min_gain {min_gain:g}"
