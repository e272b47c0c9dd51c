"""Stop strings, whatever the pieces: equal to a scan of the text one character at a time."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tenora.control.inference.stops import StopScanner


def slowly(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    """What it means: the first moment at which the text so far ends with a stop string, the longest such one."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if stop and text[:end].endswith(stop)]
        if found:
            stop = max(found, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


def feed(scanner: StopScanner, parts: list[str]) -> list[str]:
    shown = []
    for part in parts:
        shown.append(scanner.feed(part))
        if scanner.matched is not None:
            return shown
    return [*shown, scanner.flush()]


letters = st.text(alphabet="ab·", max_size=6)


@given(st.lists(letters, max_size=12), st.lists(letters, max_size=4), st.booleans())
def test_pieces_do_not_matter(parts: list[str], stops: list[str], include: bool) -> None:
    scanner = StopScanner(stops, include=include)
    assert ("".join(feed(scanner, parts)), scanner.matched) == slowly("".join(parts), stops, include)


@given(st.lists(letters, max_size=12), st.lists(letters.filter(bool), min_size=1, max_size=4))
def test_no_beginning_of_a_stop_string_is_shown(parts: list[str], stops: list[str]) -> None:
    """After each piece: what was shown does not end with something that a stop string could go on from."""
    scanner, shown, text = StopScanner(stops), "", ""
    for part in parts:
        shown += scanner.feed(part)
        text += part
        if scanner.matched is not None:
            return
        held = text[len(shown) :]
        begun = [n for n in range(1, len(text) + 1) if any(s.startswith(text[-n:]) and s != text[-n:] for s in stops)]
        assert len(held) == max(begun, default=0)


def test_examples() -> None:
    scanner = StopScanner(["\nUser:", "END"])
    assert [scanner.feed(part) for part in ("Hello", "\n", "Us", "ing E", "N")] == ["Hello", "", "", "\nUsing ", ""]
    assert scanner.feed("D and more") == ""
    assert scanner.matched == "END"


def test_skipped_text_is_shown_whole() -> None:
    scanner = StopScanner(["stop"])
    assert scanner.feed("st") == ""
    assert scanner.skip("op!") == "stop!"
    assert scanner.feed("stop") == ""
    assert scanner.matched == "stop"


@pytest.mark.parametrize("stops", [[], [""]])
def test_without_stop_strings(stops: list[str]) -> None:
    scanner = StopScanner(stops)
    assert scanner.feed("anything") == "anything"
    assert scanner.flush() == ""
