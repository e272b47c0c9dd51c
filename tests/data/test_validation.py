"""Every code of a validation report, with the line it belongs to."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from tenora.data import containers
from tenora.data.dataset import validate_file
from tenora.data.forms import parse_row
from tenora.data.rows import ANSWERS, PREFERENCES, ChatRow, RowChecker

from .rows import chat, write_lines

GOOD = chat()


def openai_pair(**changes: Any) -> dict[str, Any]:
    """A preference row of OpenAI's form."""
    return {
        "input": {"messages": [{"role": "user", "content": "Why?"}]},
        "preferred_output": [{"role": "assistant", "content": "So."}],
        "non_preferred_output": [{"role": "assistant", "content": "Because."}],
        **changes,
    }


def one(message: dict[str, Any]) -> dict[str, Any]:
    """A row whose second message is good, so that only the first can be at fault."""
    return {"messages": [message, {"role": "assistant", "content": "Yes."}]}


@pytest.mark.parametrize(
    ("row", "code"),
    [
        ([1, 2], "data_type"),
        ("text", "data_type"),
        ({"messages": ["hello"]}, "data_type"),
        (one({"role": "user", "content": 7}), "data_type"),
        (one({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}), "data_type"),
        (one({"role": "assistant", "content": "x", "weight": 0.5}), "data_type"),
        (one({"role": "assistant", "content": "x", "weight": True}), "data_type"),
        (one({"role": "assistant", "content": None, "tool_calls": "f()"}), "data_type"),
        ({**GOOD, "tools": {"name": "f"}}, "data_type"),
        ({"prompt": ["a"], "completion": "b"}, "data_type"),
        ({"messages": []}, "missing_messages_list"),
        ({"messages": "hello"}, "missing_messages_list"),
        ({"question": "a"}, "missing_messages_list"),
        ({"messages": None, "system": "a"}, "missing_messages_list"),
        (one({"content": "a"}), "message_missing_key"),
        (one({"role": "user"}), "message_missing_key"),
        (one({"role": "user", "content": "a", "weight": 1}), "message_unrecognized_key"),
        (one({"role": "user", "content": "a", "colour": 1}), "message_unrecognized_key"),
        (one({"role": "bot", "content": "a"}), "unrecognized_role"),
        (one({"role": ["user"], "content": "a"}), "unrecognized_role"),
        (one({"role": "user", "content": None}), "missing_content"),
        (one({"role": "assistant", "content": ""}), "missing_content"),
        ({"prompt": "a"}, "missing_content"),
        ({"prompt": "a", "completion": ""}, "missing_content"),
        ({"messages": [{"role": "user", "content": "a"}]}, "example_missing_assistant_message"),
        (chat(weight=0), "no_trainable_tokens"),
        ({**GOOD, "prompt": "a", "completion": "b"}, "ambiguous_format"),
        ({**GOOD, "label": {"a": 1}}, "data_type"),
        ({"prompt": "a", "completion": "b", "label": True}, "ambiguous_format"),
        ({**GOOD, "text": "a"}, "ambiguous_format"),
        ({**GOOD, "prompt": "Another question?"}, "ambiguous_format"),
        ({"instruction": "a", "output": "b", "text": "c"}, "ambiguous_format"),
        ({"Prompt": "a", "Completion": "b"}, "missing_messages_list"),
        (one({"role": "function", "name": "f", "content": "a"}), "unrecognized_role"),
        (one({"role": "assistant", "content": "a", "function_call": {"name": "f"}}), "message_unrecognized_key"),
        (one({"role": "assistant", "content": "a", "mask": [1]}), "message_unrecognized_key"),
        ({**GOOD, "system": "a"}, "ambiguous_format"),
        ({"text": "a", "label": []}, "missing_content"),
        ({"text": "a", "label": 1, "prompt": "b"}, "ambiguous_format"),
        ({"prompt": "a", "completion": "b", "chosen": "b"}, "ambiguous_format"),
        ({"instruction": "a", "output": "b", "history": [["c", "d"]]}, "ambiguous_format"),
        ({"system": "a", "conversations": [{"from": "system", "value": "b"}]}, "ambiguous_format"),
        ({"instruction": "a"}, "missing_content"),
        ({"instruction": "", "output": "b"}, "missing_content"),
        ({"instruction": "a", "output": 3}, "data_type"),
        ({"text": ""}, "missing_content"),
        ({"text": ["a"]}, "data_type"),
        ({"conversations": "a"}, "missing_messages_list"),
        ({"conversations": [{"from": "human"}]}, "message_missing_key"),
        ({"conversations": [{"role": "user", "content": "a"}]}, "message_missing_key"),
        ({"conversations": [{"from": "narrator", "value": "a"}]}, "unrecognized_role"),
        ({"conversations": [{"from": "human", "value": "a"}]}, "example_missing_assistant_message"),
        ({"chosen": "a", "rejected": "b"}, "missing_content"),
        ({"prompt": "a", "chosen": "b"}, "missing_content"),
        ({"prompt": "a", "chosen": "b", "rejected": ""}, "missing_content"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "no_trainable_tokens"),
        ({"prompt": "a", "chosen": [{"role": "assistant", "content": "b"}], "rejected": "c"}, "data_type"),
        (openai_pair(preferred_output=[]), "missing_messages_list"),
        (openai_pair(preferred_output=[{"role": "user", "content": "a"}]), "unrecognized_role"),
        (openai_pair(input="Why?"), "data_type"),
        (openai_pair(input={"messages": GOOD["messages"], "colour": 1}), "message_unrecognized_key"),
        (
            openai_pair(non_preferred_output=[{"role": "assistant", "content": "a", "weight": 1}]),
            "message_unrecognized_key",
        ),
        (openai_pair(non_preferred_output=openai_pair()["preferred_output"]), "no_trainable_tokens"),
        # Fine by themselves, but the others are conversations.
        ({"prompt": "a", "completion": "b"}, "ambiguous_format"),
        ({"text": "plain"}, "ambiguous_format"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "ambiguous_format"),
    ],
)
def test_a_bad_row_is_reported_with_its_line_and_code(tmp_path: Path, row: Any, code: str) -> None:
    report = validate_file(write_lines(tmp_path / "rows.jsonl", [GOOD, row, GOOD]))
    assert [(issue.line, issue.code) for issue in report.issues] == [(2, code)]
    assert (report.issue_count, report.counts, report.rows) == (1, {code: 1}, 3)
    assert not report.ok
    assert f"line 2: {code}" in report.summary()


