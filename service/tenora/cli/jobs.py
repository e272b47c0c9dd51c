"""`tenora jobs`."""

from __future__ import annotations

from typing import Annotated

import typer

from tenora.cli.connection import connect
from tenora.cli.groups import Group
from tenora.cli.output import AsJson, moment, show_object, show_objects
from tenora_client import JobEvent

app = typer.Typer(cls=Group, no_args_is_help=True, help="Fine-tuning jobs: list, show, events, cancel, pause, resume.")


@app.command("list")
def list_(as_json: AsJson = False) -> None:
    """All jobs, newest first."""
    with connect() as client:
        columns = ("id", "created_at", "status", "name", "model", "trained_tokens")
        show_objects(client.jobs.list(), columns, as_json=as_json)


@app.command()
def show(job_id: str, as_json: AsJson = False) -> None:
    """Everything about a job."""
    with connect() as client:
        show_object(client.jobs.get(job_id), as_json=as_json)


@app.command()
def events(
    job_id: str,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Wait for the job's end.")] = False,
    as_json: AsJson = False,
) -> None:
    """The job's log, oldest first."""
    with connect() as client:
        if follow:
            client.jobs.wait(job_id, progress=True)
        for event in reversed(list(client.jobs.events(job_id, limit=100))):
            typer.echo(event.model_dump_json() if as_json else line(event))


def line(event: JobEvent) -> str:
    """An event in one line."""
    return f"{moment(event.created_at)}  {event.level:5}  {event.message}"


@app.command()
def cancel(job_id: str) -> None:
    """End a job without a result."""
    with connect() as client:
        typer.echo(f"{job_id} is {client.jobs.cancel(job_id).status}.")


@app.command()
def pause(job_id: str) -> None:
    """Keep a job's state and stop it for now."""
    with connect() as client:
        typer.echo(f"{job_id} is {client.jobs.pause(job_id).status}.")


@app.command()
def resume(job_id: str) -> None:
    """Let a paused job go on."""
    with connect() as client:
        typer.echo(f"{job_id} is {client.jobs.resume(job_id).status}.")
