from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tenora.adapters.ref import AdapterRef
from tenora.model.decoder import Decoder
from tenora.model.loading import load_decoder
from tests.engine.driver import Driver, make_adapter
from tests.support.threads import one_thread

TARGETS = (
    ("q_proj", "v_proj"),
    ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    ("gate_proj", "down_proj"),
    ("k_proj", "up_proj"),
)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="session")
def decoder(tiny_base: Path) -> Decoder:
    """The tiny base in float32."""
    return load_decoder(tiny_base)


@pytest.fixture
def driver(decoder: Decoder) -> Iterator[Callable[..., Driver]]:
    """`driver(**settings)`: an engine on the tiny base."""
    made: list[Driver] = []

    def make(base: Decoder = decoder, **given: Any) -> Driver:
        made.append(Driver(base, **given))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.fixture(scope="session")
def adapters(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[AdapterRef]:
    """Eight adapters of the tiny base: ranks 1 to 16, all kinds of targets, every other one rsLoRA."""
    root = tmp_path_factory.mktemp("adapters")
    return [
        make_adapter(
            tiny_base,
            root / f"a{index}",
            rank=(4, 8, 16, 1)[index % 4],
            targets=TARGETS[(index + index // 4) % 4],
            seed=index,
            use_rslora=bool(index % 2),
        )
        for index in range(8)
    ]
