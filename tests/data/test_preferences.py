"""Preference rows as public data sets lay them out: the pairs that TRL makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from trl.data_utils import extract_prompt

from tenora.data.containers import read_records
from tenora.data.dataset import validate_file
from tenora.data.forms import parse_row
from tenora.data.rows import PREFERENCES, ChatRow, CompletionRow, PreferenceRow, RowChecker

from .rows import write_lines

SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "Why is the sky blue?"}
GOOD, BAD = {"role": "assistant", "content": "Rayleigh."}, {"role": "assistant", "content": "Paint."}
MORE = {"role": "user", "content": "And the sea?"}


def parsed(value: dict[str, Any]) -> PreferenceRow:
    checker = RowChecker(1)
    found = parse_row(value, checker)
    assert found is not None, checker.issues
    assert isinstance(found[1], PreferenceRow)
    return found[1]


def issue_of(value: dict[str, Any]) -> tuple[str, str]:
    checker = RowChecker(1)
    assert parse_row(value, checker) is None
    return checker.issues[0].code, checker.issues[0].message


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"chosen": [USER, GOOD], "rejected": [USER, BAD]}, [USER]),
        ({"prompt": [USER], "chosen": [USER, GOOD], "rejected": [USER, BAD]}, [USER]),
        ({"prompt": "Why is the sky blue?", "chosen": [GOOD], "rejected": [BAD]}, [USER]),
        # UltraFeedback, binarized: everything is said twice.
        (
            {
                "prompt": "Why is the sky blue?",
                "prompt_id": "a1",
                "chosen": [USER, GOOD],
                "rejected": [USER, BAD],
                "messages": [USER, GOOD],
                "score_chosen": 8.0,
                "score_rejected": 2.0,
            },
            [USER],
        ),
        (
            {"prompt": "Be brief.", "chosen": [SYSTEM, USER, GOOD], "rejected": [SYSTEM, USER, BAD]},
            [SYSTEM, USER],
        ),
        ({"chosen": [USER, GOOD, MORE, GOOD], "rejected": [USER, GOOD, MORE, BAD]}, [USER, GOOD, MORE]),
    ],
)
def test_conversations_that_hold_the_prompt_become_prompt_and_answers(
    row: dict[str, Any], prompt: list[dict[str, Any]]
) -> None:
    pair = parsed(row)
    unlearned = (False,) * len(prompt)
    assert pair == PreferenceRow(
        ChatRow([*prompt, GOOD], (*unlearned, True), None), ChatRow([*prompt, BAD], (*unlearned, True), None)
    )


@pytest.mark.parametrize(
    "row",
    [
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"chosen": [USER, GOOD, MORE, GOOD], "rejected": [USER, GOOD, MORE, BAD]},
        {"chosen": "The sky is blue.", "rejected": "The sky is green."},
        {"chosen": "Q: x\nA: yes", "rejected": "Q: x\nA: no"},
    ],
)
def test_the_prompt_within_is_the_one_that_trl_extracts(row: dict[str, Any]) -> None:
    theirs = extract_prompt(row)
    pair = parsed(row)
    if isinstance(pair.chosen, CompletionRow) and isinstance(pair.rejected, CompletionRow):
        found = {"prompt": pair.chosen.prompt, "chosen": pair.chosen.completion, "rejected": pair.rejected.completion}
        assert found == theirs
    else:
        assert isinstance(pair.chosen, ChatRow)
        assert isinstance(pair.rejected, ChatRow)
        count = len(theirs["prompt"])
        assert pair.chosen.messages == [*theirs["prompt"], *theirs["chosen"]]
        assert pair.rejected.messages[count:] == theirs["rejected"]
        assert not any(pair.chosen.trained[:count])


def test_words_are_not_torn_by_what_two_answers_begin_with() -> None:
    pair = parsed({"chosen": "The sky is blue", "rejected": "The sky is black"})
    assert pair.chosen == CompletionRow("The sky is", " blue")


def test_hh_dialogues_become_conversations() -> None:
    start = "\n\nHuman: Hi.\n\nAssistant: Hello.\n\nHuman: Why?\n\nAssistant:"
    pair = parsed({"chosen": f"{start} So.\n\nIndeed.", "rejected": f"{start} Because."})
    assert isinstance(pair.chosen, ChatRow)
    assert [(turn["role"], turn["content"]) for turn in pair.chosen.messages] == [
        ("user", "Hi."),
        ("assistant", "Hello."),
        ("user", "Why?"),
        ("assistant", "So.\n\nIndeed."),
    ]
    assert pair.chosen.trained == (False, False, False, True)


@pytest.mark.parametrize(
    ("row", "code", "words"),
    [
        (
            {"prompt": "Else?", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
            "ambiguous_format",
            "`prompt` is none of",
        ),
        (
            {"chosen": [USER, GOOD], "rejected": [USER, BAD], "messages": [USER, BAD]},
            "ambiguous_format",
            "not its `chosen`",
        ),
        ({"chosen": [USER, GOOD], "rejected": [MORE, BAD]}, "missing_content", "no message in common"),
        ({"chosen": [USER, GOOD, USER], "rejected": [USER, GOOD, MORE]}, "unrecognized_role", "of the role 'user'"),
        ({"chosen": [USER, GOOD], "rejected": [USER, GOOD]}, "no_trainable_tokens", "are equal"),
        ({"chosen": "a b", "rejected": "c d"}, "missing_content", "`prompt` is missing"),
        ({"chosen": [USER, GOOD], "rejected": "a"}, "data_type", "`chosen` is a list"),
    ],
)
def test_contradictions_are_told(row: dict[str, Any], code: str, words: str) -> None:
    found = issue_of(row)
    assert found[0] == code
    assert words in found[1]


def test_a_file_of_ultrafeedback_has_pairs(tmp_path: Path) -> None:
    row = {"prompt": USER["content"], "chosen": [USER, GOOD], "rejected": [USER, BAD], "messages": [USER, GOOD]}
    path = write_lines(tmp_path / "rows.jsonl", [row] * 3)
    assert len(list(read_records(path))) == 3
    report = validate_file(path)
    assert (report.format, report.kind, report.ok) == ("trl_preference", PREFERENCES, True)
