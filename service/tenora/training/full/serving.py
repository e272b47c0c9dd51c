"""An adapter that stands for a full fine-tuning: which rank suffices, and whether any does.

What is served must answer as the model does. On held-out rows the adapter's loss may be above the model's by no more
than is lost in the noise, and its distribution of the next token may hardly differ: the gap alone would let an adapter
pass that errs in both directions. Ranks are tried from below, and the first that passes is served.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tenora.adapters.atomic import new_directory
from tenora.adapters.digest import CONFIG_NAME, WEIGHTS_NAME
from tenora.adapters.kinds.lora import lora_config, lora_tensors
from tenora.adapters.matching import layer_number
from tenora.adapters.safetensors_file import write_file
from tenora.data.dataset import TokenizedDataset
from tenora.model.checkpoint import Checkpoint
from tenora.model.spec import target_modules
from tenora.training.events import RankPoint
from tenora.training.full.low_rank import Factors, share_ranks
from tenora.training.full.passing import Divergence, diverge, finished_states, head_of
from tenora.training.full.ranks import SERVED_RANKS
from tenora.training.full.weights import FullWeights
from tenora.training.intervals import bootstrap
from tenora.training.packing import PackedRows, microbatches
from tenora.training.spec import LoraSpec

GAP_NATS = 0.01
KL_NATS = 0.02
"""Per token; the gap may also be half as wide as the interval of what the fine-tuning has gained."""
MOST_TOKENS = 32_768  # that are read for each rank

__all__ = ["GAP_NATS", "KL_NATS", "Approximation", "allowed_gap", "measured_rows"]


def allowed_gap(tokens: Sequence[int], model: Sequence[float], start: Sequence[float], *, seed: int) -> float:
    """By how much the adapter's held-out loss may be above the model's, in nats per token.

    Args:
        tokens: learned ones of each row.
        model, start: summed loss of each row under the model and under the base.
    """
    differences = np.array(model, dtype=np.float64) - np.array(start, dtype=np.float64)
    low, high = bootstrap(differences, np.array(tokens, dtype=np.int64), seed=seed)
    return max(GAP_NATS, (high - low) / 2)


def measured_rows(dataset: TokenizedDataset, *, capacity: int, seed: int) -> list[PackedRows]:
    """As many held-out rows as MOST_TOKENS hold, drawn by the seed, at least one."""
    chosen: list[int] = []
    tokens = 0
    for row in np.random.default_rng(seed).permutation(len(dataset)).tolist():
        length = len(dataset.row(row)[0])
        if not chosen or tokens + length <= MOST_TOKENS:
            chosen.append(row)
            tokens += length
    return microbatches(dataset, sorted(chosen), capacity)


class Approximation:
    """The base and low-rank terms in the place of a model. Grad mode is expected to be off around it.

    Attributes:
        left_out: what an adapter cannot carry: of norms, biases, embeddings the difference to the base's, relative to
            them, in the Frobenius norm.
    """

    def __init__(self, weights: FullWeights, base: Checkpoint, parts: Sequence[PackedRows], *, most_rank: int) -> None:
        """Nothing happens before `prepare`.

        Args:
            weights: the model's, which are replaced by the base's and low-rank terms.
            parts: rows to compare on.
            most_rank: of one matrix, and on the average.
        """
        self._weights, self._decoder, self._base = weights, weights.decoder, base
        self._parts, self._most_rank = parts, most_rank
        self._factors: dict[str, Factors] = {}
        self._model_states: list[Tensor] = []
        self._model_head: Tensor | None = None
        self.left_out: dict[str, float] = {}

    def prepare(self) -> Generator[None, None, None]:
        """Measure the model, and take its difference to the base apart, yielding now and then."""
        for part in self._parts:
            self._model_states.append(finished_states(self._decoder, part))
            yield
        if self._weights.trains_head:
            self._model_head = head_of(self._decoder).clone()
        paths = {f"{target.path}.weight": target.path for target in target_modules(self._decoder.spec)}
        changed: dict[str, list[float]] = {}
        for name, tensor in self._weights.tensors.items():
            base = self._base.tensor(name).to(tensor)
            if name in paths:
                self._factors[paths[name]] = Factors.of(tensor - base, self._most_rank)
            else:
                kind = "embeddings and head" if tensor.dim() == 2 else "norms and biases"
                sums = changed.setdefault(kind, [0.0, 0.0])
                sums[0] += float((tensor - base).square().sum())
                sums[1] += float(base.square().sum())
                tensor.copy_(base)
            yield
        self.left_out = {kind: (moved / max(whole, 1e-30)) ** 0.5 for kind, (moved, whole) in changed.items()}

    @property
    def ranks(self) -> list[int]:
        """The mean ranks that are tried."""
        return [rank for rank in SERVED_RANKS if rank < self._most_rank] + [self._most_rank]

    def take(self, mean: int) -> None:
        """Give the decoder the base's weights and the terms of a mean rank."""
        for path, rank in share_ranks(self._factors, mean).items():
            name = f"{path}.weight"
            tensor = self._weights.tensors[name]
            tensor.copy_(self._base.tensor(name)).add_(self._factors[path].product(rank))

    def measure(self, mean: int) -> Generator[None, None, RankPoint]:
        """How far a mean rank, which was taken, is from the model."""
        total = Divergence(0.0, 0.0, 0.0, 0)
        for part, states in zip(self._parts, self._model_states, strict=True):
            own = finished_states(self._decoder, part)
            targets = torch.from_numpy(part.targets).to(own.device)
            total += diverge(self._decoder, own, states, targets, self._model_head)
            yield
        ranks = share_ranks(self._factors, mean)
        tokens = max(total.tokens, 1)
        return RankPoint(
            rank=mean,
            highest=max(ranks.values()),
            weights=sum(self._factors[path].weights(rank) for path, rank in ranks.items()),
            loss=total.loss / tokens,
            gap=(total.loss - total.model_loss) / tokens,
            kl=total.kl / tokens,
        )

    def write(self, directory: Path, mean: int, *, base_model: str) -> None:
        """Write the adapter of a mean rank as a PEFT directory, which does not exist yet."""
        ranks = share_ranks(self._factors, mean)
        lora = LoraSpec(rank=mean, alpha=float(mean))
        modules = {}
        for path, rank in ranks.items():
            a, b = self._factors[path].pair(rank)
            # PEFT scales by alpha ÷ the rank of the module.
            modules[path] = (a.cpu().numpy(), (b * (rank / mean)).contiguous().cpu().numpy())
        layers = sorted({layer_number(path, None) or 0 for path in modules})
        config = lora_config(base_model, lora, modules)
        if len(layers) < self._decoder.spec.num_layers:
            config["layers_to_transform"] = layers
        with new_directory(directory) as temporary:
            (temporary / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            write_file(temporary / WEIGHTS_NAME, lora_tensors(modules))


def told_left_out(left_out: Mapping[str, float]) -> str:
    """What an adapter cannot carry, in words; empty if that is nothing."""
    if not left_out:
        return ""
    named = ", ".join(f"{kind} by {share:.2%}" for kind, share in left_out.items())
    return f" An adapter does not carry that the training has changed {named}."
