"""Activated LoRA (Greenewald et al. 2025, arXiv:2504.12397): a LoRA adapter that acts from its invocation on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from tenora.adapters.invocation import MAX_INVOCATION
from tenora.adapters.kinds import fields, lora
from tenora.adapters.kinds.kind import Kind
from tenora.adapters.kinds.lora import LoraConfiguration, LoraPlan
from tenora.adapters.safetensors_file import TensorEntry
from tenora.adapters.table_rows import TableRows
from tenora.errors import AdapterFormatError

_FIELD = "alora_invocation_tokens"


@dataclass(frozen=True, slots=True)
class ActivatedConfiguration:
    """See `tenora.adapters.kinds.kind.Configuration`. `lora` is what it has of a LoRA adapter."""

    lora: LoraConfiguration

    @property
    def raw(self) -> Mapping[str, Any]:
        """See `tenora.adapters.kinds.kind.Configuration`."""
        return self.lora.raw

    def plan(self, entries: Mapping[str, TensorEntry], rows: TableRows, *, max_rank: int) -> LoraPlan:
        """See `tenora.adapters.kinds.kind.Configuration`."""
        plan = self.lora.plan(entries, rows, max_rank=max_rank)
        return replace(plan, summary=replace(plan.summary, kind=ALORA.name))


def parse(raw: Mapping[str, Any]) -> ActivatedConfiguration:
    """Read and check the fields of an aLoRA configuration. Raises AdapterFormatError that names the field."""
    tokens = raw[_FIELD]
    if not isinstance(tokens, list) or not 1 <= len(tokens) <= MAX_INVOCATION:
        raise AdapterFormatError(
            f"{_FIELD} is {fields.shown(tokens)}; it must be a list of 1 to {MAX_INVOCATION} token ids, or null for an "
            "adapter that acts on every token."
        )
    if not all(type(token) is int and 0 <= token < 2**31 for token in tokens):
        raise AdapterFormatError(f"{_FIELD} is {fields.shown(tokens)}; a token id is a whole number from 0 on.")
    return ActivatedConfiguration(lora.parse(raw, also_read={_FIELD}))


ALORA = Kind(
    name="alora",
    title="An activated LoRA adapter",
    is_of=lambda raw: raw.get("peft_type") == "LORA" and raw.get(_FIELD) is not None,
    parse=parse,
)
