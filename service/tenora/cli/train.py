"""`tenora train`: a file becomes an adapter."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from tenora.cli.connection import connect
from tenora.cli.output import AsJson, show_object, show_table
from tenora.cli.setting_flags import given, with_flags
from tenora.errors import ConfigurationError
from tenora.training.kinds.table import KINDS, OWN
from tenora.training.methods.table import METHODS
from tenora.training.settings import JOB, RUN
from tenora.training.spec import LORA_ASKED, SWEPT, USUAL_KIND
from tenora_client import Client, Evaluation, Job, NotFoundError

_VERDICTS = {"start": "against start", "base": "against base", "few_shot_base": "against shots"}
_TABLE = ("trial", *SWEPT, "status", "step", "valid_loss", "winner")
OF_METHODS = {setting.name: (name, setting) for name, method in METHODS.items() for setting in method.settings}
"""The settings that one method has alone, with its name."""
OF_ADAPTER = {*LORA_ASKED, *OWN}
_ALL = {**RUN, **JOB, **LORA_ASKED, **OWN, **{name: one for name, (_, one) in OF_METHODS.items()}}
FLAGS = {name: setting for name, setting in _ALL.items() if setting.flag}
KINDS_HELP = "; ".join(f"{name} {kind.summary}" for name, kind in KINDS.items())
METHODS_HELP = "; ".join(f"{name} {method.summary}" for name, method in METHODS.items())


@with_flags(FLAGS)
def train(
    training: Annotated[
        list[str],
        typer.Argument(
            metavar="FILE...",
            help="A training file, or the id of an uploaded one. Several are tasks; FILE=2 has its rows seen twice as "
            "often.",
        ),
    ],
    name: Annotated[str | None, typer.Option("--name", help="What to call the adapter.")] = None,
    validation: Annotated[
        str | None, typer.Option("--validation", help="A file or id to measure on; rows are held out if absent.")
    ] = None,
    method: Annotated[str | None, typer.Option("--method", help=METHODS_HELP)] = None,
    adapter_type: Annotated[str | None, typer.Option("--adapter-type", help=KINDS_HELP)] = None,
    sweep: Annotated[
        list[str] | None,
        typer.Option("--sweep", help="Values to try, as rank=8,16 or learning_rate=1e-4..1e-3; may be repeated."),
    ] = None,
    trials: Annotated[int | None, typer.Option("--trials", min=2, help="How many settings the sweep tries.")] = None,
    seed: Annotated[int | None, typer.Option("--seed", min=0)] = None,
    suffix: Annotated[str | None, typer.Option("--suffix", help="Part of the result's full name.")] = None,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Wait for the end, with a progress bar.")] = True,
    as_json: AsJson = False,
    **settings: Any,
) -> None:
    """Upload a file, train an adapter on it and wait until it can be called."""
    chosen = given(**settings)
    fields = given(
        name=name,
        seed=seed,
        suffix=suffix,
        method=method_of(method, {name: value for name, value in chosen.items() if name in OF_METHODS}),
        sweep=sweep_of(sweep or [], trials),
        **_adapter(adapter_type, {name: value for name, value in chosen.items() if name in OF_ADAPTER}),
        **{name: value for name, value in chosen.items() if name not in OF_ADAPTER and name not in OF_METHODS},
    )
    for source in (*(_weighted(entry)[0] for entry in training), *([] if validation is None else [validation])):
        check_file(source)
    with connect() as client:
        check_settings(client, training, validation, fields)
        fields |= training_fields(client, training)
        validation_file = None if validation is None else file_id(client, validation)
        job = client.jobs.create(validation_file=validation_file, **fields)
        if not wait:
            show_object(job, as_json=as_json)
            return
        typer.echo(f"{job.id} is {job.status}; Ctrl-C stops waiting, not the job.", err=True)
        finished = job.wait(progress=True)
    if as_json:
        typer.echo(finished.model_dump_json())
        return
    report(finished)


def _adapter(kind: str | None, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The field of a job that says what the adapter is."""
    if kind is None and not OWN.keys() & settings.keys():
        return {"lora": dict(settings)} if settings else {}
    return {"adapter": {"type": kind or USUAL_KIND, **settings}}


def _report_evaluation(said: Evaluation, start: str) -> None:
    """Held-out losses, of each task too, and the verdicts."""
    if said.base_loss is not None and said.valid_loss is not None:
        typer.echo(f"held-out loss  {said.base_loss:.3f} ({start})  ->  {said.valid_loss:.3f} (adapter)")
    for task in said.tasks if len(said.tasks) > 1 else ():
        found = task.comparison
        if found is not None and found.other_loss is not None and found.adapter_loss is not None:
            typer.echo(f"  {task.name}: {found.other_loss:.3f}  ->  {found.adapter_loss:.3f}  ({found.verdict})")
    for name, label in _VERDICTS.items():
        if name in said.verdicts:
            typer.echo(f"{label:<15}{said.verdicts[name].verdict}")


