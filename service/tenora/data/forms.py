"""The forms that a row may have: told apart by their keys, never guessed. Free of torch.

| form | keys | becomes |
| --- | --- | --- |
| chat | `messages`, optionally `tools` | a conversation |
| prompt and completion | `prompt`, `completion` | text and its continuation |
| text | `text` | text that is learned throughout |
| Alpaca | `instruction`, `output`, optionally `input`, `system` | a conversation |
| ShareGPT | `conversations` of `{from, value}`, optionally `system`, `tools` | a conversation |
| preference (OpenAI) | `input` {`messages`, `tools`}, `preferred_output`, `non_preferred_output` | a pair |
| preference (TRL) | `prompt`, `chosen`, `rejected`: three strings, or lists of messages | a pair |
| preference, its prompt within | `chosen`, `rejected`, which both begin with the prompt | a pair |
| labelled | `label`, and `text`, `messages` (optionally `tools`) or `prompt` | what a head reads, and says |
| pair | `anchor`, `positive`, optionally `negatives` (a list) or `negative` | texts that a head tells apart |

Some public data sets say a thing twice: `prompt` beside `messages`, `messages` beside `chosen`, `text` beside Alpaca's
keys. That is read if the two agree. Keys that belong to no form, such as `id`, are ignored, and a key whose value is
null counts as absent. A row that carries keys of two forms, or keys that ask for what is not done
(`tenora.data.unserved`) is refused: training on a rejected answer because its key was ignored would be worse than
an error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tenora.data.labelled import labelled_messages, labelled_prompt, labelled_text, pair
from tenora.data.messages import Checked, check_messages, check_tools, from_sharegpt
from tenora.data.preferences import implicit_preference, openai_preference, prompt_is_in, trl_preference
from tenora.data.row_fields import quoted, text_field, without_nulls
from tenora.data.rows import (
    ANSWERS,
    LABELLED,
    PAIRS,
    PREFERENCES,
    ChatRow,
    CompletionRow,
    Row,
    RowChecker,
    RowFormat,
    RowKind,
    TextRow,
    kind_of,
)
from tenora.data.unserved import UNSERVED, refuse_unserved


@dataclass(frozen=True, slots=True)
class Form:
    """One form.

    Attributes:
        title: how it is called in messages.
        required, optional: its keys.
        repeated: keys that may stand beside them, and say again what they say.
        structured: those of them that hold lists or objects; a CSV cell writes them as JSON.
        parse: makes the row, or reports why it cannot be made.
        kind: what its rows are to a method.
    """

    title: str
    required: tuple[str, ...]
    parse: Callable[[Mapping[str, Any], RowChecker], Row | None]
    optional: tuple[str, ...] = ()
    repeated: tuple[str, ...] = ()
    structured: tuple[str, ...] = ()
    kind: RowKind = ANSWERS

    @property
    def keys(self) -> frozenset[str]:
        """All of its keys."""
        return frozenset(self.required + self.optional)


def parse_row(value: Any, checker: RowChecker) -> tuple[RowFormat, Row] | None:
    """The row that a JSON value stands for, with its form; None if `checker` says why there is none."""
    if not isinstance(value, dict):
        checker.report("data_type", f"The row is {kind_of(value)}; make it an object with the keys of {_any_form()}.")
        return None
    try:
        value = without_nulls(value)
    except RecursionError as error:
        checker.report("bad_json", f"In the row {error}; make it flatter.")
        return None
    form = _detect(value, checker)
    if form is None:
        return None
    refuse_unserved(value, checker)
    row = FORMS[form].parse(value, checker)
    return None if row is None or checker.issues else (form, row)


def check_columns(columns: Sequence[str], checker: RowChecker) -> RowFormat | None:
    """The form that the columns of a table make; None if `checker` says why they make none."""
    twice = sorted(key for key in FORM_KEYS if columns.count(key) > 1)
    if twice:
        checker.report("ambiguous_format", f"The column `{twice[0]}` appears twice; remove one.")
        return None
    return _detect(dict.fromkeys(columns, True), checker)


def column_names(columns: Sequence[str]) -> list[str]:
    """The columns of a table as the keys that they mean: spreadsheets write them with capitals and spaces."""
    meant = [(name.strip(), name.strip().lower()) for name in columns]
    return [lower if lower in TABLE_KEYS else name for name, lower in meant]


def _detect(value: Mapping[str, Any], checker: RowChecker) -> RowFormat | None:
    found = {key for key in FORM_KEYS if value.get(key) is not None and (key != "history" or value[key])}
    if not found - {"system", "tools"}:
        keys = ", ".join(f"`{str(key)[:40]}`" for key in list(value)[:6]) or "none"
        lower = " Keys are written in lower case." if {str(key).lower() for key in value} & _REQUIRED else ""
        checker.report(
            "missing_messages_list", f"The row (its keys: {keys}) has the keys of no form; use {_any_form()}.{lower}"
        )
        return None
    if {"label", "completion"} <= found:
        checker.report(
            "ambiguous_format",
            "The row has a `label` beside `completion`; answers that are labelled good or bad cannot be trained on "
            "yet. Remove `label` to learn the answer, or `completion` to learn the label of `prompt`.",
        )
        return None
    for name, form in FORMS.items():
        if found.issuperset(form.required) and found <= form.keys.union(form.repeated):
            return name
    if fitting := [name for name, form in FORMS.items() if found <= form.keys]:
        _report_incomplete(found, fitting, checker)
    else:
        _report_mixture(found, checker)
    return None


def _report_incomplete(found: set[str], fitting: list[RowFormat], checker: RowChecker) -> None:
    """Say what is missing for each form that the row could still become."""
    needs = [
        f"{quoted(key for key in FORMS[name].required if key not in found)} ({FORMS[name].title})" for name in fitting
    ]
    checker.report("missing_content", f"The row has {quoted(sorted(found))} and still needs {', or '.join(needs)}.")


def _report_mixture(found: set[str], checker: RowChecker) -> None:
    """Name the forms whose keys meet in the row."""
    left, forms = set(found), []
    while left & _REQUIRED:
        form = max(FORMS.values(), key=lambda form: len(left.intersection(form.required)))
        forms.append(f"{form.title} ({quoted(sorted(left & form.keys))})")
        left -= form.keys
    odd = f", and also {quoted(sorted(left))}" if left else ""
    checker.report(
        "ambiguous_format",
        f"The row has keys of {' and of '.join(forms)}{odd}; keep those of one form and remove the rest.",
    )


def _chat(value: Mapping[str, Any], checker: RowChecker) -> Row | None:
    tools = check_tools(value.get("tools"), "tools", checker)
    checked = check_messages(value["messages"], "messages", checker)
    if checked is not None and "prompt" in value and not prompt_is_in(value["prompt"], checked[0]):
        checker.report(
            "ambiguous_format",
            "The row has `prompt` beside `messages`, and the conversation does not begin with it; remove one of them.",
        )
    return _supervised_chat(checked, tools, checker)


def _sharegpt(value: Mapping[str, Any], checker: RowChecker) -> Row | None:
    tools = check_tools(value.get("tools"), "tools", checker)
    turns = from_sharegpt(value["conversations"], checker)
    if checker.issues:
        return None
    checked = check_messages(turns, "conversations", checker)
    return _supervised_chat(_with_system(value, checked, checker), tools, checker)


def _alpaca(value: Mapping[str, Any], checker: RowChecker) -> Row | None:
    instruction = text_field(value, "instruction", checker)
    given = text_field(value, "input", checker, may_be_empty=True) if value.get("input") is not None else ""
    answer = text_field(value, "output", checker)
    if not all(part in str(value.get("text", part)) for part in (instruction, given, answer)):
        checker.report(
            "ambiguous_format",
            "The row has `text` beside `instruction` and `output`, and it does not hold them; remove one of them.",
        )
    question = f"{instruction}\n\n{given}" if given else instruction
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return _supervised_chat(_with_system(value, (messages, (False, True)), checker), None, checker)


def _with_system(value: Mapping[str, Any], checked: Checked | None, checker: RowChecker) -> Checked | None:
    """The conversation with the row's own `system`, if it has one, as its first message."""
    system = text_field(value, "system", checker, may_be_empty=True) if value.get("system") is not None else ""
    if checked is None or not system:
        return checked
    messages, trained = checked
    if messages[0]["role"] == "system":
        checker.report("ambiguous_format", "The row has `system` and begins with a system message; keep one of them.")
    return [{"role": "system", "content": system}, *messages], (False, *trained)


