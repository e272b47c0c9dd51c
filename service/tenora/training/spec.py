"""What a training run is told and what it says, as messages. Free of torch: the control plane builds and reads them."""

from __future__ import annotations

from typing import Literal

import msgspec

ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
Scheduler = Literal["linear", "cosine", "constant"]


class LoraSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Shape of the adapter to train (Hu et al. 2021; rsLoRA: Kalajdzievski 2023)."""

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    target_modules: tuple[str, ...] = ALL_LINEAR
    use_rslora: bool = False


class TrainSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One run: paths, adapter shape and optimisation, all resolved (nothing is "auto" here).

    Attributes:
        run_id: opaque name of the run; events carry it.
        group: opaque fairness group.
        train_path, valid_path: tokenized datasets (`tenora.training.dataset.TokenizedDataset.save`).
        workdir: directory of this run alone; checkpoints and resume state live there.
        batch_size: rows of one optimizer step.
        max_steps: stop after this many optimizer steps; 0 means `n_epochs` decides.
        eval_interval: optimizer steps between evaluations; 0 means once an epoch.
        base_model: id written into the exported adapter_config.json.
    """

    run_id: str
    group: str
    train_path: str
    valid_path: str
    workdir: str
    base_model: str
    lora: LoraSpec = LoraSpec()
    n_epochs: int = 3
    max_steps: int = 0
    batch_size: int = 8
    learning_rate: float = 5e-4
    scheduler: Scheduler = "cosine"
    warmup_ratio: float = 0.05
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    eval_interval: int = 0
    tokens_per_microbatch: int = 2048
    seed: int = 0


class StepEvent(msgspec.Struct, frozen=True, kw_only=True, tag="step"):
    """After each optimizer step. Losses are nats per trained token.

    After a crash the steps since the last saved state are told again, with the same numbers.

    Attributes:
        step: counted from 1.
        learning_rate: the one this step was made with.
        grad_norm: before clipping.
        trained_tokens: learned tokens so far, over all epochs.
        tokens_per_second: all tokens that the model read in this step, per second of wall time.
    """

    run_id: str
    step: int
    total_steps: int
    epoch: float
    train_loss: float
    train_accuracy: float
    learning_rate: float
    grad_norm: float
    trained_tokens: int
    tokens_per_second: float


class EvalEvent(msgspec.Struct, frozen=True, kw_only=True, tag="eval"):
    """After an evaluation of the whole held-out set. `base_loss` is the base's on the same rows.

    The first one, at step 0, measures the base itself; a later one is `best` if no earlier adapter had a lower loss.
    """

    run_id: str
    step: int
    valid_loss: float
    valid_accuracy: float
    base_loss: float
    best: bool


class CheckpointEvent(msgspec.Struct, frozen=True, kw_only=True, tag="checkpoint"):
    """A PEFT directory was written, complete, at `path`. It is the state after optimizer step `step`.

    It follows every EvalEvent but the first. `path` stays until three later ones were written, the best one for good.
    Train loss and accuracy are means over the steps since the one before.
    """

    run_id: str
    step: int
    path: str
    train_loss: float
    train_accuracy: float
    valid_loss: float
    valid_accuracy: float


class FinishedEvent(msgspec.Struct, frozen=True, kw_only=True, tag="finished"):
    """The run is over; `path` is the PEFT directory of the best checkpoint, made at `step` of `steps`.

    Its held-out loss may still be above `base_loss`: then training did not help, and that is for the caller to say.
    """

    run_id: str
    path: str
    step: int
    steps: int
    valid_loss: float
    valid_accuracy: float
    base_loss: float
    trained_tokens: int
    seconds: float


class StoppedEvent(msgspec.Struct, frozen=True, kw_only=True, tag="stopped"):
    """The run ended early because it was told to; with `paused` its state was saved and it can go on."""

    run_id: str
    step: int
    paused: bool


class FailedEvent(msgspec.Struct, frozen=True, kw_only=True, tag="failed"):
    """The run ended with an error that concerns it alone.

    Codes: invalid_training_file, no_trainable_tokens, non_finite, zero_loss, no_steps, training_failed, out_of_memory,
    storage_full, storage_error, resume_mismatch, resume_unreadable, internal_error.
    """

    run_id: str
    code: str
    message: str


TrainEvent = StepEvent | EvalEvent | CheckpointEvent | FinishedEvent | StoppedEvent | FailedEvent
