"""What a run leaves on disk: PEFT directories of its evaluations, and the state from which it goes on after a crash.

    <workdir>/resume.safetensors         weights, moments and progress after a step; at the end the progress alone
    <workdir>/checkpoints/step-<n>/      adapter_config.json, adapter_model.safetensors

Both are replaced atomically: a reader, or a run that was killed at any moment, finds the old or the new, never a part.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tenora.adapters.atomic import fsync, replace_file
from tenora.adapters.head_files import HeadTensors
from tenora.adapters.safetensors_file import write_file
from tenora.data.dataset import TokenizedDataset
from tenora.errors import TrainingError
from tenora.training.arena import TrainedAdapter
from tenora.training.events import EvaluationPoint, HeadOutcome
from tenora.training.optimizer import AdamW
from tenora.training.settings import RunSettings
from tenora.training.spec import TrainSpec, stored_shape

_MOST_POINTS = 256  # of the curve that is kept
_STEP_DIRECTORY = re.compile(r"step-(\d+)")


class Best(msgspec.Struct, frozen=True, kw_only=True):
    """The evaluation with the lowest held-out loss so far, and where its adapter lies.

    Attributes:
        rows, probe: see `tenora.training.evaluation.Evaluation`.
        tasks: held-out loss of each task, if there are several.
        general_loss: on the general text, if the run has one.
        head: what its head says of the held-out rows, if it has one.
    """

    step: int
    valid_loss: float
    valid_accuracy: float
    path: str
    rows: list[float]
    probe: list[list[float]]
    tasks: dict[str, float]
    general_loss: float | None = None
    head: HeadOutcome | None = None


class Evaluated(msgspec.Struct, frozen=True, kw_only=True):
    """One evaluation row by row, for cross-validation."""

    step: int
    valid_loss: float
    valid_accuracy: float
    rows: list[float]


class Progress(msgspec.Struct, frozen=True, kw_only=True):
    """Everything of a run but its weights and moments. Row order and dropout follow from the seed and `step`.

    Attributes:
        step: optimizer steps done.
        evaluated_step: the step of the last complete evaluation, -1 before the first.
        base_loss, start_rows: held-out loss of what training starts from, as a mean and per row.
        last_loss: of the last evaluation.
        base_general_loss: of the base on the general text, if the run has one.
        row_tokens: learned tokens of each held-out row.
        stale: evaluations since the best one.
        curve: all evaluations row by row, where they are asked for.
        points: the evaluations; of many some.
        trained_tokens: learned tokens seen so far, every epoch counted.
        seconds: time spent in the run, over all its resumptions.
        window_loss, window_correct, window_tokens: sums over the steps since the last evaluation.
    """

    step: int = 0
    evaluated_step: int = -1
    base_loss: float = 0.0
    last_loss: float = 0.0
    base_general_loss: float | None = None
    start_rows: list[float] = []  # msgspec copies empty literals
    row_tokens: list[int] = []
    best: Best | None = None
    stale: int = 0
    curve: list[Evaluated] = []
    points: list[EvaluationPoint] = []
    trained_tokens: int = 0
    seconds: float = 0.0
    window_loss: float = 0.0
    window_correct: float = 0.0
    window_tokens: int = 0


def thinned(points: list[EvaluationPoint]) -> list[EvaluationPoint]:
    """Of too many points of a curve every other one, and the last."""
    return points if len(points) <= _MOST_POINTS else [*points[:-1:2], points[-1]]


@dataclass(frozen=True, slots=True)
class State:
    """What goes on from where it was.

    Attributes:
        optimizer: weights and moments, restored in place.
        of_method: what the run's method keeps; restored in place.
        belongs_to: `fingerprint` of the run.
        over: no step follows, and the best adapter lies in its directory: weights and moments are not kept. To write
            them durably would take longer than to publish.
    """

    optimizer: AdamW
    of_method: Mapping[str, npt.NDArray[np.float32]]
    progress: Progress
    belongs_to: str
    over: bool = False

    def tensors(self) -> dict[str, Tensor]:
        """By name in the file."""
        own = self.optimizer
        kept = {name: torch.from_numpy(array) for name, array in self.of_method.items()}
        if self.over:
            return kept
        return kept | {"weights": own.parameters.weights, "exp_avg": own.exp_avg, "exp_avg_sq": own.exp_avg_sq}


def fingerprint(spec: TrainSpec, train: TokenizedDataset, valid: TokenizedDataset) -> str:
    """Names what a state belongs to: settings and data, but not where they lie.

    States outlive the version that wrote them: a field that is new in `TrainSpec` must leave the names of older runs.
    """
    start = Path(spec.init_path).name  # a digest
    settings = msgspec.to_builtins(
        msgspec.structs.replace(spec, run_id="", share_group="", tasks=(), workdir="", init_path=start)
    )
    del settings["split_seed"], settings["acknowledged"]  # the rows that it draws go in; and what its follower does
    digest = hashlib.sha256(msgspec.json.encode(_in_first_order(spec, settings)))
    for dataset in (train, valid):
        for array in (dataset.tokens, dataset.weights, dataset.offsets):
            digest.update(array.tobytes())
        for array in () if dataset.labels is None else dataset.labels.to_arrays().values():
            digest.update(array.tobytes())
    return digest.hexdigest()


def _in_first_order(spec: TrainSpec, settings: dict[str, Any]) -> dict[str, Any]:
    """The settings as the first release named them: beta in every run, and what all methods have after the shape."""
    of_all = {name: settings.pop(name) for name in RunSettings.__struct_fields__}
    found: dict[str, Any] = {}
    for name, value in settings.items():
        found |= {"beta": 0.1, **value} if name == "method_settings" else {name: value}
        if name == "lora":
            found |= {"lora": stored_shape(spec.lora), **of_all}
    return found


def save_state(workdir: Path, state: State) -> None:
    """Replace the run's state atomically and durably.

    Raises:
        OSError: the disk is full, for one; the old state is then still there.
    """
    metadata = {
        "fingerprint": state.belongs_to,
        "optimizer_steps": str(state.optimizer.steps),
        "progress": msgspec.json.encode(state.progress).decode(),
    } | ({"over": "yes"} if state.over else {})
    replace_tensors(workdir / "resume.safetensors", state.tensors(), metadata)


def replace_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file atomically and durably, whatever was there before.

    Raises:
        OSError: the disk is full, for one; the old file is then still there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=".safetensors")
    os.close(handle)
    temporary = Path(name)
    try:
        # One tensor after the other: the library's own writer has all of them in memory a second time.
        write_file(temporary, {name: tensor.detach().cpu().numpy() for name, tensor in tensors.items()}, metadata)
        fsync(temporary)
        temporary.replace(path)
        fsync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of such a file.

    Raises:
        TrainingError: it is not there, or damaged.
    """
    try:
        with safe_open(path, framework="pt") as stored:
            return {name: stored.get_tensor(name) for name in stored.keys()}, stored.metadata() or {}  # noqa: SIM118  # it is no dict
    except (SafetensorError, OSError) as error:
        raise TrainingError(f"The saved state cannot be read ({error}).", code="resume_unreadable") from error


