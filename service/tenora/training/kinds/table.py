"""The kinds of adapters that can be trained. A new one is a file beside this and a line here."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from tenora.errors import TrainingError
from tenora.training.kinds import alora, bottleneck, dora, ia3, lora, parallel, prefix, prompt
from tenora.training.kinds.kind import AdapterKind
from tenora.training.settings import Setting

_TABLE = (
    *(lora.KIND, alora.KIND, dora.KIND, ia3.KIND),
    *(bottleneck.KIND, parallel.KIND, prefix.KIND, prompt.KIND),
)
KINDS: Mapping[str, AdapterKind] = MappingProxyType({kind.name: kind for kind in _TABLE})
OWN: Mapping[str, Setting] = MappingProxyType({one.name: one for kind in _TABLE for one in kind.settings})
"""The settings that a kind has alone, of all kinds."""
LORA_KIND = lora.KIND
"""Of a job that names none."""


def find_kind(name: str) -> AdapterKind:
    """The kind of a stored shape.

    Raises:
        TrainingError: there is none of that name here.
    """
    try:
        return KINDS[name]
    except KeyError:
        raise TrainingError(f"Adapters of type {name!r} cannot be trained here.", code="adapter_unavailable") from None
