"""`tenora chat`: one answer, or a conversation."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from tenora.cli.connection import connect
from tenora_client import Client
from tenora_client.params import ChatParams, Combination, WeightedAdapter


def chat(
    model: Annotated[str | None, typer.Argument(help="An adapter's name; the base if absent.")] = None,
    message: Annotated[str | None, typer.Option("--message", "-m", help="Ask this, print the answer, exit.")] = None,
    system: Annotated[str | None, typer.Option("--system", help="A system message to begin with.")] = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="Longest answer.")] = 256,
    temperature: Annotated[float, typer.Option("--temperature", min=0, max=2, help="0 is greedy.")] = 0.0,
    adapters: Annotated[
        list[str] | None, typer.Option("--adapter", help="NAME or NAME=WEIGHT; several answer as one.")
    ] = None,
    combination: Annotated[
        Combination, typer.Option("--combination", help="How several adapters are combined.")
    ] = "cat",
    density: Annotated[
        float | None, typer.Option("--density", help="Share of the weights that ties and dare keep.")
    ] = None,
    adapter_scale: Annotated[
        float | None, typer.Option("--adapter-scale", min=0, max=2, help="Scale of the adapters; 0 is the base.")
    ] = None,
) -> None:
    """Talk to the base or to an adapter. The answer appears while it is written."""
    messages: list[dict[str, str]] = [{"role": "system", "content": system}] if system else []
    with connect() as client:
        name = model or client.models.base().id
        params: ChatParams = {"max_tokens": max_tokens, "temperature": temperature}
        if adapters:
            params |= {"adapters": [weighted(adapter) for adapter in adapters], "combination": combination}
        if density is not None:
            params["density"] = density
        if adapter_scale is not None:
            params["adapter_scale"] = adapter_scale
        if message is not None:
            answer(client, name, [*messages, {"role": "user", "content": message}], params)
            return
        if sys.stdin.isatty():
            typer.echo(f"Talking to {name}. Ctrl-C stops an answer, Ctrl-D ends.", err=True)
        converse(client, name, messages, params)


def weighted(text: str) -> WeightedAdapter:
    """What `NAME` or `NAME=WEIGHT` says."""
    name, given, weight = text.rpartition("=")
    if not given:
        return {"name": text}
    try:
        return {"name": name, "weight": float(weight)}
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is not NAME=WEIGHT, such as fox=0.5.", param_hint="--adapter") from error


def converse(client: Client, model: str, messages: list[dict[str, str]], params: ChatParams) -> None:
    """Ask each line of stdin, with all that was said before, until it ends."""
    while True:
        if sys.stdin.isatty():
            typer.echo("> ", nl=False, err=True)
        line = sys.stdin.readline()
        if not line:
            return
        if not line.strip():
            continue
        messages.append({"role": "user", "content": line.strip()})
        messages.append({"role": "assistant", "content": answer(client, model, messages, params)})


def answer(client: Client, model: str, messages: Sequence[dict[str, Any]], params: ChatParams) -> str:
    """Print the answer as it comes; its text, or as much as there was when Ctrl-C stopped it."""
    parts: list[str] = []
    try:
        with client.chat.create(messages, model, stream=True, **params) as stream:
            for chunk in stream:
                parts.append(chunk.text)
                typer.echo(chunk.text, nl=False)
                sys.stdout.flush()
    except KeyboardInterrupt:
        typer.echo(" [stopped]", nl=False, err=True)
    typer.echo()
    return "".join(parts)
