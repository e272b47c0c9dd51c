"""Module names and patterns as PEFT understands them, bounded for configurations that tenants send. Free of torch.

PEFT reads lists of names as ends of module paths, and a string in `target_modules` or `exclude_modules` and the keys of
`rank_pattern` and `alpha_pattern` as regular expressions. Nearly all keys are plain names: they are looked up. What is
left is counted before it is compiled, and compiled before it is matched.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Generic, TypeVar

from tenora.adapters.pattern import Pattern, PatternError
from tenora.errors import AdapterFormatError

# Of one adapter. Real ones have one or two; compiling and matching this many takes a few hundredths of a second.
MAX_EXPRESSIONS = 32
MAX_CHARACTERS = 8192
_PLAIN = re.compile(r"(?P<anchor>\^?)(?P<name>(?:[A-Za-z0-9_]|\\?\.)+)\$?")
_ANY = "\n"  # stands for an unescaped dot, which matches any character; no path has a line break

T = TypeVar("T")


class Expressions:
    """The regular expressions of one adapter, within a bound that all its fields share."""

    def __init__(self) -> None:
        self._compiled: dict[tuple[str, bool], Pattern] = {}
        self._characters = 0

    def compile(self, field: str, text: str, *, as_suffix: bool = False) -> Pattern:
        """The pattern of a field; one that occurs twice counts once.

        Raises:
            AdapterFormatError: it cannot be read, or the adapter has too many of them.
        """
        known = self._compiled.get((text, as_suffix))
        if known is not None:
            return known
        self._characters += len(text)
        if len(self._compiled) >= MAX_EXPRESSIONS or self._characters > MAX_CHARACTERS:
            raise AdapterFormatError(
                f"{field} brings the adapter's regular expressions to more than {MAX_EXPRESSIONS}, or to more than "
                f"{MAX_CHARACTERS} characters; list the module names instead."
            )
        try:
            pattern = self._compiled[text, as_suffix] = Pattern(text, as_suffix=as_suffix)
        except PatternError as error:
            raise AdapterFormatError(
                f"{field} holds the pattern {text[:80]!r}, which cannot be read: {error}. List module names instead."
            ) from error
        return pattern


class KeyTable(Generic[T]):
    """`rank_pattern` or `alpha_pattern`: the first key that matches whole trailing components of a path wins."""

    def __init__(self, field: str, values: Mapping[str, T], expressions: Expressions) -> None:
        """Raises AdapterFormatError as `Expressions.compile`."""
        self._values = list(values.values())
        # By length and last component, which fix what is left to be compared to next to nothing.
        self._plain: dict[tuple[int, str], list[tuple[int, str, bool]]] = {}
        self._expressions: list[tuple[int, Pattern]] = []
        for order, key in enumerate(values):
            plain = _PLAIN.fullmatch(key)
            if plain is None:
                self._expressions.append((order, expressions.compile(field, key, as_suffix=True)))
                continue
            name = plain["name"].replace("\\.", "\0").replace(".", _ANY).replace("\0", ".")
            entry = (order, name, bool(plain["anchor"]))
            self._plain.setdefault((len(name), _last_component(name)), []).append(entry)
        self._last_lengths = sorted({len(last) for _, last in self._plain})

    def get(self, path: str, default: T) -> T:
        """The value for a path."""
        found = min(self._plain_matches(path), default=len(self._values))
        for order, pattern in self._expressions:
            if order < found and pattern.fullmatch(path):
                found = order
                break
        return self._values[found] if found < len(self._values) else default

    def _plain_matches(self, path: str) -> Iterator[int]:
        for suffix in suffixes(path):
            for length in self._last_lengths:
                last = suffix[max(len(suffix) - length, 0) :]
                for order, name, anchored in self._plain.get((len(suffix), last), ()):
                    if not (anchored and suffix != path) and all(
                        wanted in (_ANY, found) for wanted, found in zip(name, suffix, strict=True)
                    ):
                        yield order


def suffixes(path: str) -> Iterator[str]:
    """`a.b.c`, `b.c`, `c`."""
    yield path
    while "." in path:
        path = path.partition(".")[2]
        yield path


def ends_with_any(path: str, names: Collection[str]) -> bool:
    """Whether a path is one of the names, or ends with whole components of one."""
    return any(suffix in names for suffix in suffixes(path))


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


def _last_component(name: str) -> str:
    return re.split(r"[.\n]", name)[-1]
