"""A method is known by name in its own file alone, and a setting is stated once."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tenora.training.methods.table import METHODS, USUAL
from tenora.training.settings import HYPERPARAMETERS, SETTINGS
from tenora.training.spec import LORA_ASKED
from tests.architecture.test_imports import TENSOR_LIBRARIES, loaded_by
from tests.architecture.test_source import library_files

DECLARED = "service/tenora/training/methods/"
GENERATED = "clients/python/src/tenora_client/settings.py"
NOT_STATED = {
    **dict.fromkeys(("Rows", "RowsObject"), "how rows were cut"),
    **dict.fromkeys(
        ("ResolvedHyperparameters", "AdamWSettings", "OptimStep", "StepEvent", "EventData"),
        "numbers of a run, a step",
    ),
    **dict.fromkeys(("AdapterObject", "Adapter", "AdapterRecord", "AdapterVersionRow"), "an adapter that there is"),
    **dict.fromkeys(("Blob", "ParentShape", "Subject"), "an adapter that there is"),
    **dict.fromkeys(("Limits", "Ready"), "the modules of a base"),
    **dict.fromkeys(("Layout", "PackedStack"), "the layers of a base"),
    "Selection": "which weights are trained",
    **dict.fromkeys(
        ("RankPoint", "RankPointObject", "FullResult", "FullCard", "FullObject", "FullModel"),
        "an adapter that was made of a model",
    ),
    **dict.fromkeys(("Part", "Pass"), "where a pass takes the numbers of its dropout"),
    "PromptLogprob": "the rank of a token",
}
"""Classes with a field of a setting's name that says nothing of its bounds or default."""
COMMON_WORDS = {"full"}
"""Names of methods that stand in sentences about other things, too: disks are full."""
PEFT = "service/tenora/adapters/"  # its format has names of its own, some of which ours are called after
OF_ADAPTERS = ("service/tenora/cli/adapters.py", "service/tenora/cli/bench/")  # columns and flags of those there are
COMMON = {**HYPERPARAMETERS, **SETTINGS, **LORA_ASKED}
OWN = {setting.name for method in METHODS.values() for setting in method.settings}


def is_named_in(source: str, method: str) -> bool:
    """Whether a method is named in code: in a string, whole or as a word of it, or by an import of its file."""
    tree = ast.parse(source)
    told = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    common = rf"^{method}$|\bmethod\W+{method}\b|\b{method}-|\bof {method.upper()}\b"
    word = re.compile(common) if method in COMMON_WORDS else re.compile(rf"\b{method}\b", re.IGNORECASE)
    return any(
        (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and id(node) not in told
            and word.search(node.value)
        )
        or (isinstance(node, ast.ImportFrom) and method in {(node.module or "").rpartition(".")[2], *_imported(node)})
        for node in ast.walk(tree)
    )


def _imported(node: ast.ImportFrom) -> set[str]:
    return {one.name for one in node.names}


A_METHOD = re.compile(
    r"\bUSUAL(_METHOD)?\b|\bMETHODS\[|\bMETHOD\b|\b(spec|asked|job)\.method\b|\blearns_by\b|method\.name\b"
)


def forks_in(source: str) -> set[str]:
    """Comparisons of a method with another, or of its name."""
    same = (ast.Eq, ast.NotEq, ast.Is, ast.IsNot)
    return {
        ast.unparse(node)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Compare)
        and isinstance(node.ops[0], same)
        and any(A_METHOD.search(ast.unparse(side)) for side in (node.left, *node.comparators))
    }


def sources(root: Path) -> Iterator[tuple[str, str]]:
    for path in library_files(root):
        yield str(path.relative_to(root)), path.read_text()


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_named_in_its_own_file_alone(repo_root: Path, name: str) -> None:
    found = {path for path, source in sources(repo_root) if is_named_in(source, name) and "migrations" not in path}
    # The one that jobs without a method are trained by has its name beside the settings.
    own = "service/tenora/training/settings.py" if name == USUAL.name else f"{DECLARED}{name}.py"
    assert found - {GENERATED, f"{DECLARED}table.py"} == {own}
    for fork in (f'x = method == "{name}"', f'x = f"{name}-{{n}}"', f'help = "A pair of {name.upper()}."'):
        assert is_named_in(fork, name)
    assert is_named_in(f"from tenora.training.methods.{name} import METHOD", name)
    assert not is_named_in(f'def f():\n    """Of {name}."""', name)


