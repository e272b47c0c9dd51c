"""`tenora doctor`: what is right on this machine, and what to do about the rest."""

from __future__ import annotations

import asyncio
import json
import os
import platform
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import typer

from tenora import __version__
from tenora.cli.connection import local_url
from tenora.cli.options import load_settings
from tenora.config import ON_CPU, Settings
from tenora.errors import ConfigurationError, TenoraError, UnsupportedModelError
from tenora.model.catalog import CATALOGUE
from tenora.model.spec import ModelSpec
from tenora_client import Client
from tenora_client import TenoraError as ClientError

Verdict = Literal["ok", "note", "bad"]
FREE_BYTES = 2 * 2**30
# In a process of its own: torch is slow to import, may be broken, and has no place in this one.
PROBE = """
import json, torch
print(json.dumps({
    "version": torch.__version__,
    "cpu": torch.backends.cpu.get_cpu_capability(),
    "cuda": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
}))
"""


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report; `advice` says what to do unless all is well."""

    topic: str
    verdict: Verdict
    found: str
    advice: str = ""


def doctor() -> None:
    """Check this machine: Python, torch, device, memory, disk, model, database, server."""
    findings = list(examine())
    width = max(len(finding.topic) for finding in findings)
    for finding in findings:
        typer.echo(f"{finding.verdict:4}  {finding.topic.ljust(width)}  {finding.found}")
        if finding.advice:
            typer.echo(f"{'':4}  {'':{width}}  -> {finding.advice}")
    if any(finding.verdict == "bad" for finding in findings):
        raise typer.Exit(1)


def examine() -> Iterator[Finding]:
    """All findings, in the order in which a start would meet the problems."""
    yield Finding("tenora", "ok", f"{__version__} on {platform.system()} {platform.machine()}")
    yield check_python()
    torch = probe_torch()
    yield torch if isinstance(torch, Finding) else Finding("torch", "ok", str(torch["version"]))
    try:
        settings = load_settings()
    except ConfigurationError as error:
        yield Finding("settings", "bad", error.message, "Correct the variable, or unset it.")
        return
    if not isinstance(torch, Finding):
        yield check_device(settings, torch)
    checks: tuple[Callable[[Settings], Finding], ...] = (
        check_memory,
        check_disk,
        check_model,
        check_database,
        check_credentials,
        check_server,
    )
    for check in checks:
        yield check(settings)


def check_python() -> Finding:
    """Is this Python one that Tenora runs on."""
    version = platform.python_version()
    if (3, 11) <= sys.version_info < (3, 15):
        return Finding("python", "ok", f"{version} ({sys.executable})")
    return Finding("python", "bad", version, "Use Python 3.11 to 3.14.")


def probe_torch() -> dict[str, Any] | Finding:
    """What torch says of itself, or what is wrong with it."""
    command = [sys.executable, "-c", PROBE]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        answer: dict[str, Any] = json.loads(done.stdout)
    except subprocess.CalledProcessError as error:
        reason = (error.stderr.strip().splitlines() or ["it cannot be imported"])[-1]
        return Finding("torch", "bad", reason, "Install Tenora again in a fresh virtual environment.")
    except (subprocess.TimeoutExpired, ValueError) as error:
        return Finding("torch", "bad", f"no answer ({type(error).__name__})", "Try `python -c 'import torch'` by hand.")
    return answer


def check_device(settings: Settings, torch: dict[str, Any]) -> Finding:
    """Where the base would run."""
    gpus = list(torch["cuda"])
    if settings.device == "cuda" and not gpus:
        return Finding("device", "bad", "no GPU that torch can use", "Set TENORA_DEVICE=cpu, or install the driver.")
    if gpus and settings.device != "cpu":
        return Finding("device", "ok", ", ".join(gpus))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    native = [flag for flag in ("avx512_bf16", "amx_bf16") if flag in cpu_flags()]
    found = f"cpu, {cores} cores, {torch['cpu']}{', ' + ' '.join(native) if native else ''}"
    if native or settings.dtype in {"auto", "float32"}:
        return Finding("device", "ok", found)
    advice = f"This processor does not multiply {settings.dtype} itself; TENORA_DTYPE=auto is much faster."
    return Finding("device", "note", found, advice)


def cpu_flags() -> frozenset[str]:
    """The processor's feature words as Linux lists them; none elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), []))


