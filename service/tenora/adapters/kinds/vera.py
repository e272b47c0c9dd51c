"""VeRA (Kopiczko et al. 2024, arXiv:2310.11454) in the PEFT format: two random matrices shared by all modules.

Δ = diag(b) · B · diag(d) · A with A [r, widest input] and B [widest output, r] cut to the module. What a module learned
are b and d; the matrices are in the file, or drawn from a seed. Here each module gets diag(d) · A and diag(b) · B of
its own: it is then a LoRA adapter of rank r, and costs what one costs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tenora.adapters.foreign_names import PREFIX
from tenora.adapters.kinds import fields
from tenora.adapters.kinds.coverage import FIELDS as COVERAGE_FIELDS
from tenora.adapters.kinds.coverage import Coverage
from tenora.adapters.kinds.kind import Kind
from tenora.adapters.kinds.tensors import Expected, wide
from tenora.adapters.matching import Expressions
from tenora.adapters.safetensors_file import Array, TensorEntry, as_float32
from tenora.adapters.table_rows import TableRows
from tenora.adapters.targets import TargetModule
from tenora.adapters.weights import AdapterSummary, AdapterWeights, LoraModule
from tenora.errors import AdapterFormatError

_PEFT_DEFAULT_RANK = 256
_SHARED_A, _SHARED_B = "base_model.vera_A", "base_model.vera_B"
_READ = (
    fields.DESCRIPTIVE
    | COVERAGE_FIELDS
    | {*("peft_type", "task_type", "r", "projection_prng_key", "save_projection")}
    | {*("vera_dropout", "d_initial", "init_weights")}  # of training
)
_UNSUPPORTED = {
    "bias": "trained biases are not served; train with bias='none'",
    "modules_to_save": "modules that are trained in full are not served; train without modules_to_save",
    "fan_in_fan_out": "transposed layers do not occur in the bases served here; train with fan_in_fan_out=False",
    "auto_map": "code in an upload is never run; remove auto_map",
}


@dataclass(frozen=True, slots=True)
class VeraConfiguration:
    """See `tenora.adapters.kinds.kind.Configuration`.

    Attributes:
        rank: r.
        coverage: the modules that it adapts.
        saved: whether A and B are in the file.
        seed: what they are drawn from otherwise.
    """

    rank: int
    coverage: Coverage
    saved: bool
    seed: int
    raw: Mapping[str, Any]

    def plan(self, entries: Mapping[str, TensorEntry], rows: TableRows, *, max_rank: int) -> VeraPlan:
        """See `tenora.adapters.kinds.kind.Configuration`."""
        if self.rank > max_rank:
            raise AdapterFormatError(
                f"r is {self.rank}; this server accepts ranks up to {max_rank}, and a VeRA adapter is served as one of "
                "LoRA of its rank. Train with a lower r, or have the operator raise TENORA_MAX_LORA_RANK."
            )
        covered = self.coverage.modules(rows.modules, Expressions())
        widest = (max(module.in_features for module in covered), max(module.out_features for module in covered))
        expected = Expected(entries)
        shared = (
            expected.take(_SHARED_A, (self.rank, widest[0]), "save_projection"),
            expected.take(_SHARED_B, (widest[1], self.rank), "save_projection"),
        ) if self.saved else None  # fmt: skip
        vectors = [
            (
                module,
                expected.take(f"{PREFIX}{module.path}.vera_lambda_d", (self.rank,), "target_modules"),
                expected.take(f"{PREFIX}{module.path}.vera_lambda_b", (module.out_features,), "target_modules"),
            )
            for module in covered
        ]
        expected.refuse_others("the configuration")
        summary = AdapterSummary(
            kind=VERA.name,
            rank=self.rank,
            target_modules=tuple(dict.fromkeys(module.name for module in covered)),
            parameters=self.rank * sum(module.in_features + module.out_features for module in covered),
            bfloat16=False,  # the products are float32
            nbytes=sum(entry.nbytes for entry in entries.values()),
            config=self.raw,
        )
        return VeraPlan(vectors, shared, widest, self, summary)


@dataclass(frozen=True, slots=True)
class VeraPlan:
    """See `tenora.adapters.kinds.kind.Plan`.

    Attributes:
        vectors: each module with its d and b.
        shared: A and B, if the file has them.
        widest: columns of A and rows of B.
    """

    vectors: Sequence[tuple[TargetModule, TensorEntry, TensorEntry]]
    shared: tuple[TensorEntry, TensorEntry] | None
    widest: tuple[int, int]
    config: VeraConfiguration
    summary: AdapterSummary

    def weights(self, arrays: Mapping[str, Array]) -> AdapterWeights:
        """See `tenora.adapters.kinds.kind.Plan`."""
        if self.shared is None:
            a, b = drawn(self.config.seed, self.config.rank, *self.widest)
        else:
            a, b = wide(arrays, self.shared)
        modules: dict[str, LoraModule] = {}
        for module, d, scale in self.vectors:
            modules[module.path] = LoraModule(
                module.path,
                self.config.rank,
                1.0,
                as_float32(arrays[d.name])[:, None] * a[:, : module.in_features],
                as_float32(arrays[scale.name])[:, None] * b[: module.out_features],
                "float32",
            )
        summary = self.summary
        return AdapterWeights(modules, summary.rank, summary.target_modules, summary.config, summary.nbytes)


def drawn(seed: int, rank: int, inputs: int, outputs: int) -> tuple[Array, Array]:
    """A [rank, inputs] and B [outputs, rank] as PEFT draws them from `projection_prng_key`: Kaiming's uniform ones.

    torch's generator on a CPU is the Mersenne Twister; a uniform float32 has 24 of a word's bits, rounded once.
    """
    bits = np.random.MT19937()
    bits._legacy_seeding(seed & 0xFFFFFFFF)  # noqa: SLF001  # as init_genrand of the authors
    found: list[Array] = []
    for shape in ((rank, inputs), (outputs, rank)):
        bound = float(np.float32(math.sqrt(3.0) * (math.sqrt(2) / math.sqrt(shape[1]))))
        words = bits.random_raw(math.prod(shape)) & np.uint64(2**24 - 1)
        found.append((words * (2.0**-24 * 2 * bound) - bound).astype(np.float32).reshape(shape))
    return found[0], found[1]


def parse(raw: Mapping[str, Any]) -> VeraConfiguration:
    """Read and check the fields of a VeraConfig. Raises AdapterFormatError that names the field."""
    fields.require_causal_lm(raw)
    fields.refuse_unread(raw, _READ, _UNSUPPORTED)
    seed = raw.get("projection_prng_key", 0)
    if type(seed) is not int or not 0 <= seed < 2**63:
        raise AdapterFormatError(f"projection_prng_key is {fields.shown(seed)}; it must be a whole number from 0 on.")
    return VeraConfiguration(
        rank=fields.positive_int("r", raw.get("r", _PEFT_DEFAULT_RANK)),
        coverage=Coverage.of(raw),
        saved=fields.flag("save_projection", raw.get("save_projection", True)),
        seed=seed,
        raw=raw,
    )


VERA = Kind(
    name="vera", title="A VeRA adapter", is_of=lambda raw: raw.get("peft_type") == "VERA", parse=parse, composes=True
)


def vera_files(
    base_model: str, shared: tuple[Array, Array], vectors: Mapping[str, tuple[Array, Array]], *, seed: int = 0
) -> tuple[dict[str, Any], dict[str, Array]]:
    """An adapter_config.json and tensors of a VeRA adapter, A and B included.

    Args:
        base_model: id of the base.
        shared: A [r, widest input] and B [widest output, r].
        vectors: d [r] and b [out] by path.
        seed: that A and B were drawn from.
    """
    tensors: dict[str, Array] = {_SHARED_A: shared[0], _SHARED_B: shared[1]}
    for path, (d, b) in vectors.items():
        tensors[f"{PREFIX}{path}.vera_lambda_d"] = d
        tensors[f"{PREFIX}{path}.vera_lambda_b"] = b
    config = {
        "base_model_name_or_path": base_model,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "peft_type": "VERA",
        "projection_prng_key": seed,
        "r": shared[0].shape[0],
        "save_projection": True,
        "target_modules": list(dict.fromkeys(path.rpartition(".")[2] for path in vectors)),
        "task_type": "CAUSAL_LM",
    }
    return config, tensors
