"""Adapters: the native objects, and vLLM's two calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field

from tenora.api.schemas.base import RequestModel, ResponseModel

EVALUATION = (
    "Of an adapter that a job made. `valid_loss`, `base_loss` and the like are the run's own. `held_out` compares the "
    "adapter with what training started from, row by row: `difference` in nats per learned token (`unit`: or per "
    "preference pair) with a 95% interval (`low`, `high`), `verdict` better, worse, no difference or too few rows; "
    "`source` says whether the rows were held out or cross-validated. `base` compares it with the base, `replaced` "
    "with the version that its name meant when the job ended, and `few_shot` with the base that has `shots` training "
    "rows in its prompt; `verdicts` has the verdict against each of them, or not measured with the reason. "
    "`forgetting` is the change on a general text, `overfitting` what went on after the best evaluation, "
    "`near_duplicates` how many held-out rows are nearly training rows, `parity` how far serving is from training, "
    "and `lineage` what it was made of. `notes` says what could not be measured."
)


class AdapterObject(ResponseModel):
    """An `AdapterRecord` of the control plane: an alias with the version that it points at, or one of its versions."""

    id: str
    object: Literal["adapter"] = "adapter"
    name: str
    tenant: str
    version: int
    active: bool
    digest: str
    base_model: str
    method: str
    rank: int
    target_modules: Sequence[str]
    bytes: int
    created_at: int
    source: Literal["job", "upload"]
    job_id: str | None
    parent: str
    parent_digest: str | None
    resident: Literal["device", "host", "disk"]
    pinned: bool
    evaluation: dict[str, Any] | None = Field(description=EVALUATION)


class RollbackRequest(RequestModel):
    """Which version the alias shall point at: its number, or a prefix of its digest."""

    version: int | str = Field(union_mode="left_to_right")


class LoadLoraAdapterRequest(RequestModel):
    """vLLM's call to load an adapter from a directory of the server."""

    lora_name: str = Field(max_length=256)
    lora_path: str = Field(max_length=4096)
    load_inplace: bool = False


class UnloadLoraAdapterRequest(RequestModel):
    """vLLM's call to take an adapter away. `lora_int_id` is accepted and not used."""

    lora_name: str = Field(max_length=256)
    lora_int_id: int | None = None