def check_settings(client: Client, training: Sequence[str], validation: str | None, fields: Mapping[str, Any]) -> None:
    """Ask the server whether it takes the settings of a job, before anything is uploaded for it.

    It is asked for an estimate on files that it does not have: settings and the adapter to start from come first.
    """
    names = [f"file-{number}-of-{len(training)}" for number in range(1, len(training) + 1)]
    weights = [_weighted(entry)[1] for entry in training]
    files = [given(file=name, weight=weight) for name, weight in zip(names, weights, strict=True)]
    sources = {"training_file": names[0]} if len(files) == 1 and weights[0] is None else {"training_files": files}
    measured_on = None if validation is None else "file-to-measure-on"
    try:
        client.jobs.estimate(validation_file=measured_on, **sources, **fields)
    except NotFoundError as error:
        if not (error.param or "").startswith("training_file"):
            raise


def check_file(path_or_id: str) -> None:
    """Raise ConfigurationError for what is neither a file nor an id."""
    if not Path(path_or_id).is_file() and not path_or_id.startswith("file-"):
        raise ConfigurationError(f"There is no file {path_or_id!r}. Give a JSONL file, or the id of an uploaded one.")


def training_fields(client: Client, training: Sequence[str]) -> dict[str, Any]:
    """`training_file` for one file, `training_files` for several or with a weight; uploads what is a path."""
    if len(training) == 1 and _weighted(training[0])[1] is None:
        return {"training_file": file_id(client, training[0])}
    files = []
    for entry in training:
        path, weight = _weighted(entry)
        files.append(given(file=file_id(client, path), weight=weight))
    return {"training_files": files}


def method_of(name: str | None, own: Mapping[str, Any]) -> dict[str, Any] | None:
    """The request's `method`; None for the usual one.

    Raises:
        ConfigurationError: a setting belongs to another method.
    """
    for setting in own:
        owner, declared = OF_METHODS[setting]
        if owner != name:
            raise ConfigurationError(f"{declared.flag} is a setting of method {owner}; add --method {owner}.")
    if name is None:
        return None
    return {"type": name, **({name: METHODS[name].placed(own)} if own else {})}


def sweep_of(values: Sequence[str], trials: int | None) -> dict[str, Any] | None:
    """The request's `sweep` from `name=value,value` and `name=low..high`; None if nothing is to be tried.

    Raises:
        ConfigurationError: an entry of another form.
    """
    if not values and trials is None:
        return None
    found: dict[str, Any] = given(trials=trials)
    for entry in values:
        name, equals, text = entry.partition("=")
        low, dots, high = text.partition("..")
        try:
            numbers = [json.loads(part) for part in ([low, high] if dots else text.split(","))]
        except json.JSONDecodeError:
            numbers = []
        if not equals or not numbers or not all(isinstance(number, int | float) for number in numbers):
            raise ConfigurationError(
                f"--sweep {entry!r} is not understood. Write rank=8,16 for a list, or learning_rate=1e-4..1e-3 for a "
                "range."
            )
        found[name] = {"min": numbers[0], "max": numbers[1]} if dots else numbers
    return found


def _weighted(entry: str) -> tuple[str, float | None]:
    """`rows.jsonl=2` as a path and a weight; a file that has such a name is a path."""
    path, equals, text = entry.rpartition("=")
    if not equals or Path(entry).is_file():
        return entry, None
    try:
        return path, float(text)
    except ValueError:
        return entry, None


def file_id(client: Client, path_or_id: str) -> str:
    """The id of an uploaded file: uploads a path, passes an id on.

    Raises:
        ConfigurationError: neither a file nor an id, or the server found errors in the file.
    """
    check_file(path_or_id)
    path = Path(path_or_id)
    if not path.is_file():
        return path_or_id
    uploaded = client.files.upload(path, progress=True)
    if uploaded.status == "error":
        raise ConfigurationError(f"{path_or_id} cannot be used: {uploaded.status_details}")
    return uploaded.id


def report(job: Job) -> None:
    """Print what came of a job, and how to go on."""
    if job.sweep_results:
        show_table(_TABLE, ([getattr(trial, column) for column in _TABLE] for trial in job.sweep_results))
    if job.evaluation is not None:
        _report_evaluation(job.evaluation, "base" if job.parent is None else job.parent)
    if job.evaluation is not None and job.evaluation.full_model is not None:
        typer.echo(f"full model     {job.evaluation.full_model.reason}")
        typer.echo(f"               tenora files download {job.result_files[-1]} model.tar fetches it.")
    if job.fine_tuned_model is None:
        return
    typer.echo(f"model          {job.fine_tuned_model}")
    name = job.name or job.fine_tuned_model
    if job.published is not None:
        typer.echo(f"name           {job.published.reason}")
        if not job.published.alias_moved:
            typer.echo(
                f"               tenora adapters rollback {job.name} {job.published.version} has it mean this one."
            )
            name = job.fine_tuned_model
    typer.echo(f'try it         tenora chat {name} -m "..."')
