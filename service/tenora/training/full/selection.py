"""Which of a base's weights a full fine-tuning changes, and what memory that takes. Free of torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tenora.errors import InvalidRequestError
from tenora.model.spec import ModelSpec

BYTES_PER_WEIGHT = 4
BYTES_PER_TRAINED = 16
"""A float32 weight with its gradient and the two moments of AdamW."""
BYTES_BESIDE = 8
"""For each trained weight, what loading, writing and approximating the model hold beside: SmolLM2-135M was measured."""
TOKENS_PER_PASS = 512
"""Rows are packed to so many tokens; a longer row makes a pass of its own. Longer passes are hardly faster on a CPU."""
_RUNTIME_BYTES = 512 * 2**20  # the interpreter, torch, and slices that the optimizer works on
_LOGITS_BYTES = 3 * 16 * 2**20  # of the chunks in which scores are made
_LAST = re.compile(r"last (\d+)")
_RANGE = re.compile(r"(\d+)(?:-(\d+))?")


@dataclass(frozen=True, slots=True)
class Selection:
    """What is trained.

    Attributes:
        layers: their indices, ascending.
        embeddings: the tokens' embeddings, and the head, which may be the same matrix.
        norms: weights of norms, but those of heads, and biases.
    """

    layers: tuple[int, ...]
    embeddings: bool
    norms: bool

    @classmethod
    def of(cls, settings: Mapping[str, Any], spec: ModelSpec) -> Selection:
        """From a job's own settings; raises as `chosen_layers`."""
        layers = chosen_layers(settings["layers"], spec.num_layers)
        return cls(layers, bool(settings["embeddings"]), bool(settings["norms"]))

    @property
    def whole(self) -> bool:
        """Whether an adapter of the base's projections could carry all of the difference."""
        return not self.embeddings and not self.norms

    def trained(self, spec: ModelSpec) -> int:
        """Weights that are trained."""
        layout = spec.layout
        matrices = sum(site.input * module.output for site in layout.sites for module in site.modules)
        found = len(self.layers) * (matrices + (_vectors(spec) if self.norms else 0))
        if self.norms:
            found += spec.hidden_size
        return found + (_embeddings(spec) if self.embeddings else 0)


def chosen_layers(text: str, count: int) -> tuple[int, ...]:
    """The layers of `all`, `last N` or a list of numbers and ranges such as `0, 5-8`, of a base that has `count`.

    Raises:
        InvalidRequestError: it is none of these, or names a layer that the base lacks.
    """
    words = " ".join(text.lower().split())
    if words == "all":
        return tuple(range(count))
    if found := _LAST.fullmatch(words):
        last = int(found[1])
        if not 1 <= last <= count:
            raise _wrong(text, count)
        return tuple(range(count - last, count))
    layers: set[int] = set()
    for part in words.split(","):
        found = _RANGE.fullmatch(part.strip())
        if found is None:
            raise _wrong(text, count)
        first, stop = int(found[1]), int(found[2] or found[1])
        if not first <= stop < count:
            raise _wrong(text, count)
        layers.update(range(first, stop + 1))
    return tuple(sorted(layers))


def needed_bytes(spec: ModelSpec, selection: Selection, longest_row: int) -> int:
    """What the training takes at its peak: weights, gradients, moments, and the activations of a pass.

    Layers run a second time in the backward pass, so the inputs of all and the inside of one are there at once.
    """
    trained = selection.trained(spec)
    frozen = parameters(spec) - trained
    tokens = max(TOKENS_PER_PASS, longest_row)
    inside = 12 * spec.hidden_size + 6 * (spec.q_size + 2 * spec.kv_size) + 7 * spec.intermediate_size
    kept = BYTES_PER_WEIGHT * tokens * (spec.num_layers * spec.hidden_size + inside)
    return (
        (BYTES_PER_TRAINED + BYTES_BESIDE) * trained + BYTES_PER_WEIGHT * frozen + kept + _LOGITS_BYTES + _RUNTIME_BYTES
    )


def parameters(spec: ModelSpec) -> int:
    """All weights of a base."""
    every = Selection(tuple(range(spec.num_layers)), embeddings=True, norms=True)
    of_heads = spec.num_layers * spec.head_dim * sum(len(block.head_norms) for block in spec.layout.blocks)
    return every.trained(spec) + of_heads


def _embeddings(spec: ModelSpec) -> int:
    return spec.vocab_size * spec.hidden_size * (1 if spec.tie_word_embeddings else 2)


def _vectors(spec: ModelSpec) -> int:
    """Norms and biases of a layer, without norms of heads."""
    layout = spec.layout
    return len(layout.blocks) * spec.hidden_size + sum(
        module.output for site in layout.sites if site.bias for module in site.modules
    )


def _wrong(text: str, count: int) -> InvalidRequestError:
    return InvalidRequestError(
        f'layers is {text!r}; write "all", "last 4", or numbers from 0 to {count - 1} such as "0, 5-8".',
        param="layers",
    )
