"""One line of a training file: parsed, checked, and brought into one of two forms. Free of torch.

A row is a JSON object in one of these forms (keys that belong to neither, such as `id`, are ignored):

- chat: `messages` [{role, content, ...}], optionally `tools`. Roles: system, user, assistant, tool. Content: a string,
  or a list of `{"type": "text", "text": ...}` parts that are joined. An assistant message may carry `weight`: 0 takes
  it out of the loss.
- prompt and completion: two strings.

A row that carries keys of two forms, or of a form that means something else (preferences, labels), is refused rather
than guessed at: training on a rejected answer because its key was ignored would be worse than an error.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import msgspec

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
    "too_few_examples",
    "too_many_examples",
]
RowFormat = Literal["chat", "prompt_completion"]

ROLES = ("system", "user", "assistant", "tool")
_MESSAGE_KEYS = {
    "system": frozenset({"role", "content", "name"}),
    "user": frozenset({"role", "content", "name"}),
    "assistant": frozenset({"role", "content", "name", "weight", "tool_calls"}),
    "tool": frozenset({"role", "content", "name", "tool_call_id"}),
}
# Keys of forms that supervised training would misread: preference pairs, labels, plain text, Alpaca, ShareGPT.
_FOREIGN_KEYS = frozenset(
    {
        "chosen",
        "conversations",
        "input",
        "instruction",
        "label",
        "non_preferred_output",
        "output",
        "preferred_output",
        "rejected",
        "text",
    }
)


@dataclass(frozen=True, slots=True)
class RowIssue:
    """What is wrong with one row and what to do about it. `line` is one-based; blank lines count."""

    line: int
    code: IssueCode
    message: str


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


Row = ChatRow | CompletionRow


class RowChecker:
    """Parses one row and collects what is wrong with it, each code at most once."""

    def __init__(self, line: int) -> None:
        self.line = line
        self.issues: list[RowIssue] = []

    def report(self, code: IssueCode, message: str) -> None:
        """Add an issue unless the row already has one with this code."""
        if all(issue.code != code for issue in self.issues):
            self.issues.append(RowIssue(self.line, code, message))

    def parse(self, raw: bytes) -> Row | None:
        """The row in `raw` (one line without its line end), or None if `issues` says why not."""
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            self.report("bad_utf8", f"Byte {error.start + 1} is not UTF-8; save the file as UTF-8.")
            return None
        try:
            value = msgspec.json.decode(text)
        except (msgspec.DecodeError, RecursionError) as error:
            hint = (
                " The file must be JSON Lines: one object per line, no enclosing list."
                if text.strip() in ("[", "]", "],")
                else ""
            )
            self.report("bad_json", f"The line is not a JSON object: {error}.{hint}")
            return None
        if not isinstance(value, dict):
            self.report(
                "data_type",
                f"The row is a {_kind(value)}; make it a JSON object with `messages` or `prompt` and `completion`.",
            )
            return None
        row = self._dispatch(value)
        return None if self.issues else row

    def _dispatch(self, value: dict[str, Any]) -> Row | None:
        chat = "messages" in value
        pair = "prompt" in value or "completion" in value
        foreign = sorted(_FOREIGN_KEYS & value.keys())
        if (chat and pair) or ((chat or pair) and foreign):
            keys = ", ".join(
                f"`{key}`" for key in sorted({"messages", "prompt", "completion"} & value.keys()) + foreign
            )
            self.report(
                "ambiguous_format",
                f"The row mixes the keys {keys}; keep `messages`, or `prompt` and `completion`, and remove the rest.",
            )
            return None
        if chat:
            return self._chat(value)
        if pair:
            return self._pair(value)
        found = ", ".join(f"`{key[:40]}`" for key in list(value)[:6]) or "none"
        self.report(
            "missing_messages_list",
            f"The row has neither `messages` nor `prompt` and `completion` (its keys: {found}); add one of them.",
        )
        return None

    def _pair(self, value: dict[str, Any]) -> CompletionRow | None:
        for key in ("prompt", "completion"):
            content = value.get(key)
            if content is None:
                self.report("missing_content", f"`{key}` is missing; a row needs both `prompt` and `completion`.")
            elif not isinstance(content, str):
                self.report(
                    "data_type",
                    f"`{key}` is a {_kind(content)}; make it a string, or use `messages` for conversations.",
                )
        if value.get("completion") == "":
            self.report("missing_content", "`completion` is empty; give the text that is to be learned.")
        return None if self.issues else CompletionRow(value["prompt"], value["completion"])

    def _chat(self, value: dict[str, Any]) -> ChatRow | None:
        messages, tools = value["messages"], value.get("tools")
        if not isinstance(messages, list) or not messages:
            self.report("missing_messages_list", "`messages` must be a list with at least one message.")
            return None
        if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
            self.report("data_type", "`tools` must be a list of objects.")
        parsed = [self._message(index, message) for index, message in enumerate(messages)]
        if self.issues:
            return None
        rendered = [message for message, _ in parsed if message is not None]
        trained = tuple(learn for _, learn in parsed)
        if not any(message["role"] == "assistant" for message in rendered):
            self.report(
                "example_missing_assistant_message",
                "The conversation has no assistant message, so there is nothing to learn; add one.",
            )
        elif not any(trained):
            self.report("no_trainable_tokens", "Every assistant message has `weight` 0; set it to 1 on at least one.")
        return ChatRow(rendered, trained, tools or None)

    def _message(self, index: int, message: Any) -> tuple[dict[str, Any] | None, bool]:
        """Message `index` with its content as one string and without `weight`, and whether it is learned."""
        where = f"messages[{index}]"
        if not isinstance(message, dict):
            self.report("data_type", f"{where} is a {_kind(message)}; make it an object with `role` and `content`.")
            return None, False
        if "role" not in message:
            self.report("message_missing_key", f"{where} has no `role`; use one of {', '.join(ROLES)}.")
            return None, False
        role = message["role"]
        if not isinstance(role, str) or role not in ROLES:
            self.report("unrecognized_role", f"{where} has the role {str(role)[:40]!r}; use one of {', '.join(ROLES)}.")
            return None, False
        unknown = sorted(message.keys() - _MESSAGE_KEYS[role])
        if unknown:
            self.report(
                "message_unrecognized_key",
                f"{where} ({role}) has the key `{unknown[0][:40]}`, which it may not have; remove it.",
            )
        weight = message.get("weight", 1)
        if isinstance(weight, bool) or weight not in (0, 1):
            self.report("data_type", f"{where} has a `weight` that is neither 0 nor 1.")
        calls = message.get("tool_calls")
        if calls is not None and not (
            isinstance(calls, list) and calls and all(isinstance(call, dict) for call in calls)
        ):
            self.report("data_type", f"{where} has `tool_calls` that are not a list of objects.")
        content = self._content(where, role, message, has_calls=bool(calls))
        kept = {key: value for key, value in message.items() if key not in ("weight", "content") and value is not None}
        return {**kept, "content": content}, role == "assistant" and weight == 1

    def _content(self, where: str, role: str, message: dict[str, Any], *, has_calls: bool) -> str:
        """The content as one string; "" where there is none (reported, unless tool calls stand in its place)."""
        content = message.get("content")
        if content is None:
            if not has_calls and "content" in message:
                self.report("missing_content", f"{where} ({role}) has no content; give it some text.")
            elif not has_calls:
                self.report("message_missing_key", f"{where} ({role}) has no `content`; add it.")
            return ""
        if isinstance(content, list):
            for part in content:
                if not (isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)):
                    self.report(
                        "data_type",
                        f'{where} has a content part other than {{"type": "text", "text": …}}; only text is learned.',
                    )
                    return ""
            content = "".join(part["text"] for part in content)
        if not isinstance(content, str):
            self.report(
                "data_type",
                f"{where} has content that is a {_kind(content)}; make it a string or a list of text parts.",
            )
            return ""
        if not content and role == "assistant" and not has_calls:
            self.report("missing_content", f"{where} (assistant) is empty; give it the answer that is to be learned.")
        return content


def _kind(value: object) -> str:
    """The JSON name of a value's type."""
    if value is None:
        return "null"
    names = {dict: "object", list: "list", str: "string", bool: "boolean", int: "number", float: "number"}
    return names.get(type(value), type(value).__name__)
