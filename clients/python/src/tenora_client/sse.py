"""Server-sent events, parsed as bytes arrive (WHATWG HTML, section 9.2.6, "Interpreting an event stream")."""

from __future__ import annotations

import codecs
import re

_LINE_END = re.compile(r"\r\n|\n|\r")


class EventParser:
    """Turns a byte stream, cut anywhere, into the `data` of its events.

    Lines end with LF, CR or CRLF and with nothing else: U+2028 and its like, at which `str.splitlines` would cut, are
    content. An event that the stream's end cuts off is dropped, as the standard says.
    """

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")(errors="replace")
        self._pieces: list[str] = []  # of the line that is still open; joined once, so a long line costs linear time
        self._after_cr = False
        self._data: list[str] = []

    def feed(self, chunk: bytes) -> list[str]:
        """The data of each event that `chunk` completes, in order."""
        text = self._decoder.decode(chunk)
        if not text:
            return []
        if self._after_cr:
            # The CR ended its line when it came; an LF that follows it belongs to the same line end.
            text = text.removeprefix("\n")
        self._after_cr = text.endswith("\r")
        events, start = [], 0
        for end in _LINE_END.finditer(text):
            line = "".join((*self._pieces, text[start : end.start()]))
            self._pieces.clear()
            start = end.end()
            data = self._take(line)
            if data is not None:
                events.append(data)
        if start < len(text):
            self._pieces.append(text[start:])
        return events

    def _take(self, line: str) -> str | None:
        """Apply one line; the event's data if the line ends an event that has some."""
        if not line:
            data, self._data = self._data, []
            return "\n".join(data) if data else None
        field, _, value = line.partition(":")
        if field == "data":
            self._data.append(value.removeprefix(" "))
        return None  # comments (no field name) and the fields event, id and retry carry nothing that we use
