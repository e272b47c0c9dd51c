"""A layer's shape is written once."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tenora.model.layout import LAYOUTS, Sizes

from .test_source import library_files

HOME = "service/tenora/model/layout.py"
SIZES = Sizes(hidden=8, mlp=12, heads=2, kv_heads=1, head_dim=4, qk_norm=True)


def names_of_layers() -> set[str]:
    """Modules, blocks and norms of every layout, as checkpoints call them."""
    found = set()
    for layout in (make(SIZES) for make in LAYOUTS.values()):
        found |= {module.name for module in layout.modules}
        for block in layout.blocks:
            found |= {block.norm, *(name for name, _ in block.head_norms)}
    return found


def mentions(source: str, names: set[str]) -> set[str]:
    """Names that stand in a file's code: in its strings, docstrings not counted, or as its identifiers."""
    tree = ast.parse(source)
    docs = {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    }
    texts = [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs
    ]
    texts += [node.id for node in ast.walk(tree) if isinstance(node, ast.Name)]
    texts += [node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    return {name for name in names for text in texts if re.search(rf"(?<![A-Za-z0-9_]){name}(?![A-Za-z0-9_])", text)}


def test_only_the_layout_names_a_layers_modules(repo_root: Path) -> None:
    names = names_of_layers()
    found = {
        str(path.relative_to(repo_root)): here
        for path in library_files(repo_root)
        if (here := mentions(path.read_text(), names))
    }
    assert set(found) == {HOME}, found
    assert found[HOME] == names


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ('NAMES = ("q_proj", "k_proj")\n', {"q_proj"}),
        ('x = f"{prefix}.self_attn.q_proj.weight"\n', {"q_proj"}),
        ("y = self.q_proj(x)\n", {"q_proj"}),
        ('def f():\n    """Such as q_proj."""\n', set()),
        ("y = self.fq_proj(x)\n", set()),
    ],
)
def test_names_are_found_in_code_but_not_in_what_is_said_about_it(source: str, found: set[str]) -> None:
    assert mentions(source, {"q_proj"}) == found
