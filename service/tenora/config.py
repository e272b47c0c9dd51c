"""Settings: read from the environment once, frozen, and passed down.

Every flag of `tenora serve` has a `TENORA_` variable of the same name; a flag wins over the variable.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, Field, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

Device = Literal["auto", "cpu", "cuda"]
DType = Literal["auto", "bfloat16", "float16", "float32"]
Role = Literal["all", "serve", "train"]
LogLevel = Literal["debug", "info", "warning", "error"]

ON_CPU: Final[Mapping[str, int]] = {
    "max_num_seqs": 64,
    "max_num_batched_tokens": 512,
    "kv_cache_bytes": 512 * 2**20,
    "adapter_pool_bytes": 512 * 2**20,
}
"""What a CPU gets where 0 leaves it open; for a GPU `tenora.engine.resources` looks at the device."""


def _at_least(least: int) -> AfterValidator:
    """0, or at least so much."""

    def check(value: int) -> int:
        if value < 0 or 0 < value < least:
            raise ValueError(f"must be 0 or at least {least}")
        return value

    return AfterValidator(check)


AtLeast16 = Annotated[int, _at_least(16)]
AtLeastMiB = Annotated[int, _at_least(2**20)]


class Settings(BaseSettings):
    """What an operator can set. Sizes are bytes and times seconds unless the name says otherwise."""

    model_config = SettingsConfigDict(
        env_prefix="TENORA_", frozen=True, extra="ignore", protected_namespaces=(), allow_inf_nan=False
    )

    home: Path = Field(default=Path("~/.tenora"), description="State directory: models, database, files, adapters.")
    model: str = Field(default="smollm2-135m", description="Base model: a catalogue name, a directory or a hub id.")
    host: str = Field(default="127.0.0.1", description="Address that the HTTP server listens on.")
    port: int = Field(default=8000, ge=0, le=65535, description="Port of the HTTP server; 0 picks a free one.")
    device: Device = Field(default="auto", description="Where the base model runs.")
    dtype: DType = Field(default="auto", description="Compute type; auto is bfloat16 where the hardware multiplies it.")
    role: Role = Field(default="all", description="all, serve (never trains) or train (no public inference).")
    api_key: str | None = Field(
        default=None, description="The default tenant's admin key; made at first start if unset."
    )
    database_url: str | None = Field(
        default=None,
        repr=False,  # it may hold a password
        description="Registry: postgresql://user:password@host/database; default SQLite in the state directory.",
    )
    log_level: LogLevel = Field(default="info", description="debug, info, warning or error.")

    # engine
    threads: int = Field(default=0, ge=0, description="CPU threads of the engine; 0 takes every core it may use.")
    max_num_seqs: int = Field(
        default=0, ge=0, description="Sequences that decode together; 0: 64 on a CPU, 256 on a GPU."
    )
    max_num_batched_tokens: AtLeast16 = Field(
        default=0,
        description="Tokens of one step, prefill chunks included; 0: 512 on a CPU, 2048 on a GPU, 8192 from 80 GB on.",
    )
    max_model_len: int = Field(
        default=0, ge=0, description="Longest sequence; 0 takes the model's own limit, capped by KV memory."
    )
    block_size: int = Field(default=16, ge=1, description="Tokens in a KV block.")
    kv_cache_bytes: AtLeastMiB = Field(
        default=0,
        description="Memory of the KV cache; 0: 512 MiB on a CPU, on a GPU what is left of 0.9 of it.",
    )
    adapter_pool_bytes: AtLeastMiB = Field(
        default=0,
        description="Memory of the adapter slots on the device; 0: 512 MiB, or on a GPU a twentieth if that is more.",
    )
    host_cache_bytes: int = Field(
        default=128 * 2**20,
        ge=0,
        description="Host memory for prepared adapters; if larger than the pool, evicted adapters are kept there too.",
    )
    max_adapters: int = Field(default=256, ge=1, le=65_536, description="Adapter slots on the device.")
    max_lora_rank: int = Field(default=256, ge=1, le=256, description="Highest rank that is accepted.")

    # limits of connections, of one request, of the queue and of uploads
    max_connections: int = Field(
        default=4096,
        ge=1,
        description="Open connections, or what three quarters of the open files allow; beyond it only probes.",
    )
    max_queued_requests: int = Field(default=1024, ge=1, description="Requests waiting in the engine before 429.")
    max_body_bytes: int = Field(default=8 * 2**20, ge=1024, description="Largest JSON body.")
    max_file_bytes: int = Field(default=512 * 2**20, ge=1024, description="Largest uploaded training file.")
    max_adapter_bytes: int = Field(default=1024 * 2**20, ge=1024, description="Largest uploaded adapter.")
    adapter_dirs: Annotated[tuple[Path, ...], NoDecode] = Field(
        default=(), description="Directories from which the default tenant's admins may load adapters by path."
    )

    # training
    max_running_jobs: int = Field(default=16, ge=1, description="Jobs that train at the same time; others queue.")
    training_share: float = Field(
        default=0.5, ge=0.05, le=0.95, description="Share of the engine's time that training has beside generation."
    )
    max_training_rows: int = Field(default=1_000_000, ge=1, description="Rows of one training file.")
    train_tokens_per_microbatch: int = Field(default=2048, ge=64, description="Packed tokens of a training microbatch.")

    failpoints: str = Field(
        default="", description="Tests only: places at which the process kills itself or fails; warned of at start."
    )

    # lifecycle
    drain_seconds: float = Field(default=30.0, ge=0, description="How long open requests may finish after SIGTERM.")
    engine_start_seconds: float = Field(
        default=300.0, gt=0, description="How long the engine may load without progress; it may get on for longer."
    )
    engine_hang_seconds: float = Field(
        default=60.0, ge=2, description="Without a heartbeat for this long, the engine is replaced."
    )
    key_cache_seconds: float = Field(default=5.0, ge=0, description="A revoked key works at most this much longer.")

    @field_validator("log_level", mode="before")
    @classmethod
    def _lower(cls, value: Any) -> Any:
        """Python's own spelling of a level is in capitals."""
        return value.lower() if isinstance(value, str) else value

    @field_validator("adapter_dirs", mode="before")
    @classmethod
    def _path_list(cls, value: Any) -> Any:
        """In the environment a path list as in PATH, or a JSON array."""
        if not isinstance(value, str):
            return value
        if value.lstrip().startswith("["):
            return json.loads(value)
        return [part for part in value.split(os.pathsep) if part]

    @property
    def root(self) -> Path:
        """The state directory as an absolute path."""
        return self.home.expanduser().resolve()

    @property
    def database(self) -> str:
        """SQLAlchemy URL of the registry."""
        return self.database_url or f"sqlite+aiosqlite:///{self.root / 'tenora.db'}"
