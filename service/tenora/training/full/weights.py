"""The trained weights of a copy of the base: one float32 vector, of which the decoder's matrices are views."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from tenora.adapters.head_files import HeadTensors
from tenora.errors import TrainingError
from tenora.model.decoder import Decoder
from tenora.model.layout import Matrix
from tenora.model.loading import vectors
from tenora.model.spec import table_rows
from tenora.model.weights.dense import Dense
from tenora.training.arena import TrainedAdapter, TrainingArena
from tenora.training.checkpoint import read_tensors, replace_tensors
from tenora.training.full.selection import Selection
from tenora.training.kinds.table import find_kind
from tenora.training.spec import LoraSpec

__all__ = ["FullArena", "FullWeights"]

WEIGHTS_NAME = "trained.safetensors"


@dataclass(frozen=True, slots=True)
class Piece:
    """A tensor of the decoder that is trained.

    Attributes:
        parts: the tensors of the checkpoint that it is made of, one below the other, each with its rows.
        now: as the decoder has it.
        put: gives the decoder another one in its place; what has its gradient now.
    """

    parts: tuple[tuple[str, int], ...]
    now: Tensor
    put: Callable[[Tensor], Tensor]

    def parts_of(self, view: Tensor) -> Iterator[tuple[str, Tensor]]:
        """The tensors of the checkpoint, as views of what stands for the whole piece."""
        start = 0
        for name, rows in self.parts:
            yield name, view[start : start + rows]
            start += rows


class FullWeights(TrainedAdapter):
    """What a learner trains as if it were an adapter: all of a decoder's chosen weights.

    Optimizer, clipping, states and checkpoints see one vector. The decoder's own tensors are replaced by leaves of
    autograd that are views of it, with their gradients in another vector.

    Attributes:
        decoder: dense, float32, nobody else's.
        lowest_layer: below it no gradient is wanted; the embeddings lie below layer 0.
        trains_head: the head is trained, with the embeddings.
        embedding_grad, head_grad: [V, H] views of the gradient; None if they are not trained. One and the same where
            the two are tied.
    """

    kept_checkpoints = 1

    def __init__(self, decoder: Decoder, selection: Selection) -> None:
        """Move the decoder's chosen weights into one vector; no other copy of them stays."""
        self.decoder = decoder
        self.kind = find_kind(LoraSpec().type)  # whose gradients are those of what is learned
        self.lowest_layer = 0 if selection.embeddings else selection.layers[0]
        pieces = list(_pieces(decoder, selection))
        self.numel = sum(piece.now.numel() for piece in pieces)
        self._flat = torch.empty(self.numel, dtype=torch.float32, device=decoder.device)
        self._grad = torch.zeros_like(self._flat)
        self._tensors: dict[str, Tensor] = {}
        self._leaves: list[Tensor] = []
        self.trains_head = selection.embeddings
        self.embedding_grad: Tensor | None = None
        self.head_grad: Tensor | None = None
        tied = decoder.lm_head is decoder.embed_tokens
        start = 0
        pieces.reverse()
        while pieces:
            piece = pieces.pop()  # the last hold on the tensor that is replaced
            span = slice(start, start + piece.now.numel())
            view = self._flat[span].view(piece.now.shape)
            view.copy_(piece.now)
            leaf = view.detach().requires_grad_()
            leaf.grad = self._grad[span].view(piece.now.shape)
            self._leaves.append(piece.put(leaf))
            self._tensors.update(piece.parts_of(view))
            if piece.parts[0][0] == f"{decoder.spec.layout.embedding}.weight":
                self.embedding_grad = leaf.grad
            if piece.parts[0][0] == f"{decoder.spec.head.parts[0][0]}.weight":
                self.head_grad = leaf.grad
            start = span.stop
        if tied:
            decoder.lm_head = decoder.embed_tokens

    @property
    def weights(self) -> Tensor:
        """float32 [numel]."""
        return self._flat

    @property
    def grad(self) -> Tensor:
        """float32 [numel]."""
        return self._grad

    @property
    def rates(self) -> list[tuple[slice, float]]:
        """One rate for all."""
        return []

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """The trained tensors by their names in a checkpoint, views of the vector."""
        return self._tensors

    def let_go_of_gradients(self) -> None:
        """Free them: nothing is learned any more."""
        self.embedding_grad = self.head_grad = None
        for leaf in self._leaves:
            leaf.grad = None
        self._grad = self._flat.new_empty(0)

    def refresh(self) -> None:
        """Nothing is made from the weights."""

    def initialise(self, seed: int) -> None:
        """It begins as the base."""

    def remove(self) -> None:
        """The process ends with it."""

    def write(self, directory: Path, *, base_model: str, heads: HeadTensors | None = None) -> None:  # noqa: ARG002  # an adapter's
        """Write the trained tensors as they are now."""
        replace_tensors(directory / WEIGHTS_NAME, self._tensors, {})

    @torch.no_grad()
    def read(self, directory: Path) -> None:
        """Take up what `write` has written.

        Raises:
            TrainingError: it is gone, damaged or of another run.
        """
        found, _ = read_tensors(directory / WEIGHTS_NAME)
        if found.keys() != self._tensors.keys():
            raise TrainingError("The best weights are of another run; start a new job.", code="resume_mismatch")
        for name, tensor in self._tensors.items():
            tensor.copy_(found[name])


