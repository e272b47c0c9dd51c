"""Parameters of which `make test` runs a few and `make test-full` the others."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def full_but(kept: Any, values: Iterable[Any]) -> list[Any]:
    """`values` as parameters; all but those in `kept` are marked `full`.

    Args:
        kept: one value, or a list of them. A value that is not among `values` is an error, so that a renamed case
            does not leave `make test` without one.
        values: the whole matrix, in its order.
    """
    found, wanted = list(values), kept if isinstance(kept, list) else [kept]
    missing = [value for value in wanted if value not in found]
    if missing:
        raise ValueError(f"no such cases: {missing}")
    return [value if value in wanted else full(value) for value in found]


def full(*values: Any) -> Any:
    """One case that only `make test-full` runs."""
    return pytest.param(*values, marks=pytest.mark.full)
