"""What the documents tell a reader to type exists: make targets, commands with their options, files, Python calls."""

from __future__ import annotations

import ast
import json
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from tenora.cli.app import app
from tenora.data.dataset import validate_file

PAGES = tuple(f"docs/{page.name}" for page in sorted((Path(__file__).parents[2] / "docs").glob("*.md")))
DOCUMENTS = ("README.md", "service/README.md", "CHANGELOG.md", "clients/python/README.md", *PAGES)


def blocks(text: str, language: str) -> list[str]:
    """The fenced code blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def shell_lines(root: Path) -> Iterator[tuple[str, list[str]]]:
    """Every command line in a document's shell blocks, continued lines joined, as (document, words)."""
    for document in DOCUMENTS:
        for block in blocks((root / document).read_text(), "(?:sh|bash|console)"):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if words:
                    yield document, words


def targets(root: Path) -> set[str]:
    """The phony targets of the Makefile."""
    phony = re.search(r"^\.PHONY: (.*)$", (root / "Makefile").read_text(), re.MULTILINE)
    assert phony is not None
    return set(phony.group(1).split())


def parse(words: list[str]) -> None:
    """Parse `tenora …` as the program itself would; a wrong command or option raises click's UsageError."""
    command: Any = typer.main.get_command(app)
    context = command.make_context("tenora", list(words))
    rest = words
    while hasattr(command, "resolve_command"):
        name, command, rest = command.resolve_command(context, rest)
        context = command.make_context(name, list(rest), parent=context)


def test_make_targets_exist(repo_root: Path) -> None:
    named = {words[1] for _, words in shell_lines(repo_root) if words[0] == "make"}
    assert {"demo", "test", "setup"} <= named
    assert named <= targets(repo_root)
    inline = {
        name for document in DOCUMENTS for name in re.findall(r"`make ([\w-]+)", (repo_root / document).read_text())
    }
    assert inline <= targets(repo_root)


def test_commands_exist_with_their_options(repo_root: Path) -> None:
    found = [(document, words) for document, words in shell_lines(repo_root) if Path(words[0]).name == "tenora"]
    assert len([words for document, words in found if document == "README.md"]) >= 5
    for _, words in found:
        parse(words[1:])


@pytest.mark.parametrize("words", ["sreve", "serve --prot 1", "keys create --tenant a", "chat -m", "adapters"])
def test_wrong_commands_are_noticed(words: str) -> None:
    with pytest.raises(Exception, match=r".") as caught:
        parse(words.split())
    assert "click" in type(caught.value).__module__


def test_make_help_lists_every_target(repo_root: Path) -> None:
    done = subprocess.run(["make", "--silent", "help"], cwd=repo_root, capture_output=True, text=True, check=True)
    assert {line.split()[1] for line in done.stdout.splitlines()} == targets(repo_root)
    default = subprocess.run(["make", "--silent"], cwd=repo_root, capture_output=True, text=True, check=True)
    assert default.stdout == done.stdout


def test_ci_runs_what_the_readme_says_and_the_tests_that_take_minutes(repo_root: Path) -> None:
    lines = [line.strip() for line in (repo_root / ".ci/run").read_text().splitlines()]
    assert [line for line in lines if line.startswith("make ")] == ["make lint", "make test", "make test-full"]


def test_linked_files_exist(repo_root: Path) -> None:
    for document in DOCUMENTS:
        path = repo_root / document
        links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text())
        missing = [link for link in links if not (path.parent / link).exists()]
        assert missing == [], document


def test_the_map_names_files_that_exist(repo_root: Path) -> None:
    text = (repo_root / "service/README.md").read_text()
    named = set(re.findall(r"`((?:\.\./|\w+/)[\w./]+\.\w+|\w+\.py)[`:]", text))
    assert len(named) > 25
    roots = (repo_root / "service/tenora", repo_root / "service", repo_root)
    assert [name for name in named if not any((root / name).is_file() for root in roots)] == []


def test_the_map_names_every_room(repo_root: Path) -> None:
    package = repo_root / "service/tenora"
    rooms = {path.name for path in package.iterdir() if (path / "__init__.py").exists()}
    text = (repo_root / "service/README.md").read_text()
    assert [room for room in rooms if f"`{room}/`" not in text] == []


def test_the_readme_is_in_step_with_the_packages(repo_root: Path) -> None:
    import tomllib

    service = tomllib.loads((repo_root / "pyproject.toml").read_text())["project"]
    client = tomllib.loads((repo_root / "clients/python/pyproject.toml").read_text())["project"]
    readme = (repo_root / "README.md").read_text()
    assert service["name"] == "tenora"
    assert client["name"] == "tenora-client"
    assert f"`{client['name']}`" in readme
    assert readme.startswith("# Tenora\n")
    assert service["license"] == client["license"] == "Apache-2.0"
    assert (repo_root / "LICENSE").read_text().lstrip().startswith("Apache License")


@pytest.mark.parametrize("document", DOCUMENTS)
def test_python_examples_are_python(repo_root: Path, document: str) -> None:
    for block in blocks((repo_root / document).read_text(), "python"):
        ast.parse(block)


def test_the_example_row_is_a_training_row(repo_root: Path, tmp_path: Path) -> None:
    (row,) = blocks((repo_root / "README.md").read_text(), "json")
    json.loads(row)
    file = tmp_path / "train.jsonl"
    file.write_text(row * 10)
    assert validate_file(file, max_rows=100).issue_count == 0


def test_the_curl_example_sends_json(repo_root: Path) -> None:
    (words,) = (words for document, words in shell_lines(repo_root) if document == "README.md" and words[0] == "curl")
    body = json.loads(words[words.index("-d") + 1])
    assert set(body) == {"model", "messages"}
