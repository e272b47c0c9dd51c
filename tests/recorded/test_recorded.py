"""The answers of the fixed set are those that were recorded; `python -m tests.recorded` records them anew."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.recorded.fixed_answers import FixedAnswers
from tests.support.threads import one_thread

RECORDED = Path(__file__).with_name("recorded.json")
TOLERANCE = 5e-4  # of losses, which differ in their last bits between processors


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def test_rows_splits_losses_and_tokens_of_the_fixed_set_are_the_recorded_ones(tiny_base: Path, tmp_path: Path) -> None:
    recorded = json.loads(RECORDED.read_text(encoding="utf-8"))
    for name, answer in FixedAnswers(tiny_base, tmp_path).items():
        expected = recorded.pop(name)
        found = json.loads(json.dumps(answer))
        assert _without_floats(found) == _without_floats(expected), name
        assert _floats(found) == pytest.approx(_floats(expected), rel=TOLERANCE), name
    assert not recorded


def _without_floats(answer: Any) -> Any:
    if isinstance(answer, list):
        return [{**each, "floats": None} if isinstance(each, dict) and "floats" in each else each for each in answer]
    return answer


def _floats(answer: Any) -> list[float]:
    return [number for event in answer for number in event["floats"]] if isinstance(answer, list) else []
