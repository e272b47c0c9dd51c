"""The shape of the adapter that a job trains: from the request, with the defaults of an adapter to start from.

Transfer (`init_from`) never changes what the parent computes at step 0. Rank, scaling and target modules default to the
parent's. A higher rank is allowed, because further rows of A may be random where those columns of B are zero; so are
more modules, which begin as the base. A lower rank or fewer modules would throw away what the parent learned and are
refused. `alpha` defaults to the one that keeps alpha / rank (alpha / √rank for rsLoRA); another one is allowed, since
training multiplies the difference into B, but it is another effective learning rate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tenora.adapters.kinds.lora import LoraConfiguration
from tenora.adapters.targets import TargetModule
from tenora.control.jobs.field_checks import known_fields
from tenora.errors import AdapterFormatError, InvalidRequestError, TrainingError
from tenora.training.kinds.kind import AdapterKind
from tenora.training.kinds.table import KINDS, LORA_KIND
from tenora.training.settings import ROWS, Setting
from tenora.training.spec import LORA, LORA_ASKED, LoraSpec, highest_rank


def _fits_anywhere(_shape: LoraSpec) -> None:
    """A pool without end."""


def _admits_anything(_settings: Mapping[str, Any]) -> None:
    """A machine without end."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What bounds a request on this service."""

    base_id: str
    max_rank: int
    max_model_len: int
    target_modules: tuple[str, ...]  # last parts of the paths of the base's modules, in its order
    fits: Callable[[LoraSpec], None] = _fits_anywhere
    """Raises AdapterFormatError if an adapter of this shape could never be served."""
    admit_whole: Callable[[Mapping[str, Any]], None] = _admits_anything
    """Raises InvalidRequestError if a full fine-tuning with these settings of its own could never be run."""

    def of(self, setting: Setting) -> Setting:
        """A setting as it is bounded here."""
        match setting.name:
            case "rank":
                return replace(setting, most=self.max_rank)
            case "max_seq_length":
                return replace(setting, most=self.max_model_len)
            case "target_modules":
                return replace(setting, choices=self.target_modules)
        return setting


@dataclass(frozen=True, slots=True)
class ParentShape:
    """An adapter to start from.

    Attributes:
        rank: the highest of its modules.
        scaling: alpha / rank (alpha / √rank for rsLoRA), where no pattern of its configuration says otherwise.
        target_modules: last parts of the paths that it adapts, perhaps not in every layer.
    """

    rank: int
    scaling: float
    use_rslora: bool
    target_modules: frozenset[str]

    @classmethod
    def of(cls, config: LoraConfiguration, targets: Sequence[TargetModule]) -> ParentShape:
        """The shape that an adapter_config.json names for this base."""
        covered = config.resolve(targets)
        return cls(
            rank=max(rank for rank, _ in covered.values()),
            scaling=config.alpha / (math.sqrt(config.rank) if config.use_rslora else config.rank),
            use_rslora=config.use_rslora,
            target_modules=frozenset(path.rpartition(".")[2] for path in covered),
        )


def lora_spec(
    lora: Mapping[str, Any], limits: Limits, parent: ParentShape | None = None, *, usual_rank: int = LoraSpec().rank
) -> LoraSpec:
    """The adapter's shape with defaults filled in: alpha is twice the rank, all linear modules of the base.

    Args:
        lora: as asked for; None and absent are the same.
        limits: of the service.
        parent: the adapter to start from; its shape is the default then.
        usual_rank: where neither says one.

    Raises:
        InvalidRequestError: out of bounds, larger than the engine's pool, or the parent does not fit into it.
    """
    kind = kind_of(lora)
    if kind is not LORA_KIND:
        return _other_kind(kind, lora, limits, parent)
    known_fields(lora, ("type", *LORA_ASKED), "lora")
    given = {
        name: limits.of(setting).check(lora[name], f"lora.{name}")
        for name, setting in LORA.items()
        if lora.get(name) is not None
    }
    usual_rank = min(usual_rank, limits.max_rank) if parent is None else parent.rank
    rank = given.get("rank") or limits.of(LORA["rank"]).check(usual_rank, "lora.rank")
    modules = _target_modules(given.get("target_modules"), limits, parent)
    if parent is not None:
        _require_room(rank, modules, parent)
    rslora = given.get("use_rslora", parent is not None and parent.use_rslora)
    usual_alpha = 2.0 * rank
    if parent is not None and parent.scaling > 0:
        usual_alpha = parent.scaling * (math.sqrt(rank) if rslora else rank)
    settled = {"rank": rank, "target_modules": modules, "use_rslora": rslora}
    shape = LoraSpec(**{"alpha": usual_alpha, **given, **settled})
    _check_start(shape, limits, parent)
    return _fitting(shape, limits, "lora.rank")


