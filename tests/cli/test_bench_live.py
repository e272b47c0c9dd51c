"""`tenora bench` against a real server of the tiny base. Its times are looked at, never judged."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.serving import Server

pytestmark = [pytest.mark.e2e, pytest.mark.full]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Iterator[Server]:
    served = Server(tmp_path_factory.mktemp("bench"), tiny_base, TENORA_DTYPE="float32")
    try:
        served.start()
        yield served
    finally:
        served.stop()


def report(server: Server, target: Path, *arguments: str) -> tuple[str, dict[str, Any]]:
    """What the command printed, and the report that it wrote."""
    output = server.command("bench", *arguments, "--base-url", server.url, "--json", str(target))
    return output, json.loads(target.read_text())


def test_serving(server: Server, tmp_path: Path) -> None:
    picture = tmp_path / "latencies.svg"
    output, found = report(
        server, tmp_path / "a.json", "serving", "--concurrency", "3", "--requests", "5", "--prompt-tokens", "9",
        "--output-tokens", "7", "--adapters", "2", "--rank", "2", "--rank", "4", "--repeats", "2",
        "--distribution", "zipf:1.1", "--plot", str(picture),
    )  # fmt: skip
    summary = found["summary"]
    assert found["kind"] == "serving"
    assert found["parameters"]["ranks"] == [2, 4]
    assert (summary["requests"], summary["errors"]) == (10, 0)
    assert (summary["prompt_tokens"], summary["output_tokens"]) == (10 * 9, 10 * 7)
    assert summary["ttft_ms"]["count"] == 10
    between = summary["inter_token_ms"]  # nothing, where a slow machine sent all tokens of every request at once
    assert between["count"] <= 10 * 6
    assert not between["count"] or between["p50"] <= between["p95"] <= between["p99"]
    assert 0 < summary["client_cpu_share"] < 1
    assert {"output tokens/s", "first token, ms, p99"} <= {
        line.rpartition("  ")[0].strip() for line in output.splitlines()
    }
    assert picture.read_text().startswith("<svg")
    assert server.command("adapters", "list", "--json") == ""


@pytest.mark.full
def test_two_reports_are_compared(server: Server, tmp_path: Path) -> None:
    few = ("serving", "--concurrency", "2", "--output-tokens", "4", "--repeats", "1", "--warm-up", "0")
    report(server, tmp_path / "a.json", *few)
    report(server, tmp_path / "b.json", *few, "--seed", "1")
    output = server.command("bench", "compare", str(tmp_path / "a.json"), str(tmp_path / "b.json"))
    lines = {line.split()[0]: line.split()[1:] for line in output.splitlines()}
    assert lines["FIGURE"] == ["FIRST", "SECOND", "RATIO"]
    assert lines["summary.output_tokens"] == ["8", "8", "1.000"]
    assert "summary.output_tokens_per_s" in lines


@pytest.mark.full
def test_adapters(server: Server, tmp_path: Path) -> None:
    output, found = report(server, tmp_path / "a.json", "adapters", "--count", "3", "--rank", "2")
    summary = found["summary"]
    assert sum(summary["resident_before"].values()) == 3
    assert summary["import_ms"]["count"] == 3
    assert summary["first_token_ms"]["count"] + summary["resident_before"].get("device", 0) == 3
    assert "disk to first token" in output
    assert server.command("adapters", "list", "--json") == ""


def test_failing_requests_are_told(server: Server) -> None:
    with pytest.raises(AssertionError, match="No request succeeded: HTTP 404"):
        server.command("bench", "serving", "--adapter", "nobody", "--base-url", server.url)
    with pytest.raises(AssertionError, match="error: 'zip' is not a distribution"):
        server.command("bench", "serving", "--distribution", "zip", "--base-url", server.url)
