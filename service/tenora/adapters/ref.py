"""The immutable identity of an adapter version. Free of torch."""

from __future__ import annotations

import msgspec


class AdapterRef(msgspec.Struct, frozen=True):
    """Names one immutable adapter version and where its PEFT files lie on this machine.

    Attributes:
        digest: lowercase hex SHA-256 over the version's content; equal digest means equal bytes.
        path: directory with `adapter_config.json` and `adapter_model.safetensors`.
    """

    digest: str
    path: str
