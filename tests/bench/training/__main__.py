"""`python -m tests.bench.training --model DIR [CASE …]`: training beside PEFT, and beside serving. Ratios first.

Whatever two things a ratio compares were measured in turn, in this run, on this machine. PEFT computes in the better of
its types here (float32 without bfloat16 instructions).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tenora.cli.bench.figures import head, median
from tenora.data.dataset import TokenizedDataset, tokenize_file
from tenora.model.decoder import Decoder
from tenora.model.tokenizer import Tokenizer
from tenora.training.recipes import resolve_hyperparameters
from tests.bench.serving.fixture import default_threads, end_in_order
from tests.bench.serving.quiet import NOISY, Quiet
from tests.bench.training import ours
from tests.bench.training.co_serving import co_serving
from tests.bench.training.peft_loop import PeftLoop

DATA = Path(__file__).parents[1] / "data"


@dataclass
class Setting:
    """What a case is given."""

    model: Path
    threads: int
    work: Path
    rows: int
    dtype: str
    data: Path = DATA
    _decoder: Decoder | None = None
    _number: int = 0

    @property
    def decoder(self) -> Decoder:
        """Ours, loaded once."""
        if self._decoder is None:
            self._decoder = ours.load(self.model, self.threads)
        return self._decoder

    def place(self) -> Path:
        """A directory of its own for the next run."""
        self._number += 1
        return self.work / f"run-{self._number}"

    @property
    def sets(self) -> list[str]:
        """Names of the data sets: pairs of a file to train on and one to measure on."""
        found = [path.name.removesuffix("_train.jsonl") for path in sorted(self.data.glob("*_train.jsonl"))]
        return [name for name in found if (self.data / f"{name}_valid.jsonl").exists()]

    @property
    def longest(self) -> str:
        """The set with the longest file, which the cases that measure speed take."""
        return max(self.sets, key=lambda name: (self.data / f"{name}_train.jsonl").stat().st_size)

    def rows_of(self, name: str, first: int, count: int) -> Path:
        """Rows of a real file, tokenized."""
        path = self.work / f"{name}-{first}-{count}.npz"
        if not path.exists():
            whole = tokenize_file(self.data / f"{name}.jsonl", Tokenizer.load(self.model), max_length=2048)
            rows: TokenizedDataset = whole.select(np.arange(first, min(first + count, len(whole))))
            rows.save(path)
        return path


def one_job(setting: Setting, peft: PeftLoop) -> dict[str, Any]:
    """One job of chats, defaults, one epoch: real tokens per second of the steps."""
    name = setting.longest
    train, valid = setting.rows_of(f"{name}_train", 0, setting.rows), setting.rows_of(f"{name}_valid", 0, 8)
    rows = TokenizedDataset.load(train)
    found = ours.train(setting.decoder, [ours.spec("a", train, valid, setting.place(), n_epochs=1)])
    theirs = peft.run(train=train, dtype=setting.dtype, batch_size=16)
    mine = rows.num_tokens / found.stepping
    return {
        "ratio": mine / theirs["tokens_per_second"],
        "tokens_per_s": mine,
        "peft_tokens_per_s": theirs["tokens_per_second"],
        "rows": len(rows),
    }


def eight_jobs(setting: Setting, peft: PeftLoop) -> dict[str, Any]:
    """8 jobs of 8 tenants, an eighth of the rows each, one epoch: wall time against 8 PEFT runs one after the other.

    Both measure 4 held-out rows before and after and write the adapter; PEFT loads the base for each, ours is resident.
    """
    count = max(setting.rows // 8, 4)
    name = setting.longest
    trains = [setting.rows_of(f"{name}_train", number * count, count) for number in range(8)]
    valid = setting.rows_of(f"{name}_valid", 0, 4)
    place = setting.place()
    specs = [ours.spec(f"job-{number}", train, valid, place, n_epochs=1) for number, train in enumerate(trains)]
    found = ours.train(setting.decoder, specs)
    theirs = [peft.run(train=train, valid=valid, dtype=setting.dtype, batch_size=8) for train in trains]
    wall = sum(run["wall"] for run in theirs)
    return {
        "ratio": wall / found.seconds,
        "seconds": found.seconds,
        "peft_seconds": wall,
        "peft_seconds_of_steps": sum(run["seconds"] for run in theirs),
        "rows_each": count,
    }


def sweep(setting: Setting, peft: PeftLoop) -> dict[str, Any]:
    """12 points, 3 epochs, halving: wall time against 12 full PEFT runs, of which one was run and counted 12 times.

    Both measure 8 held-out rows before and after each epoch, or at each rung.
    """
    count = max(setting.rows // 8, 8)
    name = setting.longest
    train, valid = setting.rows_of(f"{name}_train", 0, count), setting.rows_of(f"{name}_valid", 0, 8)
    trials = tuple(
        {"rank": rank, "alpha": 2.0 * rank, "learning_rate": rate, "n_epochs": 3, "batch_size": 8}
        for rank in (4, 8, 16)
        for rate in (1e-4, 3e-4, 5e-4, 1e-3)
    )
    found = ours.train(setting.decoder, [ours.spec("s", train, valid, setting.place(), trials=trials)])
    one = peft.run(train=train, valid=valid, dtype=setting.dtype, batch_size=8, epochs=3)
    theirs = 12 * one["wall"]
    winner = found.finished["s"]
    return {
        "ratio": theirs / found.seconds,
        "seconds": found.seconds,
        "peft_seconds": theirs,
        "peft_seconds_of_steps": 12 * one["seconds"],
        "rows": count,
        "winner": winner.trial,
        "valid_loss": winner.valid_loss,
    }


def quality(setting: Setting, peft: PeftLoop) -> dict[str, Any]:
    """Held-out loss of a job's defaults against PEFT's best of three learning rates, as many epochs, every data set."""
    result: dict[str, Any] = {}
    for name in setting.sets:
        train, valid = setting.rows_of(f"{name}_train", 0, setting.rows), setting.rows_of(f"{name}_valid", 0, 40)
        rows = TokenizedDataset.load(train)
        auto = resolve_hyperparameters(len(rows), rows.num_tokens, {})
        same = {"n_epochs": auto.n_epochs, "batch_size": auto.batch_size}
        specs = [ours.spec(name, train, valid, setting.place(), learning_rate=auto.learning_rate, **same)]
        finished = ours.train(setting.decoder, specs).finished[name]
        runs = [
            peft.run(
                train=train, valid=valid, epochs=auto.n_epochs, batch_size=auto.batch_size, learning_rate=rate,
                dtype=setting.dtype, parts=4,
            )
            for rate in (2e-4, 5e-4, 1e-3)
        ]  # fmt: skip
        print(f"  {name}: ours {finished.valid_loss}, PEFT {[run['losses'] for run in runs]}", flush=True)
        best = min(min(run["losses"][1:]) for run in runs)
        result |= {
            f"{name}_ratio": finished.valid_loss / best,
            f"{name}_ours": finished.valid_loss,
            f"{name}_base": finished.base_loss,
            f"{name}_peft_best": best,
            f"{name}_epochs": auto.n_epochs,
        }
    return result


def co_served(setting: Setting, peft: PeftLoop) -> dict[str, Any]:
    """8 streams while a job trains: gaps between tokens, training speed, the last step to the first token, memory."""
    del peft
    return co_serving(setting.model, setting.threads, setting.work, setting.data / f"{setting.longest}_train.jsonl")


CASES: dict[str, Callable[[Setting, PeftLoop], dict[str, Any]]] = {
    "one-job": one_job,
    "eight-jobs": eight_jobs,
    "sweep": sweep,
    "co-serving": co_served,
    "quality": quality,
}


def main(arguments: list[str]) -> int:
    """Run the cases that are named, or all but `quality`, which takes two hours."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.training", description=__doc__)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face directory of the base")
    parser.add_argument("--data", type=Path, default=DATA, help="directory of NAME_train.jsonl, NAME_valid.jsonl")
    parser.add_argument("--rows", type=int, default=400)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--dtype", default="float32", help="of PEFT")
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args(arguments)
    if unknown := set(options.cases) - set(CASES):
        parser.error(f"no such case: {', '.join(sorted(unknown))}")
    if not Setting(options.model, 1, options.data, 0, "", options.data).sets:
        parser.error(f"{options.data} holds no pair of NAME_train.jsonl and NAME_valid.jsonl")
    names = options.cases or [name for name in CASES if name != "quality"]
    report: dict[str, Any] = {**head("training", {"rows": options.rows, "threads": options.threads}), "cases": {}}
    with tempfile.TemporaryDirectory(prefix="tenora-bench-") as work, PeftLoop(options.model, options.threads) as peft:
        setting = Setting(options.model, options.threads, Path(work), options.rows, options.dtype, options.data)
        for name in names:
            print(f"{name}: {(CASES[name].__doc__ or '').splitlines()[0]}", flush=True)
            runs = []
            for _ in range(options.repeats):
                with Quiet() as quiet:
                    runs.append({**CASES[name](setting, peft), "foreign_cores": quiet.foreign})
            found = {
                label: median([run[label] for run in runs]) if isinstance(value, float) else value
                for label, value in runs[0].items()
            }
            report["cases"][name] = {"median": found, "runs": runs}
            for label, value in found.items():
                print(f"  {label:32} {value:.4g}" if isinstance(value, float) else f"  {label:32} {value}", flush=True)
            if quiet.foreign > NOISY:
                print(f"  NOISY: other programs kept {quiet.foreign:.2f} cores busy; measure again", flush=True)
            if options.json:
                options.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    end_in_order()
    sys.exit(main(sys.argv[1:]))
