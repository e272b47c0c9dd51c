"""Every kind of adapters that is read. Free of torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tenora.adapters.head_files import without_heads
from tenora.adapters.kinds.alora import ALORA
from tenora.adapters.kinds.bottleneck import BOTTLENECK
from tenora.adapters.kinds.dora import DORA
from tenora.adapters.kinds.head import HEAD
from tenora.adapters.kinds.ia3 import IA3
from tenora.adapters.kinds.kind import Configuration, Kind
from tenora.adapters.kinds.lora import LORA
from tenora.adapters.kinds.vera import VERA
from tenora.adapters.kinds.virtual_tokens import PREFIX, PROMPT
from tenora.adapters.safetensors_file import parse_json_object
from tenora.errors import AdapterFormatError

KINDS: tuple[Kind, ...] = (HEAD, DORA, ALORA, LORA, IA3, VERA, BOTTLENECK, PREFIX, PROMPT)
"""The first that a configuration is of counts."""
NAMED = {kind.name: kind for kind in KINDS}
COMPOSED = frozenset(kind.name for kind in KINDS if kind.composes)
"""The names of those of which several act as one."""
MAX_CONFIG_BYTES = 2**20


def read_fields(text: bytes) -> dict[str, Any]:
    """The fields of an adapter_config.json.

    Raises:
        AdapterFormatError: if it is too large, or not JSON.
    """
    if len(text) > MAX_CONFIG_BYTES:
        raise AdapterFormatError(
            f"adapter_config.json is over {MAX_CONFIG_BYTES} bytes; that is no configuration of an adapter."
        )
    return parse_json_object(text, what="adapter_config.json")


def kind_of(raw: Mapping[str, Any]) -> Kind:
    """The kind whose configuration an adapter_config.json is. Raises AdapterFormatError if none is known."""
    for kind in KINDS:
        if kind.is_of(raw):
            return kind
    raise AdapterFormatError(
        f"peft_type is {raw.get('peft_type')!r}; adapters of the kinds {', '.join(kind.name for kind in KINDS)} are "
        "served. Train one of them."
    )


def parse_config(text: bytes) -> Configuration:
    """Read and check an adapter_config.json, but for what it says of heads (`tenora.adapters.head_files`).

    Raises:
        AdapterFormatError: if it is too large, not JSON, of a kind that is not served, or holds a field that is not
            known; the message names the field.
    """
    raw = without_heads(read_fields(text))
    return kind_of(raw).parse(raw)
