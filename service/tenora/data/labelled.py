"""Rows that a head learns from: labelled texts and conversations, and pairs of texts. Free of torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import msgspec

from tenora.data.labels import MAX_LABEL, class_name, number_of
from tenora.data.messages import check_messages, check_tools
from tenora.data.row_fields import text_field
from tenora.data.rows import ChatRow, Label, LabelledRow, PairRow, ReadRow, Row, RowChecker, TextRow, kind_of

MAX_NEGATIVES = 16
"""Of a pair: each is read like the anchor itself."""
_WHAT = "a class (a string, true or false, a whole number), a number, or a list of classes"


def labelled_text(value: Mapping[str, Any], checker: RowChecker) -> Row | None:
    """See `tenora.data.forms.Form`."""
    return _labelled(TextRow(text_field(value, "text", checker)), value, checker)


def labelled_prompt(value: Mapping[str, Any], checker: RowChecker) -> Row | None:
    """The same by another name: public data sets of ratings call it so."""
    return _labelled(TextRow(text_field(value, "prompt", checker)), value, checker)


def labelled_messages(value: Mapping[str, Any], checker: RowChecker) -> Row | None:
    """Whoever speaks last: of a user's message it may be an intent, of an answer its quality."""
    tools = check_tools(value.get("tools"), "tools", checker)
    checked = check_messages(value["messages"], "messages", checker, weighted=False)
    return None if checked is None else _labelled(ChatRow(checked[0], checked[1], tools), value, checker)


def pair(value: Mapping[str, Any], checker: RowChecker) -> Row | None:
    """Two texts that belong together, and perhaps others that do not."""
    anchor, positive = (text_field(value, key, checker) for key in ("anchor", "positive"))
    if anchor == positive and not checker.issues:
        checker.report("no_trainable_tokens", "`anchor` and `positive` are equal, so the row says nothing; remove it.")
    texts = [anchor, positive, *_negatives(value, checker)]
    return PairRow(tuple(ReadRow(TextRow(text)) for text in texts))


def alike(row: Row) -> str:
    """What all rows of a file must have in common beyond their form, in words; empty if that is nothing."""
    if isinstance(row, PairRow):
        count = len(row.texts) - 2
        return f"{count or 'no'} negative{'' if count == 1 else 's'}"
    if not isinstance(row, LabelledRow):
        return ""
    if isinstance(row.label, tuple):
        return "a list of classes as its label"
    kinds: Mapping[type, str] = {str: "a string", bool: "true or false"}
    return f"{kinds.get(type(row.label), 'a number')} as its label"


def _labelled(content: ChatRow | TextRow, value: Mapping[str, Any], checker: RowChecker) -> Row | None:
    label = _label(value["label"], checker)
    return None if label is None else LabelledRow(ReadRow(content), label)


def _label(label: Any, checker: RowChecker) -> Label | None:
    """A label as it is; of a list the names. None if `checker` says what is wrong with it."""
    if isinstance(label, str) and label.startswith("[") and label.endswith("]"):
        label = _from_cell(label)
    if isinstance(label, list):
        return _classes(label, checker)
    if isinstance(label, str):
        return label if _is_name(label, "label", checker) else None
    if isinstance(label, float) and not math.isfinite(label):
        checker.report("data_type", f"`label` is {label}, which nothing can be learned from; remove the row.")
        return None
    if not isinstance(label, bool | int | float):
        checker.report("data_type", f"`label` is {kind_of(label)}; make it {_WHAT}.")
        return None
    if isinstance(label, int) and abs(label) > 2**53:
        checker.report("data_type", "`label` is a whole number beyond 2^53; write it as a string if it names a class.")
        return None
    return label


def _classes(labels: list[Any], checker: RowChecker) -> Label | None:
    if not labels:
        checker.report(
            "missing_content",
            '`label` is an empty list; where a row is of no class, name one for that, such as ["none"].',
        )
        return None
    if len({type(label) for label in labels}) > 1 or not isinstance(labels[0], str | bool | int):
        checker.report("data_type", "`label` must be a list of classes of one kind: strings, or whole numbers.")
        return None
    names = tuple(dict.fromkeys(class_name(label) for label in labels))
    return names if all(_is_name(name, "label", checker) for name in names) else None


def _is_name(name: str, key: str, checker: RowChecker) -> bool:
    """Whether a text may name a class, or what is wrong with it is reported."""
    if not name.strip():
        checker.report("missing_content", f"`{key}` is empty; name the class, or remove the row.")
    elif len(name) > MAX_LABEL:
        checker.report("too_long", f"`{key}` has {len(name)} characters; a class has at most {MAX_LABEL}.")
    elif math.isnan(number_of(name, otherwise=0.0)):
        checker.report("data_type", f"`{key}` is {name!r}, which is neither a number nor a class; remove the row.")
    return not checker.issues


def _from_cell(text: str) -> Any:
    """The list that a cell of a table writes as JSON; the text itself if it is none."""
    try:
        return msgspec.json.decode(text)
    except msgspec.DecodeError:
        return text


def _negatives(value: Mapping[str, Any], checker: RowChecker) -> list[str]:
    one, many = value.get("negative"), value.get("negatives")
    if one is not None and many is not None:
        checker.report("ambiguous_format", "The row has `negative` and `negatives`; write all of them in `negatives`.")
        return []
    if one is not None:
        return [text_field(value, "negative", checker)]
    if many is None:
        return []
    if not isinstance(many, list) or not all(isinstance(text, str) and text for text in many):
        checker.report("data_type", "`negatives` must be a list of strings that are not empty.")
        return []
    if len(many) > MAX_NEGATIVES:
        checker.report("too_long", f"The row has {len(many)} negatives and may have {MAX_NEGATIVES}; keep the hardest.")
    return many
