"""The parts of `tenora bench`: statistics, distributions, events, pictures, ratios, shapes of reports."""

from __future__ import annotations

import asyncio
import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tenora.adapters.peft_format import read_adapter
from tenora.cli.bench import compare, figures, load, plot, serving, subjects, workload
from tenora.cli.bench.exchange import Address, EventCounter, Sample
from tenora.cli.bench.workload import Ask, Distribution
from tenora.errors import InvalidRequestError
from tenora.model.spec import ModelSpec, table_rows

EVENTS = (
    b'data: {"choices":[{"text":"a"}]}\n\n: still here\n\ndata: {"choices":[{"text":"b\\n\\n"}]}\n\n'
    b'data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":2}}\n\ndata: [DONE]\n\n'
)


# ---- statistics


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=60), st.floats(0, 100))
def test_percentiles_are_numpys(values: list[float], percent: float) -> None:
    assert figures.percentile(values, percent) == pytest.approx(np.percentile(values, percent), rel=1e-9, abs=1e-6)


def test_figures_of_nothing() -> None:
    assert math.isnan(figures.median([]))
    assert figures.spread([]) == {"count": 0, "mean": None, "p50": None, "p95": None, "p99": None, "max": None}
    json.dumps(figures.head("serving", {}), allow_nan=False)


def test_spread_is_scaled() -> None:
    spread = figures.spread([0.001, 0.002, 0.003], scale=1000)
    assert spread["count"] == 3
    assert [spread[name] for name in ("mean", "p50", "max")] == pytest.approx([2, 2, 3])


# ---- workload


def drawn(text: str, adapters: int, requests: int, seed: int = 0) -> list[int | None]:
    return Distribution.parse(text).draw(adapters, requests, seed)


def test_plain_distributions() -> None:
    assert drawn("base", 0, 3) == [None, None, None]
    assert drawn("identical", 5, 3) == [0, 0, 0]
    assert drawn("distinct", 3, 7) == [0, 1, 2, 0, 1, 2, 0]
    uniform = Counter(drawn("uniform", 4, 4000))
    assert set(uniform) == {0, 1, 2, 3}
    assert min(uniform.values()) > 850


@pytest.mark.parametrize("exponent", [0.5, 1.1, 2.0])
def test_zipf_follows_its_law(exponent: float) -> None:
    adapters, requests = 50, 40_000
    weights = np.arange(1, adapters + 1, dtype=float) ** -exponent
    expected = requests * weights / weights.sum()
    found = Counter(drawn(f"zipf:{exponent}", adapters, requests, seed=3))
    for adapter in range(5):
        assert found[adapter] == pytest.approx(expected[adapter], rel=0.1)
    assert set(found) <= set(range(adapters))


def test_draws_repeat_with_their_seed() -> None:
    assert drawn("zipf:1.1", 100, 50, seed=7) == drawn("zipf:1.1", 100, 50, seed=7)
    assert drawn("zipf:1.1", 100, 50, seed=7) != drawn("zipf:1.1", 100, 50, seed=8)


@pytest.mark.parametrize("text", ["", "zipf", "zipf:", "zipf:0", "zipf:-1", "zipf:nan", "zipf:x", "distinct:2", "all"])
def test_what_is_no_distribution(text: str) -> None:
    with pytest.raises(InvalidRequestError, match="is not a distribution"):
        Distribution.parse(text)


def test_a_distribution_needs_adapters() -> None:
    with pytest.raises(InvalidRequestError, match="at least one adapter"):
        drawn("distinct", 0, 1)


def test_prompts_have_their_length_and_share_no_beginning() -> None:
    made = workload.prompts(200, 64, vocabulary=256, seed=1)
    assert {len(prompt) for prompt in made} == {64}
    assert len({prompt[:16] for prompt in made}) == 200
    assert all(100 <= token < 256 for prompt in made for token in prompt)
    assert max(max(prompt) for prompt in workload.prompts(5, 9, vocabulary=20, seed=1)) < 20


def test_arrivals_have_their_rate() -> None:
    assert workload.arrivals(3, 0, 0) == [0, 0, 0]
    times = workload.arrivals(4000, 20.0, 1)
    assert times == sorted(times)
    assert times[-1] == pytest.approx(200, rel=0.1)