def test_nothing_forks_by_which_method_it_is(repo_root: Path) -> None:
    """What differs is asked of the method; a name, the usual one or a class of one is compared nowhere."""
    known = {path: forks_in(source) for path, source in sources(repo_root) if not path.startswith(DECLARED)}
    assert {path: found for path, found in known.items() if found} == {}
    for fork in ("x = method is USUAL", "x = spec.method == y", "x = asked.learns_by.name != z", "x = y is METHODS[n]"):
        assert forks_in(fork)


def stated_in(source: str, names: set[str]) -> set[tuple[str, str]]:
    """Fields of classes that are called as one of the names."""
    return {
        (cls.name, node.target.id)
        for cls in ast.walk(ast.parse(source))
        if isinstance(cls, ast.ClassDef)
        for node in cls.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id in names
    }


def listed_in(source: str, names: set[str]) -> set[tuple[str, ...]]:
    """Tuples, lists and sets in which one of the names stands, as a table of settings would have it."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Tuple | ast.List | ast.Set):
            held = [item.value for item in node.elts if isinstance(item, ast.Constant) and item.value in names]
            if held:
                found.add(tuple(map(str, held)))
    return found


def texts_in(source: str) -> set[str]:
    """The strings of the code."""
    return {
        node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant) and type(node.value) is str
    }


def test_settings_are_listed_nowhere(repo_root: Path) -> None:
    """What is done for each of them asks their declaration which there are."""
    known = {path: source for path, source in sources(repo_root) if not path.startswith((PEFT, *OF_ADAPTERS))}
    listed = {path: listed_in(source, {*COMMON, *OWN}) for path, source in known.items()}
    assert {path: found for path, found in listed.items() if found} == {}
    assert listed_in('SWEPT = ("rank", "alpha", "other")\nx = {"rank": "alpha"}', {*COMMON}) == {("rank", "alpha")}
    assert listed_in('_OF_SPEC = ("method", *RUN, "packing")', {*COMMON}) == {("packing",)}


def test_flags_are_made_of_the_settings(repo_root: Path) -> None:
    """On the command line none is written out, with a help and a bound of its own."""
    flags = {setting.flag or f"--{name.replace('_', '-')}" for name, setting in COMMON.items()}
    declared = {"service/tenora/training/settings.py", "service/tenora/training/spec.py"}
    known = {path: source for path, source in sources(repo_root) if not path.startswith(OF_ADAPTERS)}
    found = {path: texts_in(source) & flags for path, source in known.items() if path not in declared}
    assert {path: stated for path, stated in found.items() if stated} == {}
    assert texts_in('def f(n: Annotated[int, typer.Option("--epochs", min=1)]) -> None: ...') & flags == {"--epochs"}


def test_a_setting_is_stated_in_one_file(repo_root: Path) -> None:
    known = {path: source for path, source in sources(repo_root) if path != GENERATED and not path.startswith(PEFT)}
    found = {path: stated_in(source, {*COMMON, *OWN}) for path, source in known.items() if DECLARED not in path}
    declared = {name for _, name in found.pop("service/tenora/training/settings.py")}
    declared |= {name for cls, name in found["service/tenora/training/spec.py"] if cls.startswith("Lora")}
    found["service/tenora/training/spec.py"] = {
        one for one in found["service/tenora/training/spec.py"] if not one[0].startswith("Lora")
    }
    assert declared == set(COMMON)
    elsewhere = {(path, *one) for path, stated in found.items() for one in stated if one[0] not in NOT_STATED}
    assert elsewhere == set()
    assert stated_in("class Request:\n    packing: bool = True\n", {*COMMON}) == {("Request", "packing")}


def test_what_a_method_declares_is_read_without_tensors() -> None:
    """import-linter is told to look away where a method's functions import torch; this sees that they alone do."""
    assert loaded_by("tenora.training.methods.table") & set(TENSOR_LIBRARIES) == set()
