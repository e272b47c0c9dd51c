"""(IA)³ (Liu et al. 2022, arXiv:2205.05638) in the PEFT format: a vector that scales what a module gives or reads.

PEFT keeps the vectors as `ia3_l`, [out, 1] of a module's output, [1, in] of the input of a feed-forward module. Rows of
the base scale outputs. Where an input is a product with another module's output, column by column, as behind a gate,
its scale is one of that output (`TableRows.factors`); the inputs of other modules are no such product.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from tenora.adapters.foreign_names import PREFIX
from tenora.adapters.kinds import fields
from tenora.adapters.kinds.coverage import Coverage
from tenora.adapters.kinds.kind import Kind
from tenora.adapters.kinds.tensors import Expected, alike, all_bfloat16, wide
from tenora.adapters.matching import Expressions
from tenora.adapters.pattern import Pattern
from tenora.adapters.safetensors_file import Array, TensorEntry
from tenora.adapters.table_rows import RowKind, TableRows
from tenora.adapters.targets import TargetModule
from tenora.adapters.weights import AdapterPart, AdapterSummary, AdapterWeights
from tenora.errors import AdapterFormatError

_READ = fields.DESCRIPTIVE | {
    *("peft_type", "task_type", "target_modules", "exclude_modules", "feedforward_modules", "init_ia3_weights")
}
_UNSUPPORTED = {
    "fan_in_fan_out": "transposed layers do not occur in the bases served here; train with fan_in_fan_out=False",
    "modules_to_save": "modules that are trained in full are not served; train without modules_to_save",
    "auto_map": "code in an upload is never run; remove auto_map",
}


@dataclass(frozen=True, slots=True)
class Ia3Configuration:
    """See `tenora.adapters.kinds.kind.Configuration`.

    Attributes:
        coverage: the modules that have a vector.
        feedforward: those of them whose vector scales the input: what paths end with, or one expression for all.
    """

    coverage: Coverage
    feedforward: tuple[str, ...] | str
    raw: Mapping[str, Any]

    def plan(self, entries: Mapping[str, TensorEntry], rows: TableRows, *, max_rank: int) -> Ia3Plan:  # noqa: ARG002  # the protocol's
        """See `tenora.adapters.kinds.kind.Configuration`; there are no ranks here."""
        expressions = Expressions()
        covered = self.coverage.modules(rows.modules, expressions)
        reads_scaled = self._feedforward(expressions)
        expected = Expected(entries)
        factors: dict[str, list[TensorEntry]] = {}
        for module in covered:
            name = f"{PREFIX}{module.path}.ia3_l"
            scaled, shape = module, (module.out_features, 1)
            if reads_scaled(module.path):
                scaled, shape = _giver(module, rows), (1, module.in_features)
            factors.setdefault(scaled.path, []).append(expected.take(name, shape, "the configuration's target_modules"))
        expected.refuse_others("target_modules")
        scales = {module.path: factors[module.path] for module in rows.modules if module.path in factors}
        summary = AdapterSummary(
            kind=IA3.name,
            rank=0,
            target_modules=tuple(_names(module.path for module in covered)),
            parameters=sum(rows.rows[rows.row(RowKind.SCALE, path)].in_features for path in scales),
            bfloat16=all_bfloat16(list(entries.values())) and all(len(found) == 1 for found in scales.values()),
            nbytes=sum(entry.nbytes for entry in entries.values()),
            config=self.raw,
        )
        return Ia3Plan(scales, summary)

    def _feedforward(self, expressions: Expressions) -> _Matcher:
        if isinstance(self.feedforward, str):
            return _Matcher(expressions.compile("feedforward_modules", self.feedforward), ())
        return _Matcher(None, self.feedforward)


@dataclass(frozen=True, slots=True)
class _Matcher:
    """Whether a path is one of a feed-forward module; as PEFT does, by the end of its characters."""

    pattern: Pattern | None
    ends: tuple[str, ...]

    def __call__(self, path: str) -> bool:
        return path.endswith(self.ends) if self.pattern is None else self.pattern.fullmatch(path)


@dataclass(frozen=True, slots=True)
class Ia3Plan:
    """See `tenora.adapters.kinds.kind.Plan`; the vectors that make up the scale of a module, by its path."""

    scales: Mapping[str, list[TensorEntry]]
    summary: AdapterSummary

    def weights(self, arrays: Mapping[str, Array]) -> AdapterWeights:
        """See `tenora.adapters.kinds.kind.Plan`."""
        parts: list[AdapterPart] = []
        for path, entries in self.scales.items():
            if len(entries) == 1:
                dtype, (scale,) = alike(arrays, entries)
            else:  # an output that is scaled itself, and then read scaled
                given, read = (vector.reshape(-1) for vector in wide(arrays, entries))
                dtype, scale = "float32", given * read
            parts.append(AdapterPart.columns(RowKind.SCALE, path, scale.reshape(1, -1), dtype=dtype))
        summary = self.summary
        return AdapterWeights(
            {}, summary.rank, summary.target_modules, summary.config, summary.nbytes, parts=tuple(parts)
        )


def _giver(module: TargetModule, rows: TableRows) -> TargetModule:
    """The module whose scaled output is the scaled input of another one."""
    given = rows.factors.get(module.path)
    if given is None:
        names = _names(rows.factors)
        raise AdapterFormatError(
            f"feedforward_modules names {module.path}, whose input cannot be scaled here: only that of "
            f"{', '.join(names)} is a product with another module's output, column by column. Train with "
            f"feedforward_modules={names}, or leave the module out of feedforward_modules."
        )
    return rows.modules[rows.row(RowKind.LOW_RANK, given)]


def parse(raw: Mapping[str, Any]) -> Ia3Configuration:
    """Read and check the fields of an IA3Config. Raises AdapterFormatError that names the field."""
    fields.require_causal_lm(raw)
    fields.refuse_unread(raw, _READ, _UNSUPPORTED)
    if raw.get("feedforward_modules") is None:
        raise AdapterFormatError(
            "feedforward_modules is None: which vectors scale an input is not said; list their modules, or [] for none."
        )
    return Ia3Configuration(
        coverage=Coverage.of(raw),
        feedforward=fields.names("feedforward_modules", raw["feedforward_modules"], required=False),
        raw=raw,
    )


IA3 = Kind(name="ia3", title="An (IA)³ adapter", is_of=lambda raw: raw.get("peft_type") == "IA3", parse=parse)


def ia3_files(base_model: str, scales: Mapping[str, Array], rows: TableRows) -> tuple[dict[str, Any], dict[str, Array]]:
    """An adapter_config.json and tensors of an (IA)³ adapter.

    Args:
        base_model: id of the base.
        scales: by path, the scale [out] of a module's output, float32, float16 or bfloat16 as its bits. One of an
            output that is a factor of another module's input is written as the scale of that input, as the paper has
            it, unless the other module has a scale of its output, beside which there is no room for one.
        rows: those of the base.
    """
    reads = {given: module for module, given in rows.factors.items() if module not in scales}
    tensors: dict[str, Array] = {}
    for path, scale in scales.items():
        shape = (1, -1) if path in reads else (-1, 1)
        tensors[f"{PREFIX}{reads.get(path, path)}.ia3_l"] = scale.reshape(shape)
    config = {
        "base_model_name_or_path": base_model,
        "fan_in_fan_out": False,
        "feedforward_modules": _names(reads[path] for path in scales if path in reads),
        "inference_mode": True,
        "init_ia3_weights": True,
        "modules_to_save": None,
        "peft_type": "IA3",
        "target_modules": _names(reads.get(path, path) for path in scales),
        "task_type": "CAUSAL_LM",
    }
    return config, tensors


def _names(paths: Iterable[str]) -> list[str]:
    """The last parts of paths, each once."""
    return list(dict.fromkeys(path.rpartition(".")[2] for path in paths))
