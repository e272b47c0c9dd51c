"""What a fine-tuning job may ask for: every field checked before anything is stored."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, get_args

import msgspec

from tenora.control.jobs.field_checks import flag, is_int, known_fields, one_of, real, whole
from tenora.control.jobs.records import SETTINGS, USUAL_PUBLISH, JobRequest, Publish
from tenora.control.jobs.shape import LORA, Limits, lora_spec
from tenora.control.jobs.sources import check_sources
from tenora.control.jobs.sweeps import check_sweep
from tenora.control.registry.ids import SUFFIX_PATTERN, check_name, check_suffix
from tenora.errors import InvalidRequestError
from tenora.training.recipes import EARLY_STOPPING_EVALUATIONS, resolve_hyperparameters
from tenora.training.spec import Method, Scheduler

HYPERPARAMETERS = ("n_epochs", "batch_size", "learning_rate_multiplier")
OF_METHOD: Mapping[Method, tuple[str, ...]] = {"supervised": HYPERPARAMETERS, "dpo": (*HYPERPARAMETERS, "beta")}
PUBLISHING = ("publish", "min_gain")
MAX_SEED = 2**31 - 1
USUAL_SEED = 0
"""Of a job that asks for none: two jobs on one file compare, and the seed that a job shows makes it again."""
METADATA_KEY = re.compile(r'[^"\\\x00-\x1f]{1,64}')


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """What a job asks for, checked: as it is stored, so that preparing it again gives the same.

    Attributes:
        model: the base's id, or the adapter of the tenant that was named instead.
        hyperparameters: those of the method, each a number or "auto".
        settings: the given ones of `SETTINGS`.
        lora: the given ones of `tenora.control.jobs.shape.LORA`.
        sweep: the object as sent.
        seed: as sent.
    """

    model: str
    method: Method
    hyperparameters: dict[str, Any]
    settings: dict[str, Any]
    lora: dict[str, Any]
    sweep: dict[str, Any] | None = None
    seed: int | None = None

    @property
    def split_seed(self) -> int:
        """What draws the rows that are held out, with their content."""
        return USUAL_SEED if self.seed is None else self.seed

    @classmethod
    def stored(cls, requested: Mapping[str, Any]) -> Asked:
        """From the JSON of `to_json`."""
        return msgspec.convert(requested, cls)

    def to_json(self) -> dict[str, Any]:
        """As plain JSON types."""
        found: dict[str, Any] = msgspec.to_builtins(self)
        return found


def check_request(request: JobRequest, limits: Limits) -> Asked:
    """The request with "auto" for absent hyperparameters. InvalidRequestError names the first field at fault.

    That files and adapters exist is not looked at here.
    """
    if request.name is not None:
        check_name(request.name, reserved=limits.base_id)
    if request.suffix is not None:
        check_suffix(request.suffix)
    if request.seed is not None:
        whole(request.seed, "seed", 0, MAX_SEED)
    _check_metadata(request.metadata)
    check_sources(request)
    method = _method(request)
    asked = Asked(
        model=request.model,
        method=method,
        hyperparameters=_hyperparameters(request, method),
        settings=_settings(request, limits),
        lora=_given(known_fields(request.lora, LORA, "lora"), LORA),
        sweep=None if request.sweep is None else dict(request.sweep),
        seed=request.seed,
    )
    if asked.settings.get("max_steps") and asked.hyperparameters["n_epochs"] != "auto":
        raise InvalidRequestError(
            "max_steps says how long the job trains, so n_epochs would change nothing; give one of them.",
            param="n_epochs",
        )
    starts_from = {name: asked.lora[name] for name in ("init_from",) if name in asked.lora}
    if not all(isinstance(name, str) and name for name in starts_from.values()):
        raise InvalidRequestError("lora.init_from must be the name of an adapter.", param="lora.init_from")
    if not starts_from and request.model == limits.base_id:
        lora_spec(asked.lora, limits)
    # Ranges do not depend on the rows: these numbers stand in for them until the files are read.
    resolve_hyperparameters(
        1000, 100_000, {**asked.hyperparameters, "learning_rate": asked.settings.get("learning_rate")}, method=method
    )
    if asked.sweep is not None:
        _check_sweep(asked, limits)
    return asked


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


def _method(request: JobRequest) -> Method:
    if request.method is None:
        return "supervised"
    methods: tuple[Method, ...] = get_args(Method)
    named = request.method.get("type")
    kind = next((method for method in methods if method == named), None)
    if kind is None:
        raise InvalidRequestError(
            f"method.type must be {' or '.join(methods)}; {named!r} is not available.", param="method.type"
        )
    # Options of another method than the one that is named would be ignored.
    known_fields(request.method, ("type", kind), "method")
    return kind


def _hyperparameters(request: JobRequest, method: Method) -> dict[str, Any]:
    """Merge the places in which a hyperparameter may stand; two different values for one are refused."""
    names = OF_METHOD[method]
    options = known_fields((request.method or {}).get(method) or {}, ("hyperparameters",), f"method.{method}")
    inner = known_fields(options.get("hyperparameters") or {}, names, f"method.{method}.hyperparameters")
    older = known_fields(request.hyperparameters, HYPERPARAMETERS, "hyperparameters")
    found: dict[str, Any] = {}
    for name in names:
        places = {
            name: getattr(request, name, None),
            f"hyperparameters.{name}": older.get(name),
            f"method.{method}.hyperparameters.{name}": inner.get(name),
        }
        given = {place: value for place, value in places.items() if value is not None}
        if any(value != next(iter(given.values())) for value in given.values()):
            raise InvalidRequestError(
                f"{' and '.join(given)} differ; send the value in one place.", param=next(iter(given))
            )
        found[name] = next(iter(given.values()), "auto")
    return found


def _settings(request: JobRequest, limits: Limits) -> dict[str, Any]:
    """The given settings, each within its bounds; `early_stopping` as a number of evaluations."""
    given = _given({name: getattr(request, name) for name in SETTINGS}, SETTINGS)
    if "scheduler" in given:
        one_of(given["scheduler"], "scheduler", get_args(Scheduler))
    for name, most in (("warmup_ratio", 1.0), ("weight_decay", 10.0)):
        if name in given:
            real(given[name], name, least=0.0, most=most)
    for name, most in (("learning_rate", 1.0), ("max_grad_norm", 1e6)):
        if name in given:
            real(given[name], name, above=0.0, most=most)
    for name, least, highest in (
        ("max_seq_length", 8, limits.max_model_len),
        ("max_steps", 0, 1_000_000),
        ("eval_interval", 0, 1_000_000),
    ):
        if name in given:
            whole(given[name], name, least, highest)
    for name in ("truncate", "packing"):
        if name in given:
            flag(given[name], name)
    if "early_stopping" in given:
        given["early_stopping"] = _early_stopping(given["early_stopping"])
    return given | _publishing(given)


def _publishing(given: Mapping[str, Any]) -> dict[str, Any]:
    """Whether the name shall mean the result, and the gain that is asked for, which only if_better looks at."""
    publish = one_of(given.get("publish", USUAL_PUBLISH), "publish", get_args(Publish))
    if publish == "if_better":
        return {"publish": publish, "min_gain": real(given.get("min_gain", 0.0), "min_gain", least=0.0, most=100.0)}
    if "min_gain" in given:
        raise InvalidRequestError(
            f"min_gain is looked at only with publish if_better, and publish is {publish}; leave one of them out.",
            param="min_gain",
        )
    return {"publish": publish}


def _early_stopping(value: Any) -> int:
    if isinstance(value, bool):
        return EARLY_STOPPING_EVALUATIONS if value else 0
    if not is_int(value, 0, 1000):
        raise InvalidRequestError(
            f"early_stopping must be true ({EARLY_STOPPING_EVALUATIONS} evaluations without a better one), false, or "
            "a number of evaluations from 0 to 1000.",
            param="early_stopping",
        )
    return value


def _check_sweep(asked: Asked, limits: Limits) -> None:
    swept = check_sweep(asked.sweep or {}, limits)
    fixed = {**asked.hyperparameters, **asked.settings, **asked.lora}
    for name in swept:
        if fixed.get(name) not in (None, "auto"):
            raise InvalidRequestError(
                f"sweep.{name} tries several values, but {name} is given too; leave it out.", param=f"sweep.{name}"
            )
    if "learning_rate" in swept and fixed["learning_rate_multiplier"] != "auto":
        raise InvalidRequestError(
            "sweep.learning_rate tries several rates, but learning_rate_multiplier is given too; leave it out.",
            param="sweep.learning_rate",
        )
    if "n_epochs" in swept and asked.settings.get("max_steps"):
        raise InvalidRequestError(
            "max_steps says how long every trial trains, so sweep.n_epochs would change nothing; give one of them.",
            param="sweep.n_epochs",
        )


def _given(values: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {name: values[name] for name in names if values.get(name) is not None}


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
