r"""Regular expressions that cannot run away, for patterns that tenants send. Free of torch.

Python's `re` backtracks: `(a+)+$` takes years on thirty characters, holding the interpreter lock. Here a pattern
becomes a nondeterministic automaton whose states are walked all at once (Thompson, 1968), so a match costs at most the
length of the text times the size of the pattern, and both are bounded.

Understood: literals, `.`, classes, `\d \w \s` and their opposites, groups `(…)`, `(?:…)`, `(?P<name>…)`, `|`, the
repetitions `* + ? {m} {m,} {m,n}` (lazy ones too: whether the whole text matches does not depend on it), and
`^ $ \A \Z \b \B`. Refused: look-around, back-references and flags.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NoReturn

MAX_LENGTH = 2048
MAX_STATES = 4096
_MAX_DEPTH = 40
_DIGITS = (("0", "9"),)
_WORD = (("0", "9"), ("A", "Z"), ("a", "z"), ("_", "_"))
_SPACE = (("\t", "\r"), (" ", " "))
_LITERAL_ESCAPES = {"n": "\n", "t": "\t", "r": "\r"}


class PatternError(ValueError):
    """The pattern is not understood, or is larger than the bounds."""


@dataclass(frozen=True, slots=True)
class _Chars:
    """One character within (or outside of) some ranges."""

    ranges: tuple[tuple[str, str], ...]
    negated: bool = False

    def __contains__(self, char: str) -> bool:
        return any(low <= char <= high for low, high in self.ranges) != self.negated


@dataclass(frozen=True, slots=True)
class _Edge:
    """A zero-width condition: `^`, `$`, `b` or `B`."""

    kind: str

    def holds(self, before: str, after: str) -> bool:
        if self.kind == "^":
            return before == ""
        if self.kind == "$":
            return after == ""
        is_boundary = (before != "" and before in _CLASSES["w"]) != (after != "" and after in _CLASSES["w"])
        return is_boundary == (self.kind == "b")


@dataclass(frozen=True, slots=True)
class _Sequence:
    parts: tuple[_Node, ...]


@dataclass(frozen=True, slots=True)
class _Choice:
    options: tuple[_Node, ...]


@dataclass(frozen=True, slots=True)
class _Repeat:
    part: _Node
    least: int
    most: int | None  # None is without end


_Node = _Chars | _Edge | _Sequence | _Choice | _Repeat
_CLASSES = {
    "d": _Chars(_DIGITS),
    "D": _Chars(_DIGITS, negated=True),
    "w": _Chars(_WORD),
    "W": _Chars(_WORD, negated=True),
    "s": _Chars(_SPACE),
    "S": _Chars(_SPACE, negated=True),
}
_EDGES = {"A": _Edge("^"), "Z": _Edge("$"), "b": _Edge("b"), "B": _Edge("B")}


class _Parser:
    """Recursive descent over one pattern."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self._depth = 0

    def parse(self) -> _Node:
        node = self._choice()
        if self._at < len(self._text):
            self._fail("an unmatched ')'")
        return node

    def _choice(self) -> _Node:
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            self._fail(f"groups nested deeper than {_MAX_DEPTH}")
        options = [self._sequence()]
        while self._accept("|"):
            options.append(self._sequence())
        self._depth -= 1
        return options[0] if len(options) == 1 else _Choice(tuple(options))

    def _sequence(self) -> _Node:
        parts: list[_Node] = []
        while self._at < len(self._text) and self._text[self._at] not in "|)":
            parts.append(self._repeated(self._atom()))
        return _Sequence(tuple(parts))

    def _repeated(self, part: _Node) -> _Node:
        bounds = self._bounds()
        if bounds is None:
            return part
        if isinstance(part, _Edge):
            self._fail("a repetition of nothing")
        self._accept("?")  # lazy
        if self._bounds() is not None:
            self._fail("a repetition of a repetition")
        return _Repeat(part, *bounds)

    def _bounds(self) -> tuple[int, int | None] | None:
        for sign, bounds in (("*", (0, None)), ("+", (1, None)), ("?", (0, 1))):
            if self._accept(sign):
                return bounds
        if not self._accept("{"):
            return None
        end = self._text.find("}", self._at)
        least, comma, most = self._text[self._at : end].partition(",")
        if (
            end < 0
            or not (least or comma)
            or not all(n.isascii() and n.isdigit() and len(n) < 5 for n in (least or "0", most or "0"))
        ):
            self._fail("a '{' that starts no repetition")
        self._at = end + 1
        first = int(least or "0")
        last = first if not comma else int(most) if most else None
        if last is not None and last < first:
            self._fail("a repetition whose bounds are swapped")
        return first, last

    def _atom(self) -> _Node:
        char = self._take()
        if char == "(":
            return self._group()
        if char == "[":
            return self._class()
        if char == "\\":
            return self._escape()
        if char == ".":
            return _Chars((("\n", "\n"),), negated=True)
        if char in "^$":
            return _Edge(char)
        if char in "*+?{":
            self._fail("a repetition of nothing")
        return _Chars(((char, char),))

    def _group(self) -> _Node:
        if self._accept("?"):
            if self._accept("P<"):
                end = self._text.find(">", self._at)
                if not self._text[self._at : max(end, self._at)].isidentifier():
                    self._fail("a group with a bad name")
                self._at = end + 1
            elif not self._accept(":"):
                self._fail("look-around, a flag or another special group")
        node = self._choice()
        if not self._accept(")"):
            self._fail("an unmatched '('")
        return node

    def _escape(self) -> _Node:
        char = self._take()
        if char in _CLASSES:
            return _CLASSES[char]
        if char in _EDGES:
            return _EDGES[char]
        literal = self._literal_escape(char)
        return _Chars(((literal, literal),))

    def _literal_escape(self, char: str) -> str:
        if char in _LITERAL_ESCAPES:
            return _LITERAL_ESCAPES[char]
        if char.isalnum():
            self._fail(f"a back-reference or the unknown escape \\{char}")
        return char

    def _class(self) -> _Node:
        negated = self._accept("^")
        ranges: list[tuple[str, str]] = []
        while not ranges or not self._accept("]"):
            low = self._take()
            if low == "\\":
                low = self._take()
                if low in ("d", "w", "s"):
                    ranges += _CLASSES[low].ranges
                    continue
                low = self._literal_escape(low)
            high = low
            if self._text[self._at : self._at + 1] == "-" and self._text[self._at + 1 : self._at + 2] not in ("]", ""):
                self._at += 1
                high = self._take()
                if high == "\\":
                    high = self._literal_escape(self._take())
            if high < low:
                self._fail("a class with a range whose ends are swapped")
            ranges.append((low, high))
        return _Chars(tuple(ranges), negated)

    def _take(self) -> str:
        if self._at >= len(self._text):
            self._fail("an end where more must follow")
        self._at += 1
        return self._text[self._at - 1]

    def _accept(self, token: str) -> bool:
        found = self._text.startswith(token, self._at)
        self._at += len(token) * found
        return found

    def _fail(self, what: str) -> NoReturn:
        raise PatternError(f"it has {what}")