@pytest.mark.parametrize(
    ("line", "code"),
    [
        (b'{"messages": [', "bad_json"),
        (b"[", "bad_json"),
        (b'{"prompt": "\\ud800", "completion": "b"}', "bad_json"),  # half a surrogate pair cannot be tokenized
        (b'{"prompt": NaN, "completion": "b"}', "bad_json"),
        (b'{"prompt": "a", "completion": "b", "prompt": "c"}', "bad_json"),
        (b'{"messages": [{"role": "user", "content": "a", "content": "b"}]}', "bad_json"),
        (b'{"text": ' + b"[" * 500 + b"]" * 500 + b"}", "bad_json"),
        (b'{"text": ' + b"9" * 5000 + b"}", "bad_json"),
        (b'{"text": 1e999}', "bad_json"),
        (b'{"text": "a\x00b"}', "bad_json"),
        (b"[" * 100_000, "bad_json"),
        (b'{"prompt": "\xff", "completion": "b"}', "bad_utf8"),
        (json.dumps(GOOD).encode("utf-16"), "bad_utf8"),
    ],
)
def test_bytes_that_are_not_json_in_utf8(tmp_path: Path, line: bytes, code: str) -> None:
    path = tmp_path / "rows.jsonl"
    good = json.dumps(GOOD).encode()
    path.write_bytes(b"\n".join([good, line, good]) + b"\n")
    assert [(issue.line, issue.code) for issue in validate_file(path).issues] == [(2, code)]


