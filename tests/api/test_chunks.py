"""Events from a template are what the schema gives, to the byte."""

from __future__ import annotations

from hypothesis import example, given, settings
from hypothesis import strategies as st

from tenora.api.chunks import TextEvents
from tenora.api.schemas.chat import ChatChunk, ChunkChoice
from tenora.api.schemas.completions import Completion, CompletionChoice


def chat(index: int, text: str) -> ChatChunk:
    choice = ChunkChoice(index=index, delta={"content": text})
    return ChatChunk(id="chatcmpl-1", created=1, model='acme/"{desk}"', choices=[choice])


def legacy(index: int, text: str) -> Completion:
    choice = CompletionChoice(index=index, text=text, finish_reason=None)
    return Completion(id="cmpl-1", created=1, model="tiny", choices=[choice])


@settings(derandomize=True, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.text()), max_size=8))
@example([(0, '\x00\x1f\x7f\u2028"\\/\b\f\n\r\t 東 👋 \ufffd {}'), (1, "")])
def test_an_event_from_the_template_has_the_bytes_of_the_schema(pieces: list[tuple[int, str]]) -> None:
    for event in (chat, legacy):
        texts = TextEvents(event)
        for index, text in pieces:
            assert texts(index, text) == event(index, text).model_dump_json()


def test_the_schema_is_asked_once_for_each_choice_and_not_for_each_token() -> None:
    asked: list[int] = []

    def event(index: int, text: str) -> ChatChunk:
        asked.append(index)
        return chat(index, text)

    texts = TextEvents(event)
    for token in range(50):
        texts(token % 2, str(token))
    assert sorted(asked) == [0, 1]
