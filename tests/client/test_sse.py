"""The event parser: the same events wherever the bytes are cut."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tenora_client.sse import EventParser

STREAM = (
    "\ufeffdata: one\n\n"
    ": a comment\r\n"
    "data:two\r\n\r\n"
    "event: x\rdata: thr\u2028ee\u0085\rdata: and more, 東京 🙂\r\r"
    "id: 7\n\n"
    "data\n\n"
    "data:  spaced: \n\n"
    "data: [DONE]\n\n"
    "data: cut off by the end"
).encode()
EVENTS = ["one", "two", "thr\u2028ee\u0085\nand more, 東京 🙂", "", " spaced: ", "[DONE]"]


def parse(pieces: list[bytes]) -> list[str]:
    parser = EventParser()
    return [event for piece in pieces for event in parser.feed(piece)]


def test_a_stream_in_one_piece() -> None:
    assert parse([STREAM]) == EVENTS


def test_a_stream_byte_by_byte() -> None:
    assert parse([STREAM[i : i + 1] for i in range(len(STREAM))]) == EVENTS


@given(st.lists(st.integers(0, len(STREAM)), max_size=12))
def test_a_stream_cut_anywhere(cuts: list[int]) -> None:
    bounds = [0, *sorted(cuts), len(STREAM)]
    assert parse([STREAM[a:b] for a, b in itertools.pairwise(bounds)]) == EVENTS


def test_events_come_as_soon_as_their_blank_line_does() -> None:
    parser = EventParser()
    assert parser.feed(b"data: a\r\n\r") == ["a"]
    assert parser.feed(b"\ndata: b\n") == []
    assert parser.feed(b"\n") == ["b"]


@pytest.mark.parametrize("end", [b"\n", b"\r", b"\r\n"])
def test_every_line_end_of_the_standard(end: bytes) -> None:
    assert parse([b"data: a" + end + b"data: b" + end + end]) == ["a\nb"]
