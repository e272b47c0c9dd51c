"""What `tenora bench adapters` does: how long an adapter takes from disk to its first token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tenora.cli.bench import load
from tenora.cli.bench.exchange import Address
from tenora.cli.bench.figures import spread
from tenora.cli.bench.serving import MILLI
from tenora.cli.bench.subjects import Subject
from tenora.cli.bench.workload import Ask, prompts
from tenora.errors import UnavailableError
from tenora_client import Client

RESIDENT_ASKS = 3


def measure(
    client: Client,
    address: Address,
    base: str,
    subjects: Sequence[Subject],
    *,
    prompt_tokens: int,
    vocabulary: int,
    seed: int,
) -> dict[str, Any]:
    """Ask each adapter once while it is not on the device and three times afterwards, one request at a time.

    Prompts are never repeated, and one token is generated: the times are those to the first token. The file was
    written a moment ago, so the system has it in memory; a disk's own latency comes on top.

    Raises:
        UnavailableError: if a request fails.
    """
    ids = iter(prompts((1 + RESIDENT_ASKS) * (len(subjects) + 1), prompt_tokens, vocabulary=vocabulary, seed=seed))
    places: dict[str, int] = {}
    cold: list[float] = []
    warm: list[float] = []
    beyond: list[float] = []

    def first_token(model: str) -> float:
        done = load.run(address, [Ask(model, next(ids), 1)], 1)
        if not done.good:
            raise UnavailableError(f"{model} did not answer: {done.samples[0].error}")
        return done.samples[0].first_token

    for _ in range(1 + RESIDENT_ASKS):
        first_token(base)  # whatever a first request costs is not the adapter's
    for subject in subjects:
        place = client.adapters.get(subject.name).resident or "disk"
        places[place] = places.get(place, 0) + 1
        first = first_token(subject.name)
        later = sorted(first_token(subject.name) for _ in range(RESIDENT_ASKS))
        if place == "device":
            continue
        cold.append(first)
        warm += later
        beyond.append(first - later[RESIDENT_ASKS // 2])
    return {
        "first_token_ms": spread(cold, scale=MILLI),
        "first_token_resident_ms": spread(warm, scale=MILLI),
        "beyond_resident_ms": spread(beyond, scale=MILLI),
        "import_ms": spread([subject.import_seconds for subject in subjects], scale=MILLI),
        "resident_before": places,
    }


def table(summary: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """The summary as lines for people: label, count, p50, p95."""
    labels = {
        "beyond_resident_ms": "disk to first token, beyond a resident one's",
        "first_token_ms": "first token, not resident",
        "first_token_resident_ms": "first token, resident",
        "import_ms": "import",
    }
    lines = []
    for name, label in labels.items():
        values = summary[name]
        p50, p95 = ("-" if values[point] is None else f"{values[point]:.1f}" for point in ("p50", "p95"))
        lines.append((label, str(values["count"]), p50, p95))
    return lines
