"""Preference rows: two answers to one prompt, as OpenAI, TRL and public data sets lay them out. Free of torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from tenora.data.messages import Checked, Messages, check_messages, check_tools
from tenora.data.row_fields import quoted, text_field
from tenora.data.rows import ChatRow, CompletionRow, PreferenceRow, Row, RowChecker, kind_of

_ANSWERS = ("chosen", "rejected")
_TURN = re.compile(r"\n\n(Human|Assistant):")  # Anthropic's HH-RLHF
_SPEAKERS = {"Human": "user", "Assistant": "assistant"}


def openai_preference(value: Mapping[str, Any], checker: RowChecker) -> Row | None:
    """`input` {`messages`, `tools`}, `preferred_output`, `non_preferred_output`."""
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
        _checked(value, ("preferred_output", "non_preferred_output"), checker),
        tools,
        checker,
    )


def trl_preference(value: Mapping[str, Any], checker: RowChecker) -> Row | None:
    """`prompt`, `chosen`, `rejected`: three strings, or answers as lists of messages, which may begin with the prompt.

    Beside such lists the prompt is a list of messages or, as in UltraFeedback, the text of one of its messages.
    """
    tools = check_tools(value.get("tools"), "tools", checker)
    prompt = value["prompt"]
    if all(isinstance(value[key], list) for key in _ANSWERS) and isinstance(prompt, list | str):
        answers = _checked(value, _ANSWERS, checker)
        if isinstance(prompt, list):
            asked = check_messages(prompt, "prompt", checker, weighted=False)
            answers = _without_prompt(asked, answers)
        else:
            asked, answers = _split_at(prompt, answers, checker)
        _check_beside(value, checker)
        return _conversations(asked, answers, tools, checker)
    kinds = {key: kind_of(value[key]) for key in ("prompt", *_ANSWERS)}
    if set(kinds.values()) != {"a string"}:
        said = ", ".join(f"`{key}` is {kind}" for key, kind in kinds.items())
        checker.report("data_type", f"{said}; make them three strings or three lists of messages.")
        return None
    return _texts(prompt, value, tools, checker)


def implicit_preference(value: Mapping[str, Any], checker: RowChecker) -> Row | None:
    """`chosen` and `rejected` that both begin with the prompt: lists of messages, HH-RLHF's dialogues, or strings."""
    tools = check_tools(value.get("tools"), "tools", checker)
    whole = {key: _dialogue(value[key]) for key in _ANSWERS}
    if all(isinstance(messages, list) for messages in whole.values()):
        asked, answers = _split_at(None, _checked(whole, _ANSWERS, checker), checker)
        _check_beside(value, checker)
        return _conversations(asked, answers, tools, checker)
    texts = {key: text_field(value, key, checker) for key in _ANSWERS}
    if checker.issues:
        return None
    prompt = _shared_text(texts["chosen"], texts["rejected"])
    if not prompt and texts["chosen"] != texts["rejected"]:
        checker.report(
            "missing_content",
            "`prompt` is missing, and `chosen` and `rejected` begin with no words in common; put into `prompt` what "
            "both answer.",
        )
        return None
    return _texts(prompt, {key: text[len(prompt) :] for key, text in texts.items()}, tools, checker)


def prompt_is_in(prompt: Any, messages: Messages) -> bool:
    """Whether a prompt that stands beside a conversation is what the conversation begins with.

    It is a list of its first messages, or the text of a message before the first answer.
    """
    if isinstance(prompt, list):
        return [(turn.get("role"), turn.get("content")) for turn in prompt if isinstance(turn, dict)] == [
            (turn["role"], turn["content"]) for turn in messages[: len(prompt)]
        ]
    first = next((index for index, turn in enumerate(messages) if turn["role"] == "assistant"), len(messages))
    return isinstance(prompt, str) and any(prompt.strip() == turn["content"].strip() for turn in messages[:first])


Answers = dict[str, Checked | None]


def _checked(value: Mapping[str, Any], keys: tuple[str, str], checker: RowChecker) -> Answers:
    return {key: check_messages(value[key], key, checker, weighted=False) for key in keys}


def _without_prompt(asked: Checked | None, answers: Answers) -> Answers:
    """The answers without the prompt, if all of them repeat it."""
    if asked is None:
        return answers
    count = len(asked[0])
    if all(answer is not None and answer[0][:count] == asked[0] for answer in answers.values()):
        return {key: None if answer is None else _after(answer, count) for key, answer in answers.items()}
    return answers


