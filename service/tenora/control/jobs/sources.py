"""The files that a job learns from: one, or several with weights (multi-task learning)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from tenora.control.jobs.field_checks import known_fields, real
from tenora.control.jobs.records import JobRequest
from tenora.control.registry.ids import SUFFIX_PATTERN
from tenora.errors import InvalidRequestError

MAX_SOURCES = 16
ONLY_SOURCE = "rows"
_FIELDS = ("file", "weight", "name")
_UNFIT = re.compile(r"[^A-Za-z0-9._-]+")


class Source(msgspec.Struct, frozen=True, kw_only=True):
    """A training file of a job, which is a task of its own.

    Attributes:
        file: id.
        name: what its held-out loss is called; empty before it is taken from the file's name.
        weight: how often its rows are seen, relative to those of the other files.
        param: the field of the request that named it.
    """

    file: str
    name: str = ""
    weight: float = 1.0
    param: str = "training_file"


def check_sources(request: JobRequest) -> tuple[Source, ...]:
    """The files as asked for; nothing is looked up.

    Raises:
        InvalidRequestError: none or both of `training_file` and `training_files`, an entry that is not well formed or
            names a file twice, or a validation file for several files.
    """
    if (request.training_file is None) == (request.training_files is None):
        raise InvalidRequestError(
            "Send training_file, or training_files for several with weights; one of the two.", param="training_file"
        )
    if request.training_files is None:
        return (Source(file=str(request.training_file), name=ONLY_SOURCE),)
    if not isinstance(request.training_files, list | tuple) or not 1 <= len(request.training_files) <= MAX_SOURCES:
        raise InvalidRequestError(
            f"training_files must be a list of 1 to {MAX_SOURCES} entries.", param="training_files"
        )
    sources = tuple(_source(entry, f"training_files[{index}]") for index, entry in enumerate(request.training_files))
    _refuse_twice([(source.file, f"{source.param}.file") for source in sources], "file")
    _refuse_twice([(source.name, f"{source.param}.name") for source in sources if source.name], "name")
    if len(sources) > 1 and request.validation_file is not None:
        raise InvalidRequestError(
            "With several training_files each holds out rows of its own, so that every task is measured; leave "
            "validation_file out.",
            param="validation_file",
        )
    return sources


def name_sources(sources: Sequence[Source], filenames: Sequence[str]) -> tuple[Source, ...]:
    """The sources with names: where none was given, the file's own without its ending, numbered if that is taken."""
    taken = {source.name for source in sources if source.name}
    named: list[Source] = []
    for source, filename in zip(sources, filenames, strict=True):
        name = source.name
        if not name:
            stem = _UNFIT.sub("-", filename.rpartition(".")[0] or filename).strip("-._")[:56] or "task"
            candidates = (stem if number == 1 else f"{stem}-{number}" for number in range(1, MAX_SOURCES + 2))
            name = next(candidate for candidate in candidates if candidate not in taken)
            taken.add(name)
        named.append(msgspec.structs.replace(source, name=name))
    return tuple(named)


def sources_of(training_file: str, training_files: Sequence[Mapping[str, Any]] | None) -> tuple[Source, ...]:
    """The sources of a stored job."""
    if training_files is None:
        return (Source(file=training_file, name=ONLY_SOURCE),)
    return tuple(
        Source(file=entry["file"], name=entry["name"], weight=entry["weight"], param=f"training_files[{index}]")
        for index, entry in enumerate(training_files)
    )


def _source(entry: Any, where: str) -> Source:
    given = known_fields(entry, _FIELDS, where)
    file, name, weight = given.get("file"), given.get("name"), given.get("weight")
    if not isinstance(file, str) or not file:
        raise InvalidRequestError(f"{where}.file must be the id of a file.", param=f"{where}.file")
    if name is not None and (not isinstance(name, str) or SUFFIX_PATTERN.fullmatch(name) is None):
        raise InvalidRequestError(
            f"{where}.name must be 1 to 64 letters, digits, '.', '_' or '-', starting with a letter or digit.",
            param=f"{where}.name",
        )
    return Source(
        file=file,
        name=name or "",
        weight=1.0 if weight is None else real(weight, f"{where}.weight", above=0.0, most=1000.0),
        param=where,
    )


def _refuse_twice(values: Sequence[tuple[str, str]], word: str) -> None:
    seen: set[str] = set()
    for value, param in values:
        if value in seen:
            raise InvalidRequestError(f"{param} names the {word} {value!r} a second time.", param=param)
        seen.add(value)