def test_rounds_have_prompts_of_their_own() -> None:
    plan = serving.Workload(2, 4, 16, 3, Distribution.parse("distinct"), 0.0, 2, 0, 5, 1000)
    first, second = plan.asks("base", ["a", "b", "c"], 0), plan.asks("base", ["a", "b", "c"], 1)
    assert [ask.model for ask in first] == ["a", "b", "c", "a"]
    assert {ask.prompt for ask in first}.isdisjoint(ask.prompt for ask in second)


# ---- events


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 1000])
def test_events_are_counted_wherever_they_are_cut(size: int) -> None:
    counter = EventCounter()
    counts = [counter.feed(EVENTS[start : start + size]) for start in range(0, len(EVENTS), size)]
    assert sum(counts) == 3  # the text of the second holds no empty line: JSON writes it as \\n
    assert counter.done
    assert json.loads(counter.last)["usage"]["completion_tokens"] == 2


def test_an_error_event_is_kept() -> None:
    counter = EventCounter()
    assert counter.feed(b'data: {"error": {"message": "no room"}}\n\n') == 0
    assert (counter.done, json.loads(counter.error)["error"]["message"]) == (False, "no room")


def answer(status: str, content: bytes) -> bytes:
    """A chunked HTTP answer."""
    head = f"HTTP/1.1 {status}\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
    return head + b"%x\r\n%s\r\n0\r\n\r\n" % (len(content), content)


