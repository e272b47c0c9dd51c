"""A process in which there is one more method. Arguments: a base and a directory. It prints what came of it as JSON."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import msgspec
from pydantic import ValidationError

from tenora.training.methods.method import Figures, Float64Array, Learner, Learning, Method, Unit
from tenora.training.methods.table import METHODS, register
from tenora.training.packing import PackedRows
from tenora.training.settings import Setting

if TYPE_CHECKING:
    from torch import Tensor

    from tenora.training.step import TokenLosses


class Smoothed(Method):
    """Toy: the loss of a token counts 1 - epsilon of itself, a row counts as one."""

    name = "label_smoothing"
    summary = "learns a little less"
    learning_rate = 1e-3
    settings = (Setting("How much less.", name="epsilon", least=0, most=1, auto="0.1", default=0.1),)
    unit = Unit("nats per answer", examples="answers")
    metrics = MappingProxyType({"smoothed": "How much is taken away."})

    def learning(self, learner: Learner) -> Learning:
        return SmoothedLearning(learner)

    def example_losses(self, settings: Mapping[str, Any], rows: Float64Array, start: Float64Array) -> Float64Array:
        return (1 - settings["epsilon"]) * rows[:, 0]


@dataclass(frozen=True)
class SmoothedLoss:
    share: float
    needs_losses = False

    def coefficients(self, part: PackedRows, losses: Tensor) -> Tensor:
        return losses.new_full((len(part.targets),), self.share)


class SmoothedLearning(Learning):
    def objective(self, parts: Sequence[PackedRows]) -> SmoothedLoss:
        return SmoothedLoss((1 - self._epsilon) / sum(len(part.targets) for part in parts))

    def measure(self, step: int, parts: Sequence[PackedRows], found: Sequence[TokenLosses]) -> Figures:
        return Figures(float(found[0].loss.mean()), 0.0, {"smoothed": self._epsilon})

    @property
    def _epsilon(self) -> float:
        epsilon: float = self.learner.spec.method_settings["epsilon"]
        return epsilon


register(Smoothed())


def main(base: Path, directory: Path) -> None:
    import torch

    from tenora.api.schemas.evaluation import ComparisonObject
    from tenora.api.schemas.fine_tuning import JobCreateRequest
    from tenora.api.schemas.job_parts import EventData
    from tenora.control.gate.held_out import HeldOutExamples
    from tenora.control.gate.lineage import settings_of
    from tenora.control.jobs.preparation import Preparation, prepare, spec_of
    from tenora.control.jobs.requests import check_request
    from tenora.control.jobs.shape import Limits
    from tenora.control.jobs.sources import Source
    from tenora.control.worker.log import eval_line, metrics_csv, step_line
    from tenora.model.loading import load_decoder
    from tenora.model.tokenizer import Tokenizer
    from tenora.training.events import EvalEvent, FinishedEvent, StepEvent
    from tests.data.rows import chat, write_lines
    from tests.training.runs import TrainingRun, events_of

    def body(kind: str, **hyperparameters: Any) -> dict[str, Any]:
        method = {"type": kind, kind: {"hyperparameters": hyperparameters}}
        return {"model": "tiny", "training_file": "file-1", "method": method}

    refused = []
    for wrong in (body("label_smoothing", epsilon=2), body("supervised", epsilon=0.5)):
        try:
            JobCreateRequest.model_validate(wrong)
        except ValidationError as error:
            refused.append(".".join(map(str, error.errors()[0]["loc"])))
    request = JobCreateRequest.model_validate(body("label_smoothing", epsilon=0.25, n_epochs=2)).to_request()
    limits = Limits(base_id="tiny", max_rank=16, max_model_len=256, target_modules=("q_proj", "v_proj"))
    asked = check_request(request, limits)
    rows = write_lines(
        directory / "rows.jsonl", [chat(f"What is {n}?", "quick brown fox " * (n % 5 + 1)) for n in range(60)]
    )
    job = Preparation(
        "job", "acme", str(directory / "work"), [Source(file="file-1", name="rows")], [str(rows)], None, asked, None, 0
    )
    prepared = prepare(job, Tokenizer.load(base), limits, tokens_per_microbatch=256)
    stored = json.loads(json.dumps(prepared.plan))
    spec = spec_of(stored, str(directory / "work"), None)
    decoder = load_decoder(base, device=torch.device("cpu"), dtype=torch.float32)
    torch.set_num_threads(1)
    events = events_of(TrainingRun(decoder, spec))
    finished = events[-1]
    if not isinstance(finished, FinishedEvent) or finished.held_out is None:
        raise SystemExit(str(finished))
    again = events_of(TrainingRun(decoder, spec))[-1]
    held_out = HeldOutExamples.load(spec, finished.held_out)
    found = held_out.against_start()
    if found is None or not isinstance(again, FinishedEvent):
        raise SystemExit("nothing was measured")
    lines = [step_line(event)[1] for event in events if isinstance(event, StepEvent)]
    lines += [eval_line(event, 0)[1] for event in events if isinstance(event, EvalEvent)]
    table = metrics_csv(lines, metrics=METHODS[spec.method].metrics).decode()
    told = {
        "refused": refused,
        "schema": json.dumps(JobCreateRequest.model_json_schema()),
        "asked": asked.hyperparameters,
        "shown": prepared.hyperparameters,
        "lineage": settings_of(spec, None),
        "learning_rate": spec.learning_rate,
        "events": [msgspec.to_builtins(event)["type"] for event in events],
        "metrics": next(event for event in events if isinstance(event, StepEvent)).metrics,
        "digest": digest(finished.path),
        "resumed": digest(again.path),
        "unit": found.unit,
        "units": ComparisonObject.model_json_schema()["properties"]["unit"]["enum"],
        "comparison": str(found),
        "event": list(EventData.model_fields),
        "table": table.splitlines(),
        "card_loss": found.adapter_loss,
        "plain_loss": sum(finished.held_out.adapter) / len(finished.held_out.adapter),
    }
    print(json.dumps(told))


def digest(path: str) -> str:
    return hashlib.sha256((Path(path) / "adapter_model.safetensors").read_bytes()).hexdigest()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
