"""What a fine-tuning job may ask for: every field checked before anything is stored."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from tenora.control.jobs.apart import check_apart
from tenora.control.jobs.field_checks import known_fields, whole
from tenora.control.jobs.records import JobRequest
from tenora.control.jobs.shape import Limits, ParentShape, kind_of, lora_spec
from tenora.control.jobs.sources import check_sources
from tenora.control.jobs.sweeps import check_sweep, swept_ranks
from tenora.control.registry.ids import SUFFIX_PATTERN, check_name, check_suffix
from tenora.data.rows import RowKind
from tenora.errors import InvalidRequestError
from tenora.training.kinds.table import LORA_KIND
from tenora.training.methods.method import Method
from tenora.training.methods.table import METHODS, USUAL, find_method
from tenora.training.recipes import resolve_hyperparameters
from tenora.training.settings import AUTO, BY_THEMSELVES, HYPERPARAMETERS, JOB, RUN, SETTINGS
from tenora.training.spec import LORA, LORA_ASKED, Trial

MAX_SEED = 2**31 - 1
USUAL_SEED = 0
"""Of a job that asks for none: two jobs on one file compare, and the seed that a job shows makes it again."""
METADATA_KEY = re.compile(r'[^"\\\x00-\x1f]{1,64}')


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """What a job asks for, checked: as it is stored, so that preparing it again gives the same.

    Attributes:
        model: the base's id, or the adapter of the tenant that was named instead.
        method: its name.
        hyperparameters: those of the method, each a number or "auto".
        settings: the given ones of `SETTINGS`.
        lora: the given ones of `tenora.training.spec.LORA_ASKED`; or those of another kind of adapter, with its `type`.
        sweep: the object as sent.
        seed: as sent.
    """

    model: str
    method: str
    hyperparameters: dict[str, Any]
    settings: dict[str, Any]
    lora: dict[str, Any]
    sweep: dict[str, Any] | None = None
    seed: int | None = None

    @property
    def learns_by(self) -> Method:
        """Its method."""
        return find_method(self.method)

    @property
    def method_settings(self) -> dict[str, Any]:
        """The method's own settings, with defaults."""
        method = self.learns_by
        given = {one.name: self.hyperparameters.get(one.name) for one in method.settings}
        return method.own_settings({name: None if value == AUTO else value for name, value in given.items()})

    @property
    def rows(self) -> RowKind:
        """The kind of rows that it learns from."""
        return self.learns_by.rows_of(self.method_settings)

    @property
    def split_seed(self) -> int:
        """What draws the rows that are held out, with their content."""
        return USUAL_SEED if self.seed is None else self.seed

    def at(self, point: Trial) -> Asked:
        """What one trial of the sweep asks for."""
        return msgspec.structs.replace(
            self,
            hyperparameters={name: point.get(name, value) for name, value in self.hyperparameters.items()},
            settings=self.settings | {name: value for name, value in point.items() if name in SETTINGS},
            lora=self.lora | {name: value for name, value in point.items() if name in LORA},
            sweep=None,
        )

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
        method=method.name,
        hyperparameters=_hyperparameters(request, method),
        settings=_settings(request, limits),
        lora=_shape(request),
        sweep=None if request.sweep is None else dict(request.sweep),
        seed=request.seed,
    )
    if asked.settings.get("max_steps") and asked.hyperparameters["n_epochs"] != "auto":
        raise InvalidRequestError(
            "max_steps says how long the job trains, so n_epochs would change nothing; give one of them.",
            param="n_epochs",
        )
    method.check(asked.method_settings, _given_beside(asked))
    if method.runs_apart:
        check_apart(method, request, asked.method_settings, asked.lora, limits)
    starts_from = asked.lora.get("init_from")
    if starts_from is not None:
        LORA_ASKED["init_from"].check(starts_from, "lora.init_from")
    # Ranges do not depend on the rows: these numbers stand in for them until the files are read.
    resolve_hyperparameters(
        1000,
        100_000,
        {**asked.hyperparameters, "learning_rate": asked.settings.get("learning_rate")},
        method=method,
        kind=kind_of(asked.lora),
    )
    if asked.sweep is not None:
        _check_sweep(asked, limits)
    if starts_from is None and request.model == limits.base_id:
        check_shape(asked, limits, None)
    return asked