async def asked(reply: Callable[[int], bytes], count: int = 1, concurrency: int = 1) -> tuple[load.Load, list[bytes]]:
    """What the load generator makes of a server that answers its i-th request with `reply(i)`."""
    seen: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while head := await reader.readuntil(b"\r\n\r\n") if not reader.at_eof() else b"":
            length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
            seen.append(head + await reader.readexactly(length))
            writer.write(reply(len(seen) - 1))
            await writer.drain()
            if reply(len(seen) - 1) == b"":
                break
        writer.close()

    async def quiet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await serve(reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    server = await asyncio.start_server(quiet, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    asks = [Ask(f"m{index}", (5, 6, 7), 2) for index in range(count)]
    done = await asyncio.to_thread(load.run, Address.of(f"http://127.0.0.1:{port}", "key"), asks, concurrency)
    server.close()
    await server.wait_closed()
    return done, seen


async def test_a_stream_is_measured() -> None:
    done, seen = await asked(lambda _: answer("200 OK", EVENTS), count=5, concurrency=2)
    assert [sample.error for sample in done.samples] == [""] * 5
    assert done.output_tokens == 10
    assert all(len(sample.arrivals) == 2 for sample in done.samples)  # the usage is not a token
    assert all(sample.first_token > 0 and len(sample.gaps) == 1 for sample in done.samples)
    body = json.loads(seen[0].partition(b"\r\n\r\n")[2])
    assert (body["prompt"], body["max_tokens"], body["min_tokens"], body["ignore_eos"]) == ([5, 6, 7], 2, 2, True)
    assert b"authorization: bearer key" in seen[0].lower()


@pytest.mark.parametrize(
    ("reply", "error"),
    [
        (answer("404 Not Found", b'{"error": {"message": "no such model"}}'), "HTTP 404: no such model"),
        (answer("500 Oh", b"<html>"), "HTTP 500: <html>"),
        (answer("200 OK", EVENTS.partition(b": still")[0] + b'data: {"error": {"message": "the end"}}\n\n'), "the end"),
        (answer("200 OK", EVENTS.replace(b"data: [DONE]\n\n", b"")), "before [DONE]"),
        (answer("200 OK", b'data: {"choices": []}\n\ndata: [DONE]\n\n'), "usage"),
        (b"nonsense\r\n\r\n", "not HTTP"),
        (b"", "the connection broke"),
    ],
)
async def test_failures_are_counted_not_raised(reply: bytes, error: str) -> None:
    done, _ = await asked(lambda index: reply if index == 0 else answer("200 OK", EVENTS), count=2)
    assert error in done.samples[0].error
    assert done.samples[1].error == ""
    summary = serving.summarise([done])
    assert (summary["requests"], summary["errors"]) == (1, 1)


# ---- reports


def made_load(*arrivals: list[float], seconds: float = 2.0) -> load.Load:
    samples = [Sample("m", "", 0.0, times, 4, len(times)) for times in arrivals]
    return load.Load(samples, seconds, 0.1)


def test_a_summary_of_known_times() -> None:
    summary = serving.summarise([made_load([0.5, 0.6, 0.8]), made_load([0.1, 0.2, 0.3], seconds=1.0)])
    assert summary["output_tokens_per_s"] == pytest.approx((1.5 + 3.0) / 2)
    assert summary["total_tokens_per_s"] == pytest.approx((3.5 + 7.0) / 2)
    assert summary["ttft_ms"]["p50"] == pytest.approx(300)
    assert summary["inter_token_ms"]["count"] == 4
    assert summary["inter_token_ms"]["max"] == pytest.approx(200)
    assert summary["per_token_ms"]["p50"] == pytest.approx((150 + 100) / 2)
    assert summary["client_cpu_share"] == pytest.approx(0.2 / 3)
    json.dumps(summary, allow_nan=False)
    assert ("output tokens/s", "2.2") in serving.table(summary) or ("output tokens/s", "2.3") in serving.table(summary)


def test_ratios() -> None:
    a = {"kind": "serving", "parameters": {"seed": 0}, "summary": {"rate": 50.0, "none": None, "zero": 0, "only": 1}}
    b = {"kind": "serving", "parameters": {"seed": 9}, "summary": {"rate": 75, "none": 3, "zero": 4, "errors": {}}}
    assert compare.compare(a, b) == [("summary.rate", 50, 75, 1.5), ("summary.zero", 0, 4, None)]


def test_rows_are_compared_with_their_like() -> None:
    def rows(*items: tuple[int, float]) -> dict[str, Any]:
        return {
            "kind": "kernels",
            "measurements": [{"group": "qkv", "rows": n, "ranks": [8, 16], "us": t} for n, t in items],
        }

    assert compare.compare(rows((1, 2.0), (8, 4.0)), rows((8, 5.0))) == [
        ("measurements[qkv 8 8/16].us", 4.0, 5.0, 1.25)
    ]


def test_what_cannot_be_compared(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match="cannot be compared"):
        compare.compare({"kind": "serving"}, {"kind": "kernels"})
    with pytest.raises(InvalidRequestError, match="no figure in common"):
        compare.compare({"kind": "serving", "a": 1}, {"kind": "serving", "b": 1})
    for text in ("{", "[]", "{}"):
        (tmp_path / "r.json").write_text(text)
        with pytest.raises(InvalidRequestError, match="report"):
            compare.read(tmp_path / "r.json")


def test_the_picture_is_xml_with_a_line_per_panel(tmp_path: Path) -> None:
    target = tmp_path / "p.svg"
    plot.save(target, {"first <token>": [1.0, 2.0, 9.0], "empty": []}, "a & b")
    root = ElementTree.fromstring(target.read_text())
    assert len([element for element in root.iter() if element.tag.endswith("polyline")]) == 1
    assert {"a & b", "first <token>", "empty"} <= {element.text for element in root.iter()}


def test_a_png_needs_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(plot.importlib, "import_module", missing)
    with pytest.raises(InvalidRequestError, match="matplotlib"):
        plot.save(tmp_path / "p.png", {"a": [1.0]}, "x")


# ---- adapters


def test_bfloat16_rounds_to_nearest_even() -> None:
    import torch

    values = np.random.default_rng(0).normal(size=1000).astype(np.float32)
    values[:2] = np.array([0x3F808000, 0x3F818000], dtype=np.uint32).view(np.float32)  # halfway, down and up
    expected = torch.from_numpy(values).to(torch.bfloat16).view(torch.uint16).numpy()
    assert (subjects.as_bfloat16(values) == expected).all()


def test_random_adapters_are_adapters_of_the_base(tiny_base: Path, tmp_path: Path) -> None:
    rows = table_rows(ModelSpec.from_directory(tiny_base))
    targets = rows.modules
    paths = [subjects.write_random_adapter(tmp_path / str(i), targets, rank=3, seed=i // 2) for i in range(3)]
    first = read_adapter(paths[0], rows, max_rank=8)
    assert (first.rank, len(first.modules)) == (3, len(targets))
    assert {module.dtype for module in first.modules.values()} == {"bfloat16"}
    assert all(module.b.any() for module in first.modules.values())
    weights = [(path / "adapter_model.safetensors").read_bytes() for path in paths]
    assert weights[0] == weights[1] != weights[2]