def check_memory(settings: Settings) -> Finding:
    """Is there room for the caches that are configured."""
    caches = sum(getattr(settings, name) or ON_CPU[name] for name in ("kv_cache_bytes", "adapter_pool_bytes"))
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        available = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return Finding("memory", "note", "unknown on this system", f"The caches alone may take {size(caches)}.")
    found = f"{size(available)} available; caches may take {size(caches)}, the model comes on top"
    if available > caches:
        return Finding("memory", "ok", found)
    return Finding("memory", "bad", found, "Lower TENORA_KV_CACHE_BYTES and TENORA_ADAPTER_POOL_BYTES.")


def check_disk(settings: Settings) -> Finding:
    """Can the state directory be written, and is there room."""
    place = settings.root
    while not place.exists():
        place = place.parent
    if not os.access(place, os.W_OK):
        return Finding("disk", "bad", f"{place} cannot be written", "Set TENORA_HOME to a directory of your own.")
    free = shutil.disk_usage(place).free
    found = f"{settings.root}, {size(free)} free"
    if free >= FREE_BYTES:
        return Finding("disk", "ok", found)
    return Finding("disk", "note", found, f"Keep {size(FREE_BYTES)} free for a model, uploads and adapters.")


def check_model(settings: Settings) -> Finding:
    """Is the base model here, and of a kind that can be served."""
    pulled = settings.root / "models" / settings.model
    directory = pulled if settings.model in CATALOGUE else Path(settings.model).expanduser()
    if not directory.is_dir():
        return Finding(
            "model", "note", f"{settings.model} is not here yet", "`tenora pull` fetches it, or the first start."
        )
    try:
        spec = ModelSpec.from_directory(directory)
    except UnsupportedModelError as error:
        return Finding("model", "bad", error.message, "Choose another with TENORA_MODEL.")
    return Finding("model", "ok", f"{settings.model}: {spec.family}, {spec.num_layers} layers, in {directory}")


def check_database(settings: Settings) -> Finding:
    """Does the registry open."""
    if settings.database_url is None and not (settings.root / "tenora.db").exists():
        return Finding("database", "ok", "none yet; the first start makes it")
    from tenora.control.tenancy.bootstrap import Registry  # noqa: PLC0415 - SQLAlchemy, which only this check needs

    async def count() -> int:
        registry = await Registry.open(settings)
        try:
            return len(await registry.tenants.list())
        finally:
            await registry.close()

    try:
        tenants = asyncio.run(count())
    except TenoraError as error:
        return Finding("database", "bad", error.message, "Start the version that wrote it, or restore a backup.")
    return Finding("database", "ok", f"{tenants} tenants")


def check_credentials(settings: Settings) -> Finding:
    """Will the command line find a key, and nobody else."""
    if settings.api_key is not None:
        return Finding("key", "ok", "from TENORA_API_KEY")
    path = settings.root / "credentials"
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
    except OSError:
        return Finding("key", "ok", "none yet; the first start makes one")
    if mode & 0o077:
        return Finding("key", "bad", f"{path} can be read by others", f"chmod 600 {path}")
    return Finding("key", "ok", str(path))


def check_server(settings: Settings) -> Finding:
    """Does a server of this state directory answer."""
    url = os.environ.get("TENORA_URL") or local_url()
    if url is None:
        return Finding("server", "note", "not running", "`tenora serve` starts it.")
    try:
        # Readiness asks for no key; the client only wants to have one.
        with Client(base_url=url, api_key=settings.api_key or "none") as client:
            ready = client.ready()
    except ClientError as error:
        return Finding("server", "bad", str(error), "Correct TENORA_URL.")
    if ready:
        return Finding("server", "ok", f"ready at {url}")
    return Finding("server", "bad", f"{url} is not ready", "Look at its log, or start it again with `tenora serve`.")


def size(count: float) -> str:
    """Bytes for people."""
    return f"{count / 2**30:.1f} GiB"
