"""The client that the HTTP commands share, and how they find the server of this machine."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from tenora_client import Client

SERVER_FILE = "server.json"


def connect() -> Client:
    """A client for $TENORA_URL, else for the server that runs on this $TENORA_HOME, else for the default address."""
    return Client(base_url=os.environ.get("TENORA_URL") or local_url())


def running() -> Client | None:
    """A client for $TENORA_URL or for the server that runs on this $TENORA_HOME; None if there is neither."""
    if os.environ.get("TENORA_URL"):
        return connect()
    if local_url() is None:
        return None
    client = connect()
    if client.ready():
        return client
    client.close()  # it was killed, or does not take requests now
    return None


def state_directory(environ: Mapping[str, str] = os.environ) -> Path:
    """$TENORA_HOME."""
    return Path(environ.get("TENORA_HOME") or "~/.tenora").expanduser()


def local_url() -> str | None:
    """Where the server of this state directory listens, as it wrote down itself; None if none runs."""
    try:
        written = json.loads((state_directory() / SERVER_FILE).read_text())
    except (OSError, ValueError):
        return None
    url = written.get("url") if isinstance(written, dict) else None
    return url if isinstance(url, str) else None
