"""Full fine-tunings of tiny bases, and the same by transformers and torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch.nn import functional as F

from tenora.data.dataset import TokenizedDataset
from tenora.model.loading import load_decoder
from tenora.training.full.selection import Selection
from tenora.training.full.training import FullHost, FullTraining
from tenora.training.methods.table import find_method
from tenora.training.spec import LoraSpec, TrainSpec
from tests.training.runs import default_spec

SETTINGS = {"layers": "all", "embeddings": False, "norms": False, "serve_as": "none"}


def full_spec(directory: Path, workdir: str, *, own: dict[str, Any] | None = None, **changes: Any) -> TrainSpec:
    """`default_spec` by this method."""
    fields = {"method": "full", "method_settings": {**SETTINGS, **(own or {})}, "lora": LoraSpec(rank=8, alpha=16.0)}
    return default_spec(directory, workdir, **{**fields, "learning_rate": 1e-3, **changes})


def full_training(base: Path, spec: TrainSpec) -> FullTraining:
    """A run on a copy of the base."""
    decoder = load_decoder(base, dtype=torch.float32)
    settings = find_method(spec.method).own_settings(spec.method_settings)
    return FullTraining(FullHost(decoder, Selection.of(settings, decoder.spec)), spec, base)


def oracle(
    base: Path,
    dataset: TokenizedDataset,
    rows: Sequence[int],
    trains: Any,
    *,
    rate: float,
    max_grad_norm: float,
    weight_decay: float,
) -> tuple[float, float, dict[str, torch.Tensor]]:
    """The loss of rows and the norm of its gradient before a step of torch's AdamW on transformers' model, and its
    weights afterwards.

    Args:
        trains: of a parameter's name, whether it is trained.
    """
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trains(name))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=weight_decay, betas=(0.9, 0.999), eps=1e-8)
    losses, count = [], 0
    for row in rows:
        tokens, weights = dataset.row(row)
        ids, learned = torch.from_numpy(tokens.astype(np.int64)), torch.from_numpy(weights[1:].astype(bool))
        logits = model(input_ids=ids[None]).logits[0, :-1][learned]
        losses.append(F.cross_entropy(logits, ids[1:][learned], reduction="sum"))
        count += int(learned.sum())
    loss = torch.stack(losses).sum() / count
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(trained, max_grad_norm)
    optimizer.step()
    return loss.item(), norm.item(), {name: tensor.detach() for name, tensor in model.state_dict().items()}
