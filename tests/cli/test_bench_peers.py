"""The runners of `tests/bench` without servers and peers: order, ratios, the protocol with a worker, memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tenora.cli.bench.exchange import Sample
from tenora.cli.bench.load import Load
from tests.bench.peers import __main__ as peers
from tests.bench.peers import side_by_side, worker
from tests.bench.peers.environments import ENVIRONMENTS, ready
from tests.bench.peers.side_by_side import Result
from tests.bench.serving import cases, fixture, quiet
from tests.bench.serving.memory import memory

ECHO = """
import json, os, sys
settings = json.loads(sys.argv[1])
print(json.dumps({"ready": True}), flush=True)
for line in sys.stdin:
    ask = json.loads(line)
    if ask["batch"] == 99: sys.exit(7)
    # A peer of a known speed: 0.1 s for the prompt, 0.01 s a token.
    print(json.dumps({"seconds": 0.1 + 0.01 * ask["new_tokens"], "adapters": ask["adapters"]}), flush=True)
"""


def load_of(tokens: int, seconds: float) -> Load:
    return Load([Sample("m", "", 0.0, [0.1], 1, tokens)], seconds, 0.0)


def result(dtype: str, theirs: float, ours: float, *, adapters: bool = True, peer: str = "vllm") -> Result:
    return Result(peer, dtype, 8, adapters, ours / theirs, theirs, ours, 3)


@pytest.fixture
def echo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> worker.Worker:
    (tmp_path / "echo_worker.py").write_text(ECHO)
    monkeypatch.setattr(worker, "WORKERS", tmp_path)
    return worker.Worker(Path(sys.executable), "echo", {"threads": 1}, tmp_path / "log")


def test_sides_take_turns() -> None:
    order: list[str] = []

    def side(name: str, rate: float) -> Load:
        order.append(name)
        return load_of(100, 100 / rate + len(order) * 1e-9)

    done = fixture.interleaved(3, a=lambda: side("a", 50.0), b=lambda: side("b", 100.0))
    assert "".join(order) == "baabbaab"
    assert {name: len(loads) for name, loads in done.items()} == {"a": 3, "b": 3}
    assert fixture.pair_ratio(done["a"], done["b"]) == pytest.approx(0.5)


def test_the_yardstick_is_the_peer_at_its_best() -> None:
    found = [result("bfloat16", 10, 90), result("float32", 30, 90), result("float32", 60, 200, adapters=False)]
    assert [(best.dtype, best.ratio) for best in side_by_side.yardsticks(found)] == [
        ("float32", 3.0),
        ("float32", pytest.approx(200 / 60)),
    ]
    assert side_by_side.against_base(found) == {"8": 1.5}
    assert side_by_side.against_base([result("float32", 1, 2, peer="peft")]) == {}


def test_a_worker_answers_and_ends(echo: worker.Worker) -> None:
    with echo as child:
        assert child.ask(batch=1, adapters=True, new_tokens=10)["seconds"] == pytest.approx(0.2)
    assert child._process.returncode is not None


def test_a_worker_that_ends_is_named(echo: worker.Worker) -> None:
    with pytest.raises(worker.WorkerError, match=r"status 7.*log"), echo as child:
        child.ask(batch=99, adapters=True, new_tokens=1)


class Ours:
    """Tenora at 200 tokens/s."""

    def load(self, models: list[Any], **options: Any) -> Load:
        return load_of(200, 1.0)


@pytest.mark.parametrize(("limit", "repeats", "extrapolated"), [(60.0, 3, False), (0.2, 1, True)])
def test_slow_peers_are_measured_less(
    echo: worker.Worker, tmp_path: Path, limit: float, repeats: int, extrapolated: bool
) -> None:
    plan = side_by_side.Plan(tmp_path, None, 1, (2,), ("float32",), (True,), 8, 40, 3, limit)  # type: ignore[arg-type]
    with echo as child:
        found = side_by_side._compare(plan, Ours(), ["a", "b"], child, "echo", "f", 2, adapters=True)  # type: ignore[arg-type]
    assert found.peer_tokens_per_s == pytest.approx(2 * 40 / 0.5)
    assert found.ratio == pytest.approx(200 / 160)
    assert found.extrapolated is extrapolated
    assert found.repeats == repeats
    json.dumps(found.row)


def test_an_environment_of_other_requirements_is_not_ready(tmp_path: Path) -> None:
    (tmp_path / "vllm").mkdir()
    assert not ready(tmp_path, "vllm")
    (tmp_path / "vllm" / ".ready").write_text(repr(ENVIRONMENTS["vllm"]))
    assert ready(tmp_path, "vllm")
    (tmp_path / "vllm" / ".ready").write_text(repr(ENVIRONMENTS["peft"]))
    assert not ready(tmp_path, "vllm")


def test_a_peer_that_is_not_there_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert peers.main(["run", "--only", "vllm,llama", "--work", str(tmp_path)]) == 1
    assert capsys.readouterr().err.splitlines() == ["vllm: is not set up", "llama: is not set up"]
    with pytest.raises(SystemExit):
        peers.main(["run", "--only", "gpt"])


def test_memory_of_this_process() -> None:
    found = memory({"a": os.getpid()}, 0, adapter_bytes=2**20, kv_bytes=2**21)
    assert found["a_mib"] == found["total_mib"] > 20
    assert found["rest_beyond_float32_weights_mib"] == pytest.approx(found["total_mib"] - 3)


def test_a_neighbour_is_noticed_and_a_child_is_not() -> None:
    with quiet.Quiet() as measured:
        child = subprocess.Popen([sys.executable, "-c", "while True: pass"])
        while quiet.own_seconds() - measured._own < 0.5:  # all of it the child's, which is ours
            time.sleep(0.01)
    child.kill()
    child.wait()
    assert measured.foreign >= 0
    measured = quiet.Quiet()
    with measured:
        time.sleep(0.1)
        seconds = time.monotonic() - measured._started
        measured._all -= 1000 * seconds  # as if others had kept a thousand cores busy
    assert measured.foreign > 100


def test_the_workers_need_nothing_of_ours(repo_root: Path) -> None:
    for path in (repo_root / "tests/bench/peers/workers").glob("*_worker.py"):
        assert "tenora" not in path.read_text()


@pytest.mark.parametrize("module", ["tests.bench.peers", "tests.bench.serving.cases"])
def test_the_runners_explain_themselves(repo_root: Path, module: str) -> None:
    command = [sys.executable, "-m", module, "--help"]
    done = subprocess.run(command, cwd=repo_root, capture_output=True, text=True, check=True)
    assert "--json" in done.stdout


def test_every_case_is_described(repo_root: Path) -> None:
    text = (repo_root / "tests/bench/README.md").read_text()
    assert [name for name in cases.CASES if f"`{name}`" not in text] == []
    assert all(case.__doc__ for case in cases.CASES.values())
