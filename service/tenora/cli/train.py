"""`tenora train`: a file becomes an adapter."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from tenora.cli.connection import connect
from tenora.cli.output import AsJson, show_object
from tenora.errors import ConfigurationError
from tenora_client import Client, Job


def train(
    training: Annotated[str, typer.Argument(help="A JSONL file, or the id of an uploaded one.")],
    name: Annotated[str | None, typer.Option("--name", help="What to call the adapter.")] = None,
    validation: Annotated[
        str | None, typer.Option("--validation", help="A file or id to measure on; rows are held out if absent.")
    ] = None,
    epochs: Annotated[int | None, typer.Option("--epochs", min=1, help="Passes over the file.")] = None,
    batch_size: Annotated[int | None, typer.Option("--batch-size", min=1, help="Rows of a step.")] = None,
    learning_rate: Annotated[float | None, typer.Option("--learning-rate", min=0, help="Peak of the schedule.")] = None,
    rank: Annotated[int | None, typer.Option("--rank", min=1, help="Rank of the adapter.")] = None,
    seed: Annotated[int | None, typer.Option("--seed", min=0)] = None,
    suffix: Annotated[str | None, typer.Option("--suffix", help="Part of the result's full name.")] = None,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Wait for the end, with a progress bar.")] = True,
    as_json: AsJson = False,
) -> None:
    """Upload a file, train an adapter on it and wait until it can be called."""
    hyperparameters = _given(n_epochs=epochs, batch_size=batch_size)
    optional = _given(name=name, seed=seed, suffix=suffix)
    with connect() as client:
        training_file = file_id(client, training)
        validation_file = None if validation is None else file_id(client, validation)
        job = client.jobs.create(
            training_file,
            validation_file=validation_file,
            hyperparameters=hyperparameters,
            lora=_given(rank=rank),
            training=_given(learning_rate=learning_rate),
            **optional,
        )
        if not wait:
            show_object(job, as_json=as_json)
            return
        typer.echo(f"{job.id} is {job.status}; Ctrl-C stops waiting, not the job.", err=True)
        finished = job.wait(progress=True)
    if as_json:
        typer.echo(finished.model_dump_json())
        return
    report(finished)


def _given(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def file_id(client: Client, path_or_id: str) -> str:
    """The id of an uploaded file: uploads a path, passes an id on.

    Raises:
        ConfigurationError: neither a file nor an id, or the server found errors in the file.
    """
    path = Path(path_or_id)
    if not path.is_file():
        if path_or_id.startswith("file-"):
            return path_or_id
        raise ConfigurationError(f"There is no file {path_or_id!r}. Give a JSONL file, or the id of an uploaded one.")
    uploaded = client.files.upload(path, progress=True)
    if uploaded.status == "error":
        raise ConfigurationError(f"{path_or_id} cannot be used: {uploaded.status_details}")
    return uploaded.id


def report(job: Job) -> None:
    """Print what came of a job, and how to go on."""
    evaluation: Mapping[str, Any] = job.evaluation or {}
    base, adapter = evaluation.get("base_loss"), evaluation.get("valid_loss")
    if isinstance(base, int | float) and isinstance(adapter, int | float):
        typer.echo(f"held-out loss  {base:.3f} (base)  ->  {adapter:.3f} (adapter)")
    typer.echo(f"model          {job.fine_tuned_model}")
    name = job.name or job.fine_tuned_model
    typer.echo(f'try it         tenora chat {name} -m "..."')
