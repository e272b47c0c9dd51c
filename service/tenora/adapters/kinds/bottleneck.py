"""Bottleneck adapters in AdapterHub's format: Houlsby et al. 2019 (arXiv:1902.00751), Pfeiffer et al. 2020
(arXiv:2005.00247), and parallel ones, He et al. 2021 (arXiv:2110.04366).

A block's output y becomes y + s · (U · f(D · h + b_d) + b_u) before it is added to the residual stream x. In pre-norm
decoders the library gives h = y, or y + x (`original_ln_before`), or x (`is_parallel`); its layer norms are the base's
own, applied by the base, so what is said of them here is where x is added.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from tenora.adapters.kinds import fields
from tenora.adapters.kinds.kind import Kind
from tenora.adapters.kinds.tensors import Expected, alike, all_bfloat16
from tenora.adapters.safetensors_file import Array, TensorEntry
from tenora.adapters.table_rows import RowKind, TableRows
from tenora.adapters.weights import AdapterPart, AdapterSummary, AdapterWeights
from tenora.errors import AdapterFormatError
from tenora_kernels.flags import ACTIVATIONS, PARALLEL, WITH_RESIDUAL

WEIGHTS_NAME = "adapter.safetensors"
_ACTIVATIONS = {name: name for name in ACTIVATIONS} | {
    "swish": "silu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_pytorch_tanh",
}
_PLACES = {"mh_adapter": ("attention_adapters", "self_attn"), "output_adapter": ("output_adapters", "mlp")}
"""By the field that asks for it: the library's name of a place in a layer, and the block whose output it is."""
_OUTSIDE = {*("config", "hidden_size", "model_class", "model_name", "model_type", "name", "version", "config_id")}
_READ = {
    *("mh_adapter", "output_adapter", "reduction_factor", "non_linearity", "scaling", "is_parallel", "leave_out"),
    *("original_ln_before", "original_ln_after", "residual_before_ln", "adapter_residual_before_ln", "architecture"),
    # Of training, or of what the fields below would turn on.
    *("dropout", "init_weights", "init_weights_seed", "stochastic_depth", "inv_adapter_reduction_factor"),
    *("phm_dim", "factorized_phm_W", "shared_W_phm", "shared_phm_rule", "factorized_phm_rule", "phm_c_init"),
    *("phm_init_range", "learn_phm", "hypercomplex_nonlinearity", "phm_rank", "phm_bias"),
}
_UNSUPPORTED = {
    "ln_before": "a norm of the adapter's own is not served; train with ln_before=False",
    "ln_after": "a norm of the adapter's own is not served; train with ln_after=False",
    "use_gating": "gates are not served; train with use_gating=False",
    "inv_adapter": "invertible adapters of the embeddings are not served; train with inv_adapter=None",
    "cross_adapter": "the bases served here have no cross attention; train with cross_adapter=False",
    "phm_layer": "Compacter's layers are not served; train with phm_layer=False",
}


class _Place(NamedTuple):
    """One bottleneck: the block whose output it changes, its width, and where its tensors are."""

    block: str
    width: int
    prefix: str