def _supervised_chat(checked: Checked | None, tools: list[Any] | None, checker: RowChecker) -> ChatRow | None:
    if checked is None or checker.issues:
        return None
    messages, trained = checked
    if not any(message["role"] == "assistant" for message in messages):
        checker.report(
            "example_missing_assistant_message",
            "The conversation has no assistant message, so there is nothing to learn; add one.",
        )
    elif not any(trained):
        checker.report("no_trainable_tokens", "Every assistant message has `weight` 0; set it to 1 on at least one.")
    return ChatRow(messages, trained, tools)


def _prompt_completion(value: Mapping[str, Any], checker: RowChecker) -> Row | None:
    prompt = text_field(value, "prompt", checker, may_be_empty=True)
    return CompletionRow(prompt, text_field(value, "completion", checker))


def _plain_text(value: Mapping[str, Any], checker: RowChecker) -> Row | None:
    return TextRow(text_field(value, "text", checker))


def _any_form() -> str:
    return ", or ".join(f"{quoted(form.required)} ({form.title})" for form in FORMS.values())


FORMS: Mapping[RowFormat, Form] = {
    "chat": Form(
        "chat", ("messages",), _chat, optional=("tools",), repeated=("prompt",), structured=("messages", "tools")
    ),
    "prompt_completion": Form("prompt and completion", ("prompt", "completion"), _prompt_completion),
    "text": Form("text", ("text",), _plain_text),
    "alpaca": Form("Alpaca", ("instruction", "output"), _alpaca, optional=("input", "system"), repeated=("text",)),
    "sharegpt": Form(
        "ShareGPT",
        ("conversations",),
        _sharegpt,
        optional=("system", "tools"),
        structured=("conversations", "tools"),
    ),
    "preference": Form(
        "OpenAI preference",
        ("input", "preferred_output", "non_preferred_output"),
        openai_preference,
        structured=("input", "preferred_output", "non_preferred_output"),
        kind=PREFERENCES,
    ),
    "trl_preference": Form(
        "TRL preference",
        ("prompt", "chosen", "rejected"),
        trl_preference,
        optional=("tools",),
        repeated=("messages",),
        kind=PREFERENCES,
    ),
    "implicit_preference": Form(
        "preference with its prompt within",
        ("chosen", "rejected"),
        implicit_preference,
        optional=("tools",),
        repeated=("messages",),
        kind=PREFERENCES,
    ),
    "labelled_text": Form("labelled text", ("text", "label"), labelled_text, kind=LABELLED),
    "labelled_messages": Form(
        "labelled chat",
        ("messages", "label"),
        labelled_messages,
        optional=("tools",),
        structured=("messages", "tools"),
        kind=LABELLED,
    ),
    "labelled_prompt": Form("labelled prompt", ("prompt", "label"), labelled_prompt, kind=LABELLED),
    "pair": Form(
        "pair",
        ("anchor", "positive"),
        pair,
        optional=("negatives", "negative"),
        structured=("negatives",),
        kind=PAIRS,
    ),
}
_REQUIRED = frozenset(key for form in FORMS.values() for key in form.required)
FORM_KEYS = frozenset({"history"}).union(*(form.keys for form in FORMS.values()))
"""Keys that make a form. `history` (earlier turns of LLaMA-Factory's Alpaca) is in no form: a row that carries it says
something that would be lost."""
TABLE_KEYS = FORM_KEYS.union(UNSERVED)
"""Columns of a table that are read."""
