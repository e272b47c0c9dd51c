"""What a row of training data is once it was read, and what may be wrong with one. Free of torch.

`tenora.data.forms` says which keys make which row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

IssueCode = Literal[
    "data_type",
    "missing_messages_list",
    "message_missing_key",
    "message_unrecognized_key",
    "unrecognized_role",
    "missing_content",
    "example_missing_assistant_message",
    "no_trainable_tokens",
    "too_long",
    "ambiguous_format",
    "bad_json",
    "bad_utf8",
    "unsupported_key",
    "too_few_examples",
    "too_many_examples",
]
RowFormat = Literal[
    "chat",
    "prompt_completion",
    "text",
    "alpaca",
    "sharegpt",
    "preference",
    "trl_preference",
    "implicit_preference",
    "labelled_text",
    "labelled_messages",
    "labelled_prompt",
    "pair",
]
_MAX_MESSAGE = 1000


@dataclass(frozen=True, slots=True)
class RowKind:
    """What rows of a form are to a method.

    Attributes:
        key: what stored rows call it.
        name: in words.
        fields: of a row, in words.
        sequences: token sequences that a row becomes; of pairs the least, since negatives come to them.
    """

    key: str
    name: str
    fields: str
    sequences: int


ANSWERS = RowKind("answers", "rows with one answer each", "messages; or prompt and completion; or text", 1)
PREFERENCES = RowKind(
    "preferences",
    "preference rows",
    "input, preferred_output and non_preferred_output; or prompt, chosen and rejected",
    2,
)
LABELLED = RowKind("labels", "labelled rows", "text, messages or prompt, and label", 1)
PAIRS = RowKind("pairs", "pairs of texts", "anchor and positive, perhaps negatives", 2)
KINDS: Mapping[str, RowKind] = MappingProxyType({kind.key: kind for kind in (ANSWERS, PREFERENCES, LABELLED, PAIRS)})


@dataclass(frozen=True, slots=True)
class RowIssue:
    """What is wrong with one row and what to do about it.

    Attributes:
        line: one-based: the line of a text file, blank ones counted; the number of the record in CSV and Parquet.
    """

    line: int
    code: IssueCode
    message: str

    def __post_init__(self) -> None:
        """Messages quote what a file holds, which may be anything; they are stored and shown as they are."""
        object.__setattr__(self, "message", _fit_to_be_shown(self.message))


@dataclass(frozen=True, slots=True)
class ChatRow:
    """A conversation ready for a chat template: every content a string; `trained[i]` says if message i is learned."""

    messages: list[dict[str, Any]]
    trained: tuple[bool, ...]
    tools: list[Any] | None = None


@dataclass(frozen=True, slots=True)
class CompletionRow:
    """Text to continue and its continuation, which is learned together with the end-of-text token."""

    prompt: str
    completion: str


@dataclass(frozen=True, slots=True)
class TextRow:
    """Text that is learned from its second token to the end-of-text token."""

    text: str


@dataclass(frozen=True, slots=True)
class PreferenceRow:
    """Two answers to one prompt: both rows begin with it, and it is not learned in either."""

    chosen: ChatRow | CompletionRow
    rejected: ChatRow | CompletionRow


@dataclass(frozen=True, slots=True)
class ReadRow:
    """A text or conversation that is read to its end, and of which nothing is learned token by token."""

    content: ChatRow | TextRow


Label = str | bool | int | float | tuple[str, ...]
"""A class, a number (which may also be meant as a class), or the distinct classes of a row, as names."""


@dataclass(frozen=True, slots=True)
class LabelledRow:
    """What is read, and what is to be said of it."""

    content: ReadRow
    label: Label


@dataclass(frozen=True, slots=True)
class PairRow:
    """Texts of which the first two belong together and the others do not belong to the first: anchor, positive, and
    negatives.
    """

    texts: tuple[ReadRow, ...]


SupervisedRow = ChatRow | CompletionRow | TextRow
Row = SupervisedRow | PreferenceRow | LabelledRow | PairRow


def _fit_to_be_shown(message: str) -> str:
    """The message within bounds, its control characters and lone surrogates written as escapes."""
    if len(message) > _MAX_MESSAGE:
        message = f"{message[:_MAX_MESSAGE]}…"
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in message)


class RowChecker:
    """Collects what is wrong with one row, each code at most once."""

    def __init__(self, line: int) -> None:
        self.line = line
        self.issues: list[RowIssue] = []

    def report(self, code: IssueCode, message: str) -> None:
        """Add an issue unless the row already has one with this code."""
        if all(issue.code != code for issue in self.issues):
            self.issues.append(RowIssue(self.line, code, message))


def kind_of(value: object) -> str:
    """The JSON name of a value's type, with its article: `a list`, `an object`, `null`."""
    if value is None:
        return "null"
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return names.get(type(value), f"a {type(value).__name__}")
