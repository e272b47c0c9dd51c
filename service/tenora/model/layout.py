"""The shape of a decoder layer as data, and where its weights lie in a checkpoint. Free of torch.

The one place that says which modules a layer has. Target modules, projections, loading, the compiled layers of the CPU,
training and the GPU's groups read it, so another shape is another function here, named in `LAYOUTS`. Only a block that
computes something new (`Block.kind`) is code as well: a class in `decoder.BLOCKS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import NamedTuple

__all__ = ["LAYOUTS", "Block", "Layout", "Matrix", "Module", "Site", "Sizes", "gated_decoder"]


@dataclass(frozen=True, slots=True)
class Module:
    """A linear module of the checkpoint, which an adapter may change.

    Attributes:
        name: the last part of its path, as `target_modules` of PEFT lists it.
        output: columns of its output.
    """

    name: str
    output: int


@dataclass(frozen=True, slots=True)
class Site:
    """One product with frozen weights: modules that read one input and lie side by side in its output.

    Attributes:
        name: what the block that owns it calls it.
        input: columns of the input.
        modules: in the order of their columns.
        bias: every one of them has a bias.
        factor: a module of the block whose output's columns are factors of the input's, one of each; empty if none is.
        cached: its modules whose output are keys or values.
    """

    name: str
    input: int
    modules: tuple[Module, ...]
    bias: bool = False
    factor: str = ""
    cached: tuple[str, ...] = ()

    @property
    def output(self) -> int:
        """Columns of the output."""
        return sum(module.output for module in self.modules)

    @property
    def slices(self) -> tuple[tuple[int, int], ...]:
        """`[start, stop)` columns of the output per module."""
        return tuple(pairwise(accumulate((module.output for module in self.modules), initial=0)))


@dataclass(frozen=True, slots=True)
class Block:
    """One step of a layer: hidden += f(norm(hidden)).

    Attributes:
        name: where its modules lie below the layer in the checkpoint.
        kind: what f is, a key of `decoder.BLOCKS`.
        norm: of its input, below the layer in the checkpoint.
        sites: its products, in the order of the modules' rows; their names differ within a layer.
        head_norms: norms over the head dimension: below the block in the checkpoint, and of how many heads each is.
    """

    name: str
    kind: str
    norm: str
    sites: tuple[Site, ...]
    head_norms: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Matrix:
    """A frozen matrix of the decoder, made of modules of the checkpoint one below the other.

    Attributes:
        input: its columns.
        parts: path in the checkpoint, without the tensor's own name, and rows of each module.
    """

    input: int
    parts: tuple[tuple[str, int], ...]

    @property
    def output(self) -> int:
        """Its rows."""
        return sum(rows for _, rows in self.parts)


@dataclass(frozen=True, slots=True)
class Layout:
    """A decoder's layers, all of the same blocks, and the names around them.

    Attributes:
        blocks: of a layer, in the order in which they are computed.
        layers, embedding, norm, head: paths in the checkpoint.
    """

    blocks: tuple[Block, ...]
    layers: str = "model.layers"
    embedding: str = "model.embed_tokens"
    norm: str = "model.norm"
    head: str = "lm_head"

    @property
    def sites(self) -> tuple[Site, ...]:
        """Of a layer."""
        return tuple(site for block in self.blocks for site in block.sites)

    @property
    def modules(self) -> tuple[Module, ...]:
        """Of a layer, in table order."""
        return tuple(module for site in self.sites for module in site.modules)

    def row(self, layer: int, site: Site) -> int:
        """Row of the first module of a layer's site in the tables of adapters."""
        before = 0
        for other in self.sites:
            if other == site:
                return layer * len(self.modules) + before
            before += len(other.modules)
        raise ValueError(f"the site {site.name} is not one of this layout.")

    def path(self, layer: int, *names: str) -> str:
        """A path below a layer in the checkpoint."""
        return ".".join((self.layers, str(layer), *names))

    def paths(self, layer: int) -> Iterator[tuple[str, Site, Module]]:
        """Path, site and module of everything in a layer that an adapter may change, in table order."""
        for block in self.blocks:
            for site in block.sites:
                for module in site.modules:
                    yield self.path(layer, block.name, module.name), site, module

    def matrix(self, layer: int, block: Block, site: Site) -> Matrix:
        """The matrix of a layer's site."""
        parts = ((self.path(layer, block.name, module.name), module.output) for module in site.modules)
        return Matrix(site.input, tuple(parts))


class Sizes(NamedTuple):
    """What a layout depends on; biases and norms as those of `ModelSpec`, `mlp` its `intermediate_size`."""

    hidden: int
    mlp: int
    heads: int
    kv_heads: int
    head_dim: int
    attention_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False


def gated_decoder(sizes: Sizes) -> Layout:
    """Attention and a gated MLP (Touvron et al. 2023), with q, k and v, and gate and up, as modules of their own."""
    hidden, mlp = sizes.hidden, sizes.mlp
    q, kv = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
    qkv = (Module("q_proj", q), Module("k_proj", kv), Module("v_proj", kv))
    attention = Block(
        name="self_attn",
        kind="attention",
        norm="input_layernorm",
        sites=(
            Site("qkv", hidden, qkv, bias=sizes.attention_bias, cached=("k_proj", "v_proj")),
            Site("o", q, (Module("o_proj", hidden),), bias=sizes.o_bias),
        ),
        head_norms=(("q_norm", sizes.heads), ("k_norm", sizes.kv_heads)) if sizes.qk_norm else (),
    )
    gated = Block(
        name="mlp",
        kind="gated_mlp",
        norm="post_attention_layernorm",
        sites=(
            Site("gate_up", hidden, (Module("gate_proj", mlp), Module("up_proj", mlp)), bias=sizes.mlp_bias),
            Site("down", mlp, (Module("down_proj", hidden),), bias=sizes.mlp_bias, factor="up_proj"),
        ),
    )
    return Layout((attention, gated))


LAYOUTS: dict[str, Callable[[Sizes], Layout]] = {
    "llama": gated_decoder,
    "mistral": gated_decoder,
    "qwen2": gated_decoder,
    "qwen3": gated_decoder,
}
"""By family."""
