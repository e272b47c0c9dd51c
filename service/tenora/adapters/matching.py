"""Module-name patterns as PEFT understands them, bounded for configurations that tenants send. Free of torch.

PEFT reads `target_modules`, `exclude_modules`, `rank_pattern` and `alpha_pattern` as regular expressions over module
paths.
"""

from __future__ import annotations

import re

from tenora.adapters.pattern import Pattern, PatternError
from tenora.errors import AdapterFormatError

# States walked over all patterns of one adapter: about a second of Python. Real adapters take a few thousand.
MAX_COST = 2_000_000
_PLAIN = re.compile(r"[A-Za-z0-9_.]+")


class PatternMatcher:
    """Matches module paths against the patterns of one adapter, within a bound that they share."""

    def __init__(self) -> None:
        self._compiled: dict[str, Pattern] = {}
        self._cost = 0

    def full(self, field: str, pattern: str, path: str) -> bool:
        """Whether the whole path matches: a string in `target_modules` or `exclude_modules`."""
        return self._match(field, pattern, pattern, path)

    def suffix(self, field: str, pattern: str, path: str) -> bool:
        """Whether whole trailing components match: a key of `rank_pattern` or `alpha_pattern`."""
        if _PLAIN.fullmatch(pattern):
            # The usual key, a name or a dotted path, needs no automaton. Its dots match anything, as in an expression.
            start = len(path) - len(pattern)
            if start < 0 or (start and path[start - 1] != ".") or not path.endswith(pattern.rpartition(".")[2]):
                return False
            return all(wanted in (".", found) for wanted, found in zip(pattern, path[start:], strict=True))
        return self._match(field, pattern, rf"(?:.*\.)?(?:{pattern})", path)

    def _match(self, field: str, pattern: str, expression: str, path: str) -> bool:
        try:
            compiled = self._compiled.get(expression)
            if compiled is None:
                # By itself first: an unbalanced one must not become valid through what is put around it.
                Pattern(pattern)
                compiled = self._compiled[expression] = Pattern(expression)
                self._cost += len(expression)
            before = compiled.cost
            matches = compiled.fullmatch(path)
        except PatternError as error:
            raise AdapterFormatError(
                f"{field} holds the pattern {pattern[:80]!r}, which cannot be read: {error}. List the module names."
            ) from error
        self._cost += compiled.cost - before
        if self._cost > MAX_COST:
            raise AdapterFormatError(f"{field} holds patterns that take too long to match. List the module names.")
        return matches


def layer_number(path: str, after: str | None) -> int | None:
    """The number of the layer that a path belongs to: the first one after the component(s) `after`, such as `layers`.

    Without `after` any component may precede it, but there must be two. None if the path is in no layer.
    """
    parts = path.split(".")
    names = [] if after is None else after.split(".")
    for i in range(2 if after is None else len(names), len(parts) - 1):
        if parts[i].isascii() and parts[i].isdigit() and (after is None or parts[i - len(names) : i] == names):
            return int(parts[i])
    return None
