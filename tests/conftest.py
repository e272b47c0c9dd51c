"""Fixtures that several rooms share; a room's own fixtures stand in its own `conftest.py`.

The environment is set before any test module is imported, because transformers and tokenizers read it at import: no
test talks to a model hub.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from numba.core import config

from tenora_kernels.cpu.runtime.levels import LEVELS, target_features

if TYPE_CHECKING:
    from tenora.model.tokenizer import Tokenizer

# The tiny bases are whole panels of AVX2's vectors and not of AVX-512's, so the compiled layers would not take them.
if target_features().get("avx512f"):
    os.environ |= {"NUMBA_CPU_NAME": "x86-64-v3", "NUMBA_CPU_FEATURES": LEVELS["x86-64-v3"]}
    config.reload_config()
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
REPO = Path(__file__).resolve().parents[1]
# A developer's own settings must not leak into the tests' servers; the state directory says where the real base is.
for _name in [name for name in os.environ if name.startswith("TENORA_") and name != "TENORA_HOME"]:
    del os.environ[_name]


@pytest.fixture(scope="session")
def repo_root() -> Path:
    """The checkout."""
    return REPO


@pytest.fixture(scope="session")
def make_tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`make_tiny(family)` -> directory of a tiny random model of that family, built once per session; read only."""
    built: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in built:
            from tests.support.tiny import build_tiny  # imports transformers: seconds that many tests do not need

            built[family] = build_tiny(tmp_path_factory.mktemp(f"tiny-{family}"), family)
        return built[family]

    return make


@pytest.fixture(scope="session")
def tiny_base(make_tiny: Callable[[str], Path]) -> Path:
    """Directory of the tiny random base that most tests serve; read only."""
    return make_tiny("smollm2")


@pytest.fixture(scope="session")
def tokenizer(tiny_base: Path) -> Tokenizer:
    """The tiny base's tokenizer."""
    from tenora.model.tokenizer import Tokenizer  # imports tokenizers, whose parallelism is settled above

    return Tokenizer.load(tiny_base)


@pytest.fixture(scope="session")
def real_base() -> Path:
    """Directory of the real base, fetched once into $TENORA_HOME (default ~/.tenora); read only."""
    from tests.support.base import real_base as fetch

    return fetch()


@pytest.fixture(scope="session")
def shared_data(repo_root: Path) -> Path:
    """Directory of the real data sets beside the checkout; a test that asks for it is skipped where there is none."""
    directory = repo_root.parent / "shared" / "data"
    if not directory.is_dir():
        pytest.skip("no real data beside this checkout (../shared/data)")
    return directory
