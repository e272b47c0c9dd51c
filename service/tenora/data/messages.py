"""Messages of a conversation, checked one by one and brought into the form that chat templates take. Free of torch.

A message is `{role, content, ...}`. Roles: system (or developer, which is the same), user, assistant, tool. Content: a
string, or a list of `{"type": "text", "text": ...}` parts that are joined. An assistant message may carry `weight`: 0
takes it out of the loss.
"""

from __future__ import annotations

from typing import Any

from tenora.data.rows import RowChecker, kind_of

ROLES = ("system", "user", "assistant", "tool")
_SAME_ROLES = {"developer": "system"}  # OpenAI's newer word
_KEYS = {
    "system": frozenset({"role", "content", "name"}),
    "user": frozenset({"role", "content", "name"}),
    "assistant": frozenset({"role", "content", "name", "weight", "tool_calls"}),
    "tool": frozenset({"role", "content", "name", "tool_call_id"}),
}
_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
    "developer": "system",
    "tool": "tool",
    "observation": "tool",
}

Messages = list[dict[str, Any]]
Checked = tuple[Messages, tuple[bool, ...]]
"""Messages whose contents are strings, without `weight`, and for each whether it is learned."""


def check_messages(value: Any, where: str, checker: RowChecker, *, weighted: bool = True) -> Checked | None:
    """The messages of a list; None if `checker` says why not.

    Args:
        where: the list's key, for what is reported: `messages`.
        weighted: whether assistant messages may carry `weight`.
    """
    if not isinstance(value, list) or not value:
        checker.report("missing_messages_list", f"`{where}` must be a list with at least one message.")
        return None
    checked = [
        _check_message(f"{where}[{index}]", message, checker, weighted=weighted) for index, message in enumerate(value)
    ]
    if checker.issues:
        return None
    return [message for message, _ in checked if message is not None], tuple(learned for _, learned in checked)


def check_tools(value: Any, where: str, checker: RowChecker) -> list[Any] | None:
    """The tools that a conversation may call; None if there are none, or if `checker` says what is wrong with them."""
    if value is not None and not (isinstance(value, list) and all(isinstance(tool, dict) for tool in value)):
        checker.report("data_type", f"`{where}` must be a list of objects.")
        return None
    return value or None


def from_sharegpt(turns: Any, checker: RowChecker) -> Any:
    """The list `conversations` of `{from, value}` as one of `{role, content}`, for `check_messages`."""
    if not isinstance(turns, list):
        return turns
    return [_from_turn(f"conversations[{index}]", turn, checker) for index, turn in enumerate(turns)]


def _from_turn(where: str, turn: Any, checker: RowChecker) -> Any:
    if not isinstance(turn, dict):
        return turn
    if "from" not in turn and "role" in turn:
        checker.report(
            "message_missing_key",
            f"{where} has `role` where ShareGPT has `from`; call the list `messages` if it holds `role` and `content`.",
        )
        return turn
    for key in ("from", "value"):
        if turn.get(key) is None:
            checker.report("message_missing_key", f"{where} has no `{key}`; add it.")
    speaker = turn.get("from")
    if speaker is not None and (not isinstance(speaker, str) or speaker not in _SHAREGPT_ROLES):
        checker.report(
            "unrecognized_role",
            f"{where} is from {str(speaker)[:40]!r}; use one of {', '.join(_SHAREGPT_ROLES)}.",
        )
    rest = {key: value for key, value in turn.items() if key not in ("from", "value") and value is not None}
    return {**rest, "role": _SHAREGPT_ROLES.get(str(speaker), "user"), "content": turn.get("value")}


def _check_message(
    where: str, message: Any, checker: RowChecker, *, weighted: bool
) -> tuple[dict[str, Any] | None, bool]:
    """A message with its content as one string and without `weight`, and whether it is learned."""
    if not isinstance(message, dict):
        checker.report("data_type", f"{where} is {kind_of(message)}; make it an object with a role and content.")
        return None, False
    if "role" not in message:
        checker.report("message_missing_key", f"{where} has no `role`; use one of {', '.join(ROLES)}.")
        return None, False
    role = message["role"]
    role = _SAME_ROLES.get(role, role) if isinstance(role, str) else role
    if not isinstance(role, str) or role not in ROLES:
        checker.report("unrecognized_role", f"{where} has the role {str(role)[:40]!r}; use one of {', '.join(ROLES)}.")
        return None, False
    unknown = sorted(message.keys() - _KEYS[role] | ({"weight"} & message.keys() if not weighted else set()))
    if unknown:
        checker.report(
            "message_unrecognized_key",
            f"{where} ({role}) has the key `{unknown[0][:40]}`, which it may not have; remove it.",
        )
    weight = message.get("weight", 1)
    if isinstance(weight, bool) or weight not in (0, 1):
        checker.report("data_type", f"{where} has a `weight` that is neither 0 nor 1.")
    calls = message.get("tool_calls")
    if calls is not None and not (isinstance(calls, list) and calls and all(isinstance(call, dict) for call in calls)):
        checker.report("data_type", f"{where} has `tool_calls` that are not a list of objects.")
    content = _content(where, role, message, checker, has_calls=bool(calls))
    kept = {key: value for key, value in message.items() if key not in ("weight", "content") and value is not None}
    return {**kept, "role": role, "content": content}, role == "assistant" and weight == 1


def _content(where: str, role: str, message: dict[str, Any], checker: RowChecker, *, has_calls: bool) -> str:
    """The content as one string; "" where there is none (reported, unless tool calls stand in its place)."""
    content = message.get("content")
    if content is None:
        if not has_calls and "content" in message:
            checker.report("missing_content", f"{where} ({role}) has no content; give it some text.")
        elif not has_calls:
            checker.report("message_missing_key", f"{where} ({role}) has no `content`; add it.")
        return ""
    if isinstance(content, list):
        for part in content:
            if not (isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)):
                checker.report(
                    "data_type",
                    f'{where} has a content part other than {{"type": "text", "text": …}}; only text is learned.',
                )
                return ""
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        checker.report(
            "data_type",
            f"{where} has content that is {kind_of(content)}; make it a string or a list of text parts.",
        )
        return ""
    if not content and role == "assistant" and not has_calls:
        checker.report("missing_content", f"{where} (assistant) is empty; give it the answer that is to be learned.")
    return content