@dataclass(frozen=True, slots=True)
class BottleneckConfiguration:
    """See `tenora.adapters.kinds.kind.Configuration`.

    Attributes:
        name: that the library knows the adapter by; it is in the names of its tensors.
        places: keys of `_PLACES`.
        reduction: H divided by the width, by layer ("0", …), or "default".
        left_out: layers without bottlenecks.
        scaling: s.
        flags: activation and what the bottlenecks read, as bits of `LoraTables.flags`.
    """

    name: str
    places: Sequence[str]
    reduction: Mapping[str, float]
    left_out: frozenset[int]
    scaling: float
    flags: int
    hidden: int | None
    raw: Mapping[str, Any]

    def plan(self, entries: Mapping[str, TensorEntry], rows: TableRows, *, max_rank: int) -> BottleneckPlan:
        """See `tenora.adapters.kinds.kind.Configuration`."""
        if self.hidden not in (None, rows.hidden):
            raise AdapterFormatError(
                f"hidden_size is {self.hidden}, and this base has {rows.hidden}; it is made for another base."
            )
        expected = Expected(entries)
        found: list[tuple[_Place, tuple[TensorEntry, ...]]] = []
        for place in self._places(rows):
            if place.width > max_rank:
                raise AdapterFormatError(
                    f"reduction_factor makes bottlenecks of {place.width}; this server accepts ranks and widths up to "
                    f"{max_rank}. Train with a larger factor, or have the operator raise TENORA_MAX_LORA_RANK."
                )
            found.append((place, tuple(_tensors(expected, place, rows.hidden))))
        if not found:
            raise AdapterFormatError("leave_out leaves no layer of this base; train with bottlenecks in some layer.")
        expected.refuse_others("the configuration")
        summary = AdapterSummary(
            kind=BOTTLENECK.name,
            rank=max(place.width for place, _ in found),
            target_modules=tuple(block for place, (_, block) in _PLACES.items() if place in self.places),
            parameters=sum(place.width * (2 * rows.hidden + 1) + rows.hidden for place, _ in found),
            bfloat16=all_bfloat16(list(entries.values())),
            nbytes=sum(entry.nbytes for entry in entries.values()),
            config=self.raw,
        )
        return BottleneckPlan(found, self, summary)

    def _places(self, rows: TableRows) -> Iterator[_Place]:
        for number, layer in enumerate(rows.layers):
            if number in self.left_out:
                continue
            factor = self.reduction.get(str(number), self.reduction.get("default"))
            if factor is None:
                raise AdapterFormatError(f"reduction_factor says nothing of layer {number}; give it a 'default'.")
            width = max(int(rows.hidden // factor), 1)
            for place in self.places:
                where, block = _PLACES[place]
                yield _Place(f"{layer}.{block}", width, f"{layer}.{where}.adapters.{self.name}")


@dataclass(frozen=True, slots=True)
class BottleneckPlan:
    """See `tenora.adapters.kinds.kind.Plan`; each place with down, its bias, up, its bias."""

    places: Sequence[tuple[_Place, tuple[TensorEntry, ...]]]
    config: BottleneckConfiguration
    summary: AdapterSummary

    def weights(self, arrays: Mapping[str, Array]) -> AdapterWeights:
        """See `tenora.adapters.kinds.kind.Plan`."""
        parts: list[AdapterPart] = []
        for (block, _, _), (down, inner, up, outer) in self.places:
            dtype, (a, b) = alike(arrays, [down, up])
            parts.append(AdapterPart(RowKind.BOTTLENECK, block, a, b.T, self.config.scaling, dtype))
            for kind, entry, shape in ((RowKind.OUTER_BIAS, outer, (1, -1)), (RowKind.INNER_BIAS, inner, (-1, 1))):
                dtype, (bias,) = alike(arrays, [entry])
                parts.append(AdapterPart.columns(kind, block, bias.reshape(shape), dtype=dtype))
        summary = self.summary
        return AdapterWeights(
            {},
            summary.rank,
            summary.target_modules,
            summary.config,
            summary.nbytes,
            parts=tuple(parts),
            flags=self.config.flags,
        )


def _tensors(expected: Expected, place: _Place, hidden: int) -> Iterator[TensorEntry]:
    for name, shape in (("adapter_down.0", (place.width, hidden)), ("adapter_up", (hidden, place.width))):
        yield expected.take(f"{place.prefix}.{name}.weight", shape, "the configuration")
        yield expected.take(f"{place.prefix}.{name}.bias", shape[:1], "the configuration")


def parse(raw: Mapping[str, Any]) -> BottleneckConfiguration:
    """Read and check an adapter_config.json of AdapterHub. Raises AdapterFormatError that names the field."""
    config = raw["config"]
    if config.get("architecture") is not None:
        raise AdapterFormatError(
            f"architecture is {fields.shown(config['architecture'])}: of AdapterHub's adapters bottlenecks are read; "
            "train other kinds with PEFT."
        )
    fields.refuse_unread(raw, _OUTSIDE, {})
    fields.refuse_unread(config, _READ, _UNSUPPORTED)
    name, hidden, left_out = raw.get("name"), raw.get("hidden_size"), config.get("leave_out") or []
    if not isinstance(name, str) or not name:
        raise AdapterFormatError(f"name is {fields.shown(name)}; it must be the name that the library saved it by.")
    if hidden is not None and type(hidden) is not int:
        raise AdapterFormatError(f"hidden_size is {fields.shown(hidden)}; it must be a whole number.")
    if not isinstance(left_out, list) or not all(type(layer) is int for layer in left_out):
        raise AdapterFormatError(f"leave_out is {fields.shown(left_out)}; it must be a list of layer numbers.")
    places = [place for place in _PLACES if fields.flag(place, config.get(place))]
    if not places:
        raise AdapterFormatError("mh_adapter and output_adapter are both false: there are no bottlenecks; set one.")
    return BottleneckConfiguration(
        name=name,
        places=places,
        reduction=_reduction(config.get("reduction_factor")),
        left_out=frozenset(left_out),
        scaling=_scaling(config.get("scaling", 1.0)),
        flags=_activation(config.get("non_linearity")) | _reads(config),
        hidden=hidden,
        raw=raw,
    )


def _reduction(value: Any) -> dict[str, float]:
    factors = value if isinstance(value, dict) else {"default": value}
    for factor in factors.values():
        if type(factor) not in (int, float) or not 1e-3 <= factor < 1e9:
            raise AdapterFormatError(
                f"reduction_factor is {fields.shown(value)}; it must be a number above 0, or one for each layer."
            )
    return factors


def _scaling(value: Any) -> float:
    if isinstance(value, str):
        raise AdapterFormatError(f"scaling is {value!r}: learned scalings are not served; train with a number.")
    return fields.finite("scaling", value)


def _activation(value: Any) -> int:
    found = _ACTIVATIONS.get(value.lower()) if isinstance(value, str) else None
    if found is None:
        raise AdapterFormatError(
            f"non_linearity is {fields.shown(value)}; bottlenecks are served with {', '.join(sorted(_ACTIVATIONS))}."
        )
    return ACTIVATIONS.index(found)


def _reads(config: Mapping[str, Any]) -> int:
    """What the bottlenecks read; raises AdapterFormatError unless block and residual stream are added once each."""
    before = fields.flag("original_ln_before", config.get("original_ln_before"))
    after = fields.flag("original_ln_after", config.get("original_ln_after", True))
    of_output = config.get("residual_before_ln", True)
    parallel = fields.flag("is_parallel", config.get("is_parallel"))
    if not parallel and type(of_output) is not bool:
        raise AdapterFormatError(
            f"residual_before_ln is {fields.shown(of_output)}, which needs a norm after the block; these bases have "
            "theirs before it. Train with residual_before_ln=True."
        )
    if after != (parallel or of_output or not before):
        raise AdapterFormatError(
            f"original_ln_before={before}, residual_before_ln={of_output} and original_ln_after={after} leave the "
            "residual stream out or add it twice; train with residual_before_ln=True and original_ln_after=True."
        )
    if parallel:
        return PARALLEL
    return WITH_RESIDUAL if before else 0


BOTTLENECK = Kind(
    name="bottleneck",
    title="Bottleneck adapters",
    is_of=lambda raw: isinstance(raw.get("config"), dict) and "peft_type" not in raw,
    parse=parse,
    library="adapters",
    weights_name=WEIGHTS_NAME,
)


class Bottleneck(NamedTuple):
    """The weights of one: down [r, H], its bias [r], up [H, r], its bias [H]."""

    down: Array
    inner: Array
    up: Array
    outer: Array


def bottleneck_files(
    base_model: str, bottlenecks: Mapping[str, Bottleneck], *, flags: int, scaling: float, layers: int, family: str
) -> tuple[dict[str, Any], dict[str, Array]]:
    """An adapter_config.json and tensors of bottlenecks, as AdapterHub's library saves them.

    Args:
        base_model: id of the base.
        bottlenecks: by the block that each is behind, such as `model.layers.0.mlp`; all of one width, and in every
            layer that has any behind the same blocks.
        flags: their activation and what they read.
        scaling: s.
        layers: of the base.
        family: `model_type` of the base.

    Raises:
        ValueError: they are not alike, or not behind the same blocks.
    """
    places = {block: place for place, (_, block) in _PLACES.items()}
    used = {path.rpartition(".")[2] for path in bottlenecks}
    present = {int(path.split(".")[-2]) for path in bottlenecks}
    widths = {one.down.shape for one in bottlenecks.values()}
    if len(widths) != 1 or len(bottlenecks) != len(used) * len(present):
        raise ValueError("bottlenecks have one width, and are behind the same blocks of their layers.")
    ((width, hidden),) = widths
    tensors: dict[str, Array] = {}
    for path, one in bottlenecks.items():
        layer, _, block = path.rpartition(".")
        prefix = f"{layer}.{_PLACES[places[block]][0]}.adapters.adapter"
        tensors[f"{prefix}.adapter_down.0.weight"], tensors[f"{prefix}.adapter_down.0.bias"] = one.down, one.inner
        tensors[f"{prefix}.adapter_up.weight"], tensors[f"{prefix}.adapter_up.bias"] = one.up, one.outer
    config = {
        "is_parallel": bool(flags & PARALLEL),
        "leave_out": sorted(set(range(layers)) - present),
        "mh_adapter": "self_attn" in used,
        "non_linearity": ACTIVATIONS[flags & 7],
        "original_ln_after": True,
        "original_ln_before": bool(flags & WITH_RESIDUAL),
        "output_adapter": "mlp" in used,
        # H // factor is the width whatever the division rounds to.
        "reduction_factor": hidden // width if hidden % width == 0 else hidden / (width + 0.5),
        "residual_before_ln": True,
        "scaling": float(scaling),
    }
    return {
        "config": config,
        "hidden_size": hidden,
        "model_class": f"{family.capitalize()}ForCausalLM",
        "model_name": base_model,
        "model_type": family,
        "name": "adapter",
        "version": "adapters.1.3.0",
    }, tensors
