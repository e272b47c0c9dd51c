"""Adapters of heads and nothing else: the base's hidden states are read, and not changed.

Their configuration is LoRA's with the name that PEFT gives to no module at all, so PEFT loads them, too; what is in the
heads' tensors it passes over. Heads are taken out of a file before its kind is asked (`tenora.adapters.head_files`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tenora.adapters.foreign_names import unexpected_name
from tenora.adapters.kinds.kind import Kind
from tenora.adapters.safetensors_file import Array, TensorEntry
from tenora.adapters.table_rows import TableRows
from tenora.adapters.weights import AdapterSummary, AdapterWeights
from tenora.errors import AdapterFormatError

NO_MODULES = "dummy-target-modules"
"""`peft.utils.constants.DUMMY_TARGET_MODULES`."""


@dataclass(frozen=True, slots=True)
class HeadConfiguration:
    """See `tenora.adapters.kinds.kind.Configuration`."""

    raw: Mapping[str, Any]

    def plan(self, entries: Mapping[str, TensorEntry], rows: TableRows, *, max_rank: int) -> HeadsAlone:  # noqa: ARG002 - there is no rank
        """See `tenora.adapters.kinds.kind.Configuration`."""
        for name in entries:
            raise AdapterFormatError(unexpected_name(name, {module.path for module in rows.modules}))
        return HeadsAlone(AdapterSummary(HEAD.name, 0, (), 0, bfloat16=False, nbytes=0, config=self.raw))


@dataclass(frozen=True, slots=True)
class HeadsAlone:
    """See `tenora.adapters.kinds.kind.Plan`."""

    summary: AdapterSummary

    def weights(self, arrays: Mapping[str, Array]) -> AdapterWeights:  # noqa: ARG002 - none are of modules
        """See `tenora.adapters.kinds.kind.Plan`."""
        return AdapterWeights({}, 0, (), self.summary.config, 0)


def is_of(raw: Mapping[str, Any]) -> bool:
    """See `Kind`."""
    return raw.get("peft_type") == "LORA" and raw.get("target_modules") == NO_MODULES


HEAD = Kind(name="head", title="Heads on the frozen base", is_of=is_of, parse=HeadConfiguration)


def head_config(base_model: str) -> dict[str, Any]:
    """The configuration of an adapter of heads alone, as it is written."""
    return {
        "base_model_name_or_path": base_model,
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": 1,
        "lora_alpha": 1,
        "lora_dropout": 0.0,
        "target_modules": NO_MODULES,
        "bias": "none",
        "inference_mode": True,
    }