def load_state(workdir: Path, state: State) -> Progress | None:
    """Restore weights and moments into `state`; its progress, or None, and nothing changed, if there is none saved.

    Weights and moments stay as they are if the run was over. They hold anything after an error.

    Raises:
        TrainingError: the state is of another run or cannot be read.
    """
    path = workdir / "resume.safetensors"
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as stored:
            metadata: dict[str, str] = stored.metadata() or {}
            if metadata.get("fingerprint") != state.belongs_to:
                raise TrainingError(
                    "The saved state belongs to a run with other settings or rows; start a new job.",
                    code="resume_mismatch",
                )
            state = dataclasses.replace(state, over="over" in metadata)
            places = state.tensors()
            progress = msgspec.json.decode(metadata["progress"], type=Progress)
            steps = int(metadata["optimizer_steps"])
            with torch.no_grad():
                for name, tensor in places.items():  # one after the other: of a whole base they are large
                    tensor.copy_(stored.get_tensor(name))
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise TrainingError(
            f"The saved state cannot be read ({error}); start a new job.", code="resume_unreadable"
        ) from error
    state.optimizer.steps = steps
    state.optimizer.parameters.refresh()
    return progress


def save_ranks(workdir: Path, ranks: Sequence[int]) -> None:
    """Keep the ranks that an adapter got from its rows, before its first state. Raises OSError as `save_state`."""
    replace_file(workdir / "ranks.json", msgspec.json.encode(list(ranks)))


def load_ranks(workdir: Path) -> list[int] | None:
    """The ranks of the adapter whose state is saved; None if it has those of its shape, or there is no state.

    Raises:
        TrainingError: they cannot be read.
    """
    path = workdir / "ranks.json"
    if not (path.exists() and (workdir / "resume.safetensors").exists()):
        return None
    try:
        return msgspec.json.decode(path.read_bytes(), type=list[int])
    except (OSError, msgspec.DecodeError) as error:
        raise TrainingError(
            f"The saved state cannot be read ({error}); start a new job.", code="resume_unreadable"
        ) from error


def write_checkpoint(spec: TrainSpec, adapter: TrainedAdapter, step: int, heads: HeadTensors | None = None) -> Path:
    """Write what is trained as it is after `step`, replacing what an earlier attempt may have left."""
    directory = checkpoint_path(Path(spec.workdir), step)
    directory.parent.mkdir(parents=True, exist_ok=True)
    _remove(directory)
    adapter.write(directory, base_model=spec.base_model, heads=heads)
    return directory


def checkpoint_path(workdir: Path, step: int) -> Path:
    """Where the adapter of `step` lies."""
    return workdir / "checkpoints" / f"step-{step:06d}"


def prune_checkpoints(workdir: Path, best_step: int, kept_latest: int = TrainedAdapter.kept_checkpoints) -> None:
    """Remove all checkpoints but the best and the latest ones, and whatever a killed run left half-written."""
    root = workdir / "checkpoints"
    found: dict[int, Path] = {}
    for path in root.iterdir() if root.exists() else ():
        match = _STEP_DIRECTORY.fullmatch(path.name)
        if match:
            found[int(match[1])] = path
        else:
            shutil.rmtree(path, ignore_errors=True)
    kept = {best_step, *sorted(found)[-kept_latest:]}
    for step, path in found.items():
        if step not in kept:
            _remove(path)


def _remove(directory: Path) -> None:
    """Who reads it meanwhile finds all of it or nothing. What a crash leaves of it, `prune_checkpoints` removes."""
    removed = directory.with_name(f".removed-{directory.name}")
    shutil.rmtree(removed, ignore_errors=True)
    with contextlib.suppress(FileNotFoundError):
        directory.rename(removed)
    shutil.rmtree(removed, ignore_errors=True)
