"""A JSON file that is one list of rows, in one line or many: its rows one at a time. Free of torch."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from typing import BinaryIO

from tenora.data.opening import BOM, HEAD_BYTES, UnreadableError, not_utf8
from tenora.data.records import MAX_ROW_BYTES

_SPACE = " \t\r\n"


def is_json_list(head: bytes) -> bool:
    """Whether text begins a JSON list."""
    return head.removeprefix(BOM).lstrip().startswith(b"[")


def json_list_items(file: BinaryIO) -> Iterator[str]:
    """The text of each item of the list.

    Raises:
        UnreadableError: from here on it is not a JSON list.
    """
    return _ListReader(file).items()


class _ListReader:
    """Holds the item that is being read, and no more of the file than a piece beyond it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._values = json.JSONDecoder()
        self._text, self._place = "", 0
        self._over = False

    def items(self) -> Iterator[str]:
        self._expect("[")
        if self._peek() == "]":
            self._place += 1
        else:
            yield self._item()
            while self._expect(",]") == ",":
                yield self._item()
        if self._peek():
            raise UnreadableError(
                "bad_json",
                "Something follows the end of the list; send one list, or one object per line without lists.",
            )

    def _peek(self) -> str:
        """The next character that is not white space; "" at the end."""
        while True:
            while self._place < len(self._text):
                if self._text[self._place] not in _SPACE:
                    return self._text[self._place]
                self._place += 1
            if not self._fill(HEAD_BYTES):
                return ""

    def _expect(self, characters: str) -> str:
        found = self._peek()
        if not found:
            raise UnreadableError("bad_json", "The list has no end; is the file cut off?")
        if found not in characters:
            wanted = " or ".join(repr(character) for character in characters)
            raise UnreadableError("bad_json", f"The list is not JSON: {wanted} is expected here, not {found!r}.")
        self._place += 1
        return found

    def _item(self) -> str:
        self._peek()
        while True:
            try:
                _, end = self._values.raw_decode(self._text, self._place)
            except (ValueError, RecursionError) as error:
                held = len(self._text) - self._place
                if held > MAX_ROW_BYTES:
                    raise UnreadableError(
                        "too_long", f"The row is longer than {MAX_ROW_BYTES // 2**20} MiB, or its JSON is broken."
                    ) from None
                # Doubled, so that a long item is not begun again and again.
                if isinstance(error, RecursionError) or not self._fill(max(held, HEAD_BYTES)):
                    reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
                    raise UnreadableError("bad_json", f"The row is not JSON: {reason}.") from None
            else:
                if end < len(self._text) or not self._fill(HEAD_BYTES):  # else it may be a number's first digits
                    item = self._text[self._place : end]
                    self._place = end
                    return item

    def _fill(self, count: int) -> bool:
        """Read on; False at the end of the file."""
        if self._over:
            return False
        raw = self._file.read(count)
        if not self._text and not self._place:
            raw = raw.removeprefix(BOM)
        self._over = not raw
        try:
            more = self._decoder.decode(raw, final=self._over)
        except UnicodeDecodeError as error:
            raise UnreadableError("bad_utf8", not_utf8(error.object, error.start)) from None
        self._text, self._place = self._text[self._place :] + more, 0
        return True