def _check_start(lora: LoraSpec, limits: Limits, parent: ParentShape | None) -> None:
    """Raise InvalidRequestError unless the adapter can begin so."""
    highest = highest_rank(lora)
    if lora.init == "eva" and parent is not None:
        raise InvalidRequestError(
            "lora.init says where a new adapter begins, and lora.init_from begins as another one; give one of them.",
            param="lora.init",
        )
    if highest > limits.max_rank:
        raise InvalidRequestError(
            f"With lora.init eva and lora.eva_rho {lora.eva_rho:g} a module of rank {lora.rank} may get {highest}, and "
            f"this server accepts {limits.max_rank}; lower one of them.",
            param="lora.eva_rho",
        )


def kind_of(lora: Mapping[str, Any]) -> AdapterKind:
    """The kind of adapter that a shape asks for. InvalidRequestError if there is none of that name."""
    named = lora.get("type", LORA_KIND.name)
    found = KINDS.get(named) if isinstance(named, str) else None
    if found is None:
        raise InvalidRequestError(
            f"adapter.type must be one of {', '.join(KINDS)}; {named!r} is not available.", param="adapter.type"
        )
    return found


def virtual_tokens(lora: Mapping[str, Any]) -> int:
    """How much of the context an adapter of such a shape takes before a text begins."""
    kind = kind_of(lora)
    return kind.virtual_tokens(LoraSpec(type=kind.name, own=kind.own_settings(lora)))


def _other_kind(kind: AdapterKind, asked: Mapping[str, Any], limits: Limits, parent: ParentShape | None) -> LoraSpec:
    """The shape of an adapter of another kind than LoRA."""
    known_fields(asked, ("type", *kind.declared), "adapter")
    if parent is not None:
        raise InvalidRequestError(
            f"An adapter of type {kind.name} begins as the base; only {LORA_KIND.name} goes on from another one. "
            "Set model to the base, and leave init_from out.",
            param="adapter.type",
        )
    given = {
        name: limits.of(setting).check(asked[name], f"adapter.{name}")
        for name, setting in kind.declared.items()
        if asked.get(name) is not None
    }
    shared = {name: value for name, value in given.items() if name in kind.shared}
    if "target_modules" in kind.shared:
        shared["target_modules"] = _target_modules(given.get("target_modules"), limits, None)
    if "rank" in kind.shared:
        shared["rank"] = given.get("rank") or min(LoraSpec().rank, limits.max_rank)
    if "alpha" in kind.shared:
        shared = {"alpha": 2.0 * shared["rank"], **shared}
    own = kind.own_settings(given)
    least = int(ROWS["max_seq_length"].least)
    if (before := virtual_tokens(given | {"type": kind.name})) > limits.max_model_len - least:
        raise InvalidRequestError(
            f"adapter.num_virtual_tokens is {before}, and the context of {limits.max_model_len} tokens has to hold a "
            f"text of at least {least} behind them; ask for {limits.max_model_len - least} or fewer.",
            param="adapter.num_virtual_tokens",
        )
    return _fitting(LoraSpec(**shared, type=kind.name, own=own), limits, "adapter")


def _fitting(lora: LoraSpec, limits: Limits, param: str) -> LoraSpec:
    """The shape, if an adapter of it can be served."""
    try:
        limits.fits(lora)
    except AdapterFormatError as error:
        raise InvalidRequestError(error.message, code=error.code, param=param) from error
    except TrainingError as error:
        raise InvalidRequestError(error.message, param=param) from error
    return lora


def _require_room(rank: int, modules: tuple[str, ...], parent: ParentShape) -> None:
    if rank < parent.rank:
        raise InvalidRequestError(
            f"lora.rank is {rank}, but the adapter to start from has rank {parent.rank}, and a lower rank would drop "
            f"what it learned; ask for {parent.rank} or more, or leave lora.rank out.",
            param="lora.rank",
        )
    if dropped := sorted(parent.target_modules - set(modules)):
        raise InvalidRequestError(
            f"lora.target_modules leaves out {', '.join(dropped)}, which the adapter to start from adapts; name them "
            "too, or leave lora.target_modules out.",
            param="lora.target_modules",
        )


def _target_modules(given: Any, limits: Limits, parent: ParentShape | None) -> tuple[str, ...]:
    available = limits.target_modules
    if given is None and parent is not None:
        return tuple(name for name in available if name in parent.target_modules)
    if given is None or given == LORA["target_modules"].every:
        return available
    return tuple(name for name in available if name in given)
