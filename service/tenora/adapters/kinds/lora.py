"""LoRA (Hu et al. 2021) and rsLoRA (Kalajdzievski 2023) in the PEFT format."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from tenora.adapters.foreign_names import PREFIX, foreign_name, unexpected_name
from tenora.adapters.kinds import fields
from tenora.adapters.kinds.coverage import FIELDS as COVERAGE_FIELDS
from tenora.adapters.kinds.coverage import Coverage
from tenora.adapters.kinds.kind import Kind
from tenora.adapters.kinds.tensors import alike
from tenora.adapters.matching import Expressions, KeyTable, layer_number
from tenora.adapters.safetensors_file import Array, TensorEntry
from tenora.adapters.table_rows import TableRows
from tenora.adapters.targets import TargetModule
from tenora.adapters.weights import AdapterSummary, AdapterWeights, LoraModule
from tenora.errors import AdapterFormatError

_PEFT_DEFAULT = 8  # of r and of lora_alpha, where a configuration leaves them out

# Every field that changes what the adapter computes in a way that the low-rank op does not, with what to do about it.
_UNSUPPORTED = {
    "use_dora": "it must be true or false",
    "alora_invocation_tokens": "a DoRA adapter is not activated by tokens; train without use_dora",
    "bias": "trained biases are not served; train with bias='none'",
    "lora_bias": "biases of the low-rank layers are not served; train with lora_bias=False",
    "modules_to_save": "modules that are trained in full are not served; train without modules_to_save",
    "fan_in_fan_out": "transposed layers do not occur in the bases served here; train with fan_in_fan_out=False",
    "layer_replication": "the layers of the shared base cannot be repeated; train without layer_replication",
    "trainable_token_indices": "trained embeddings are not served; train without trainable_token_indices",
    "target_parameters": "bare parameters cannot be adapted; name linear modules in target_modules",
    "auto_map": "code in an upload is never run; remove auto_map",
    "use_qalora": "QALoRA is not served; train plain LoRA",
    "use_bdlora": "block-diagonal LoRA is not served; train plain LoRA",
    "arrow_config": "Arrow routing is not served; train plain LoRA",
    "kasa_config": "KaSA is not served; train plain LoRA",
    "monteclora_config": "MonteCLoRA is not served; train plain LoRA",
    "velora_config": "VeLoRA is not served; train plain LoRA",
    "megatron_config": "Megatron layers are not served; export the adapter to plain PEFT",
    "target_modules_to_tie": "tied embeddings cannot be adapted; train without it",
}
_READ = (
    fields.DESCRIPTIVE
    | COVERAGE_FIELDS
    | {
        *("peft_type", "task_type", "init_lora_weights", "r", "lora_alpha", "use_rslora"),
        *("rank_pattern", "alpha_pattern"),
        # These matter while training only.
        *("corda_config", "eva_config", "loftq_config", "lora_ga_config", "lora_dropout"),
        *("ensure_weight_tying", "megatron_core", "qalora_group_size"),
    }
)
# PEFT's other initialisations (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) also change the base weights.
_HARMLESS_INITS: tuple[Any, ...] = (True, False, None, "gaussian", "eva", "orthogonal", "mica")


class LoraShape(Protocol):
    """The shape of an adapter to write; `tenora.training.spec.LoraSpec` is one."""

    @property
    def rank(self) -> int:
        """Rank of every module that has no other."""

    @property
    def alpha(self) -> float:
        """Numerator of the scaling."""

    @property
    def dropout(self) -> float:
        """Dropout it was trained with."""

    @property
    def target_modules(self) -> tuple[str, ...]:
        """Last parts of module paths; empty: of every module that is written."""

    @property
    def use_rslora(self) -> bool:
        """Whether the scaling is alpha / √rank."""

    @property
    def invocation(self) -> tuple[int, ...]:
        """Tokens from which on it acts; empty: on all."""


@dataclass(frozen=True, slots=True)
class LoraConfiguration:
    """The fields of an adapter_config.json that decide what an adapter computes.

    Attributes:
        rank, alpha: where no pattern says otherwise.
        coverage: the modules that it adapts.
        rank_pattern, alpha_pattern: the first key that matches the end of a path wins, so their order matters.
        raw: the whole file.
    """

    rank: int
    alpha: float
    use_rslora: bool
    coverage: Coverage
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    raw: Mapping[str, Any]

    def resolve(self, targets: Sequence[TargetModule]) -> dict[str, tuple[int, float]]:
        """Rank and scaling of each target module that the adapter covers, by path, as PEFT resolves them.

        Raises:
            AdapterFormatError: if nothing is covered, the embeddings or the head are, or the patterns are too many or
                cannot be read.
        """
        expressions = Expressions()
        ranks = KeyTable("rank_pattern", self.rank_pattern, expressions)
        alphas = KeyTable("alpha_pattern", self.alpha_pattern, expressions)
        covered: dict[str, tuple[int, float]] = {}
        for target in self.coverage.modules(targets, expressions):
            rank = ranks.get(target.path, self.rank)
            alpha = alphas.get(target.path, self.alpha)
            covered[target.path] = (rank, alpha / (math.sqrt(rank) if self.use_rslora else rank))
        return covered

    def plan(self, entries: Mapping[str, TensorEntry], rows: TableRows, *, max_rank: int) -> LoraPlan:
        """See `tenora.adapters.kinds.kind.Configuration`."""
        covered = self.resolve(rows.modules)
        if (reason := foreign_name(entries)) is not None:
            raise AdapterFormatError(reason)
        modules = [
            _planned(target, *covered[target.path], entries, max_rank)
            for target in rows.modules
            if target.path in covered
        ]
        expected = {entry.name for planned in modules for entry in (planned.a, planned.b)}
        for name in entries:
            if name not in expected:
                raise AdapterFormatError(unexpected_name(name, {target.path for target in rows.modules}))
        summary = AdapterSummary(
            kind=LORA.name,
            rank=max(planned.rank for planned in modules),
            target_modules=tuple(dict.fromkeys(planned.target.name for planned in modules)),
            parameters=sum(p.rank * (p.target.in_features + p.target.out_features) for p in modules),
            bfloat16=all(entry.dtype == "BF16" for entry in entries.values()),
            nbytes=sum(planned.a.nbytes + planned.b.nbytes for planned in modules),
            config=self.raw,
        )
        return LoraPlan(tuple(modules), summary)


@dataclass(frozen=True, slots=True)
class _Planned:
    """One module whose shapes were checked; its values were not read yet."""

    target: TargetModule
    rank: int
    scaling: float
    a: TensorEntry
    b: TensorEntry


@dataclass(frozen=True, slots=True)
class LoraPlan:
    """See `tenora.adapters.kinds.kind.Plan`; modules in the order of the base."""

    modules: tuple[_Planned, ...]
    summary: AdapterSummary

    def weights(self, arrays: Mapping[str, Array]) -> AdapterWeights:
        """See `tenora.adapters.kinds.kind.Plan`."""
        modules = {planned.target.path: _module(planned, arrays) for planned in self.modules}
        summary = self.summary
        return AdapterWeights(modules, summary.rank, summary.target_modules, summary.config, summary.nbytes)


def parse(raw: Mapping[str, Any], *, also_read: Collection[str] = ()) -> LoraConfiguration:
    """Read and check the fields of a LoRA configuration.

    Args:
        raw: the whole file.
        also_read: fields that the caller reads itself.

    Raises:
        AdapterFormatError: a field is not served or not known, or has no value that it may have; the message names it.
            `base_model_name_or_path` and `auto_mapping` are never followed.
    """
    fields.require_causal_lm(raw)
    fields.refuse_unread(raw, _READ.union(also_read), _UNSUPPORTED)
    if raw.get("init_lora_weights") not in _HARMLESS_INITS:
        raise AdapterFormatError(
            f"init_lora_weights is {fields.shown(raw['init_lora_weights'])}, which changes the base weights too; "
            "export the adapter with path_initial_model_for_weight_conversion."
        )
    ranks, alphas = fields.table("rank_pattern", raw), fields.table("alpha_pattern", raw)
    return LoraConfiguration(
        rank=fields.positive_int("r", raw.get("r", _PEFT_DEFAULT)),
        alpha=fields.finite("lora_alpha", raw.get("lora_alpha", _PEFT_DEFAULT)),
        use_rslora=fields.flag("use_rslora", raw.get("use_rslora", False)),
        coverage=Coverage.of(raw),
        rank_pattern={key: fields.positive_int(f"rank_pattern[{key!r}]", value) for key, value in ranks.items()},
        alpha_pattern={key: fields.finite(f"alpha_pattern[{key!r}]", value) for key, value in alphas.items()},
        raw=raw,
    )


LORA = Kind(
    name="lora", title="A LoRA adapter", is_of=lambda raw: raw.get("peft_type") == "LORA", parse=parse, composes=True
)


def _planned(
    target: TargetModule, rank: int, scaling: float, entries: Mapping[str, TensorEntry], max_rank: int
) -> _Planned:
    if rank > max_rank:
        raise AdapterFormatError(f"{target.path} has rank {rank}; this server accepts ranks up to {max_rank}.")
    a = _tensor(entries, target, "lora_A", (rank, target.in_features))
    b = _tensor(entries, target, "lora_B", (target.out_features, rank))
    return _Planned(target, rank, scaling, a, b)


def _tensor(entries: Mapping[str, TensorEntry], target: TargetModule, part: str, shape: tuple[int, int]) -> TensorEntry:
    name = f"{PREFIX}{target.path}.{part}.weight"
    entry = entries.get(name)
    if entry is None:
        raise AdapterFormatError(
            f"{name} is missing, but the configuration's target_modules and layers need it; upload the whole adapter."
        )
    if 0 in entry.shape:
        raise AdapterFormatError(f"{name} has shape {list(entry.shape)}: a rank of 0 adapts nothing; train it again.")
    if entry.shape != shape:
        raise AdapterFormatError(
            f"{name} has shape {list(entry.shape)}, but this base and the configuration's rank need {list(shape)}."
        )
    return entry


def _module(planned: _Planned, arrays: Mapping[str, Array]) -> LoraModule:
    dtype, (a, b) = alike(arrays, [planned.a, planned.b])
    return LoraModule(planned.target.path, planned.rank, planned.scaling, a, b, dtype)


def lora_tensors(modules: Mapping[str, tuple[Array, Array]]) -> dict[str, Array]:
    """The tensors of a file, from A [rank, in] and B [out, rank] by path. ValueError if they do not fit together."""
    tensors: dict[str, Array] = {}
    for path, (a, b) in modules.items():
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or a.shape[0] == 0 or a.dtype != b.dtype:
            raise ValueError(f"{path} has A {a.dtype} {a.shape} and B {b.dtype} {b.shape}, not [r, in] and [out, r].")
        tensors[f"{PREFIX}{path}.lora_A.weight"] = a
        tensors[f"{PREFIX}{path}.lora_B.weight"] = b
    return tensors


def lora_config(
    base_model: str, lora: LoraShape, modules: Mapping[str, tuple[Array, Array]], scaling: float | None = None
) -> dict[str, Any]:
    """The adapter_config.json of such modules. A module of another rank than `lora`'s gets an entry in `rank_pattern`.

    With `scaling` it gets one in `alpha_pattern` too, so that it is scaled as all others are.

    Raises:
        ValueError: `lora.target_modules` names others than those that are there.
    """
    names = list(dict.fromkeys(path.rpartition(".")[2] for path in modules))
    target_modules = list(lora.target_modules) or names
    if set(names) != set(target_modules):
        raise ValueError(f"the modules are {sorted(names)}, but target_modules are {sorted(target_modules)}.")
    layers = sorted({layer_number(path, None) or 0 for path in modules})
    others = {path: a.shape[0] for path, (a, _) in modules.items() if a.shape[0] != lora.rank}
    alphas = {} if scaling is None else {path: scaling * _divisor(rank, lora) for path, rank in others.items()}
    return {
        **({"alpha_pattern": alphas} if alphas else {}),
        **({"alora_invocation_tokens": list(lora.invocation)} if lora.invocation else {}),
        "base_model_name_or_path": base_model,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        **({"layers_to_transform": layers} if layers[:1] != [0] else {}),
        "lora_alpha": int(lora.alpha) if float(lora.alpha).is_integer() else lora.alpha,
        "lora_dropout": lora.dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": lora.rank,
        "rank_pattern": others,
        "target_modules": target_modules,
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": lora.use_rslora,
    }


def _divisor(rank: int, lora: LoraShape) -> float:
    """What alpha is divided by."""
    return math.sqrt(rank) if lora.use_rslora else rank
