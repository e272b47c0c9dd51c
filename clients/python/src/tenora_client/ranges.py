"""Values of a sweep between two bounds, as they are asked for and as a job says them."""

from __future__ import annotations

from typing import Required, TypedDict

from tenora_client.api_object import Part


class RangeParams(TypedDict, total=False):
    """From `min` to `max`, even in the logarithm with `log`; absent, as suits the setting."""

    min: Required[float]
    max: Required[float]
    log: bool


class Range(Part):
    """From `min` to `max`."""

    min: float
    max: float
    log: bool | None = None
