"""DoRA (Liu et al. 2024, arXiv:2402.09353) in the PEFT format: LoRA, and the length of each row of the sum with W.

y = g ∘ (W x + c·B A x) + bias with g = m / ‖W + c·B A‖, a norm for each row. What is read is the magnitude m; the scale
g takes W, so it is made where the base is (`tenora.model.magnitudes`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from tenora.adapters.foreign_names import PREFIX
from tenora.adapters.kinds import lora
from tenora.adapters.kinds.kind import Kind
from tenora.adapters.kinds.lora import LoraConfiguration, LoraPlan, LoraShape, lora_config, lora_tensors
from tenora.adapters.kinds.tensors import Expected, alike
from tenora.adapters.safetensors_file import Array, TensorEntry
from tenora.adapters.table_rows import RowKind, TableRows
from tenora.adapters.weights import AdapterPart, AdapterSummary, AdapterWeights
from tenora_kernels.flags import BIAS_OUTSIDE

_MAGNITUDE = ".lora_magnitude_vector"


@dataclass(frozen=True, slots=True)
class DoraConfiguration:
    """See `tenora.adapters.kinds.kind.Configuration`. `lora` is what it has of a LoRA adapter."""

    lora: LoraConfiguration

    @property
    def raw(self) -> Mapping[str, Any]:
        """See `tenora.adapters.kinds.kind.Configuration`."""
        return self.lora.raw

    def plan(self, entries: Mapping[str, TensorEntry], rows: TableRows, *, max_rank: int) -> DoraPlan:
        """See `tenora.adapters.kinds.kind.Configuration`."""
        of_lora = {name: entry for name, entry in entries.items() if not name.endswith(_MAGNITUDE)}
        plan = self.lora.plan(of_lora, rows, max_rank=max_rank)
        expected = Expected({name: entry for name, entry in entries.items() if name not in of_lora})
        magnitudes = {
            planned.target.path: expected.take(
                f"{PREFIX}{planned.target.path}{_MAGNITUDE}", (planned.target.out_features,), "use_dora"
            )
            for planned in plan.modules
        }
        expected.refuse_others("target_modules")
        summary = replace(
            plan.summary,
            kind=DORA.name,
            parameters=plan.summary.parameters + sum(entry.shape[0] for entry in magnitudes.values()),
            bfloat16=False,  # the scale is made in float32
            nbytes=sum(entry.nbytes for entry in entries.values()),
        )
        return DoraPlan(plan, magnitudes, summary)


@dataclass(frozen=True, slots=True)
class DoraPlan:
    """See `tenora.adapters.kinds.kind.Plan`; the magnitude of each module by its path."""

    lora: LoraPlan
    magnitudes: Mapping[str, TensorEntry]
    summary: AdapterSummary

    def weights(self, arrays: Mapping[str, Array]) -> AdapterWeights:
        """See `tenora.adapters.kinds.kind.Plan`."""
        parts: list[AdapterPart] = []
        for path, entry in self.magnitudes.items():
            dtype, (values,) = alike(arrays, [entry])
            parts.append(AdapterPart.columns(RowKind.MAGNITUDE, path, values.reshape(1, -1), dtype=dtype))
        return replace(self.lora.weights(arrays), nbytes=self.summary.nbytes, parts=tuple(parts), flags=BIAS_OUTSIDE)


def parse(raw: Mapping[str, Any]) -> DoraConfiguration:
    """Read and check the fields of a LoraConfig with use_dora. Raises AdapterFormatError that names the field."""
    return DoraConfiguration(lora.parse(raw, also_read={"use_dora"}))


DORA = Kind(
    name="dora",
    title="A DoRA adapter",
    is_of=lambda raw: raw.get("peft_type") == "LORA" and raw.get("use_dora") is True,
    parse=parse,
)


def dora_files(
    base_model: str,
    shape: LoraShape,
    modules: Mapping[str, tuple[Array, Array]],
    magnitudes: Mapping[str, Array],
) -> tuple[dict[str, Any], dict[str, Array]]:
    """An adapter_config.json and tensors of a DoRA adapter.

    Args:
        base_model, shape, modules: as `tenora.adapters.peft_format.write_adapter`.
        magnitudes: m [out] of each of the modules, by path.
    """
    if set(magnitudes) != set(modules):
        raise ValueError("every module of a DoRA adapter has a magnitude, and nothing else has one.")
    tensors = lora_tensors(modules)
    tensors.update({f"{PREFIX}{path}{_MAGNITUDE}": values.reshape(-1) for path, values in magnitudes.items()})
    return {**lora_config(base_model, shape, modules), "use_dora": True}, tensors
