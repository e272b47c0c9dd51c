"""What a run is told while it is under way, and what it answers, as messages. Free of torch.

The commands are those of low-level training: gradients that add up until a step is asked for, states that are saved and
taken up again, and samples of the policy as it is.
"""

from __future__ import annotations

import msgspec

from tenora.model.sampling import FinishReason, SamplingParams, TokenLogprob


class AdamWSettings(msgspec.Struct, frozen=True, kw_only=True):
    """How one optimizer step is made (Loshchilov and Hutter 2019); the next one may be made otherwise.

    Attributes:
        learning_rate: the step's size.
        weight_decay: decoupled: weights shrink by `learning_rate` · `weight_decay`.
        beta1, beta2: decay of the first and the second moment.
        epsilon: added to the root of the second moment.
    """

    learning_rate: float
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8


class Row(msgspec.Struct, frozen=True):
    """A sequence to learn from.

    Attributes:
        tokens: all of it, at least two tokens.
        weights: as many: what the loss of each token is multiplied with in the sum that is minimised, of any sign. None
            only reads the token, as the first one must be. With 0 its loss is told and teaches nothing.
    """

    tokens: list[int]
    weights: list[float | None]


# ---- to a run -----------------------------------------------------------------------------------------------------


class ForwardBackward(msgspec.Struct, frozen=True, kw_only=True, tag="forward_backward"):
    """Tell the losses of rows, and add the gradient of Σ weight · loss to what has gathered since the last step.

    Attributes:
        command_id: the sender's; the answer carries it.
        backward: False tells the losses only.
    """

    command_id: int
    rows: list[Row]
    backward: bool = True


class OptimStep(msgspec.Struct, frozen=True, kw_only=True, tag="optim_step"):
    """Change the weights by the gradient that has gathered, which is zero afterwards.

    Attributes:
        max_grad_norm: the gradient is scaled down to this 2-norm; 0 is off.
    """

    command_id: int
    settings: AdamWSettings
    max_grad_norm: float = 0.0


class SaveState(msgspec.Struct, frozen=True, kw_only=True, tag="save_state"):
    """Write weights, moments and the gathered gradient, durably, under a name of letters, digits, `.`, `_` and `-`."""

    command_id: int
    name: str


class LoadState(msgspec.Struct, frozen=True, kw_only=True, tag="load_state"):
    """Go on from a state that was saved with this shape of adapter.

    Attributes:
        path: as `Saved` told it, of this run or of another one.
        optimizer: False takes the weights only; moments and gradient begin at zero.
    """

    command_id: int
    path: str
    optimizer: bool = True


class SaveAdapter(msgspec.Struct, frozen=True, kw_only=True, tag="save_adapter"):
    """Write the adapter as it is now as a PEFT directory, under a name as `SaveState` takes it."""

    command_id: int
    name: str


class Sample(msgspec.Struct, frozen=True, kw_only=True, tag="sample"):
    """Continue prompts with the adapter as it is now; see `tenora.training.samples`.

    Attributes:
        base: sample without the adapter.
    """

    command_id: int
    prompts: list[list[int]]
    sampling: SamplingParams
    base: bool = False


RunCommand = ForwardBackward | OptimStep | SaveState | LoadState | SaveAdapter | Sample

# ---- from a run ---------------------------------------------------------------------------------------------------


class SessionReady(msgspec.Struct, frozen=True, kw_only=True, tag="session_ready"):
    """The session takes commands. `step` counts the optimizer steps of the state that it goes on from; 0 is new."""

    run_id: str
    step: int


class Losses(msgspec.Struct, frozen=True, kw_only=True, tag="losses"):
    """The answer to ForwardBackward.

    Attributes:
        losses: per row, those of the tokens that have a weight: nats, minus the log-probability.
        total: Σ weight · loss over all rows.
    """

    run_id: str
    command_id: int
    losses: list[list[float]]
    total: float


class Stepped(msgspec.Struct, frozen=True, kw_only=True, tag="stepped"):
    """The answer to OptimStep. `step` counts from 1; `grad_norm` is the one before clipping."""

    run_id: str
    command_id: int
    step: int
    grad_norm: float


class Saved(msgspec.Struct, frozen=True, kw_only=True, tag="saved"):
    """The answer to SaveState and SaveAdapter: what was written, whole, lies at `path`."""

    run_id: str
    command_id: int
    path: str


class Loaded(msgspec.Struct, frozen=True, kw_only=True, tag="loaded"):
    """The answer to LoadState. `step` counts the optimizer steps of the state."""

    run_id: str
    command_id: int
    step: int


class SampledSequence(msgspec.Struct, frozen=True, kw_only=True):
    """One continuation.

    Attributes:
        token_ids: without the stop token.
        logprobs: of each of them, if they were asked for.
        stop_token_id: the stop token that ended it, if one did.
    """

    token_ids: list[int]
    logprobs: list[TokenLogprob]
    finish_reason: FinishReason
    stop_token_id: int | None = None


class Sampled(msgspec.Struct, frozen=True, kw_only=True, tag="sampled"):
    """The answer to Sample: a sequence for each prompt, in order."""

    run_id: str
    command_id: int
    sequences: list[SampledSequence]


class Refused(msgspec.Struct, frozen=True, kw_only=True, tag="refused"):
    """A command was not carried out and has changed nothing; the run goes on.

    Codes: invalid_command, too_many_commands, no_gradient, non_finite, no_commands (the run takes none), unknown_run,
    and those of `FailedEvent` and of `SequenceFailed`.
    """

    run_id: str
    command_id: int
    code: str
    message: str


Answer = SessionReady | Losses | Stepped | Saved | Loaded | Sampled | Refused
