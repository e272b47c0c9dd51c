"""What a run leaves on disk: PEFT directories of its evaluations, and the state from which it goes on after a crash.

    <workdir>/resume.safetensors         weights, moments and progress after some optimizer step
    <workdir>/checkpoints/step-<n>/      adapter_config.json, adapter_model.safetensors

Both are replaced atomically: a reader, or a run that was killed at any moment, finds the old or the new, never a part.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
from pathlib import Path

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tenora.adapters.atomic import fsync
from tenora.adapters.peft_format import write_adapter
from tenora.errors import TrainingError
from tenora.training.dataset import TokenizedDataset
from tenora.training.optimizer import AdamW
from tenora.training.slots import TrainingSlots
from tenora.training.spec import TrainSpec

_KEPT = 3  # latest checkpoints that stay beside the best one
_STEP_DIRECTORY = re.compile(r"step-(\d+)")


class Best(msgspec.Struct, frozen=True, kw_only=True):
    """The evaluation with the lowest held-out loss so far, and where its adapter lies."""

    step: int
    valid_loss: float
    valid_accuracy: float
    path: str


class Progress(msgspec.Struct, frozen=True, kw_only=True):
    """Everything of a run but its weights and moments. Row order and dropout follow from the seed and `step`.

    Attributes:
        step: optimizer steps done.
        evaluated_step: the step of the last complete evaluation, -1 before the first.
        trained_tokens: learned tokens seen so far, every epoch counted.
        seconds: time spent in the run, over all its resumptions.
        window_loss, window_correct, window_tokens: sums over the steps since the last evaluation.
    """

    step: int = 0
    evaluated_step: int = -1
    base_loss: float = 0.0
    best: Best | None = None
    trained_tokens: int = 0
    seconds: float = 0.0
    window_loss: float = 0.0
    window_correct: int = 0
    window_tokens: int = 0


def fingerprint(spec: TrainSpec, train: TokenizedDataset, valid: TokenizedDataset) -> str:
    """Names what a state belongs to: settings and data, but not where they lie."""
    settings = msgspec.structs.replace(spec, run_id="", group="", train_path="", valid_path="", workdir="")
    digest = hashlib.sha256(msgspec.json.encode(settings))
    for dataset in (train, valid):
        for array in (dataset.tokens, dataset.weights, dataset.offsets):
            digest.update(array.tobytes())
    return digest.hexdigest()


def save_state(workdir: Path, optimizer: AdamW, progress: Progress, belongs_to: str) -> None:
    """Replace the run's state atomically and durably.

    Raises:
        OSError: the disk is full, for one; the old state is then still there.
    """
    tensors = {name: tensor.cpu() for name, tensor in _tensors(optimizer).items()}
    metadata = {
        "fingerprint": belongs_to,
        "optimizer_steps": str(optimizer.steps),
        "progress": msgspec.json.encode(progress).decode(),
    }
    workdir.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=workdir, prefix=".resume-", suffix=".safetensors")
    os.close(handle)
    temporary = Path(name)
    try:
        save_file(tensors, temporary, metadata=metadata)
        fsync(temporary)
        temporary.replace(workdir / "resume.safetensors")
        fsync(workdir)
    except SafetensorError as error:  # the library's own wrapping of a failed write
        raise OSError(f"The training state cannot be written: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def load_state(workdir: Path, optimizer: AdamW, belongs_to: str) -> Progress | None:
    """Restore weights and moments into `optimizer`; None, and nothing changed, if there is no state.

    Raises:
        TrainingError: the state is of another run or cannot be read.
    """
    path = workdir / "resume.safetensors"
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as stored:
            metadata: dict[str, str] = stored.metadata() or {}
            if metadata.get("fingerprint") != belongs_to:
                raise TrainingError(
                    "The saved state belongs to a run with other settings or rows; start a new job.",
                    code="resume_mismatch",
                )
            loaded: dict[str, Tensor] = {name: stored.get_tensor(name) for name in _tensors(optimizer)}
            progress = msgspec.json.decode(metadata["progress"], type=Progress)
            steps = int(metadata["optimizer_steps"])
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise TrainingError(
            f"The saved state cannot be read ({error}); start a new job.", code="resume_unreadable"
        ) from error
    with torch.no_grad():
        for name, tensor in _tensors(optimizer).items():
            tensor.copy_(loaded[name])
    optimizer.steps = steps
    return progress


def write_checkpoint(spec: TrainSpec, slots: TrainingSlots, step: int) -> Path:
    """Write the adapter as it is after `step` as a PEFT directory, replacing what an earlier attempt may have left."""
    directory = checkpoint_path(Path(spec.workdir), step)
    directory.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(directory, ignore_errors=True)
    write_adapter(directory, base_model=spec.base_model, lora=spec.lora, modules=slots.export(0))
    return directory


def checkpoint_path(workdir: Path, step: int) -> Path:
    """Where the adapter of `step` lies."""
    return workdir / "checkpoints" / f"step-{step:06d}"


def prune_checkpoints(workdir: Path, best_step: int) -> None:
    """Remove all checkpoints but the best and the latest three, and whatever a killed run left half-written."""
    root = workdir / "checkpoints"
    found: dict[int, Path] = {}
    for path in root.iterdir() if root.exists() else ():
        match = _STEP_DIRECTORY.fullmatch(path.name)
        if match:
            found[int(match[1])] = path
        else:
            shutil.rmtree(path, ignore_errors=True)
    kept = {best_step, *sorted(found)[-_KEPT:]}
    for step, path in found.items():
        if step not in kept:
            shutil.rmtree(path, ignore_errors=True)


def _tensors(optimizer: AdamW) -> dict[str, Tensor]:
    return {"weights": optimizer.weights, "exp_avg": optimizer.exp_avg, "exp_avg_sq": optimizer.exp_avg_sq}
