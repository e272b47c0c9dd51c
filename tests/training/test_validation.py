"""Every code of a validation report, with the line it belongs to."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from tenora.training import reading
from tenora.training.dataset import validate_file

from .rows import chat, write_lines

GOOD = chat()


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
        ({"text": "plain"}, "missing_messages_list"),
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
        ({**GOOD, "label": "yes"}, "ambiguous_format"),
        ({"prompt": "a", "completion": "b", "label": True}, "ambiguous_format"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "ambiguous_format"),
        ({"prompt": "a", "completion": "b"}, "ambiguous_format"),  # fine by itself, but the others are conversations
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
    monkeypatch.setattr(reading, "MAX_ROW_BYTES", 4096)
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
