"""The error tree is drawn in its own docstring, and the drawing is right."""

from __future__ import annotations

import inspect
import re

from tenora import errors


def drawn() -> dict[str, str | None]:
    """Each class of the drawing with its parent's name."""
    parents: dict[str, str | None] = {}
    path: list[tuple[int, str]] = []
    for line in (errors.__doc__ or "").splitlines():
        match = re.match(r"^([ │├└─]*)(\w+Error)\b", line)
        if match is None:
            continue
        depth = len(match.group(1))
        while path and path[-1][0] >= depth:
            path.pop()
        parents[match.group(2)] = path[-1][1] if path else None
        path.append((depth, match.group(2)))
    return parents


def test_the_drawing_is_the_tree() -> None:
    classes = {
        name: cls for name, cls in vars(errors).items() if inspect.isclass(cls) and issubclass(cls, errors.TenoraError)
    }
    real = {name: None if cls is errors.TenoraError else cls.__bases__[0].__name__ for name, cls in classes.items()}
    assert drawn() == real
