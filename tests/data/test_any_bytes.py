"""Whatever is uploaded as a training file, reading it ends in a report whose words can be stored and shown."""

from __future__ import annotations

import gzip
import io
import json
from pathlib import Path

import pyarrow
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from tenora.data.dataset import validate_file
from tenora.data.forms import TABLE_KEYS

from .rows import chat

ROWS = [chat(f"Größe {n}?", "東京") for n in range(5)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


def parquet_bytes() -> bytes:
    out = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), out)
    return out.getvalue()


VALID = {
    "lines": LINES.encode(),
    "utf-16": LINES.encode("utf-16"),
    "utf-32": LINES.encode("utf-32"),
    "list": json.dumps(ROWS, indent=1).encode(),
    "table": b"prompt;completion\na;b\n" * 5,
    "gzip": gzip.compress(LINES.encode(), mtime=0),
    "parquet": parquet_bytes(),
}
ANYTHING = st.binary(max_size=64)
EDITS = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 12), ANYTHING), min_size=1, max_size=4)
AT_RANDOM = settings(deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def check(directory: Path, content: bytes) -> None:
    path = directory / "rows"
    path.write_bytes(content)
    report = validate_file(path, max_rows=1000)
    said = report.summary(100)
    assert said.isprintable()
    said.encode()  # no lone surrogate
    assert report.ok or report.issues


@pytest.mark.parametrize(("kind", "examples"), [(kind, 12 if kind == "parquet" else 150) for kind in VALID])
def test_a_damaged_file_ends_in_a_report(tmp_path_factory: pytest.TempPathFactory, kind: str, examples: int) -> None:
    directory = tmp_path_factory.mktemp("damaged")

    @settings(AT_RANDOM, max_examples=examples)
    @given(edits=EDITS, length=st.floats(0.5, 1.5))
    def run(edits: list[tuple[float, int, bytes]], length: float) -> None:
        content = VALID[kind]
        for where, removed, put in edits:
            place = int(where * len(content))
            content = content[:place] + put + content[place + removed :]
        check(directory, content[: int(length * len(content)) + 1])

    run()


def test_random_bytes_end_in_a_report(tmp_path_factory: pytest.TempPathFactory) -> None:
    directory = tmp_path_factory.mktemp("random")
    starts = st.sampled_from(
        [
            b"",
            b"{",
            b"[",
            b'{"text": "',
            b"text\n",
            b"\xff\xfe",
            b"\xfe\xff",
            b"\xef\xbb\xbf",
            b"\x1f\x8b\x08",
            b"PK\x03\x04",
        ]
    )

    @settings(AT_RANDOM, max_examples=400)
    @given(start=starts, rest=st.binary(min_size=1, max_size=400))
    def run(start: bytes, rest: bytes) -> None:
        check(directory, start + rest)

    run()


def test_random_json_ends_in_a_report(tmp_path_factory: pytest.TempPathFactory) -> None:
    directory = tmp_path_factory.mktemp("json")
    keys = st.sampled_from([*sorted(TABLE_KEYS), "role", "content", "from", "value", "tool_calls", "type"])
    leaves = (
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=True) | st.text(max_size=8) | st.just("user")
    )
    values = st.recursive(
        leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=4), max_leaves=12
    )

    @settings(AT_RANDOM, max_examples=400)
    @given(rows=st.lists(st.dictionaries(keys, values, max_size=5), min_size=1, max_size=3))
    def run(rows: list[object]) -> None:
        check(directory, "\n".join(json.dumps(row) for row in rows).encode())
        check(directory, json.dumps(rows).encode())

    run()
