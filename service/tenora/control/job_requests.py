"""What a fine-tuning job may ask for: every field checked before anything is stored."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, get_args

from tenora.control.names import SUFFIX_PATTERN, check_name, check_suffix
from tenora.control.records import JobRequest
from tenora.errors import InvalidRequestError
from tenora.training.recipes import resolve_hyperparameters
from tenora.training.spec import ALL_LINEAR, LoraSpec, Scheduler

HYPERPARAMETERS = ("n_epochs", "batch_size", "learning_rate_multiplier")
LORA = ("rank", "alpha", "dropout", "target_modules", "use_rslora")
TRAINING = (
    "learning_rate",
    "scheduler",
    "warmup_ratio",
    "weight_decay",
    "max_grad_norm",
    "max_seq_length",
    "max_steps",
    "eval_interval",
    "truncate",
)
MAX_SEED = 2**31 - 1
METADATA_KEY = re.compile(r'[^"\\\x00-\x1f]{1,64}')


@dataclass(frozen=True, slots=True)
class Limits:
    """What bounds a request on this service."""

    base_id: str
    max_rank: int
    max_model_len: int
    target_modules: frozenset[str]  # short names of the base's modules


def check_request(request: JobRequest, limits: Limits) -> Mapping[str, Any]:
    """The hyperparameters with "auto" for absent ones. InvalidRequestError names the first field at fault."""
    if request.model != limits.base_id:
        raise InvalidRequestError(f"Jobs start from the base model; set model to {limits.base_id!r}.", param="model")
    if request.name is not None:
        check_name(request.name, reserved=limits.base_id)
    if request.suffix is not None:
        check_suffix(request.suffix)
    if request.seed is not None and not _is_int(request.seed, 0, MAX_SEED):
        raise InvalidRequestError(f"seed must be a whole number from 0 to {MAX_SEED}.", param="seed")
    _check_metadata(request.metadata)
    hyperparameters = _hyperparameters(request)
    lora_spec(request.lora, limits)
    _check_training(request.training, limits)
    # Ranges do not depend on the rows: these numbers stand in for them until the files are read.
    resolve_hyperparameters(1000, 100_000, {**hyperparameters, "learning_rate": request.training.get("learning_rate")})
    return hyperparameters


def lora_spec(lora: Mapping[str, Any], limits: Limits) -> LoraSpec:
    """The adapter's shape with defaults filled in: alpha is twice the rank, all linear modules of the base."""
    _known(lora, LORA, "lora")
    rank = lora.get("rank")
    if rank is None:
        rank = min(LoraSpec().rank, limits.max_rank)
    if not _is_int(rank, 1, limits.max_rank):
        raise InvalidRequestError(f"lora.rank must be a whole number from 1 to {limits.max_rank}.", param="lora.rank")
    alpha = lora.get("alpha")
    return LoraSpec(
        rank=rank,
        alpha=2.0 * rank if alpha is None else _real(alpha, "lora.alpha", above=0.0, most=4096.0),
        dropout=_real(lora.get("dropout") or 0.0, "lora.dropout", least=0.0, most=0.9),
        target_modules=_target_modules(lora.get("target_modules"), limits),
        use_rslora=_flag(lora.get("use_rslora"), "lora.use_rslora"),
    )


def alias_of(request: JobRequest, job_id: str, limits: Limits) -> str:
    """The name under which the result will be called: as asked for, else from the suffix, else the job's id."""
    if request.name is not None:
        return request.name
    if request.suffix is None:
        return job_id
    return check_name(request.suffix.lower()[:63], param="suffix", reserved=limits.base_id)


def model_name(base_id: str, tenant: str, suffix: str | None, job_id: str) -> str:
    """The immutable name of a job's result: `ft:<base>:<tenant>:<suffix>:<id>`; the suffix may be empty."""
    if suffix is not None and SUFFIX_PATTERN.fullmatch(suffix) is None:
        raise InvalidRequestError("The suffix cannot stand in a model's name.", param="suffix")
    return f"ft:{base_id}:{tenant}:{suffix or ''}:{job_id.rpartition('-')[2]}"


