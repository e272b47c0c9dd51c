"""The forms that a row may have: told apart by their keys, never guessed. Free of torch.

| form | keys | becomes |
| --- | --- | --- |
| chat | `messages`, optionally `tools` | a conversation |
| prompt and completion | `prompt`, `completion` | text and its continuation |
| text | `text` | text that is learned throughout |
| Alpaca | `instruction`, `output`, optionally `input`, `system` | a conversation |
| ShareGPT | `conversations` of `{from, value}`, optionally `system`, `tools` | a conversation |
| preference (OpenAI) | `input` {`messages`, `tools`}, `preferred_output`, `non_preferred_output` | a pair |
| preference (TRL) | `prompt`, `chosen`, `rejected`: three strings, or three lists of messages | a pair |

Keys that belong to no form, such as `id`, are ignored, and a key whose value is null counts as absent. A row that
carries keys of two forms, or labels, is refused: training on a rejected answer because its key was ignored would be
worse than an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tenora.training.messages import Checked, check_messages, check_tools, from_sharegpt
from tenora.training.rows import (
    ChatRow,
    CompletionRow,
    PreferenceRow,
    Row,
    RowChecker,
    RowFormat,
    TextRow,
    kind_of,
)


@dataclass(frozen=True, slots=True)
class Form:
    """One form.

    Attributes:
        title: how it is called in messages.
        required, optional: its keys.
        structured: those of them that hold lists or objects; a CSV cell writes them as JSON.
        parse: makes the row, or reports why it cannot be made.
    """

    title: str
    required: tuple[str, ...]
    parse: Callable[[Mapping[str, Any], RowChecker], Row | None]
    optional: tuple[str, ...] = ()
    structured: tuple[str, ...] = ()

    @property
    def keys(self) -> frozenset[str]:
        """All of its keys."""
        return frozenset(self.required + self.optional)


def parse_row(value: Any, checker: RowChecker) -> tuple[RowFormat, Row] | None:
    """The row that a JSON value stands for, with its form; None if `checker` says why there is none."""
    if not isinstance(value, dict):
        checker.report("data_type", f"The row is {kind_of(value)}; make it an object with the keys of {_any_form()}.")
        return None
    form = _detect(value, checker)
    if form is None:
        return None
    row = FORMS[form].parse(value, checker)
    return None if row is None or checker.issues else (form, row)


def check_columns(columns: Sequence[str], checker: RowChecker) -> RowFormat | None:
    """The form that the columns of a table make; None if `checker` says why they make none."""
    twice = sorted(key for key in FORM_KEYS if columns.count(key) > 1)
    if twice:
        checker.report("ambiguous_format", f"The column `{twice[0]}` appears twice; remove one.")
        return None
    return _detect(dict.fromkeys(columns, True), checker)


def _detect(value: Mapping[str, Any], checker: RowChecker) -> RowFormat | None:
    found = {key for key in FORM_KEYS if value.get(key) is not None and (key != "history" or value[key])}
    if not found - {"system", "tools"}:
        keys = ", ".join(f"`{str(key)[:40]}`" for key in list(value)[:6]) or "none"
        checker.report(
            "missing_messages_list", f"The row (its keys: {keys}) has the keys of no form; use {_any_form()}."
        )
        return None
    if "label" in found:
        checker.report(
            "ambiguous_format",
            "The row has a `label`; labelled rows cannot be trained on yet. Remove it to learn the rest.",
        )
        return None
    fitting = [name for name, form in FORMS.items() if found <= form.keys]
    for name in fitting:
        if found.issuperset(FORMS[name].required):
            return name
    if fitting:
        _report_incomplete(found, fitting, checker)
    else:
        _report_mixture(found, checker)
    return None


def _report_incomplete(found: set[str], fitting: list[RowFormat], checker: RowChecker) -> None:
    """Say what is missing for each form that the row could still become."""
    if found == {"chosen", "rejected"}:
        checker.report(
            "missing_content", "`prompt` is missing; put there what `chosen` and `rejected` both begin with."
        )
        return
    needs = [
        f"{_quoted(key for key in FORMS[name].required if key not in found)} ({FORMS[name].title})" for name in fitting
    ]
    checker.report("missing_content", f"The row has {_quoted(sorted(found))} and still needs {', or '.join(needs)}.")


def _report_mixture(found: set[str], checker: RowChecker) -> None:
    """Name the forms whose keys meet in the row."""
    left, forms = set(found), []
    while left & _REQUIRED:
        form = max(FORMS.values(), key=lambda form: len(left.intersection(form.required)))
        forms.append(f"{form.title} ({_quoted(sorted(left & form.keys))})")
        left -= form.keys
    odd = f", and also {_quoted(sorted(left))}" if left else ""
    checker.report(
        "ambiguous_format",
        f"The row has keys of {' and of '.join(forms)}{odd}; keep those of one form and remove the rest.",
    )


def _chat(value: Mapping[str, Any], checker: RowChecker) -> Row | None:
    tools = check_tools(value.get("tools"), "tools", checker)
    return _supervised_chat(check_messages(value["messages"], "messages", checker), tools, checker)


def _sharegpt(value: Mapping[str, Any], checker: RowChecker) -> Row | None:
    tools = check_tools(value.get("tools"), "tools", checker)
    turns = from_sharegpt(value["conversations"], checker)
    if checker.issues:
        return None
    checked = check_messages(turns, "conversations", checker)
    return _supervised_chat(_with_system(value, checked, checker), tools, checker)


def _alpaca(value: Mapping[str, Any], checker: RowChecker) -> Row | None:
    instruction = _text(value, "instruction", checker)
    given = _text(value, "input", checker, may_be_empty=True) if value.get("input") is not None else ""
    answer = _text(value, "output", checker)
    question = f"{instruction}\n\n{given}" if given else instruction
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return _supervised_chat(_with_system(value, (messages, (False, True)), checker), None, checker)


def _with_system(value: Mapping[str, Any], checked: Checked | None, checker: RowChecker) -> Checked | None:
    """The conversation with the row's own `system`, if it has one, as its first message."""
    system = _text(value, "system", checker, may_be_empty=True) if value.get("system") is not None else ""
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
    prompt = _text(value, "prompt", checker, may_be_empty=True)
    return CompletionRow(prompt, _text(value, "completion", checker))


