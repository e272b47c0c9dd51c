"""The fields of a request that compose adapters, or scale one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Self

from pydantic import Field, model_validator

from tenora.adapters.composition import (
    DEFAULT_DENSITY,
    ELECTING,
    LARGEST_SCALE,
    LARGEST_WEIGHT,
    MAX_PARTS,
    PRUNING,
)
from tenora.adapters.ref import Combination, MajoritySign
from tenora.api.schemas.base import RequestModel
from tenora.control.inference.records import AskedComposition
from tenora.errors import InvalidRequestError

Weight = Annotated[float, Field(ge=-LARGEST_WEIGHT, le=LARGEST_WEIGHT)]
Name = Annotated[str, Field(min_length=1, max_length=256)]
_DENSITY = Field(
    default=None, gt=0, le=1, description=f"Share of the weights that ties and dare keep; {DEFAULT_DENSITY} if absent."
)
_SIGN = Field(
    default=None,
    description="How ties elects the sign of a weight: by the sum of the adapters' (total, the default) or by their "
    "number (frequency).",
)


class WeightedAdapter(RequestModel):
    """An adapter by any of its names, and what its delta weights are multiplied with."""

    name: Name
    weight: Weight = 1.0


class MergedAdapters(RequestModel):
    """`adapters` as LoRAX has them."""

    ids: list[Name] = Field(min_length=1, max_length=MAX_PARTS)
    weights: list[Weight] = Field(min_length=1, max_length=MAX_PARTS)
    merge_strategy: Combination = "linear"
    density: float | None = _DENSITY
    majority_sign_method: MajoritySign | None = _SIGN

    @model_validator(mode="after")
    def _one_weight_each(self) -> Self:
        if len(self.ids) != len(self.weights):
            raise InvalidRequestError(
                f"merged_adapters has {len(self.ids)} ids and {len(self.weights)} weights. Send one weight for each.",
                param="merged_adapters.weights",
            )
        return self


class CompositionBody(RequestModel):
    """What a request says of adapters that are to act as one. An explicit null means the default."""

    adapters: list[WeightedAdapter] | None = Field(
        default=None,
        min_length=1,
        max_length=MAX_PARTS,
        description="Adapters of yours that answer as one; `model` is the base, one of them, or absent.",
    )
    combination: Combination | None = Field(
        default=None,
        description="How `adapters` are combined. cat, the default: the exact sum of what each adds. linear, ties, "
        "dare_linear, dare_ties: A and B are merged, which needs equal ranks. svd: the sum, cut to the highest rank.",
    )
    density: float | None = _DENSITY
    majority_sign_method: MajoritySign | None = _SIGN
    merged_adapters: MergedAdapters | None = Field(default=None, description="The same, in LoRAX's form.")
    adapter_scale: float | None = Field(
        default=None,
        ge=0,
        le=LARGEST_SCALE,
        description="Multiplies what the adapters, or the one adapter, add to the base: 0 is the base.",
    )

    @model_validator(mode="after")
    def _one_composition(self) -> Self:
        if self.merged_adapters is not None and self.adapters is not None:
            raise InvalidRequestError(
                "adapters and merged_adapters say the same. Send one of them.", param="merged_adapters"
            )
        for field in ("combination", "density", "majority_sign_method"):
            if getattr(self, field) is not None and self.adapters is None:
                raise InvalidRequestError(f"{field} says how adapters are combined. Send adapters too.", param=field)
        _require_used(self.combination or "cat", self.density, self.majority_sign_method)
        merged = self.merged_adapters
        if merged is not None:
            _require_used(merged.merge_strategy, merged.density, merged.majority_sign_method, "merged_adapters.")
        return self

    @property
    def composition(self) -> AskedComposition | None:
        """What is asked of several adapters, or of the scale of one; None if nothing is."""
        scale = 1.0 if self.adapter_scale is None else self.adapter_scale
        merged = self.merged_adapters
        if merged is not None:
            pairs = list(zip(merged.ids, merged.weights, strict=True))
            return _asked(pairs, merged.merge_strategy, merged.density, merged.majority_sign_method, scale)
        if self.adapters is None and self.adapter_scale is None:
            return None
        named = [(adapter.name, adapter.weight) for adapter in self.adapters or ()]
        return _asked(named, self.combination or "cat", self.density, self.majority_sign_method, scale)


def _asked(
    adapters: Sequence[tuple[str, float]],
    combination: Combination,
    density: float | None,
    sign: MajoritySign | None,
    scale: float,
) -> AskedComposition:
    return AskedComposition(adapters, combination, density or DEFAULT_DENSITY, sign or "total", scale)


def _require_used(combination: Combination, density: float | None, sign: MajoritySign | None, within: str = "") -> None:
    """Raise InvalidRequestError for a parameter that the combination does not look at."""
    for field, value, users in (("density", density, PRUNING), ("majority_sign_method", sign, ELECTING)):
        if value is not None and combination not in users:
            raise InvalidRequestError(
                f"{combination} does not use {field}; {', '.join(sorted(users))} do. Leave it out.",
                param=within + field,
            )