def check_shape(asked: Asked, limits: Limits, parent: ParentShape | None) -> None:
    """Raise InvalidRequestError if an adapter that the job may train cannot be served, or does not hold its parent."""
    ranks = swept_ranks(asked.sweep or {}, limits)
    if not ranks:
        lora_spec(asked.lora, limits, parent)
    for rank in ranks:
        try:
            lora_spec({**asked.lora, "rank": rank}, limits, parent)
        except InvalidRequestError as error:
            if error.param != "lora.rank":
                raise
            message = error.message.replace("lora.rank", "sweep.rank")
            raise InvalidRequestError(message, code=error.code, param="sweep.rank") from error


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
        return USUAL
    named = request.method.get("type")
    found = METHODS.get(named) if isinstance(named, str) else None
    if found is None:
        raise InvalidRequestError(
            f"method.type must be {' or '.join(METHODS)}; {named!r} is not available.", param="method.type"
        )
    # Options of another method than the one that is named would be ignored.
    known_fields(request.method, ("type", found.name), "method")
    return found


def _given_beside(asked: Asked) -> list[str]:
    """What the request says about training that is no setting of the method's own, by where it says so."""
    own = {one.name for one in asked.learns_by.settings}
    found = [name for name, value in asked.hyperparameters.items() if name not in own and value != AUTO]
    found += [name for name in asked.settings if name in RUN]
    found += [f"lora.{name}" for name in asked.lora]
    return found if asked.sweep is None else [*found, "sweep"]


def _hyperparameters(request: JobRequest, method: Method) -> dict[str, Any]:
    """Merge the places in which a hyperparameter may stand; two different values for one are refused.

    The method's options stand in one place each.
    """
    kind, names = method.name, tuple(method.hyperparameters)
    own = ("hyperparameters", *(group for group in method.options if group), *method.options.get("", {}))
    options = known_fields((request.method or {}).get(kind) or {}, own, f"method.{kind}")
    inner = known_fields(options.get("hyperparameters") or {}, names, f"method.{kind}.hyperparameters")
    older = known_fields(request.hyperparameters, tuple(HYPERPARAMETERS), "hyperparameters")
    found: dict[str, Any] = {}
    for name in names:
        places = {
            name: request.settings.get(name) if name in BY_THEMSELVES else None,
            f"hyperparameters.{name}": older.get(name),
            f"method.{kind}.hyperparameters.{name}": inner.get(name),
        }
        given = {place: value for place, value in places.items() if value is not None}
        if any(value != next(iter(given.values())) for value in given.values()):
            raise InvalidRequestError(
                f"{' and '.join(given)} differ; send the value in one place.", param=next(iter(given))
            )
        found[name] = next(iter(given.values()), AUTO)
    for group, settings in method.options.items():
        where = ".".join(filter(None, ("method", kind, group)))
        inner = known_fields(options.get(group) or {}, tuple(settings), where) if group else options
        for key, setting in settings.items():
            value = inner.get(key)
            found[setting.name] = AUTO if value is None else setting.check(value, f"{where}.{key}")
    return found


def _shape(request: JobRequest) -> dict[str, Any]:
    """What is asked of the adapter: `adapter`, or `lora` for one of that type."""
    lora = _given(known_fields(request.lora, tuple(LORA_ASKED), "lora"), tuple(LORA_ASKED))
    if not request.adapter:
        return lora
    if lora:
        raise InvalidRequestError(
            "lora and adapter both say what the adapter is; say all of it in adapter, with its type.", param="adapter"
        )
    kind = kind_of(request.adapter)
    names = ("type", *(LORA_ASKED if kind is LORA_KIND else kind.declared))
    found = _given(known_fields(request.adapter, names, "adapter"), names)
    return {name: value for name, value in found.items() if kind is not LORA_KIND or name != "type"}


def _settings(request: JobRequest, limits: Limits) -> dict[str, Any]:
    """The given settings, each within its bounds."""
    for name in request.settings:
        if name not in SETTINGS and name not in BY_THEMSELVES:
            raise InvalidRequestError(f"{name} is not known.", code="unknown_parameter", param=name)
    given = _given(request.settings, tuple(SETTINGS))
    given = {name: limits.of(SETTINGS[name]).check(value) for name, value in given.items()}
    return given | _publishing(given)


def _publishing(given: Mapping[str, Any]) -> dict[str, Any]:
    """Whether the name shall mean the result, and the gain that is asked for, which only if_better looks at."""
    publish = given.get("publish", JOB["publish"].default)
    if publish == "if_better":
        return {"publish": publish, "min_gain": given.get("min_gain", JOB["min_gain"].default)}
    if "min_gain" in given:
        raise InvalidRequestError(
            f"min_gain is looked at only with publish if_better, and publish is {publish}; leave one of them out.",
            param="min_gain",
        )
    return {"publish": publish}


def _check_sweep(asked: Asked, limits: Limits) -> None:
    kind = kind_of(asked.lora)
    for name in asked.sweep or {}:
        if name in LORA and name not in kind.shared:
            raise InvalidRequestError(
                f"sweep.{name} is nothing that an adapter of type {kind.name} has; leave it out.", param=f"sweep.{name}"
            )
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
