"""What a key may do is decided in one place."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from tenora.control.tenancy.access import ACTIONS

DECIDES = "control/tenancy/access.py"
# They make, keep and show keys; they do not ask what one may do.
KEEP_KEYS = {
    "control/tenancy/keys.py",
    "control/tenancy/records.py",
    "api/routes/admin.py",
    "api/schemas/admin.py",
}


def scope_reads(tree: ast.AST) -> Iterator[int]:
    """Lines that read somebody's `scopes`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr == "scopes" and isinstance(node.ctx, ast.Load):
            yield node.lineno


def actions_named(tree: ast.AST) -> Iterator[str]:
    """The actions that routes ask for: `may("files.read")`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "may":
            yield from (argument.value for argument in node.args if isinstance(argument, ast.Constant))


def trees(root: Path) -> dict[str, ast.AST]:
    service = root / "service/tenora"
    paths = [path for room in ("api", "control") for path in sorted((service / room).rglob("*.py"))]
    return {str(path.relative_to(service)): ast.parse(path.read_text()) for path in paths}


def test_no_route_or_use_case_looks_at_scopes(repo_root: Path) -> None:
    found = {name: list(scope_reads(tree)) for name, tree in trees(repo_root).items()}
    assert found[DECIDES], "the test sees nothing"
    assert {name for name, lines in found.items() if lines} - KEEP_KEYS == {DECIDES}


def test_every_action_of_the_table_is_asked_for_by_exactly_one_route(repo_root: Path) -> None:
    named = [
        action for name, tree in trees(repo_root).items() if name.startswith("api/") for action in actions_named(tree)
    ]
    assert sorted(named) == sorted(ACTIONS)
