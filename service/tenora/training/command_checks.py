"""What a session refuses before it does any work."""

from __future__ import annotations

import math
import re

import msgspec

from tenora.errors import TrainingError
from tenora.model.spec import ModelSpec
from tenora.training.commands import (
    AdamWSettings,
    ForwardBackward,
    OptimStep,
    Row,
    RunCommand,
    Sample,
    SaveAdapter,
    SaveState,
)

MAX_ROWS = 4096
MAX_TOKENS = 2**20
"""Of one command."""
MAX_PROMPTS = 1024
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}")


def check_command(command: RunCommand, spec: ModelSpec) -> None:
    """Raise TrainingError, code invalid_command, unless the command can be carried out on a base of this shape."""
    match command:
        case ForwardBackward(rows=rows):
            _require(0 < len(rows) <= MAX_ROWS, f"There are {len(rows)} rows; send 1 to {MAX_ROWS}.")
            tokens = sum(len(row.tokens) for row in rows)
            _require(tokens <= MAX_TOKENS, f"The rows have {tokens} tokens; send at most {MAX_TOKENS}.")
            for number, row in enumerate(rows):
                _check_row(number, row, spec)
        case OptimStep(settings=settings, max_grad_norm=norm):
            _check_settings(settings)
            _require(math.isfinite(norm) and norm >= 0, f"max_grad_norm is {norm} and must be 0 or more.")
        case SaveState(name=name) | SaveAdapter(name=name):
            allowed = "letters, digits, '.', '_' and '-', not beginning with '.', at most 128"
            _require(_NAME.fullmatch(name) is not None, f"The name {name[:200]!r} must be {allowed}.")
        case Sample(prompts=prompts):
            _require(0 < len(prompts) <= MAX_PROMPTS, f"There are {len(prompts)} prompts; send 1 to {MAX_PROMPTS}.")


def _check_row(number: int, row: Row, spec: ModelSpec) -> None:
    tokens, weights = row.tokens, row.weights
    length, most = len(tokens), spec.context_length
    _require(2 <= length <= most, f"Row {number} has {length} tokens; a row has 2 to {most}.")
    _require(len(weights) == length, f"Row {number} has {length} tokens and {len(weights)} weights.")
    in_range = min(tokens) >= 0 and max(tokens) < spec.vocab_size
    _require(in_range, f"Row {number} has a token that is not one of the model's {spec.vocab_size}.")
    _require(weights[0] is None, f"The first token of row {number} is predicted from nothing; its weight must be null.")
    given = [weight for weight in weights if weight is not None]
    _require(bool(given), f"Row {number} has no token with a weight.")
    _require(all(abs(weight) <= 1e30 for weight in given), f"Row {number} has a weight that is not an ordinary number.")


def _check_settings(settings: AdamWSettings) -> None:
    """The bounds of `torch.optim.AdamW`."""
    for name, value in msgspec.structs.asdict(settings).items():
        if name in {"beta1", "beta2"}:
            _require(0 <= value < 1, f"{name} is {value} and must be at least 0 and below 1.")
        else:
            _require(math.isfinite(value) and value >= 0, f"{name} is {value} and must be 0 or more.")


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise TrainingError(message, code="invalid_command")
