"""Who may import whom: the contracts in pyproject.toml, and what import-linter cannot see."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from graphlib import CycleError, TopologicalSorter
from importlib import metadata
from pathlib import Path

import grimp
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.support.patience import PATIENCE

TENSOR_LIBRARIES = ("torch", "transformers", "numba", "triton", "peft")


def test_import_contracts(repo_root: Path) -> None:
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    done = subprocess.run(command, cwd=repo_root, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def circle_in(imports: Mapping[str, set[str]]) -> list[str]:
    """Files that import each other, each the next and the last the first; empty if there are none."""
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


@pytest.mark.parametrize("package", ["tenora", "tenora_kernels", "tenora_client"])
def test_no_files_import_each_other_in_a_circle(package: str) -> None:
    """Not even for their types: whoever reads one of them would have to know all."""
    graph = grimp.build_graph(package, cache_dir=None)
    imports = {name: graph.find_modules_directly_imported_by(name) for name in graph.modules}
    assert circle_in(imports) == []
    assert sum(map(len, imports.values())) > len(imports), "the test sees nothing"


def test_the_check_above_notices_a_circle() -> None:
    assert set(circle_in({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}})) == {"a", "b", "c"}


def loaded_by(*modules: str) -> set[str]:
    """The top-level packages that a fresh interpreter holds after importing `modules`."""
    program = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]: importlib.import_module(name)\n"
        "print(*{name.partition('.')[0] for name in sys.modules})"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *modules], capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "module",
    [
        "tenora.api.app",
        "tenora.control.control",
        "tenora.cli",
        "tenora.engine.client.client",
        "tenora.engine.messages",
        "tenora.engine.client.child",
        "tenora.data.dataset",
        "tenora.training.recipes",
        "tenora.training.events",
        "tenora.training.spec",
        "tenora.model.catalog",
        "tenora.model.tokenizer",
        "tenora.adapters.peft_format",
        "tenora.adapters.ref",
        "tenora.adapters.store",
    ],
)
def test_the_api_process_holds_no_tensors(module: str) -> None:
    """import-linter follows imports in the source; this sees what they lead to, third parties included."""
    assert loaded_by(module) & set(TENSOR_LIBRARIES) == set()


def test_the_check_above_notices_torch() -> None:
    assert "torch" in loaded_by("tenora_kernels.reference")


def closure(*distributions: str) -> set[str]:
    """The distributions, and all that installing them installs."""
    found: set[str] = set()
    waiting = list(distributions)
    while waiting:
        name = canonicalize_name(waiting.pop())
        if name in found:
            continue
        found.add(name)
        needs = [Requirement(text) for text in metadata.requires(name) or []]
        waiting += [need.name for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})]
    return found


def test_the_client_needs_httpx_and_pydantic_only() -> None:
    """All that importing the client loads comes with its two dependencies, or is loaded by them where it is there."""
    owners = metadata.packages_distributions()

    def distributions(modules: set[str]) -> set[str]:
        return {canonicalize_name(owner) for name in modules for owner in owners.get(name, ())}

    modules = loaded_by("tenora_client")
    assert {"httpx", "pydantic"} <= distributions(modules)
    # httpx loads rich, click and pygments for its own command line if they are installed.
    allowed = closure("httpx", "pydantic") | distributions(loaded_by("httpx", "pydantic"))
    assert distributions(modules) - {"tenora-client"} - allowed == set()
    assert modules & {"tenora", "tenora_kernels"} == set()


def imported_by(directory: Path) -> set[str]:
    """The top-level names that the source files below `directory` import, wherever in the file."""
    names: set[str] = set()
    for path in directory.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names.add(node.module.partition(".")[0])
    return names


def test_sqlalchemy_stays_in_the_registry_and_in_the_rows_of_wings(repo_root: Path) -> None:
    control = repo_root / "service/tenora/control"
    users = {
        str(path.relative_to(control).with_suffix(""))
        for path in control.rglob("*.py")
        if any(line.startswith(("from sqlalchemy", "import sqlalchemy")) for line in path.read_text().splitlines())
    }
    allowed = {name for name in users if name.startswith("registry/") or name.endswith(("/rows", "_rows"))}
    assert users - allowed == set()
    assert {"jobs/rows", "jobs/lease_rows", "registry/database"} <= allowed


def annotated_with_path(source: str) -> list[int]:
    """Lines of annotations with `Path` in signatures and fields of what other modules may use."""
    lines: list[int] = []
    waiting: list[ast.AST] = [ast.parse(source)]
    while waiting:
        for node in ast.iter_child_nodes(waiting.pop()):
            name = getattr(node, "name", None) or getattr(getattr(node, "target", None), "id", "")
            if name.startswith("_") and name != "__init__":
                continue
            if isinstance(node, ast.ClassDef):
                waiting.append(node)
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                arguments = node.args
                given = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg]
                annotations = [argument.annotation for argument in given if argument is not None] + [node.returns]
                lines += [one.lineno for one in annotations if one is not None and _names_path(one)]
            elif isinstance(node, ast.AnnAssign) and _names_path(node.annotation):
                lines.append(node.lineno)
    return lines


def _names_path(annotation: ast.expr) -> bool:
    return any(getattr(node, "id", getattr(node, "attr", "")) == "Path" for node in ast.walk(annotation))


def test_paths_are_the_storage_s_alone_in_the_signatures_of_control(repo_root: Path) -> None:
    control = repo_root / "service/tenora/control"
    sources = [path for path in control.rglob("*.py") if path.parent.name != "storage"]
    found = {str(path.relative_to(control)): annotated_with_path(path.read_text()) for path in sources}
    assert {name: lines for name, lines in found.items() if lines} == {}
    one = "def f(a: Path): ...\nclass C:\n  x: pathlib.Path | None\n  def _g(self, a: Path): ...\n"
    assert sorted(annotated_with_path(f"{one}def h() -> list[Path]: ...")) == [1, 3, 5]


@pytest.mark.parametrize(
    ("project", "sources"),
    [(".", ("service/tenora", "kernels/tenora_kernels")), ("clients/python", ("clients/python/src/tenora_client",))],
)
def test_what_is_imported_is_a_declared_dependency(repo_root: Path, project: str, sources: tuple[str, ...]) -> None:
    """Not only there because something else, or developing, happens to bring it."""
    declared = tomllib.loads((repo_root / project / "pyproject.toml").read_text())["project"]["dependencies"]
    known = {canonicalize_name(Requirement(text).name) for text in declared}
    owners = metadata.packages_distributions()
    ours = {"tenora", "tenora_kernels", "tenora_client"}
    imported = set().union(*(imported_by(repo_root / source) for source in sources))
    third_party = imported - ours - set(sys.stdlib_module_names)
    assert {"httpx", "pydantic"} & third_party
    undeclared = [n for n in third_party if not {canonicalize_name(owner) for owner in owners.get(n, ())} & known]
    assert sorted(undeclared) == []


def test_rooms_are_importable_without_their_contents() -> None:
    rooms = ("adapters", "api", "control", "engine", "model", "training")
    assert loaded_by(*(f"tenora.{room}" for room in rooms)) & {*TENSOR_LIBRARIES, "fastapi", "sqlalchemy"} == set()
