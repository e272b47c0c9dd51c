"""Whatever the bytes of a training file are, they are read or told: encodings, line ends, packed and foreign files."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import pickle
import sqlite3
import tracemalloc
import zipfile
from pathlib import Path

import pytest

from tenora.data import containers, opening, tables
from tenora.data.containers import read_records
from tenora.data.dataset import validate_file
from tenora.data.reading import ValidationReport

from .rows import chat

ROWS = [chat("Größe?", "東京 😀"), chat("naïve", "b")]
TEXT = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
TABLE = "prompt,completion\nGröße,東京\nc,d\n"


def report_of(tmp_path: Path, content: bytes) -> ValidationReport:
    path = tmp_path / "rows"
    path.write_bytes(content)
    return validate_file(path)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("text", [TEXT, TABLE, json.dumps(ROWS), json.dumps(ROWS, indent=2)])
def test_every_unicode_encoding_gives_the_same_rows(tmp_path: Path, encoding: str, mark: str, text: str) -> None:
    path = tmp_path / "rows"
    path.write_text(text, encoding="utf-8")
    expected = [record.value for record in read_records(path)]
    path.write_bytes((mark * (encoding != "utf-8-sig") + text).encode(encoding))
    assert [record.value for record in read_records(path)] == expected
    assert len(expected) == 2


def test_utf_16_that_breaks_off_is_told(tmp_path: Path) -> None:
    report = report_of(tmp_path, ("\ufeff" + TEXT).encode("utf-16-le")[:-1])
    assert [(issue.line, issue.code) for issue in report.issues] == [(2, "bad_utf8")]
    assert "UTF-16-LE" in report.summary()


@pytest.mark.parametrize(("content", "line"), [(TEXT, 1), ("Frage;Antwort;Größe\na;b;c\n", 1), (TABLE, 1)])
def test_windows_1252_is_told_with_its_line_and_how_to_convert_it(tmp_path: Path, content: str, line: int) -> None:
    report = report_of(tmp_path, content.encode("cp1252", errors="ignore"))
    issue = report.issues[0]
    assert (issue.line, issue.code) == (line, "bad_utf8")
    assert "iconv -f WINDOWS-1252 -t UTF-8" in issue.message
    assert "0xF6) is not UTF-8; in Windows-1252 (Latin-1) it would be 'ö'" in issue.message


@pytest.mark.parametrize("text", [TEXT, TABLE, json.dumps(ROWS, indent=2)])
def test_lines_may_end_in_cr_alone(tmp_path: Path, text: str) -> None:
    report = report_of(tmp_path, text.replace("\n", "\r").encode())
    assert (report.rows, report.summary()) == (2, "2 rows, all usable.")


def test_gzip_is_opened(tmp_path: Path) -> None:
    for content in (TEXT.encode(), TABLE.encode(), json.dumps(ROWS).encode(), ("\ufeff" + TEXT).encode("utf-16-le")):
        assert report_of(tmp_path, gzip.compress(content)).summary() == "2 rows, all usable."
    halves = gzip.compress(TEXT.encode()) + gzip.compress(TEXT.encode())
    assert report_of(tmp_path, halves).rows == 4


@pytest.mark.parametrize(("start", "stop", "line"), [(-9, None, 2000), (20, 29, 1), (4, None, 1)])
def test_damaged_gzip_is_told_behind_the_rows_before_it(
    tmp_path: Path, start: int, stop: int | None, line: int
) -> None:
    raw = gzip.compress("".join(json.dumps(chat(str(n))) + "\n" for n in range(3000)).encode())
    report = report_of(tmp_path, raw[:start] + (b"" if stop is None else b"\xff" * (stop - start) + raw[stop:]))
    assert report.issues[-1].line >= line
    assert not report.complete
    assert "gzip file is damaged" in report.issues[-1].message


def test_a_gzip_bomb_is_read_within_bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "MAX_UNPACKED_BYTES", 32 * 2**20)
    packed = io.BytesIO()
    with gzip.GzipFile(fileobj=packed, mode="wb") as file:
        for _ in range(512):
            file.write(b"{" + b"x" * 2**17 + b"\n")
    (tmp_path / "rows").write_bytes(packed.getvalue())
    tracemalloc.start()
    report = validate_file(tmp_path / "rows")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert report.counts["too_long"] == 1
    assert not report.complete
    assert peak < 2_000_000


@pytest.mark.parametrize("start", ["", "prompt,completion\n"])
def test_a_file_of_blank_lines_is_no_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: str) -> None:
    monkeypatch.setattr(containers, "MAX_BLANK_LINES", 100)
    monkeypatch.setattr(tables, "MAX_BLANK_LINES", 100)
    report = report_of(tmp_path, start.encode() + b"\n" * 100_000)
    assert (report.rows, report.issue_count, report.complete) == (1, 1, False)
    assert "blank lines" in report.summary()


def sqlite_file(tmp_path: Path) -> bytes:
    path = tmp_path / "rows.db"
    with sqlite3.connect(path) as connection:
        connection.execute("create table rows (text)")
    return path.read_bytes()


def zip_file() -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as file:
        file.writestr("rows.jsonl", TEXT)
    return packed.getvalue()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (zip_file(), "a ZIP archive or an Office document; unpack it"),
        (bz2.compress(TEXT.encode()), "a bzip2 file"),
        (lzma.compress(TEXT.encode()), "an xz file"),
        (b"\x28\xb5\x2f\xfd\x24", "a Zstandard file"),
        (gzip.compress(gzip.compress(TEXT.encode())), "gzip file inside a gzip file"),
        (gzip.compress(b"PAR1....PAR1"), "Parquet file inside a gzip file"),
        (pickle.dumps(ROWS), "a Python pickle"),
        (b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n", "a PDF document"),
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "a PNG image"),
        (b"PARE\0\0\0PARE", "an encrypted Parquet file"),
        (b"<!DOCTYPE html>\n<html>\n", "an HTML or XML page"),
        (b"\x00\x01\x02\x03 words", "not text (byte 1 is 0)"),
        (b"text\n\x00\x01\n", "not text (byte 6 is 0)"),
    ],
)
def test_a_foreign_file_is_named(tmp_path: Path, content: bytes, words: str) -> None:
    report = report_of(tmp_path, content)
    assert (report.issue_count, report.complete) == (1, False)
    assert words in report.summary()


def test_an_sqlite_database_is_named(tmp_path: Path) -> None:
    assert "an SQLite database; export its rows" in report_of(tmp_path, sqlite_file(tmp_path)).summary()


def test_what_is_said_of_a_file_can_be_stored_and_shown(tmp_path: Path) -> None:
    for content in (b"Gr\xf6\xdfe,\x1b[31m\na,b\n", b"[\xff\xfe]", b'{"\\u0007\\u0000": 1}\n', b"x" * 100_000):
        said = report_of(tmp_path, content).summary()
        assert said.isprintable()
        assert len(said.encode()) < 8000
