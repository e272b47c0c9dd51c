"""Where the server is and which key to use: arguments first, then the environment, then what `tenora serve` left."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import httpx

from tenora_client.errors import ConfigurationError

DEFAULT_URL = "http://127.0.0.1:8000"


def resolve_url(base_url: str | None, environ: Mapping[str, str] = os.environ) -> str:
    """The server's root without a trailing slash; an address that ends in `/v1` is accepted.

    Raises:
        ConfigurationError: if it is not an http(s) address.
    """
    url = base_url or environ.get("TENORA_URL") or DEFAULT_URL
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise ConfigurationError(f"{url!r} is not an address ({error}). Write it as http://host:port.") from error
    if parsed.scheme not in {"http", "https"} or not parsed.host:
        raise ConfigurationError(f"{url!r} is not an http address. Write it as http://host:port.")
    return url.rstrip("/").removesuffix("/v1").rstrip("/")


def credentials_path(environ: Mapping[str, str] = os.environ) -> Path:
    """The file in which `tenora serve` keeps the key that it made at its first start."""
    return Path(environ.get("TENORA_HOME") or "~/.tenora").expanduser() / "credentials"


def resolve_key(api_key: str | None, environ: Mapping[str, str] = os.environ) -> str:
    """The API key.

    Raises:
        ConfigurationError: if there is none, or it cannot travel in a header.
    """
    key = api_key or environ.get("TENORA_API_KEY")
    if not key:
        path = credentials_path(environ)
        try:
            key = path.read_text(encoding="utf-8").strip()
        except FileNotFoundError:
            key = ""
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigurationError(f"Cannot read the key in {path} ({error}). Set TENORA_API_KEY instead.") from error
        if not key:
            raise ConfigurationError(
                f"No API key: pass api_key, set TENORA_API_KEY, or start `tenora serve`, which writes {path}."
            )
    if not key.isascii() or not key.isprintable() or " " in key:
        raise ConfigurationError(
            "The API key has characters that a key cannot have. Copy it again, without spaces or line ends."
        )
    return key