def test_a_key_that_stands_twice_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a", "id": {"a": 1, "b": 2, "b": 3}}\n{"text": "b"}\n', encoding="utf-8")
    (issue,) = validate_file(path).issues
    assert (issue.line, issue.code) == (1, "bad_json")
    assert "'b' stands twice" in issue.message


NULLS = {"name": None, "tool_calls": None, "function_call": None, "refusal": None, "weight": None, "images": None}


@pytest.mark.parametrize(
    ("row", "same"),
    [
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": "What?", "image_url": None}], **NULLS},
                    {"role": "assistant", "content": "That.", "tool_call_id": None, **NULLS},
                ],
                "tools": None,
                "label": None,
                "weight": None,
            },
            chat(),
        ),
        (
            {"messages": [{"role": "developer", "content": "Hm."}, *GOOD["messages"]]},
            {"messages": [{"role": "system", "content": "Hm."}, *GOOD["messages"]]},
        ),
        (
            {"conversations": [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "That.", "weight": None}]},
            chat(),
        ),
        # Public layouts that say a thing twice: UltraChat and No Robots, and Alpaca.
        ({**GOOD, "prompt": "What?", "prompt_id": "a"}, chat()),
        ({**GOOD, "prompt": GOOD["messages"][:1]}, chat()),
        (
            {"messages": [{"role": "system", "content": "Hm."}, *GOOD["messages"]], "prompt": "Hm."},
            {"messages": [{"role": "system", "content": "Hm."}, *GOOD["messages"]]},
        ),
        ({"instruction": "What?", "input": "", "output": "That.", "text": "Q: What?\nA: That."}, chat()),
    ],
)
def test_rows_that_mean_the_same(row: Any, same: Any) -> None:
    found, expected = (parse_row(value, RowChecker(1)) for value in (row, same))
    assert found is not None
    assert expected is not None
    assert found[1] == expected[1]


def test_null_keys_are_absent_in_tools_and_their_calls() -> None:
    call = {"id": None, "type": "function", "function": {"name": "f", "arguments": {"a": 1, "b": None}}}
    row = {
        "messages": [GOOD["messages"][0], {"role": "assistant", "content": None, "tool_calls": [call]}],
        "tools": [{"type": "function", "function": {"name": "f", "description": None}}],
    }
    parsed = parse_row(row, RowChecker(1))
    assert parsed is not None
    assert isinstance(parsed[1], ChatRow)
    assert parsed[1].messages[1]["tool_calls"] == [
        {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
    ]
    assert parsed[1].tools == [{"type": "function", "function": {"name": "f"}}]


def test_bom_crlf_and_blank_lines_are_accepted_and_counted_as_lines(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    good = json.dumps(GOOD).encode()
    path.write_bytes(b"\xef\xbb\xbf" + good + b"\r\n\r\n  \n" + good + b"\r\n{}\r\n" + good)
    report = validate_file(path)
    assert report.rows == 4
    assert [(issue.line, issue.code) for issue in report.issues] == [(5, "missing_messages_list")]


@pytest.mark.parametrize(
    "row",
    [
        {**GOOD, "id": 3},  # a key of no known form is no reason to refuse
        {"messages": [{"role": "system", "content": ""}, *GOOD["messages"]]},
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "a"}]},
                {"role": "assistant", "content": "b"},
            ]
        },
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [{"id": "1"}]}]},
    ],
)
def test_rows_that_are_fine(tmp_path: Path, row: Any) -> None:
    report = validate_file(write_lines(tmp_path / "rows.jsonl", [row, GOOD]))
    assert report.ok, report.summary()
    assert report.format == "chat"


