"""A session: one adapter that is trained command by command. What a command does wrong ends that command alone."""

from __future__ import annotations

import math
import time
from collections.abc import Generator
from pathlib import Path

import msgspec
from torch import Tensor

from tenora.errors import TrainingError
from tenora.model.device import survive
from tenora.training.checkpoint import read_tensors, replace_tensors
from tenora.training.command_checks import check_command
from tenora.training.command_rows import WeightedLoss, by_row, dataset_of
from tenora.training.commands import (
    Answer,
    ForwardBackward,
    Loaded,
    LoadState,
    Losses,
    OptimStep,
    Refused,
    RunCommand,
    Sample,
    Sampled,
    SaveAdapter,
    Saved,
    SaveState,
    SessionReady,
    Stepped,
)
from tenora.training.evaluation import finish
from tenora.training.events import Items
from tenora.training.failures import explain
from tenora.training.inbox import Inbox
from tenora.training.optimizer import AdamW, clip_grad_norm
from tenora.training.packing import microbatches, shared_prefix
from tenora.training.pass_queue import Work
from tenora.training.resident_base import TrainingHost
from tenora.training.spec import SessionSpec, stored_shape

STATE_INTERVAL_SECONDS = 120.0
"""At most this much work is lost when the process is killed."""


class SessionPlan:
    """Commands one after the other.

    Weights, moments and the gathered gradient are those after the last command that was answered, whenever the session
    is left: a command that fails or is given up has changed nothing. They are saved by SaveState, when the session is
    paused, and now and then after a step; after a crash it goes on from the latest of these and says so
    (`SessionReady`).
    """

    def __init__(self, host: TrainingHost, spec: SessionSpec, inbox: Inbox) -> None:
        """Make room for the adapter, and begin it or take up the saved state.

        Raises:
            TrainingError: the adapter cannot be, or the saved state is of another shape or unreadable.
        """
        if spec.lora.dropout:
            raise TrainingError("A session has no dropout; set it to 0.", code="invalid_session")
        self._host, self._spec, self._inbox = host, spec, inbox
        self._workdir = Path(spec.workdir)
        self._capacity = host.part_tokens(spec.tokens_per_microbatch, recompute=spec.recompute_activations)
        self._adapter = host.arena.add(spec.lora)
        self._gradient: Tensor | None = None  # gathered by the commands that were answered
        try:
            self._adapter.initialise(spec.seed)
            self._optimizer = AdamW(self._adapter, self._adapter.rates)
            if self._resume.exists():
                self._load(self._resume, optimizer=True)
        except BaseException:
            self.close()
            raise
        self._saved = time.monotonic()

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self._optimizer.steps

    def items(self) -> Items:
        """Answers, and None where it waits. Has no end of its own."""
        yield SessionReady(run_id=self._spec.run_id, step=self.step)
        while True:
            command = yield from self._inbox.take(self._host.queue)
            try:
                answer = yield from self._answer(command)
            except Exception as error:  # noqa: BLE001  # ends this command alone; the session goes on
                survive(error, self._host.decoder.device)
                code, message = explain(error, self.step)
                answer = Refused(run_id=self._spec.run_id, command_id=command.command_id, code=code, message=message)
            yield answer

    def save(self) -> None:
        """Write the state after the last command that was answered, to be taken up when the session starts again."""
        self._write(self._resume)
        self._saved = time.monotonic()

    def close(self) -> None:
        """Free the adapter's room."""
        self._adapter.remove()

    # ---- commands -------------------------------------------------------------------------------------------------

    def _answer(self, command: RunCommand) -> Generator[None, None, Answer]:
        check_command(command, self._host.decoder.spec)
        match command:
            case ForwardBackward():
                return (yield from self._forward_backward(command))
            case OptimStep():
                return self._optim_step(command)
            case SaveState(command_id=command_id, name=name):
                path = self._workdir / "states" / f"{name}.safetensors"
                self._write(path)
                self.save()
                return Saved(run_id=self._spec.run_id, command_id=command_id, path=str(path))
            case LoadState(command_id=command_id, path=state, optimizer=optimizer):
                self._load(Path(state), optimizer=optimizer)
                return Loaded(run_id=self._spec.run_id, command_id=command_id, step=self.step)
            case SaveAdapter(command_id=command_id, name=name):
                path = self._workdir / "adapters" / name
                path.parent.mkdir(parents=True, exist_ok=True)
                self._adapter.write(path, base_model=self._spec.base_model)
                return Saved(run_id=self._spec.run_id, command_id=command_id, path=str(path))
            case Sample():
                adapter = None if command.base else self._adapter
                sequences = yield from self._host.sample(self._spec, adapter, command.prompts, command.sampling)
                return Sampled(run_id=self._spec.run_id, command_id=command.command_id, sequences=sequences)

    def _forward_backward(self, command: ForwardBackward) -> Generator[None, None, Losses]:
        spec, rows = self._spec, dataset_of(command.rows)
        invocation = spec.lora.invocation
        shared = shared_prefix(rows, invocation) if self._host.shares_prefixes and len(rows) > 1 else 0
        parts = microbatches(rows, range(len(rows)), self._capacity, shared=shared, invocation=invocation)
        objective = WeightedLoss.of(command.rows)
        work = Work(
            spec.run_id,
            spec.share_group,
            parts,
            self._adapter,
            objective if command.backward else None,
            weight=spec.weight,
            recompute=bool(spec.recompute_activations),
            gradient=self._gradient,
        )
        yield from finish(self._host.queue, work)
        found = by_row(parts, work.results)
        for number, losses in enumerate(found):
            if not losses.isfinite().all():
                message = (
                    f"The loss of row {number} is not a finite number; lower the learning rate, or look at the row."
                )
                raise TrainingError(message, code="non_finite")
        if command.backward:
            self._gradient = self._adapter.grad.clone()
        return Losses(
            run_id=spec.run_id,
            command_id=command.command_id,
            losses=[losses.tolist() for losses in found],
            total=objective.total(found),
        )

    def _optim_step(self, command: OptimStep) -> Stepped:
        if self._gradient is None:
            raise TrainingError("There is no gradient: send forward_backward before optim_step.", code="no_gradient")
        self._adapter.grad.copy_(self._gradient)  # a command that was given up may have left a part of its own
        self._adapter.kind.gradients(self._adapter)
        norm = clip_grad_norm(self._adapter.grad, command.max_grad_norm)
        if not math.isfinite(norm):
            self._gradient = None
            raise TrainingError(
                "The gradient is not a finite number; it is dropped, and the weights are as they were.",
                code="non_finite",
            )
        self._optimizer.step(command.settings)
        self._gradient = None
        if time.monotonic() - self._saved > STATE_INTERVAL_SECONDS:
            self.save()
        return Stepped(run_id=self._spec.run_id, command_id=command.command_id, step=self.step, grad_norm=norm)

    # ---- state ----------------------------------------------------------------------------------------------------

    @property
    def _resume(self) -> Path:
        return self._workdir / "resume.safetensors"

    @property
    def _shape(self) -> str:
        """What a state belongs to."""
        return msgspec.json.encode([self._spec.base_model, stored_shape(self._spec.lora)]).decode()

    def _write(self, path: Path) -> None:
        own = self._optimizer
        tensors = {"weights": self._adapter.weights, "exp_avg": own.exp_avg, "exp_avg_sq": own.exp_avg_sq}
        if self._gradient is not None:
            tensors["gradient"] = self._gradient
        replace_tensors(path, tensors, {"shape": self._shape, "optimizer_steps": str(own.steps)})

    def _load(self, path: Path, *, optimizer: bool) -> None:
        tensors, metadata = read_tensors(path)
        if metadata.get("shape") != self._shape:
            raise TrainingError("The saved state is of an adapter of another shape or base.", code="resume_mismatch")
        own = self._optimizer
        self._adapter.weights.copy_(tensors["weights"])
        self._adapter.refresh()
        own.steps = int(metadata["optimizer_steps"]) if optimizer else 0
        for name, moment in (("exp_avg", own.exp_avg), ("exp_avg_sq", own.exp_avg_sq)):
            if optimizer:
                moment.copy_(tensors[name])
            else:
                moment.zero_()
        gradient = tensors.get("gradient") if optimizer else None
        self._gradient = None if gradient is None else gradient.to(self._adapter.grad.device)
