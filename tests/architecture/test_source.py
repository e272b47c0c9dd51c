"""What holds for every source file, read off its text or its syntax tree."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

LIBRARIES = ("service/tenora", "kernels/tenora_kernels", "clients/python/src/tenora_client")
MAX_LINES = 400
# Nothing that ships may know the machine it was written on.
MACHINE_PATH = re.compile(r"(?<![\w.}])/(?:work|root|home|Users|mnt|opt/pypi|opt/wheels)\b|\.\./shared")


def files_of_the_project(root: Path) -> list[Path]:
    """Every file that git tracks or would track."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout.split("\0")
    return [root / name for name in names if name and (root / name).is_file()]


@pytest.fixture(scope="module")
def project(repo_root: Path) -> list[Path]:
    if not (repo_root / ".git").exists():
        pytest.skip("not a git checkout")
    return files_of_the_project(repo_root)


def library_files(root: Path) -> Iterator[Path]:
    for library in LIBRARIES:
        yield from sorted((root / library).rglob("*.py"))


def test_libraries_are_found(repo_root: Path) -> None:
    for library in LIBRARIES:
        assert list((repo_root / library).rglob("*.py")), library


def test_roofs_are_no_packages(repo_root: Path) -> None:
    """A package called `kernels` exists on the index, and transformers looks for it."""
    assert [name for name in ("service", "kernels", "clients") if (repo_root / name / "__init__.py").exists()] == []


def asserts_in(source: str) -> list[int]:
    return [node.lineno for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Assert)]


def test_no_check_vanishes_under_python_o(repo_root: Path) -> None:
    found = {str(path.relative_to(repo_root)): asserts_in(path.read_text()) for path in library_files(repo_root)}
    assert {name: lines for name, lines in found.items() if lines} == {}
    assert asserts_in("def f(x):\n    assert x\n") == [2]


def test_files_can_be_read_in_one_sitting(project: list[Path], repo_root: Path) -> None:
    lengths = {path: len(path.read_text().splitlines()) for path in project if path.suffix == ".py"}
    assert {str(path.relative_to(repo_root)): n for path, n in lengths.items() if n > MAX_LINES} == {}


def test_nothing_knows_the_machine_it_was_written_on(project: list[Path], repo_root: Path) -> None:
    found = {}
    for path in project:
        name = path.relative_to(repo_root)
        if name.parts[0] == "tests":
            continue
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue  # a picture or the like
        if matches := MACHINE_PATH.findall(text):
            found[str(name)] = matches
    assert found == {}


@pytest.mark.parametrize(
    ("text", "bad"),
    [
        ("see /root/x", True),
        ('open("/work/a")', True),
        ("../shared/data", True),
        ("kernels/work", False),
        ("{home}/work", False),
        ("https://example.com/home", False),
    ],
)
def test_machine_paths_are_told_from_others(text: str, bad: bool) -> None:
    assert bool(MACHINE_PATH.search(text)) is bad


FORBIDDEN_NAMES = {"utils", "util", "helpers", "helper", "manager", "managers", "common", "misc"}


def test_no_file_is_named_after_nothing(repo_root: Path) -> None:
    assert [str(path) for path in library_files(repo_root) if path.stem in FORBIDDEN_NAMES] == []


SUPPRESSION = re.compile(r"#\s*(noqa(?::\s*[A-Z]+\d+(?:,\s*[A-Z]+\d+)*)?|type:\s*ignore(?:\[[\w, -]+\])?)(.*)$")


def uncommented_suppressions(source: str) -> list[int]:
    """Lines with a `noqa` or `type: ignore` and no reason after it, above it, or at its like just before."""
    found: list[int] = []
    explained: dict[str, int] = {}
    lines = source.splitlines()
    for number, line in enumerate(lines, 1):
        match = SUPPRESSION.search(line)
        if match is None:
            continue
        kind, rest = match.groups()
        above = lines[number - 2].lstrip().startswith("#") if number > 1 else False
        if re.search(r"[A-Za-z]{3}", rest) or above or number - explained.get(kind, -9) <= 2:
            explained[kind] = number
        else:
            found.append(number)
    return found


def test_suppressions_give_their_reason(repo_root: Path) -> None:
    found = {
        str(path.relative_to(repo_root)): uncommented_suppressions(path.read_text())
        for path in library_files(repo_root)
    }
    assert {name: lines for name, lines in found.items() if lines} == {}
    assert uncommented_suppressions("x = 1  # noqa: E501\ny = 2  # noqa: S608  # no input in it\n") == [1]
    assert uncommented_suppressions("# the API's name\nid = 1  # noqa: A001\nmax = 2  # noqa: A001\n") == []


def silent_handlers(source: str) -> list[int]:
    """Lines of `except` clauses for everything whose body does nothing."""
    broad = {"Exception", "BaseException"}
    return [
        node.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ExceptHandler)
        and (node.type is None or (isinstance(node.type, ast.Name) and node.type.id in broad))
        and all(isinstance(statement, ast.Pass) for statement in node.body)
    ]


def test_no_error_is_swallowed_whole(repo_root: Path) -> None:
    found = {str(path.relative_to(repo_root)): silent_handlers(path.read_text()) for path in library_files(repo_root)}
    assert {name: lines for name, lines in found.items() if lines} == {}
    assert silent_handlers("try:\n    f()\nexcept Exception:\n    pass\n") == [3]