@pytest.mark.parametrize(
    ("row", "form"),
    [
        ({"prompt": "", "completion": "b"}, "prompt_completion"),
        ({"text": "a", "chosen": None}, "text"),
        ({"instruction": "a", "input": "", "output": "b", "history": []}, "alpaca"),
        ({"instruction": "a", "output": "b", "system": "c"}, "alpaca"),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "id": "x"}, "sharegpt"),
        (openai_pair(), "preference"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "trl_preference"),
        (
            {
                "prompt": [{"role": "user", "content": "a"}],
                "chosen": [{"role": "assistant", "content": "b"}],
                "rejected": [{"role": "assistant", "content": "c"}],
            },
            "trl_preference",
        ),
    ],
)
def test_every_form_is_detected_by_its_keys(tmp_path: Path, row: Any, form: str) -> None:
    report = validate_file(write_lines(tmp_path / "rows.jsonl", [row, row]))
    assert report.ok, report.summary()
    assert report.format == form
    assert report.kind == (PREFERENCES if "preference" in form else ANSWERS)


def test_a_mixture_names_the_forms_that_meet_in_it(tmp_path: Path) -> None:
    row = {**GOOD, "prompt": "a", "completion": "b", "colour": "c"}
    (issue,) = validate_file(write_lines(tmp_path / "rows.jsonl", [GOOD, row])).issues
    assert "prompt and completion (`completion` and `prompt`)" in issue.message
    assert "chat (`messages`)" in issue.message
    assert "colour" not in issue.message


def test_an_incomplete_row_says_what_each_possible_form_needs(tmp_path: Path) -> None:
    (issue,) = validate_file(write_lines(tmp_path / "rows.jsonl", [GOOD, {"prompt": "a"}])).issues
    assert "`completion` (prompt and completion)" in issue.message
    assert "`chosen` and `rejected` (TRL preference)" in issue.message


def test_a_row_of_another_form_says_which_form_the_file_has(tmp_path: Path) -> None:
    (issue,) = validate_file(write_lines(tmp_path / "rows.jsonl", [GOOD, {"text": "a"}, GOOD])).issues
    assert (issue.line, issue.code) == (2, "ambiguous_format")
    assert "has the form text, and those before it chat" in issue.message


def test_all_issues_are_counted_and_a_hundred_are_listed(tmp_path: Path) -> None:
    report = validate_file(write_lines(tmp_path / "rows.jsonl", [{}] * 250))
    assert (len(report.issues), report.issue_count) == (100, 250)
    assert report.issues[-1].line == 100
    assert "245 more" in report.summary()


def test_a_row_with_several_faults_lists_each_code_once(tmp_path: Path) -> None:
    row = {
        "messages": [{"role": "bot", "content": "a"}, {"role": "cat", "content": "b"}, {"role": "user", "content": 3}]
    }
    report = validate_file(write_lines(tmp_path / "rows.jsonl", [GOOD, row]))
    assert sorted(report.counts) == ["data_type", "unrecognized_role"]


@pytest.mark.parametrize(("rows", "ok"), [(0, False), (1, False), (2, True)])
def test_too_few_examples(tmp_path: Path, rows: int, ok: bool) -> None:
    report = validate_file(write_lines(tmp_path / "rows.jsonl", [GOOD] * rows))
    assert report.ok is ok
    assert list(report.counts) == ([] if ok else ["too_few_examples"])


def test_too_many_examples_stop_the_reading(tmp_path: Path) -> None:
    report = validate_file(write_lines(tmp_path / "rows.jsonl", [GOOD] * 9), max_rows=4)
    assert [(issue.line, issue.code) for issue in report.issues] == [(5, "too_many_examples")]
    assert validate_file(tmp_path / "rows.jsonl", max_rows=9).ok


def test_a_line_without_end_is_one_issue_and_takes_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(containers, "MAX_ROW_BYTES", 4096)
    path = tmp_path / "rows.jsonl"
    good = json.dumps(GOOD).encode() + b"\n"
    path.write_bytes(good + b"x" * 4_000_000 + b"\n" + good)
    tracemalloc.start()
    report = validate_file(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert [(issue.line, issue.code) for issue in report.issues] == [(2, "too_long")]
    assert report.rows == 3
    assert peak < 500_000
