"""What `tenora bench serving` does: rounds of requests against a running server, and the report of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tenora.cli.bench import load
from tenora.cli.bench.exchange import Address
from tenora.cli.bench.figures import median, spread
from tenora.cli.bench.load import Load
from tenora.cli.bench.workload import Ask, Distribution, arrivals, asks, prompts
from tenora.errors import UnavailableError

MILLI = 1000.0
LABELS = {
    "first token": "ttft_ms",
    "between tokens": "inter_token_ms",
    "per token of a request": "per_token_ms",
    "request": "request_ms",
}


@dataclass(frozen=True, slots=True)
class Workload:
    """The parameters of `tenora bench serving`.

    Attributes:
        concurrency: connections, each with one request at a time.
        requests: of one round.
        prompt_tokens, output_tokens: of every request, exactly.
        distribution: how requests spread over the adapters.
        rate: requests per second (Poisson); 0 sends the next as soon as a connection is free.
        rounds: measured; the median round is the result.
        warm_up: rounds before, not measured.
        vocabulary: prompts are drawn from as many token ids.
    """

    concurrency: int
    requests: int
    prompt_tokens: int
    output_tokens: int
    distribution: Distribution
    rate: float
    rounds: int
    warm_up: int
    seed: int
    vocabulary: int

    def asks(self, base: str, names: Sequence[str], number: int) -> list[Ask]:
        """The requests of round `number`. Prompts never repeat, so that the prefix cache does not answer."""
        seed = self.seed * 1_000_003 + number
        chosen = self.distribution.draw(len(names), self.requests, seed)
        models = [base if index is None else names[index] for index in chosen]
        ids = prompts(self.requests, self.prompt_tokens, vocabulary=self.vocabulary, seed=seed)
        return asks(models, ids, self.output_tokens, arrivals(self.requests, self.rate, seed))


def measure(address: Address, base: str, names: Sequence[str], workload: Workload) -> list[Load]:
    """Run the warm-up and the rounds.

    Raises:
        UnavailableError: if not one request of the first round succeeded; the message says why.
    """
    rounds = []
    for number in range(workload.warm_up + workload.rounds):
        done = load.run(address, workload.asks(base, names, number), workload.concurrency)
        if not done.good:
            raise UnavailableError(f"No request succeeded: {done.samples[0].error}")
        if number >= workload.warm_up:
            rounds.append(done)
    return rounds


def summarise(rounds: Sequence[Load]) -> dict[str, Any]:
    """Figures of all rounds: rates are medians over rounds, times are over all requests of all rounds."""
    good = [sample for done in rounds for sample in done.good]
    failed = Counter(sample.error for done in rounds for sample in done.samples if sample.error)
    return {
        "output_tokens_per_s": median([done.output_rate for done in rounds]),
        "total_tokens_per_s": median(
            [sum(s.prompt_tokens + s.output_tokens for s in done.good) / done.seconds for done in rounds]
        ),
        "requests_per_s": median([len(done.good) / done.seconds for done in rounds]),
        "ttft_ms": spread([sample.first_token for sample in good if sample.arrivals], scale=MILLI),
        "inter_token_ms": spread([gap for sample in good for gap in sample.gaps], scale=MILLI),
        "per_token_ms": spread([sample.per_token for sample in good if sample.output_tokens > 1], scale=MILLI),
        "request_ms": spread([sample.ended - sample.sent for sample in good], scale=MILLI),
        "requests": len(good),
        "errors": sum(failed.values()),
        "error_messages": dict(failed.most_common(5)),
        "prompt_tokens": sum(sample.prompt_tokens for sample in good),
        "output_tokens": sum(sample.output_tokens for sample in good),
        "cached_prompt_tokens": sum(sample.cached_tokens for sample in good),
        "client_cpu_share": sum(done.client_cpu for done in rounds) / sum(done.seconds for done in rounds),
        "seconds": [done.seconds for done in rounds],
    }


def table(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """The summary as lines for people."""
    lines = [
        ("output tokens/s", f"{summary['output_tokens_per_s']:.1f}"),
        ("total tokens/s", f"{summary['total_tokens_per_s']:.1f}"),
        ("requests/s", f"{summary['requests_per_s']:.2f}"),
    ]
    for label, name in LABELS.items():
        values = summary[name]
        lines += [
            (f"{label}, ms, {point}", "-" if values[point] is None else f"{values[point]:.2f}")
            for point in ("p50", "p95", "p99")
        ]
    lines += [
        ("requests", f"{summary['requests']} good, {summary['errors']} failed"),
        ("prompt tokens cached", f"{summary['cached_prompt_tokens']} of {summary['prompt_tokens']}"),
        ("load generator", f"{100 * summary['client_cpu_share']:.1f}% of one core"),
    ]
    return lines
