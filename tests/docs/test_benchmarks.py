"""Every benchmark that a document quotes starts on a fresh clone, with the quoted options and the data that ships."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tenora.data.dataset import validate_file

DOCUMENTS = ("README.md", "kernels/README.md", "tests/bench/README.md", "service/README.md")

HELP = """
import contextlib, io, json, runpy, sys
said = {}
for words in json.loads(sys.argv[1]):
    sys.argv = words
    with contextlib.redirect_stdout(io.StringIO()) as output:
        try:
            runpy.run_module(words[0], run_name="__main__", alter_sys=True)
        except SystemExit as end:
            assert not end.code, words
    said[words[0]] = said.get(words[0], "") + output.getvalue()
print(json.dumps(said))
"""


def quoted(root: Path) -> dict[str, set[str]]:
    """The benchmarks' modules and the options that go with each."""
    found: dict[str, set[str]] = {}
    for document in DOCUMENTS:
        for command in re.findall(r"`python -m (tests\.bench[^`]*)`", (root / document).read_text()):
            module, *words = shlex.split(command)
            options = {word.strip("[]") for word in words if word.lstrip("[").startswith("--")}
            found.setdefault(module, set()).update(options)
    for module in re.findall(r"-m (tests\.bench[\w.]+)", (root / "Makefile").read_text()):
        found.setdefault(module, set())
    return found


def test_every_quoted_benchmark_starts_and_knows_the_options_that_are_quoted(repo_root: Path) -> None:
    commands = quoted(repo_root)
    assert {"tests.bench.training", "tests.bench.serving.cases", "tests.bench.peers"} <= set(commands)
    asked = [[module, "--help"] for module in commands]
    asked.append(["tests.bench.peers", "run", "--help"])  # its commands have options of their own
    program = [sys.executable, "-c", HELP, json.dumps(asked)]
    done = subprocess.run(program, cwd=repo_root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    for module, options in commands.items():
        assert [option for option in options if option not in said[module]] == [], module


def test_the_data_that_ships_is_what_the_training_benchmark_takes(repo_root: Path) -> None:
    from tests.bench.training.__main__ import DATA, Setting

    setting = Setting(repo_root, 1, repo_root, 400, "float32")
    assert setting.data == DATA == repo_root / "tests/bench/data"
    assert setting.sets == ["devils_dictionary"]
    for part, rows in (("train", 400), ("valid", 80)):
        found = validate_file(DATA / f"devils_dictionary_{part}.jsonl", max_rows=1000)
        assert (found.issue_count, found.rows) == (0, rows)


def test_a_directory_without_data_is_told(repo_root: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.bench.training", "--model", str(tmp_path), "--data", str(tmp_path)]
    done = subprocess.run(command, cwd=repo_root, capture_output=True, text=True, check=False)
    assert (done.returncode, "NAME_train.jsonl" in done.stderr) == (2, True)


@pytest.mark.full
@pytest.mark.real
def test_the_training_benchmark_gives_its_first_result(repo_root: Path, real_base: Path) -> None:
    command = [sys.executable, "-m", "tests.bench.training", "--model", str(real_base), "--rows", "16", "one-job"]
    done = subprocess.run(command, cwd=repo_root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^  ratio +\d", done.stdout, re.MULTILINE), done.stdout
