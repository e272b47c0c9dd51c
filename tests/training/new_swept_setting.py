"""A process in which one more setting can be swept. Arguments: a base and a directory. It prints what came of it."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from tenora.training import settings


def main(base: Path, directory: Path) -> None:
    """Declare it before anything is made of the declaration, then ask for it and train."""
    declared = cast("dict[str, settings.Setting]", settings.RUN)
    declared["warmup_ratio"] = replace(declared["warmup_ratio"], swept=9)

    import torch

    from tenora.api.schemas.fine_tuning import JobCreateRequest
    from tenora.api.schemas.jobs import TrialObject
    from tenora.control.gate.lineage import settings_of
    from tenora.control.jobs.preparation import Preparation, prepare, spec_of
    from tenora.control.jobs.requests import check_request
    from tenora.control.jobs.shape import Limits
    from tenora.control.jobs.sources import Source
    from tenora.control.jobs.sweeps import trials_csv
    from tenora.errors import InvalidRequestError
    from tenora.model.loading import load_decoder
    from tenora.model.tokenizer import Tokenizer
    from tenora.training.events import FinishedEvent, TrialEvent
    from tests.data.rows import chat, write_lines
    from tests.training.runs import TrainingRun, events_of

    limits = Limits(base_id="tiny", max_rank=16, max_model_len=256, target_modules=("q_proj", "v_proj"))

    def asked(**sweep: Any) -> Any:
        body = {"model": "tiny", "training_file": "file-1", "n_epochs": 1, "batch_size": 8, "sweep": sweep}
        return check_request(JobCreateRequest.model_validate(body).to_request(), limits)

    rows = write_lines(directory / "rows.jsonl", [chat(f"What is {n}?", "quick brown fox") for n in range(60)])
    job = Preparation(
        *("job", "acme", str(directory / "work")),
        [Source(file="file-1", name="rows")],
        [str(rows)],
        *(None, asked(warmup_ratio=[0.0, 0.9]), None, 0),
    )
    prepared = prepare(job, Tokenizer.load(base), limits, tokens_per_microbatch=256)
    spec = spec_of(json.loads(json.dumps(prepared.plan)), str(directory / "work"), None)
    torch.set_num_threads(1)
    decoder = load_decoder(base, device=torch.device("cpu"), dtype=torch.float32)
    events = events_of(TrainingRun(decoder, spec))
    refused = ""
    try:
        asked(warmup_ratio=[0.5, 2.0])
    except InvalidRequestError as error:
        refused = error.message
    losses = {event.trial: event.valid_loss for event in events if isinstance(event, TrialEvent)}
    told = {
        "refused": refused,
        "shown": prepared.settings,
        "trials": [trial["warmup_ratio"] for trial in prepared.sweep_results or ()],
        "fields": list(TrialObject.model_fields)[:6],
        "csv": trials_csv(prepared.sweep_results or ()).decode().splitlines()[0],
        "losses": losses,
        "lineage": [settings_of(spec, number)["warmup_ratio"] for number in (0, 1)],
        "finished": isinstance(events[-1], FinishedEvent),
    }
    print(json.dumps(told))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
