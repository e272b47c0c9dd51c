"""From files to answers: what a fixed set of jobs and requests makes of a tiny base.

What is noted of it is the same on every processor: what is counted or drawn to the last bit, losses as numbers to be
compared with a tolerance. Not noted are adapters' digests, which hold the last bits of floats.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import torch

from tenora.adapters.ref import AdapterRef
from tenora.control.jobs.preparation import Preparation, Prepared, prepare, spec_of
from tenora.control.jobs.records import JobRequest
from tenora.control.jobs.requests import check_request
from tenora.control.jobs.shape import Limits
from tenora.control.jobs.sources import Source
from tenora.data.dataset import TokenizedDataset
from tenora.engine.messages import SamplingParams
from tenora.model.decoder import Decoder
from tenora.model.loading import load_decoder
from tenora.model.spec import ModelSpec, target_modules
from tenora.model.tokenizer import Tokenizer
from tenora.training.events import EvalEvent, FailedEvent, FinishedEvent, StepEvent, TrainEvent, TrialEvent
from tenora.training.fusion import FusedTraining
from tests.bench.checkouts.fixed_set import JOBS, PAIRS, QUESTIONS, ROWS
from tests.engine.driver import Driver, ref_of

FILES = {"rows": ROWS, "pairs": PAIRS}
NOTED = ("supervised", "settings", "dpo", "sweep")  # the first two are cross-validated, the others hold rows out
REQUESTS = {
    "greedy": {"temperature": 0.0},
    "seeded": {"temperature": 0.9, "top_p": 0.9, "seed": 11},
    "top-k": {"temperature": 1.2, "top_k": 20, "seed": 5},
    "penalties": {"temperature": 0.0, "frequency_penalty": 0.7, "repetition_penalty": 1.3},
}
SEED = 9  # of jobs that name none; the service would draw one


class FixedAnswers:
    """Asks one base for everything, in one order."""

    def __init__(self, base: Path, work: Path) -> None:
        self._work = work
        self._tokenizer = Tokenizer.load(base)
        self._decoder = load_decoder(base, device=torch.device("cpu"), dtype=torch.float32)
        names = dict.fromkeys(target.name for target in target_modules(ModelSpec.from_directory(base)))
        self._limits = Limits(base_id="tiny", max_rank=64, max_model_len=512, target_modules=tuple(names))
        for name, rows in FILES.items():
            (work / f"{name}.jsonl").write_bytes(b"\n".join(msgspec.json.encode(row) for row in rows))

    def items(self) -> Iterator[tuple[str, Any]]:
        """Names and what is noted: of each job its preparation, its run, and what its adapter answers."""
        yield "base", self._answers(self._decoder, None)
        for name in NOTED:
            prepared, preparation = self._prepare(name, JOBS[name])
            yield f"{name}: prepared", _noted(prepared)
            events = list(self._train(prepared, preparation.workdir))
            yield f"{name}: trained", [noted for event in events if (noted := _numbers(event)) is not None]
            finished = events[-1]
            assert isinstance(finished, FinishedEvent), finished
            yield f"{name}: answers", self._answers(self._decoder, ref_of(Path(finished.path)))

    def _prepare(self, name: str, fields: dict[str, Any]) -> tuple[Prepared, Preparation]:
        file = "pairs" if name == "dpo" else fields.get("training_file", "rows")
        request = JobRequest(**{"model": "tiny", **fields, "training_file": file})
        job = Preparation(
            job_id=name,
            tenant_id="tenant",
            workdir=self._work / name,
            sources=[Source(file=file, name=file)],
            paths=[self._work / f"{file}.jsonl"],
            validation_path=None,
            asked=check_request(request, self._limits),
            parent=None,
            seed=SEED if request.seed is None else request.seed,
        )
        return prepare(job, self._tokenizer, self._limits, tokens_per_microbatch=512), job

    def _train(self, prepared: Prepared, workdir: Path) -> Iterator[TrainEvent]:
        training = FusedTraining(self._decoder)
        training.start(spec_of(prepared.plan, workdir, None))
        yield from (event for event in training if event is not None)

    def _answers(self, decoder: Decoder, adapter: AdapterRef | None) -> dict[str, list[list[int]]]:
        """Tokens, by request and question."""
        driver = Driver(decoder)
        try:
            return {
                name: [
                    driver.tokens(
                        self._tokenizer.encode_chat([{"role": "user", "content": question}]),
                        SamplingParams(max_tokens=12, **fields),
                        adapter,
                    )
                    for question in QUESTIONS
                ]
                for name, fields in REQUESTS.items()
            }
        finally:
            driver.close()


def _noted(prepared: Prepared) -> dict[str, Any]:
    return {
        "plan": {name: prepared.plan[name] for name in ("seed", "split_seed", "folds", "general_text")},
        "shown": [prepared.hyperparameters, prepared.lora, prepared.settings, prepared.sweep_results],
        "rows": [
            [None if rows is None else _digest(rows) for rows in (task.train, task.valid)] for task in prepared.tasks
        ],
    }


def _digest(rows: TokenizedDataset) -> dict[str, Any]:
    """How many there are and how much of them is learned, their lines in order, and SHA-256 of all that is stored."""
    arrays = ((rows.tokens, "<i4"), (rows.weights, "u1"), (rows.offsets, "<i8"), (rows.lines, "<i8"))
    content = b"".join(array.astype(kind).tobytes() for array, kind in arrays)
    return {
        "examples": rows.examples,
        "learned": rows.num_trained,
        "lines": rows.lines.tolist(),
        "sha256": hashlib.sha256(content).hexdigest(),
    }


def _numbers(event: TrainEvent) -> dict[str, Any] | None:
    """What is noted of an event of a run; None of those that add nothing."""
    match event:
        case StepEvent():
            whole, floats = (event.step, event.trained_tokens), (event.train_loss, event.grad_norm, event.learning_rate)
        case EvalEvent():
            whole, floats = (event.step, event.best), (event.valid_loss, event.general_loss)
        case TrialEvent():
            whole, floats = (event.trial, event.status, event.step, event.trained_tokens), (event.valid_loss,)
        case FinishedEvent():
            whole, floats = (event.step, event.steps, event.trained_tokens, event.trial), (event.valid_loss,)
        case FailedEvent():
            raise AssertionError(event.message)
        case _:
            return None
    rounded = [float(f"{number:.6g}") for number in floats if number is not None]
    return {"event": type(event).__name__, "whole": list(whole), "floats": rounded}
