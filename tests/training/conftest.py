"""Tiny float32 bases and datasets. One CPU thread: sums then have one order, so runs can be compared bit for bit."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tenora.model.decoder import Decoder
from tenora.model.loading import load_decoder
from tenora.training.events import TrainEvent
from tests.support.threads import one_thread

from .runs import MakeSpec, TrainingRun, default_spec, write_rows


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="session")
def decoder(tiny_base: Path) -> Decoder:
    return load_decoder(tiny_base, device=torch.device("cpu"), dtype=torch.float32)


@pytest.fixture
def make_spec(tmp_path: Path) -> MakeSpec:
    """`default_spec` with changes; every call has a work directory of its own."""
    write_rows(tmp_path)
    numbers = itertools.count()
    return lambda **changes: default_spec(tmp_path, f"work-{next(numbers)}", **changes)


@pytest.fixture(scope="module")
def whole(decoder: Decoder, tmp_path_factory: pytest.TempPathFactory) -> list[TrainEvent | None]:
    """All items of an uninterrupted run of `default_spec`."""
    directory = tmp_path_factory.mktemp("whole")
    write_rows(directory)
    with one_thread():
        return list(TrainingRun(decoder, default_spec(directory, "work")))
