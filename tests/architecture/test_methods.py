"""A method is known by name in its own file alone, and a setting is stated once."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tenora.training.methods.table import METHODS, USUAL
from tests.architecture.test_imports import TENSOR_LIBRARIES, loaded_by
from tests.architecture.test_source import library_files

DECLARED = "service/tenora/training/methods/"


def names_in(source: str, words: set[str]) -> set[str]:
    """Those of the words that stand in the source as whole strings: compared, looked up or listed."""
    return {
        node.value
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in words
    }


def sources(root: Path) -> Iterator[tuple[str, str]]:
    for path in library_files(root):
        yield str(path.relative_to(root)), path.read_text()


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_named_in_its_own_file_alone(repo_root: Path, name: str) -> None:
    found = [path for path, source in sources(repo_root) if names_in(source, {name}) and "migrations" not in path]
    # The one that jobs without a method are trained by has its name beside the settings.
    own = "service/tenora/training/settings.py" if name == USUAL.name else f"{DECLARED}{name}.py"
    assert found == [own]
    assert names_in(f'x = method == "{name}"', {name}) == {name}


def test_what_a_method_declares_is_read_without_tensors() -> None:
    """import-linter is told to look away where a method's functions import torch; this sees that they alone do."""
    assert loaded_by("tenora.training.methods.table") & set(TENSOR_LIBRARIES) == set()