def _split_at(prompt: str | None, answers: Answers, checker: RowChecker) -> tuple[Checked | None, Answers]:
    """The messages that both answers begin with as the prompt, and what follows them."""
    chosen, rejected = answers.values()
    if chosen is None or rejected is None:
        return None, answers
    starts = [answer[0][0]["role"] == "assistant" for answer in (chosen, rejected)]
    if prompt and all(starts):  # the answers alone, to a prompt in words
        return ([{"role": "user", "content": prompt}], (False,)), answers
    count = 0
    for one, other in zip(chosen[0], rejected[0], strict=False):
        if one != other:
            break
        count += 1
    if count == min(len(chosen[0]), len(rejected[0])):  # one goes on where the other ends, or they are equal
        count -= 1
    shared = chosen[0][:count]
    if not shared:
        checker.report(
            "missing_content", "`chosen` and `rejected` begin with no message in common; give the prompt as `prompt`."
        )
    elif prompt is not None and not prompt_is_in(prompt, shared):
        checker.report(
            "ambiguous_format",
            "`prompt` is none of the messages that `chosen` and `rejected` both begin with; remove it, or mend it.",
        )
    return (shared, chosen[1][:count]), {key: _after(answer, count) for key, answer in answers.items() if answer}


def _after(answer: Checked, count: int) -> Checked:
    return answer[0][count:], answer[1][count:]


def _check_beside(value: Mapping[str, Any], checker: RowChecker) -> None:
    """UltraFeedback repeats `chosen` as `messages`; anything else would be lost."""
    if value.get("messages") not in (None, [], value["chosen"]):
        checker.report(
            "ambiguous_format",
            "The row is a preference and has `messages` that are not its `chosen`; remove one of them.",
        )


def _dialogue(text: Any) -> Any:
    """The messages of a dialogue in HH-RLHF's notation; anything else as it is."""
    if not isinstance(text, str) or not text.startswith("\n\nHuman:"):
        return text
    _, *parts = _TURN.split(text)
    return [
        {"role": _SPEAKERS[speaker], "content": words.strip()}
        for speaker, words in zip(parts[::2], parts[1::2], strict=True)
    ]


def _shared_text(one: str, other: str) -> str:
    """The whole words that both begin with; the space before the first that differs belongs to the answers."""
    last = 0
    for index, (character, its) in enumerate(zip(one, other, strict=False)):
        if character != its:
            break
        last = index if character.isspace() else last
    return one[:last]


def _conversations(
    prompt: Checked | None, answers: Answers, tools: list[Any] | None, checker: RowChecker
) -> PreferenceRow | None:
    """A prompt and two answers, each of which begins with a message of the assistant."""
    rows = []
    for key, answer in answers.items():
        if answer is not None and (not answer[0] or answer[0][0]["role"] != "assistant"):
            found = f"a message of the role {answer[0][0]['role']!r}" if answer[0] else "nothing"
            checker.report(
                "unrecognized_role",
                f"In `{key}` the prompt is followed by {found}; an answer begins with an assistant message.",
            )
        elif prompt is not None and answer is not None:
            rows.append(ChatRow(prompt[0] + answer[0], (False,) * len(prompt[0]) + answer[1], tools))
    if checker.issues:
        return None
    first, second = answers
    return _pair(rows[0], rows[1], (first, second), checker)


def _texts(prompt: str, value: Mapping[str, Any], tools: list[Any] | None, checker: RowChecker) -> PreferenceRow:
    if tools is not None:
        checker.report("data_type", "`tools` go with lists of messages; put their description into the prompt.")
    chosen, rejected = (CompletionRow(prompt, text_field(value, key, checker)) for key in _ANSWERS)
    return _pair(chosen, rejected, _ANSWERS, checker)


def _pair(
    chosen: ChatRow | CompletionRow, rejected: ChatRow | CompletionRow, keys: tuple[str, str], checker: RowChecker
) -> PreferenceRow:
    if chosen == rejected:
        checker.report(
            "no_trainable_tokens", f"{quoted(keys)} are equal, so the row says nothing about preference; remove it."
        )
    return PreferenceRow(chosen, rejected)