class FullArena(TrainingArena):
    """Hands a learner the one thing that there is to train."""

    def __init__(self, weights: FullWeights) -> None:
        super().__init__(table_rows(weights.decoder.spec), device=weights.decoder.device)
        self._weights = weights

    def add(self, lora: LoraSpec, ranks: Sequence[int] | None = None, *, heads: int = 0) -> TrainedAdapter:  # noqa: ARG002  # an adapter's
        """See `TrainingArena`."""
        return self._weights


def _pieces(decoder: Decoder, selection: Selection) -> Iterator[Piece]:
    """What is trained, in the order of a forward pass."""
    spec, layout = decoder.spec, decoder.spec.layout
    if selection.embeddings:
        yield _of_matrix(spec.embedding, decoder.embed_tokens, partial(setattr, decoder, "embed_tokens"))
    for index in selection.layers:
        for number, block in enumerate(layout.blocks):
            for site in block.sites:
                projection = decoder.get_submodule(f"layers.{index}.blocks.{number}.{site.name}")
                yield _of_matrix(
                    layout.matrix(index, block, site),
                    projection.weight,
                    partial(setattr, projection, "weight"),
                )
    if selection.norms:
        yield from _of_vectors(decoder, selection)
    if selection.embeddings and not spec.tie_word_embeddings:
        yield _of_matrix(spec.head, decoder.lm_head, partial(setattr, decoder, "lm_head"))


def _of_matrix(matrix: Matrix, weight: object, put: Callable[[Dense], None]) -> Piece:
    if not isinstance(weight, Dense):
        raise TypeError(f"{matrix.parts[0][0]} is no dense matrix.")
    parts = tuple((f"{path}.weight", rows) for path, rows in matrix.parts)

    def replace(leaf: Tensor) -> Tensor:
        put(Dense(leaf))
        return leaf

    return Piece(parts, weight.values, replace)


def _of_vectors(decoder: Decoder, selection: Selection) -> Iterator[Piece]:
    """Norms and biases of the chosen layers, and the last norm.

    Norms of heads stay: a checkpoint has one row for all heads, the decoder one for each, which would come apart.
    """
    chosen = tuple(f"layers.{index}." for index in selection.layers)
    parts: dict[str, list[tuple[str, int]]] = {}
    for stored, parameter, _ in vectors(decoder.spec):
        one_row = decoder.get_parameter(parameter).dim() == 1
        if one_row and (parameter == "norm.weight" or parameter.startswith(chosen)):
            parts.setdefault(parameter, []).append((stored.name, stored.shape[0]))
    for parameter, found in parts.items():
        where, _, name = parameter.rpartition(".")
        yield Piece(
            tuple(found), decoder.get_parameter(parameter), partial(_register, decoder.get_submodule(where), name)
        )


def _register(module: nn.Module, name: str, leaf: Tensor) -> Tensor:
    parameter = nn.Parameter(leaf.detach())
    parameter.grad = leaf.grad
    module.register_parameter(name, parameter)
    return parameter
