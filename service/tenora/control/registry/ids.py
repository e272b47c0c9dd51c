"""Ids, names and the patterns that they match. Ids are random; they carry no meaning beyond their prefix."""

from __future__ import annotations

import re
import secrets
import time

from tenora.errors import InvalidRequestError

NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")  # of adapters; as sent, so case tells names apart
TENANT_PATTERN = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
SUFFIX_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
DIGEST_PREFIX = re.compile(r"[0-9a-f]{8,64}")
_ALPHABET = "0123456789abcdefghijklmnopqrstuvwxyz"


def new_id(prefix: str) -> str:
    """`prefix-` and 24 random characters (124 bits)."""
    return f"{prefix}-{random_word(24)}"


def random_word(length: int) -> str:
    """`length` random characters of [0-9a-z]."""
    return "".join(secrets.choice(_ALPHABET) for _ in range(length))


def unix_now() -> int:
    """Unix time in whole seconds, as the API shows it."""
    return int(time.time())


def check_name(name: str, *, param: str = "name", reserved: str | None = None) -> str:
    """Return `name` if an adapter may be called so, else raise InvalidRequestError naming `param`.

    `reserved` is the base model's id: a request for it must always reach the base, however its letters are written.
    """
    if NAME_PATTERN.fullmatch(name) is None:
        raise InvalidRequestError(
            f"{param} must match ^{NAME_PATTERN.pattern}$; choose letters, digits, '.', '_' and '-'.", param=param
        )
    if reserved is not None and name.lower() == reserved.lower():
        raise InvalidRequestError(
            f"{param} must not be the base model's name {reserved!r}; choose another.", param=param
        )
    return name


def check_tenant_name(name: str) -> str:
    """Return `name` if a tenant may be called so, else raise InvalidRequestError."""
    if TENANT_PATTERN.fullmatch(name) is None:
        raise InvalidRequestError(
            f"name must match ^{TENANT_PATTERN.pattern}$; choose lower-case letters, digits, '.', '_' and '-'.",
            param="name",
        )
    return name


def check_suffix(suffix: str) -> str:
    """Return `suffix` if it may stand in a model's name (no ':', '/' or '@'), else raise InvalidRequestError."""
    if SUFFIX_PATTERN.fullmatch(suffix) is None:
        raise InvalidRequestError(
            "suffix must be 1 to 64 letters, digits, '.', '_' or '-', starting with a letter or digit.", param="suffix"
        )
    return suffix