def _plain_text(value: Mapping[str, Any], checker: RowChecker) -> Row | None:
    return TextRow(_text(value, "text", checker))


def _openai_preference(value: Mapping[str, Any], checker: RowChecker) -> Row | None:
    prompt = value["input"]
    if not isinstance(prompt, dict):
        checker.report("data_type", f"`input` is {kind_of(prompt)}; make it an object with `messages`.")
        return None
    unknown = sorted(prompt.keys() - {"messages", "tools", "parallel_tool_calls"})
    if unknown:
        checker.report(
            "message_unrecognized_key", f"`input` has the key `{unknown[0][:40]}`, which it may not have; remove it."
        )
    tools = check_tools(prompt.get("tools"), "input.tools", checker)
    return _conversations(
        check_messages(prompt.get("messages"), "input.messages", checker, weighted=False),
        {key: value[key] for key in ("preferred_output", "non_preferred_output")},
        tools,
        checker,
    )


def _trl_preference(value: Mapping[str, Any], checker: RowChecker) -> Row | None:
    tools = check_tools(value.get("tools"), "tools", checker)
    if all(isinstance(value[key], list) for key in ("prompt", "chosen", "rejected")):
        prompt = check_messages(value["prompt"], "prompt", checker, weighted=False)
        return _conversations(prompt, {key: value[key] for key in ("chosen", "rejected")}, tools, checker)
    kinds = {key: kind_of(value[key]) for key in ("prompt", "chosen", "rejected")}
    if set(kinds.values()) != {"a string"}:
        said = ", ".join(f"`{key}` is {kind}" for key, kind in kinds.items())
        checker.report("data_type", f"{said}; make them three strings or three lists of messages.")
        return None
    if tools is not None:
        checker.report("data_type", "`tools` go with lists of messages; put their description into the prompt.")
    prompt_text = value["prompt"]
    chosen, rejected = (CompletionRow(prompt_text, _text(value, key, checker)) for key in ("chosen", "rejected"))
    return _pair(chosen, rejected, ("chosen", "rejected"), checker)


def _conversations(
    prompt: Checked | None, answers: Mapping[str, Any], tools: list[Any] | None, checker: RowChecker
) -> PreferenceRow | None:
    """A prompt and two answers, each a list of messages that begins with one of the assistant."""
    rows = []
    for key, messages in answers.items():
        answer = check_messages(messages, key, checker, weighted=False)
        if answer is not None and answer[0][0]["role"] != "assistant":
            checker.report(
                "unrecognized_role",
                f"{key}[0] has the role {answer[0][0]['role']!r}; an answer begins with an assistant message, and the "
                "prompt is not repeated in it.",
            )
        if prompt is not None and answer is not None:
            rows.append(ChatRow(prompt[0] + answer[0], (False,) * len(prompt[0]) + answer[1], tools))
    if checker.issues:
        return None
    first, second = answers
    return _pair(rows[0], rows[1], (first, second), checker)


def _pair(
    chosen: ChatRow | CompletionRow, rejected: ChatRow | CompletionRow, keys: tuple[str, str], checker: RowChecker
) -> PreferenceRow:
    if chosen == rejected:
        checker.report(
            "no_trainable_tokens", f"{_quoted(keys)} are equal, so the row says nothing about preference; remove it."
        )
    return PreferenceRow(chosen, rejected)


def _text(value: Mapping[str, Any], key: str, checker: RowChecker, *, may_be_empty: bool = False) -> str:
    """The string under a key; what is wrong with it is reported, and then "" is returned."""
    content = value.get(key)
    if not isinstance(content, str):
        checker.report("data_type", f"`{key}` is {kind_of(content)}; make it a string (conversations use `messages`).")
        return ""
    if not content and not may_be_empty:
        checker.report("missing_content", f"`{key}` is empty; give it some text.")
    return content


def _quoted(keys: Iterable[str]) -> str:
    names = [f"`{key}`" for key in keys]
    return " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else names[0]


def _any_form() -> str:
    return ", or ".join(f"{_quoted(form.required)} ({form.title})" for form in FORMS.values())


FORMS: Mapping[RowFormat, Form] = {
    "chat": Form("chat", ("messages",), _chat, optional=("tools",), structured=("messages", "tools")),
    "prompt_completion": Form("prompt and completion", ("prompt", "completion"), _prompt_completion),
    "text": Form("text", ("text",), _plain_text),
    "alpaca": Form("Alpaca", ("instruction", "output"), _alpaca, optional=("input", "system")),
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
        _openai_preference,
        structured=("input", "preferred_output", "non_preferred_output"),
    ),
    "trl_preference": Form("TRL preference", ("prompt", "chosen", "rejected"), _trl_preference, optional=("tools",)),
}
_REQUIRED = frozenset(key for form in FORMS.values() for key in form.required)
FORM_KEYS = frozenset({"label", "history"}).union(*(form.keys for form in FORMS.values()))
"""Keys that mean something. `label` and `history` (earlier turns of LLaMA-Factory's Alpaca) are in no form: a row that
carries them says something that would be lost."""
