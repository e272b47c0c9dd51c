"""The real application over a real control plane on SQLite; only the engine is scripted."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI

from tenora.adapters.peft_format import write_adapter
from tenora.api.app import create_app
from tenora.config import Settings
from tenora.control.control import Control
from tenora.engine.client.client import AsyncEngine
from tenora.model.catalog import resolve_model
from tenora.model.spec import ModelSpec, table_rows
from tenora.model.tokenizer import Tokenizer
from tenora.training.spec import LoraSpec
from tests.support.patience import PATIENCE
from tests.support.scripted_engine import Script, ScriptedEngine
from tests.support.scripted_jobs import random_modules
from tests.support.state import migrate

SPEECH = "The quick brown fox jumps over the lazy dog."
TRAINING_ROWS = "".join(
    '{"messages": [{"role": "user", "content": "Define: fox."}, {"role": "assistant", "content": "A quick one."}]}\n'
    for _ in range(12)
)


@dataclass
class Service:
    """A running service. `keys` maps tenant → scope → secret."""

    app: FastAPI
    control: Control
    script: Script
    settings: Settings
    keys: dict[str, dict[str, str]] = field(default_factory=dict)
    clients: list[httpx.AsyncClient] = field(default_factory=list)

    def staged(self) -> list[str]:
        """What lies half-written in the state directory."""
        return [path.name for path in (self.settings.root / "staging").iterdir()]

    def client(self, scope: str = "admin", tenant: str = "default") -> httpx.AsyncClient:
        """A client with the tenant's key for that scope."""
        return self.client_with(self.keys[tenant][scope])

    def client_with(self, secret: str | None) -> httpx.AsyncClient:
        """A client with that key, or none."""
        headers = {} if secret is None else {"authorization": f"Bearer {secret}"}
        client = httpx.AsyncClient(
            transport=httpx.ASGITransport(self.app), base_url="http://tenora.test", headers=headers, timeout=PATIENCE
        )
        self.clients.append(client)
        return client


@pytest.fixture
def script() -> Script:
    return Script()


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path / "home", device="cpu", dtype="float32", key_cache_seconds=0, threads=1)


@pytest.fixture
async def service(settings: Settings, script: Script, tiny_base: Path) -> AsyncIterator[Service]:
    script.tokens = Tokenizer.load(tiny_base).encode(SPEECH)
    engine = AsyncEngine.in_thread(settings, lambda wake: ScriptedEngine(script, wake))
    async with running(settings, script, tiny_base, engine) as service:
        yield service


@asynccontextmanager
async def running(settings: Settings, script: Script, base: Path, engine: AsyncEngine) -> AsyncIterator[Service]:
    """The service over an engine, from start to end."""
    await engine.start()
    model = resolve_model(str(base), settings.root)
    rows = table_rows(ModelSpec.from_directory(base))
    await migrate(settings)
    control = await Control.open(settings, engine, Tokenizer.load(base), model, rows)
    await control.start()
    service = Service(create_app(control, settings), control, script, settings)
    await _make_keys(service)
    yield service
    for client in service.clients:
        await client.aclose()
    script.released.set()
    await control.close()
    await engine.close(0)


async def _make_keys(service: Service) -> None:
    await service.control.tenants.create("other")
    for name in ("default", "other"):
        tenant = await service.control.tenants.get(name)
        made = {}
        for scope in ("infer", "train", "adapters", "admin"):
            _, made[scope] = await service.control.keys.create(tenant.id, [scope])
        service.keys[name] = made


@pytest.fixture
def base_id(service: Service) -> str:
    return service.control.inference.base_id


@pytest.fixture
def make_adapter(tiny_base: Path, tmp_path: Path) -> Callable[..., Path]:
    """`make_adapter(seed=0)` → a PEFT directory of rank 4 on q_proj and v_proj of the tiny base."""
    targets = table_rows(ModelSpec.from_directory(tiny_base)).modules
    shape = LoraSpec(rank=4, alpha=8.0, target_modules=("q_proj", "v_proj"))

    def make(seed: int = 0) -> Path:
        directory = tmp_path / f"adapter-{seed}"
        shutil.rmtree(directory, ignore_errors=True)
        modules = random_modules(targets, shape.target_modules, shape.rank, seed)
        write_adapter(directory, base_model="tiny", lora=shape, modules=modules)
        return directory

    return make


async def import_adapter(client: httpx.AsyncClient, name: str, directory: Path) -> httpx.Response:
    """POST /v1/adapters with the two files of a PEFT directory."""
    files = {
        "adapter_config": ("adapter_config.json", (directory / "adapter_config.json").read_bytes()),
        "adapter_model": ("adapter_model.safetensors", (directory / "adapter_model.safetensors").read_bytes()),
    }
    return await client.post("/v1/adapters", data={"name": name}, files=files)


async def upload(client: httpx.AsyncClient, content: str = TRAINING_ROWS, **fields: str) -> httpx.Response:
    """POST /v1/files."""
    form = {"purpose": "fine-tune", **fields}
    return await client.post("/v1/files", data=form, files={"file": ("train.jsonl", content.encode())})
