"""`tenora bench`: serving, adapters, kernels, compare."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from tenora.cli.connection import local_url
from tenora.cli.groups import Group
from tenora.cli.options import load_settings
from tenora.cli.output import show_table
from tenora.errors import InvalidRequestError
from tenora_client import Client

app = typer.Typer(
    cls=Group, no_args_is_help=True, help="Measure: serving, adapter loading and kernels; compare two such reports."
)
SMALL_VOCABULARY = 256

BaseUrl = Annotated[
    str | None, typer.Option("--base-url", help="The server; default $TENORA_URL, else the one of this $TENORA_HOME.")
]
Model = Annotated[
    str | None, typer.Option("--model", help="The base that the server serves, as `tenora serve --model` names it.")
]
Target = Annotated[Path | None, typer.Option("--json", dir_okay=False, help="Write the report to this file.")]
Seed = Annotated[int, typer.Option(help="Equal seeds, equal requests.")]
PromptTokens = Annotated[int, typer.Option(min=1, help="Tokens of each prompt.")]
Vocabulary = Annotated[int, typer.Option(min=0, help="Token ids to draw prompts from; 0: 256, or the base's own.")]


@app.command()
def serving(
    base_url: BaseUrl = None,
    concurrency: Annotated[int, typer.Option("--concurrency", "-c", min=1, help="Requests at a time.")] = 32,
    requests: Annotated[int, typer.Option(min=0, help="Requests of a round; 0: as many as --concurrency.")] = 0,
    prompt_tokens: PromptTokens = 64,
    output_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each answer, exactly.")] = 64,
    adapters: Annotated[int, typer.Option(min=0, help="Random adapters to import, and delete afterwards.")] = 0,
    rank: Annotated[list[int] | None, typer.Option("--rank", help="Their ranks in turn; repeatable. [16]")] = None,
    adapter: Annotated[
        list[str] | None, typer.Option("--adapter", help="An adapter that is there already; repeatable.")
    ] = None,
    distribution: Annotated[
        str, typer.Option(help="Of requests over adapters: distinct, identical, uniform, zipf:S or base.")
    ] = "",
    rate: Annotated[float, typer.Option(min=0, help="Requests per second (Poisson); 0: the next when one ends.")] = 0.0,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds that count.")] = 3,
    warm_up: Annotated[int, typer.Option(min=0, help="Rounds before them.")] = 1,
    seed: Seed = 0,
    model: Model = None,
    vocabulary: Vocabulary = 0,
    target: Target = None,
    plot: Annotated[
        Path | None, typer.Option(dir_okay=False, help="Draw the latencies: *.svg; *.png with matplotlib.")
    ] = None,
) -> None:
    """Load a running server and measure tokens/s, time to first token and time between tokens."""
    # Here, because numpy, httptools and uvloop are of no use to any other command.
    from tenora.cli.bench import figures  # noqa: PLC0415 - see above
    from tenora.cli.bench import plot as drawing  # noqa: PLC0415
    from tenora.cli.bench import serving as bench  # noqa: PLC0415
    from tenora.cli.bench.workload import Distribution  # noqa: PLC0415

    if plot is not None:
        drawing.check(plot)
    names, ranks = adapter or [], _in_turn(rank or [16], adapters)
    spread = Distribution.parse(distribution or ("distinct" if adapters or names else "base"))
    with _client(base_url) as client, _adapters(client, model, ranks, seed) as made:
        names = [*names, *(subject.name for subject in made)]
        workload = bench.Workload(
            concurrency=concurrency,
            requests=requests or concurrency,
            prompt_tokens=prompt_tokens,
            output_tokens=output_tokens,
            distribution=spread,
            rate=rate,
            rounds=repeats,
            warm_up=warm_up,
            seed=seed,
            vocabulary=vocabulary or _vocabulary(model),
        )
        base = client.models.base().id
        rounds = bench.measure(_address(client), base, names, workload)
    summary = bench.summarise(rounds)
    parameters = {
        "server": client.base_url,
        "model": base,
        "concurrency": concurrency,
        "requests": workload.requests,
        "prompt_tokens": prompt_tokens,
        "output_tokens": output_tokens,
        "adapters": len(names),
        "ranks": sorted(set(ranks)),
        "distribution": distribution or spread.kind,
        "rate": rate,
        "repeats": repeats,
        "warm_up": warm_up,
        "seed": seed,
    }
    show_table(("figure", "value"), bench.table(summary))
    if summary["errors"]:
        typer.echo(f"some requests failed: {summary['error_messages']}", err=True)
    _write(target, {**figures.head("serving", parameters), "summary": summary})
    if plot is not None:
        good = [sample for done in rounds for sample in done.good]
        series = {
            "Time to first token": [1e3 * sample.first_token for sample in good if sample.arrivals],
            "Time between tokens": [1e3 * gap for sample in good for gap in sample.gaps],
        }
        drawing.save(plot, series, f"{base}: {concurrency} streams, {len(names)} adapters")


@app.command()
def adapters(
    base_url: BaseUrl = None,
    count: Annotated[int, typer.Option(min=1, help="Random adapters to import, ask, and delete.")] = 20,
    rank: Annotated[int, typer.Option(min=1, help="Their rank, in every projection.")] = 16,
    prompt_tokens: PromptTokens = 16,
    seed: Seed = 0,
    model: Model = None,
    vocabulary: Vocabulary = 0,
    target: Target = None,
) -> None:
    """Measure how long an adapter takes from disk to its first token, and how long an import takes."""
    from tenora.cli.bench import figures, loading  # noqa: PLC0415 - numpy and uvloop, which only this needs

    with _client(base_url) as client, _adapters(client, model, [rank] * count, seed) as made:
        base = client.models.base().id
        summary = loading.measure(
            client,
            _address(client),
            base,
            made,
            prompt_tokens=prompt_tokens,
            vocabulary=vocabulary or _vocabulary(model),
            seed=seed,
        )
    parameters = {
        "server": client.base_url,
        "model": base,
        "count": count,
        "rank": rank,
        "prompt_tokens": prompt_tokens,
        "seed": seed,
    }
    show_table(("milliseconds", "count", "p50", "p95"), loading.table(summary))
    _write(target, {**figures.head("adapters", parameters), "summary": summary})


@app.command()
def kernels(
    shape: Annotated[
        list[str] | None, typer.Option("--shape", help="smollm2-135m, qwen3-0.6b, llama-3-8b; repeatable.")
    ] = None,
    rows: Annotated[list[int] | None, typer.Option("--rows", help="Tokens of a step; repeatable. [1 8 32]")] = None,
    ranks: Annotated[str, typer.Option(help="Ranks of the adapters in turn, as in 8,16,32,64.")] = "16",
    distribution: Annotated[
        list[str] | None, typer.Option("--distribution", help="As of serving; repeatable. [distinct identical]")
    ] = None,
    base_share: Annotated[float, typer.Option(min=0, max=1, help="Share of rows without an adapter.")] = 0.0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, bfloat16, float16 or float32.")] = "auto",
    threads: Annotated[int, typer.Option(min=0, help="CPU threads; 0: all cores.")] = 0,
    seed: Seed = 0,
    target: Target = None,
) -> None:
    """Measure the low-rank op beside the bare matrix product on this machine's device."""
    from tenora.cli.bench import figures  # noqa: PLC0415 - as the next
    from tenora.cli.bench import kernels as bench  # noqa: PLC0415 - torch, which only this needs

    numbers = _ranks(ranks)
    chosen_device, chosen_dtype = bench.choose(device, dtype, threads)
    spreads = distribution or ["distinct", "identical"]
    cases = bench.grid(shape or ["smollm2-135m"], rows or [1, 8, 32], numbers, spreads, base_share, seed)
    found: list[dict[str, Any]] = []
    for case in cases:
        found += bench.measure(case, chosen_device, chosen_dtype)
    columns = ("shape", "group", "rows", "distribution", "gemm_us", "lora_us", "lora_per_gemm", "lora_gb_per_s")
    show_table(columns, [[_rounded(row[name]) for name in columns] for row in found])
    parameters = {
        "device": bench.describe(chosen_device),
        "dtype": str(chosen_dtype).removeprefix("torch."),
        "ranks": numbers,
        "seed": seed,
    }
    _write(target, {**figures.head("kernels", parameters), "measurements": found})


