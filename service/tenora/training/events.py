"""What a training run says, as messages. Free of torch: the control plane reads them. What it is told: `spec`."""

from __future__ import annotations

from collections.abc import Generator
from typing import Literal

import msgspec

from tenora.training.commands import Answer

TrialStatus = Literal["running", "stopped", "finished", "failed"]
PROBE_ROWS = 4
"""Held-out rows whose token log-probabilities are kept, to be compared with those of the serving path."""


class StepEvent(msgspec.Struct, frozen=True, kw_only=True, tag="step"):
    """After each optimizer step. Losses are nats per trained token.

    After a crash the steps since the last saved state are told again, with the same numbers.

    Attributes:
        step: counted from 1.
        learning_rate: the one this step was made with.
        grad_norm: before clipping.
        trained_tokens: learned tokens so far, over all epochs and folds.
        tokens_per_second: all tokens that the model read in this step, per second of wall time.
        metrics: further numbers of the method, which also says what its `train_loss` and `train_accuracy` are.
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
    metrics: dict[str, float] = {}


class EvalEvent(msgspec.Struct, frozen=True, kw_only=True, tag="eval"):
    """After an evaluation of the whole held-out set. `base_loss` is the start's on the same rows.

    The first one, at step 0, measures the base itself (the starting adapter, if there is one); a later one is `best` if
    no earlier adapter had a lower loss.

    Attributes:
        tasks: held-out loss of each task, if there are several.
        general_loss: of the best adapter so far and of the base: nats per token of `TrainSpec.general_text`.
        metrics: see `StepEvent`.
    """

    run_id: str
    step: int
    valid_loss: float
    valid_accuracy: float
    base_loss: float
    best: bool
    tasks: dict[str, float] = {}  # msgspec copies empty literals
    general_loss: float | None = None
    metrics: dict[str, float] = {}


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


class TrialEvent(msgspec.Struct, frozen=True, kw_only=True, tag="trial"):
    """Where a trial of a sweep stands: after each of its evaluations, and when it ends.

    Attributes:
        trial: index into `TrainSpec.trials`.
        status: running; stopped, because others were better (successive halving); finished; failed.
        step, total_steps: optimizer steps done, and those of the whole trial.
        trained_tokens: learned tokens so far of all trials, those that are over too.
        valid_loss: best so far; None before the first evaluation.
        reason: why it failed.
    """

    run_id: str
    trial: int
    status: TrialStatus
    step: int
    total_steps: int
    trained_tokens: int
    valid_loss: float | None = None
    reason: str = ""


class FoldEvent(msgspec.Struct, frozen=True, kw_only=True, tag="fold"):
    """Where a fold of a cross-validation stands: after each of its evaluations. The fit on all rows comes afterwards.

    Attributes:
        fold: counts from 0.
        step, total_steps: optimizer steps done, and those of the whole fold; it is over when they are equal.
        valid_loss: best so far, on the rows that the fold holds out.
        base_loss: the start's on the same rows.
        trained_tokens: learned tokens so far of all folds.
        done, done_before: share of the steps of all folds that are made now, and that were made when the run was
            started or resumed.
    """

    run_id: str
    fold: int
    step: int
    total_steps: int
    valid_loss: float
    base_loss: float
    trained_tokens: int
    done: float
    done_before: float = 0.0


class ProgressEvent(msgspec.Struct, frozen=True, kw_only=True, tag="progress"):
    """How far a run is that takes no steps.

    Attributes:
        what: is done, as a message begins: `Reading rows`.
        done, total: of it.
    """

    run_id: str
    what: str
    done: int
    total: int


class HeadCandidate(msgspec.Struct, frozen=True, kw_only=True):
    """A head that was compared with others by cross-validation on the training rows.

    Attributes:
        layer, pooling: what it reads; see `tenora.adapters.heads.Head`.
        strength: its C.
        loss, accuracy: over all rows, each under a head that had not seen it.
    """

    layer: int
    pooling: str
    strength: float
    loss: float
    accuracy: float


class HeadOutcome(msgspec.Struct, frozen=True, kw_only=True):
    """What became of a head.

    Attributes:
        scores: of each held-out row what the head says: a logarithm of odds for each class, or the number in the
            labels' units.
        folds: of the cross-validation; 0 if there was nothing to choose, or a gradient chose.
        candidates: for each layer and pooling the best strength, the best of all first.
        metrics: of embeddings, whose scores are those of the first rows: `recall_at_1`, ….
    """

    scores: list[list[float]]
    folds: int = 0
    candidates: list[HeadCandidate] = []
    metrics: dict[str, float] = {}


class HeldOut(msgspec.Struct, frozen=True, kw_only=True):
    """The held-out rows one by one: losses in nats, summed over a row's learned tokens.

    Of DPO they are plain losses too, with the chosen and the rejected answer of a pair side by side.

    Attributes:
        tokens: learned tokens of each row.
        adapter, start: loss of each row under the result, and under what training started from.
    """

    tokens: list[int]
    adapter: list[float]
    start: list[float]


class EvaluationPoint(msgspec.Struct, frozen=True, kw_only=True):
    """An evaluation of the held-out rows: of the start at step 0, then of the adapter on the way."""

    step: int
    valid_loss: float
    valid_accuracy: float


class Probe(msgspec.Struct, frozen=True, kw_only=True):
    """What the training path computes under the result; what serves the adapter must give the same.

    Attributes:
        path: a tokenized dataset.
        rows: for its rows 0, 1, …: the log-probability of each learned token.
    """

    path: str
    rows: list[list[float]]


class RankPoint(msgspec.Struct, frozen=True, kw_only=True):
    """How far an adapter of a model's difference to its base is from the model, on held-out rows.

    Attributes:
        rank: the mean over all matrices; some have more.
        highest: of one matrix.
        weights: numbers in the adapter.
        loss: held-out loss, nats per token.
        gap: that, less the model's on the same rows.
        kl: mean divergence KL(model ‖ adapter) of the next token, nats per token.
    """

    rank: int
    highest: int
    weights: int
    loss: float
    gap: float
    kl: float


class FullResult(msgspec.Struct, frozen=True, kw_only=True):
    """What a full fine-tuning came to, beside the run's other figures.

    Attributes:
        path: a Hugging Face directory, complete.
        digest: of its files; see `tenora.training.full.merged.digest_of`.
        trained: weights that were trained.
        valid_loss: held-out loss of the model itself.
        reason: why an adapter is served in its place, or none.
        rank: of that adapter, on the average over its matrices; 0 without one.
        allowed_gap, allowed_kl: what its distance to the model may be, in nats per token.
        curve: the ranks that were tried.
    """

    path: str
    digest: str
    trained: int
    valid_loss: float
    reason: str
    rank: int = 0
    allowed_gap: float = 0.0
    allowed_kl: float = 0.0
    curve: list[RankPoint] = []


class FinishedEvent(msgspec.Struct, frozen=True, kw_only=True, tag="finished"):
    """The run is over; `path` is the PEFT directory of the best checkpoint, made at `step` of `steps`.

    Of a full fine-tuning it is an adapter made of the best checkpoint, or empty if there is nothing to serve.

    Its held-out loss may still be above `base_loss`: then training did not help, and that is for the caller to say.

    Attributes:
        last_loss: held-out loss of the last evaluation, for the verdict on overfitting.
        held_out: the rows behind `valid_loss` and `base_loss`. With `TrainSpec.folds` they are the training rows, each
            measured by an adapter that had not seen it.
        probe: for the comparison with the serving path.
        tasks: held-out loss of each task, if there are several.
        general_loss, base_general_loss: of the result and of the base, nats per token of `TrainSpec.general_text`; None
            without such a text.
        curve: the evaluations of the result's run, or of all folds together; of a long run some of them.
        trial: the winner of a sweep, as an index into `TrainSpec.trials`.
        trained_tokens: learned tokens of everything that the run trained: all epochs, all trials, all folds.
        stopped_early: fewer steps were made than planned, because the held-out loss no longer fell.
        full: of a full fine-tuning.
        head: of a run that trained one.
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
    last_loss: float = 0.0
    held_out: HeldOut | None = None
    probe: Probe | None = None
    tasks: dict[str, float] = {}  # msgspec copies empty literals
    general_loss: float | None = None
    base_general_loss: float | None = None
    curve: list[EvaluationPoint] = []
    trial: int | None = None
    stopped_early: bool = False
    full: FullResult | None = None
    head: HeadOutcome | None = None


class StoppedEvent(msgspec.Struct, frozen=True, kw_only=True, tag="stopped"):
    """The run ended early because it was told to; with `paused` its state was saved and it can go on.

    Commands that it has not answered were not carried out.
    """

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


Recorded = StepEvent | EvalEvent | CheckpointEvent | TrialEvent | FoldEvent | ProgressEvent
"""What a run says on its way. Its last word is none of these: a run that is resumed comes to it again."""


class RetoldEvent(msgspec.Struct, frozen=True, kw_only=True, tag="retold"):
    """What the run said before it was resumed and nobody has acknowledged, oldest first. Said first, if there is any.

    The follower may have recorded some of it without having said so any more. It is acknowledged like new events, and
    before them.
    """

    run_id: str
    events: list[Recorded]


TrainEvent = Recorded | RetoldEvent | FinishedEvent | StoppedEvent | FailedEvent | Answer

Items = Generator[TrainEvent | None, None, None]
"""What a part of a run yields: events, and None where it waits or something else may be done in between."""
