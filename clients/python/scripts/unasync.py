"""Makes the synchronous client of the asynchronous one: `python scripts/unasync.py`, or with `--check` only compares.

Every `async_<name>.py` of the package becomes `<name>.py`: the same source, token by token, without what makes it
asynchronous. What the two share stands in other files.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator, Sequence
from io import StringIO
from keyword import iskeyword
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "src" / "tenora_client"
NAMES = {
    "__aenter__": "__enter__",
    "__aexit__": "__exit__",
    "__aiter__": "__iter__",
    "__anext__": "__next__",
    "aclose": "close",
    "aiter_bytes": "iter_bytes",
    "anext": "next",
    "aread": "read",
    "asyncio": "time",
}
PROSE = (  # of docstrings and comments
    (r"\bAn asynchronous\b", "A synchronous"),
    (r"\basynchronous\b", "synchronous"),
    (r"\bbetween tasks\b", "between threads"),
    (r"\basync (with|for)\b", r"\1"),
    (r"\bAsync(?=[A-Z])", ""),
)


def synchronous(source: str) -> str:
    """The source without what makes it asynchronous; neither formatted nor free of unused imports."""
    tokens = list(tokenize.generate_tokens(StringIO(source).readline))
    left_out = set(_left_out(tokens))
    lines = source.splitlines(keepends=True)
    written: list[str] = []
    row, column = 1, 0
    for at, token in enumerate(tokens):
        between = "".join(_text(lines, row, column, *token.start))
        written.append("" if at - 1 in left_out and tokens[at - 1].string in {"async", "await"} else between)
        written.append("" if at in left_out else _replaced(token))
        row, column = token.end
    return "".join(written)


def _left_out(tokens: Sequence[tokenize.TokenInfo]) -> Iterator[int]:
    """The places of tokens that only asynchronous code has."""
    for at, token in enumerate(tokens):
        if token.type != tokenize.NAME:
            continue
        before, after = tokens[at - 1], tokens[at + 1]
        if token.string in {"async", "await"}:
            yield at
        # (await one.get()).bind(self): the parentheses were there for the await.
        if token.string == "await" and before.string == "(" and _groups(tokens[at - 2]):
            yield from (at - 1, _closing(tokens, at - 1))
        if token.string == "Awaitable" and after.string == "[":
            yield from (at, at + 1, _closing(tokens, at + 1))


def _groups(before: tokenize.TokenInfo) -> bool:
    """Whether a parenthesis after this token groups, and does not call."""
    called = before.type == tokenize.NAME and not iskeyword(before.string)
    return not called and before.string not in {")", "]"}


def _closing(tokens: Sequence[tokenize.TokenInfo], opening: int) -> int:
    """The place of the bracket that closes the one at `opening`."""
    depth = 0
    for at in range(opening, len(tokens)):
        if tokens[at].type == tokenize.OP:
            depth += (tokens[at].string in "([{") - (tokens[at].string in ")]}")
            if depth == 0:
                return at
    raise ValueError(f"line {tokens[opening].start[0]}: a bracket is not closed")


def _replaced(token: tokenize.TokenInfo) -> str:
    if token.type == tokenize.NAME:
        return NAMES.get(token.string) or re.sub(r"^(Async(?=[A-Z])|async_)", "", token.string)
    if token.type in {tokenize.STRING, tokenize.COMMENT}:
        text = token.string
        for pattern, replacement in PROSE:
            text = re.sub(pattern, replacement, text)
        return text
    return token.string


def _text(lines: Sequence[str], row: int, column: int, to_row: int, to_column: int) -> Iterator[str]:
    """What stands between two places: spaces, and backslashes at line ends."""
    while row < to_row:
        yield lines[row - 1][column:]
        row, column = row + 1, 0
    if row <= len(lines):
        yield lines[row - 1][column:to_column]


def generated(source: Path) -> tuple[Path, str]:
    """The file that is made of `source`, and its text, as ruff would have it."""
    target = source.with_name(source.name.removeprefix("async_"))
    text = f"# Made of {source.name} by scripts/unasync.py (`make client`): change that one.\n"
    text += synchronous(source.read_text())
    # An asynchronous generator has no `yield from`.
    text = _ruff(target, text, "check", "--fix-only", "--quiet", "--config", 'lint.extend-safe-fixes=["UP028"]')
    return target, _ruff(target, text, "format")


def _ruff(target: Path, text: str, *arguments: str) -> str:
    command = [sys.executable, "-m", "ruff", *arguments, "--stdin-filename", str(target), "-"]
    return subprocess.run(command, input=text, capture_output=True, text=True, check=True).stdout


def main() -> int:
    """Write what is not fresh, or with `--check` only say so; 1 if something was not."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing")
    check = parser.parse_args().check
    stale = 0
    for source in sorted(PACKAGE.glob("async_*.py")):
        target, text = generated(source)
        if target.exists() and target.read_text() == text:
            continue
        stale += 1
        print(f"{target.name} is not what {source.name} makes" if check else f"made {target.name}")
        if not check:
            target.write_text(text)
    return int(check and stale > 0)


if __name__ == "__main__":
    sys.exit(main())