@app.command()
def compare(
    first: Annotated[Path, typer.Argument(exists=True, dir_okay=False)],
    second: Annotated[Path, typer.Argument(exists=True, dir_okay=False)],
) -> None:
    """Print the figures of two reports side by side, with the ratio of the second to the first."""
    from tenora.cli.bench import compare as bench  # noqa: PLC0415 - keeps `tenora --help` quick

    rows = bench.compare(bench.read(first), bench.read(second))
    shown = [(name, _rounded(a), _rounded(b), "-" if ratio is None else f"{ratio:.3f}") for name, a, b, ratio in rows]
    show_table(("figure", "first", "second", "ratio"), shown)


def _client(base_url: str | None) -> Client:
    return Client(base_url=base_url or os.environ.get("TENORA_URL") or local_url(), timeout=600.0)


def _address(client: Client) -> Any:
    from tenora.cli.bench.exchange import Address  # noqa: PLC0415 - httptools, which only measuring needs
    from tenora_client.environment import resolve_key  # noqa: PLC0415 - beside its use

    return Address.of(client.base_url, resolve_key(None))


def _adapters(client: Client, model: str | None, ranks: list[int], seed: int) -> Any:
    """Random adapters of the base, imported for as long as the block lasts."""
    from tenora.cli.bench.subjects import imported  # noqa: PLC0415 - numpy, which only measuring needs
    from tenora.model.catalog import resolve_model  # noqa: PLC0415 - as above
    from tenora.model.spec import ModelSpec, target_modules  # noqa: PLC0415 - as above

    if not ranks:
        return imported(client, (), (), prefix="", seed=seed)
    settings = load_settings(model=model)
    directory = resolve_model(settings.model, settings.root).directory
    targets = target_modules(ModelSpec.from_directory(directory))
    # The process's id keeps two runs at the same time apart.
    return imported(client, targets, ranks, prefix=f"bench-{os.getpid()}", seed=seed)


def _vocabulary(model: str | None) -> int:
    """Token ids to draw prompts from: those of the base if it lies here, else few enough for any base."""
    from tenora.model.spec import ModelSpec  # noqa: PLC0415 - keeps `tenora --help` quick

    settings = load_settings(model=model)
    for directory in (settings.root / "models" / settings.model, Path(settings.model).expanduser()):
        if (directory / "config.json").is_file():
            return ModelSpec.from_directory(directory).vocab_size
    return SMALL_VOCABULARY


def _in_turn(ranks: list[int], count: int) -> list[int]:
    if min(ranks) < 1:
        raise InvalidRequestError("A rank is at least 1.")
    return [ranks[index % len(ranks)] for index in range(count)]


def _ranks(text: str) -> list[int]:
    try:
        ranks = [int(word) for word in text.split(",")]
    except ValueError:
        ranks = [0]
    if min(ranks) < 1:
        raise InvalidRequestError(f"{text!r} are not ranks; write numbers from 1 on, as in 8,16,64.")
    return ranks


def _rounded(value: Any) -> Any:
    return f"{value:.4g}" if isinstance(value, float) else value


def _write(target: Path | None, report: dict[str, Any]) -> None:
    if target is not None:
        target.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        typer.echo(f"the report is in {target}")