def _hyperparameters(request: JobRequest) -> dict[str, Any]:
    given: Mapping[str, Any] = request.hyperparameters
    if request.method is not None:
        kind = request.method.get("type")
        if kind != "supervised":
            raise InvalidRequestError(
                f"method.type must be supervised; {kind!r} is not available.", param="method.type"
            )
        _known(request.method, ("type", "supervised"), "method")
        supervised = request.method.get("supervised") or {}
        _known(supervised, ("hyperparameters",), "method.supervised")
        given = {**given, **(supervised.get("hyperparameters") or {})}
    _known(given, HYPERPARAMETERS, "hyperparameters")
    return {name: "auto" if given.get(name) is None else given[name] for name in HYPERPARAMETERS}


def _check_training(training: Mapping[str, Any], limits: Limits) -> None:
    _known(training, TRAINING, "training")
    schedulers = get_args(Scheduler)
    if training.get("scheduler") is not None and training["scheduler"] not in schedulers:
        raise InvalidRequestError(
            f"training.scheduler must be one of {', '.join(schedulers)}.", param="training.scheduler"
        )
    for name, most in (("warmup_ratio", 1.0), ("weight_decay", 10.0)):
        if training.get(name) is not None:
            _real(training[name], f"training.{name}", least=0.0, most=most)
    if training.get("max_grad_norm") is not None:
        _real(training["max_grad_norm"], "training.max_grad_norm", above=0.0, most=1e6)
    for name, least, most in (
        ("max_seq_length", 8, limits.max_model_len),
        ("max_steps", 0, 1_000_000),
        ("eval_interval", 0, 1_000_000),
    ):
        if training.get(name) is not None and not _is_int(training[name], least, most):
            raise InvalidRequestError(
                f"training.{name} must be a whole number from {least} to {most}.", param=f"training.{name}"
            )
    _flag(training.get("truncate"), "training.truncate")


def _check_metadata(metadata: Mapping[str, Any] | None) -> None:
    if metadata is None:
        return
    if len(metadata) > 16:
        raise InvalidRequestError("metadata may have at most 16 entries.", param="metadata")
    for key, value in metadata.items():
        if METADATA_KEY.fullmatch(key) is None or not isinstance(value, str) or len(value) > 512:
            raise InvalidRequestError(
                "metadata maps keys of 1 to 64 characters (no quotes or backslashes) to strings of at most 512.",
                param="metadata",
            )


def _target_modules(given: Any, limits: Limits) -> tuple[str, ...]:
    available = tuple(name for name in ALL_LINEAR if name in limits.target_modules)
    if given is None or given == "all-linear":
        return available
    if not isinstance(given, list | tuple) or not given or any(name not in available for name in given):
        raise InvalidRequestError(
            f'lora.target_modules must be "all-linear" or a list of {", ".join(available)}.',
            param="lora.target_modules",
        )
    return tuple(name for name in available if name in given)


def _known(given: Mapping[str, Any], allowed: Collection[str], where: str) -> None:
    if not isinstance(given, Mapping):
        raise InvalidRequestError(f"{where} must be an object.", param=where)
    for name in given:
        if name not in allowed:
            raise InvalidRequestError(
                f"{where}.{name} is not known; {where} takes {', '.join(allowed)}.",
                code="unknown_parameter",
                param=f"{where}.{name}",
            )


def _is_int(value: Any, least: int, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _real(value: Any, param: str, *, most: float, least: float = -math.inf, above: float = -math.inf) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not (above < value and least <= value <= most):
        low = f"above {above:g}" if above > -math.inf else f"at least {least:g}"
        raise InvalidRequestError(f"{param} must be a number, {low} and at most {most:g}.", param=param)
    return float(value)


def _flag(value: Any, param: str) -> bool:
    if value is not None and not isinstance(value, bool):
        raise InvalidRequestError(f"{param} must be true or false.", param=param)
    return bool(value)
