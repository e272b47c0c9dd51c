r"""Regular expressions that tenants send, read as Python reads them and matched by RE2. Free of torch.

Python's `re` backtracks: `(a+)+$` takes years on thirty characters, holding the interpreter lock. RE2 takes time in
proportion to the text, and its automata are bounded in memory. What an expression *means* is Python's, because PEFT
matches with `re`: an expression that `re` does not compile is refused, and where the two differ it is translated
(`{,n}`, `\Z`) or refused (sets within sets, back-references, look-around but for the kind below).

RE2 has no look-around. What adapters in the wild hold of it are conditions on the whole path at the start of the
expression, `^(?!.*visual).*\.q_proj`: they are cut off and matched by themselves.
"""

from __future__ import annotations

import re
from typing import Any, NoReturn

import re2

MAX_LENGTH = 2048
_MAX_MEMORY = 2**18  # bytes of one automaton: ten thousand states, 2 ms; real expressions take a few hundred
# An escape, a set, a repetition without a lower bound, or any other character.
_PIECE = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\{,(?P<most>\d+)\}|.", re.DOTALL)
_SET_OPERATIONS = (
    "[",
    "--",
    "&&",
    "~~",
    "||",
)  # within a set: RE2 reads names of classes, Python may read sets one day
# Sets of them cost Python hundredths of a second each to compile without regard to case, and RE2 has no such escapes.
_BEYOND_ASCII = re.compile(r"(?<!\\)(?:\\\\)*\\[uUN]")
_LOOK_AROUND = ("(?=", "(?!", "(?<=", "(?<!")
_OPTIONS = re2.Options()
_OPTIONS.max_mem = _MAX_MEMORY
_OPTIONS.never_capture = True
_OPTIONS.log_errors = False


class PatternError(ValueError):
    """The expression is not understood, or is larger than the bounds."""


class Pattern:
    """One compiled expression. The cost of making it is bounded; the cost of a match is linear in the text."""

    def __init__(self, text: str, *, as_suffix: bool = False) -> None:
        """Compile `text`; with `as_suffix` it need match whole trailing components of a dotted path only.

        Raises:
            PatternError: it is too long, Python does not compile it, or RE2 cannot stand for it.
        """
        if len(text) > MAX_LENGTH:
            raise PatternError(f"it has {len(text)} characters, more than {MAX_LENGTH}")
        if not (text.isascii() and text.isprintable()) or _BEYOND_ASCII.search(text):
            raise PatternError("it holds characters that no module's name has")
        pieces = _translated(text)
        _require_python(text)
        conditions: list[tuple[bool, str]] = []
        if as_suffix:
            # As PEFT puts it. By itself first: what is unbalanced must not become valid by what is put around it.
            _require_python(f"(.*\\.)?({text})$")
            body = f"(?:.*\\.)?(?:{''.join(pieces)})"
        else:
            conditions, rest = _split_conditions(pieces)
            body = "".join(rest)
        self._conditions = [(wanted, _compiled(condition)) for wanted, condition in conditions]
        self._body = _compiled(body)

    def fullmatch(self, text: str) -> bool:
        """Whether the expression matches all of `text`."""
        if any((condition.match(text) is not None) != wanted for wanted, condition in self._conditions):
            return False
        return self._body.fullmatch(text) is not None


def _translated(text: str) -> list[str]:
    """The expression in pieces, each as RE2 writes what Python means by it."""
    pieces: list[str] = []
    for match in _PIECE.finditer(text):
        piece = match[0]
        if len(piece) > 1 and piece[0] == "[" and any(operation in piece[1:-1] for operation in _SET_OPERATIONS):
            raise PatternError("it holds a set within a set")
        if match["most"] is not None:
            piece = f"{{0,{match['most']}}}"
        pieces.append(r"\z" if piece == r"\Z" else piece)
    return pieces


def _require_python(text: str) -> None:
    """Raise unless Python compiles it; the cost of that is bounded by the length, only matching may run away."""
    try:
        re.compile(text)
    except (re.error, OverflowError, RecursionError) as error:
        raise PatternError(f"Python does not read it ({error})") from error


def _split_conditions(pieces: list[str]) -> tuple[list[tuple[bool, str]], list[str]]:
    """Look-aheads at the start of an expression, each with whether it must match; and what follows them."""
    at = 1 if pieces[:1] == ["^"] else 0
    start = at
    conditions: list[tuple[bool, str]] = []
    while "".join(pieces[at : at + 3]) in ("(?=", "(?!"):
        end = _closing(pieces, at)
        conditions.append((pieces[at + 2] == "=", "".join(pieces[at + 3 : end])))
        at = end + 1
    rest = pieces[at:]
    if conditions and _has_alternatives(rest):
        _refuse_look_around()  # a condition belongs to the first alternative only
    return conditions, pieces[:start] + rest


def _closing(pieces: list[str], opening: int) -> int:
    """Where the group that begins at `opening` ends; Python has compiled it, so it does."""
    depth = 0
    for at in range(opening, len(pieces)):
        depth += (pieces[at] == "(") - (pieces[at] == ")")
        if depth == 0:
            return at
    raise PatternError("a group is not closed")


def _has_alternatives(pieces: list[str]) -> bool:
    """Whether a `|` stands outside of all groups."""
    depth = 0
    for piece in pieces:
        depth += (piece == "(") - (piece == ")")
        if depth == 0 and piece == "|":
            return True
    return False


def _compiled(text: str) -> Any:
    try:
        return re2.compile(text, _OPTIONS)
    except re2.error as error:
        if any(opening in text for opening in _LOOK_AROUND):
            _refuse_look_around()
        reason = error.args[0]
        raise PatternError(reason.decode(errors="replace") if isinstance(reason, bytes) else str(reason)) from error


def _refuse_look_around() -> NoReturn:
    raise PatternError("look-around is read only at the start of target_modules and before no alternatives")
