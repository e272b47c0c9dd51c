"""Keys of a row that mean something which is not done: refused by name, whatever the container; harmless ones pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from tenora.data.dataset import validate_file

from .rows import chat, write_lines


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("weight", 0),
        ("weight", 0.5),
        ("sample_weight", 2),
        ("train", False),
        ("loss", False),
        ("functions", [{"name": "f", "parameters": {}}]),
        ("function_call", {"name": "f"}),
        ("images", ["a.png"]),
        ("image", "a.png"),
        ("mask", [0, 1]),
        ("loss_mask", [0]),
        ("labels", [-100, 5]),
        ("rejected_message", {"role": "assistant", "content": "no"}),
        ("chat_template_kwargs", {"enable_thinking": False}),
        ("enable_thinking", False),
    ],
)
def test_a_key_that_means_something_is_refused_by_name(tmp_path: Path, key: str, said: Any) -> None:
    report = validate_file(write_lines(tmp_path / "rows.jsonl", [chat(), {**chat(), key: said}]))
    assert [(issue.line, issue.code) for issue in report.issues] == [(2, "unsupported_key")]
    assert report.issues[0].message.startswith(f"The row has `{key}`, which ")


@pytest.mark.parametrize(
    "extra",
    [
        {"id": 3, "source": "x", "metadata": {"a": 1}, "score": 0.5, "parallel_tool_calls": False},
        {"weight": 1, "train": True, "loss": 0.53, "images": [], "functions": [], "mask": None, "image": ""},
        {"weight": 1.0, "chat_template_kwargs": {}},
    ],
)
def test_keys_that_say_nothing_or_what_is_done_anyway_pass(tmp_path: Path, extra: dict[str, Any]) -> None:
    assert validate_file(write_lines(tmp_path / "rows.jsonl", [{**chat(), **extra}] * 2)).ok


def test_columns_of_tables_are_refused_by_their_values(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    path.write_text("text,weight,images\na,1,\nb,0,[]\n", encoding="utf-8")
    assert [(issue.line, issue.code) for issue in validate_file(path).issues] == [(2, "unsupported_key")]
    parquet.write_table(pyarrow.table({"text": ["a", "b"], "Weight": [1.0, 0.0]}), path)
    assert [(issue.line, issue.code) for issue in validate_file(path).issues] == [(2, "unsupported_key")]
