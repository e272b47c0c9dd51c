"""What a training run is told, as a message. Free of torch: the control plane builds it. What it says: `events`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

from tenora.training.settings import RUN, USUAL_METHOD, RunSettings, Setting, declared

Init = Literal["kaiming", "eva"]
USUAL_KIND = "lora"
"""Of an adapter whose `type` nobody names."""


class LoraSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Shape of the adapter to train (Hu et al. 2021; rsLoRA: Kalajdzievski 2023; LoRA+: Hayou et al. 2024; EVA:
    Paischer et al. 2024).

    Attributes:
        target_modules: here every module of the base's layout if empty.
        last_layers: only what lies in so many last layers; 0 is all of them.
        type: which kind it is, one of `tenora.training.kinds.table`; what a kind does not have is passed over.
        own: settings of its kind, by name.
        invocation: tokens from which on it acts, in training as in serving (`tenora.adapters.invocation`); empty: on
            all.
    """

    rank: Annotated[int, Setting("Rank of the adapter.", least=1, most=256, swept=1, flag="--rank")] = 16
    alpha: Annotated[
        float, Setting("Scales the adapter by alpha / rank; twice the rank.", above=0, most=4096, follows="rank")
    ] = 32.0
    dropout: Annotated[float, Setting("Of the adapter's inputs.", least=0, most=0.9)] = 0.0
    target_modules: Annotated[
        tuple[str, ...],
        Setting("Last parts of the paths of what it adapts.", most=64, noun="module names", every="all-linear"),
    ] = ()
    use_rslora: Annotated[bool, Setting("Scale by alpha / root of rank.")] = False
    lora_plus_ratio: Annotated[
        float,
        Setting(
            "B learns at so many times the rate of A (LoRA+); 1 is usual, 16 LoRA+'s.",
            least=1,
            most=64,
            flag="--lora-plus-ratio",
        ),
    ] = 1.0
    init: Annotated[
        Init,
        Setting(
            "How A begins: kaiming, at random; eva, as the directions in which the inputs of each module differ most "
            "over the first rows, with ranks moved to where they explain more (EVA). B is zero.",
            flag="--init",
        ),
    ] = "kaiming"
    eva_rho: Annotated[
        float, Setting("With eva: a module's rank is at most so many times the rank; 1 moves none.", least=1, most=8)
    ] = 2.0
    last_layers: int = 0
    type: str = USUAL_KIND
    own: dict[str, Any] = msgspec.field(default_factory=dict)
    invocation: tuple[int, ...] = ()


def stored_shape(lora: LoraSpec) -> dict[str, Any]:
    """A shape in plain types, as it was stored before there were further fields, if it needs none of them."""
    found: dict[str, Any] = msgspec.to_builtins(lora)
    return {name: value for name, value in found.items() if name in FIRST or value != getattr(_USUAL_SHAPE, name)}


def highest_rank(lora: LoraSpec) -> int:
    """The highest rank that a module of such an adapter may get."""
    return round(lora.rank * lora.eva_rho) if lora.init == "eva" else lora.rank


class LoraSettings(LoraSpec, frozen=True, kw_only=True):
    """What is asked of an adapter: its shape, and where it begins."""

    init_from: Annotated[
        str,
        Setting(
            "An adapter of yours to start from.", least=1, most=600, noun="the name of an adapter", flag="--init-from"
        ),
    ] = ""


_USUAL_SHAPE = LoraSpec()
LORA, LORA_ASKED = declared(LoraSpec), declared(LoraSettings)
"""The settings of its shape, and all that may be asked of it."""
FIRST = tuple(LORA)[:5]
"""What the first release knew of a shape."""
_NUMBERS = {**LORA, **RUN}
SWEPT = {one.name: one for one in sorted(_NUMBERS.values(), key=lambda one: one.swept) if one.swept}
"""The dimensions of a sweep, in the order in which trials are drawn."""
TRIAL = {
    one.name: one
    for swept in SWEPT.values()
    for one in (swept, *(other for other in _NUMBERS.values() if other.follows == swept.name))
}
"""The settings that each trial of a sweep has of its own."""
Trial = dict[str, int | float]
"""One point of a sweep: the values of `TRIAL`."""


class TaskSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One source of rows. A run with several learns all of them at once (multi-task learning).

    Attributes:
        name: what its held-out loss is called in events.
        train_path, valid_path: tokenized datasets (`tenora.data.dataset.TokenizedDataset.save`). `valid_path` is
            empty only if `TrainSpec.folds` measures on the training rows.
        weight: how often its rows are seen, relative to the other tasks': an epoch draws `weight` · rows of each task,
            after the weights were scaled so that the largest is 1.
    """

    name: str
    train_path: str
    valid_path: str = ""
    weight: float = 1.0


class TrainSpec(RunSettings, frozen=True, kw_only=True):
    """One run: paths, adapter shape and optimisation, all resolved (nothing is "auto" here).

    Attributes:
        run_id: opaque name of the run; events carry it.
        share_group: opaque name; those that train at the same time share the machine by tokens. Stored as `group`.
        weight: share of it relative to others.
        tasks: where the rows lie; at least one.
        workdir: directory of this run alone; checkpoints and resume state live there.
        acknowledged: whoever follows the run says what of its `Recorded` events is recorded; the rest is told again
            when the run is resumed. Otherwise nothing is kept for that.
        method: one of `tenora.training.methods.table`.
        method_settings: its own ones, by name.
        init_path: PEFT directory of an adapter to start from; empty starts from the base. It must have the shape that
            `lora` names. It is also the frozen reference of a method that has one.
        folds: few-shot: choose the number of steps by cross-validation with so many folds, then train on all rows; 0 is
            off. The held-out figures are then those of the folds.
        trials: a sweep over these settings; the winner's adapter is the result. Empty trains once.
        base_model: id written into the exported adapter_config.json.
        seed: draws weights, order and dropout.
        split_seed: draws the folds, with what the rows hold.
        recompute_activations: keep only the inputs of layers and run each a second time in the backward pass; None
            decides by memory.
        general_text: tokens of a text that no rows are about: how its loss changes tells what is forgotten.
    """

    run_id: str
    share_group: str = msgspec.field(name="group")
    tasks: tuple[TaskSpec, ...]
    workdir: str
    base_model: str
    weight: float = 1.0
    method: str = USUAL_METHOD
    method_settings: dict[str, Any] = msgspec.field(default_factory=dict)
    init_path: str = ""
    lora: LoraSpec = LoraSpec()
    folds: int = 0
    trials: tuple[Trial, ...] = ()
    tokens_per_microbatch: int = 2048
    recompute_activations: bool | None = None
    seed: int = 0
    split_seed: int = 0
    general_text: tuple[int, ...] = ()
    acknowledged: bool = False


def trial_of(spec: TrainSpec, number: int) -> TrainSpec:
    """The run of one trial of a sweep, by itself."""
    point: dict[str, Any] = spec.trials[number]
    lora = {name: value for name, value in point.items() if name in LORA}
    others = {name: value for name, value in point.items() if name in RUN}
    return msgspec.structs.replace(spec, trials=(), lora=msgspec.structs.replace(spec.lora, **lora), **others)


class SessionSpec(msgspec.Struct, frozen=True, kw_only=True):
    """A run that trains one adapter as it is told, command by command (`tenora.training.commands`).

    Attributes:
        run_id, share_group, weight, workdir, base_model, seed, tokens_per_microbatch, recompute_activations: see
            `TrainSpec`.
        lora: shape of the adapter; without dropout.
    """

    run_id: str
    share_group: str = msgspec.field(name="group")
    workdir: str
    base_model: str
    weight: float = 1.0
    lora: LoraSpec = LoraSpec()
    seed: int = 0
    tokens_per_microbatch: int = 2048
    recompute_activations: bool | None = None