@dataclass(slots=True)
class Pattern:
    """A compiled pattern. `cost` counts the states that were walked so far, over all texts."""

    source: str
    cost: int = 0
    # State i goes to `_next[i]`, for _Chars if they hold the next character, for _Edge if it holds, for None freely.
    _labels: list[_Chars | _Edge | None] = field(default_factory=list)
    _next: list[tuple[int, ...]] = field(default_factory=list)
    _start: int = 0
    # Module paths are much alike, so nearly every step of a later path was made by an earlier one.
    _steps: dict[tuple[frozenset[int], str, str], frozenset[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.source) > MAX_LENGTH:
            raise PatternError(f"it has over {MAX_LENGTH} characters")
        accept = self._state(None, ())
        self._start = self._build(_Parser(self.source).parse(), accept)

    def fullmatch(self, text: str) -> bool:
        """Whether the whole text matches."""
        current, before = frozenset((self._start,)), ""
        for char in text:
            current, before = self._step(current, before, char), char
            if not current:
                return False
        return 0 in self._closure(current, before, "")

    def _step(self, current: frozenset[int], before: str, char: str) -> frozenset[int]:
        key = (current, before, char)
        if key not in self._steps:
            reached: set[int] = set()
            for state in self._closure(current, before, char):
                label = self._labels[state]
                if isinstance(label, _Chars) and char in label:
                    reached.update(self._next[state])
            self._steps[key] = frozenset(reached)
        return self._steps[key]

    def _closure(self, states: frozenset[int], before: str, after: str) -> set[int]:
        """The states and everything that is reached from them without reading a character."""
        seen, todo = set(states), list(states)
        while todo:
            state = todo.pop()
            label = self._labels[state]
            if label is None or (isinstance(label, _Edge) and label.holds(before, after)):
                fresh = [target for target in self._next[state] if target not in seen]
                seen.update(fresh)
                todo += fresh
        self.cost += len(seen)
        return seen

    def _state(self, label: _Chars | _Edge | None, targets: tuple[int, ...]) -> int:
        if len(self._labels) >= MAX_STATES:
            raise PatternError(f"it grows to over {MAX_STATES} states")
        self._labels.append(label)
        self._next.append(targets)
        return len(self._labels) - 1

    def _build(self, node: _Node, then: int) -> int:
        """Add the states of a node that go on to `then`; its first state."""
        if isinstance(node, (_Chars, _Edge)):
            return self._state(node, (then,))
        if isinstance(node, _Sequence):
            for part in reversed(node.parts):
                then = self._build(part, then)
            return then
        if isinstance(node, _Choice):
            return self._state(None, tuple(self._build(option, then) for option in node.options))
        if node.most is None:
            loop = self._state(None, ())
            self._next[loop] = (self._build(node.part, loop), then)
            then = loop
        else:
            end = then
            for _ in range(node.most - node.least):
                then = self._state(None, (self._build(node.part, then), end))
        for _ in range(node.least):
            then = self._build(node.part, then)
        return then
