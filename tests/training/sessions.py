"""Sessions driven by hand: put commands, collect answers."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from tenora.data.dataset import TokenizedDataset
from tenora.model.decoder import Decoder
from tenora.training.commands import ForwardBackward, Row, RunCommand
from tenora.training.events import TrainEvent
from tenora.training.fusion import FusedTraining
from tenora.training.spec import LoraSpec, SessionSpec


def session_spec(directory: Path, run_id: str = "session", **changes: Any) -> SessionSpec:
    settings: dict[str, Any] = {
        "run_id": run_id,
        "share_group": "g",
        "workdir": str(directory / run_id),
        "base_model": "tiny",
        "lora": LoraSpec(rank=4, alpha=8.0),
        "tokens_per_microbatch": 40,
        "seed": 11,
    }
    return SessionSpec(**{**settings, **changes})


def rows_of(dataset: TokenizedDataset, numbers: list[int], weight: float | None = None) -> list[Row]:
    """Rows of a dataset; each learned token weighs the same, in all 1."""
    found = [dataset.row(number) for number in numbers]
    if weight is None:
        weight = 1 / sum(int(np.count_nonzero(weights)) for _, weights in found)
    return [Row(tokens.tolist(), [weight if mark else None for mark in weights]) for tokens, weights in found]


def forward_backward(number: int, rows: list[Row], **changes: Any) -> ForwardBackward:
    return ForwardBackward(command_id=number, rows=rows, **changes)


class Sessions:
    """Runs in one process, with what each has answered."""

    def __init__(self, decoder: Decoder, *specs: SessionSpec, tokens: int = 200) -> None:
        self.training = FusedTraining(decoder, tokens_per_pass=tokens)
        self.events: defaultdict[str, list[TrainEvent]] = defaultdict(list)
        for spec in specs:
            self.training.start(spec)
        self.settle()

    def settle(self) -> None:
        """Go on until everybody waits for a command."""
        while self.training.busy:
            self.advance()

    def advance(self) -> None:
        if (event := self.training.advance()) is not None:
            self.events[event.run_id].append(event)

    def do(self, *commands: RunCommand, run_id: str = "session") -> list[Any]:
        """Put commands and take their answers."""
        seen = len(self.events[run_id])
        for command in commands:
            self.training.put(run_id, command)
        self.settle()
        return self.events[run_id][seen:]

    def stop(self, *, pause: bool, run_id: str = "session") -> Any:
        self.training.stop(run_id, pause=pause)
        self.settle()
        assert len(self.training.host.arena) == 0
        return self.events[run_id][-1]
