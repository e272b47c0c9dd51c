"""Events of a stream that differ in one text alone: encoded once, by their schema, and filled in from then on."""

from __future__ import annotations

import secrets
from collections.abc import Callable

from pydantic_core import to_json

from tenora.api.schemas.base import ResponseModel


class TextEvents:
    """The JSON of `event(choice, text)`, to the byte what `model_dump_json` gives, at a tenth of its cost."""

    def __init__(self, event: Callable[[int, str], ResponseModel]) -> None:
        """`event` must put the text into the event once, as it is, and nothing else may depend on it."""
        self._event = event
        self._around: dict[int, tuple[str, str]] = {}  # by choice: what stands before and after the text

    def __call__(self, choice: int, text: str) -> str:
        """The event of this choice with this text."""
        if choice not in self._around:
            mark = secrets.token_hex(16)
            before, after = self._event(choice, mark).model_dump_json().split(f'"{mark}"')
            self._around[choice] = before, after
        before, after = self._around[choice]
        return f"{before}{to_json(text).decode()}{after}"
