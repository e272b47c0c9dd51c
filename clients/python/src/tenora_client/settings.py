"""Settings of a job. Written by `clients/python/scripts/settings.py`, from the service's: do not edit."""

from __future__ import annotations

from typing import Literal, TypedDict

MethodName = Literal["supervised", "dpo"]
# Of dpo alone, among the hyperparameters of its method: beta.


class Settings(TypedDict, total=False):
    """How a job trains; absent means the server's default, which is meant to work."""

    n_epochs: int | Literal["auto"]
    """Passes over the rows; a whole number from 1 to 50, or "auto"."""
    batch_size: int | Literal["auto"]
    """Examples of an optimizer step: rows, or pairs of them; a whole number from 1 to 256, or "auto"."""
    max_steps: int
    """Optimizer steps, instead of epochs; 0 lets the epochs decide; a whole number from 0 to 1000000."""
    learning_rate: float
    """Peak of the schedule, instead of a multiplier; a number, above 0 and at most 1."""
    scheduler: Literal["linear", "cosine", "constant"]
    """Course of the learning rate after its warm-up; one of linear, cosine, constant."""
    warmup_ratio: float
    """Share of the steps in which the rate rises; a number, at least 0 and at most 1."""
    weight_decay: float
    """Decoupled weight decay of AdamW; a number, at least 0 and at most 1."""
    max_grad_norm: float
    """Gradients are clipped to this norm; a number, above 0 and at most 1000."""
    eval_interval: int
    """Optimizer steps between evaluations; 0 is once an epoch; a whole number from 0 to 1000000."""
    early_stopping: bool | int
    """End after so many evaluations without a better one; true is 3, 0 never does; true (3), false or a whole number
    from 0 to 1000."""
    packing: bool
    """Rows share passes; false gives each a pass of its own, with the same result; true or false."""
    max_seq_length: int
    """Tokens of a row; longer ones are refused, or cut with truncate; a whole number from 8 to 2147483647."""
    truncate: bool
    """Cut rows that are too long, do not refuse them; true or false."""
    publish: Literal["always", "if_better", "never"]
    """Whether `name` shall mean the result; one of always, if_better, never."""
    min_gain: float
    """With if_better: the gain that is asked for, in nats per learned token, per pair of DPO; of a new name over the
    base; a number, at least 0 and at most 100."""
