"""Every field that a job accepts changes the run, says something of its result, or is refused by name: none is ignored.

`tests/training/test_spec_fields.py` goes on from the run's spec to what the run does.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tenora.api.schemas.fine_tuning import JobCreateRequest
from tenora.control.jobs.creation import new_job
from tenora.control.jobs.preparation import Preparation, prepare
from tenora.control.jobs.requests import check_request
from tenora.control.jobs.shape import Limits
from tenora.control.jobs.sources import check_sources, name_sources
from tenora.errors import DatasetError, InvalidRequestError
from tenora.model.tokenizer import Tokenizer
from tenora.training.methods.full import METHOD as FULL
from tests.control.conftest import BASE, MANY_ROWS, ROWS, jsonl
from tests.control.jobs.test_job_methods import PAIRS
from tests.support.schemas import leaves

ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LIMITS = Limits(base_id=BASE, max_rank=64, max_model_len=256, target_modules=ALL_LINEAR)
LONG = {"messages": [{"role": "user", "content": "Say it."}, {"role": "assistant", "content": "long " * 300}]}
FILES = {"many": MANY_ROWS, "few": ROWS, "pairs": PAIRS, "others": ROWS[:9], "long": [*MANY_ROWS[:20], LONG] * 3}

DPO = {"type": "dpo"}
METHODS: Mapping[str, dict[str, Any]] = {
    "single": {"training_file": "many"},
    "few-shot": {"training_file": "few"},
    "sweep": {"training_file": "many", "sweep": {"rank": [2, 4], "learning_rate": {"min": 1e-4, "max": 1e-3}}},
    "dpo": {"training_file": "pairs", "method": DPO},
}


def hyperparameters(name: str, value: Any) -> dict[str, Callable[[str], dict[str, Any]]]:
    """A hyperparameter in each of its places."""
    inner = {"hyperparameters": {name: value}}

    def of_method(kind: str) -> Callable[[str], dict[str, Any]]:
        return lambda _: {"method": {"type": kind, kind: inner}}

    found: dict[str, Callable[[str], dict[str, Any]]] = {f"method.dpo.hyperparameters.{name}": of_method("dpo")}
    if name != "beta":
        found[f"method.supervised.hyperparameters.{name}"] = of_method("supervised")
        found[f"hyperparameters.{name}"] = lambda _: inner
    return found


def same(**fields: Any) -> Callable[[str], dict[str, Any]]:
    return lambda _: fields


CHANGES: Mapping[str, Callable[[str], dict[str, Any]]] = {
    "training_file": lambda method: {"training_file": "pairs" if method == "dpo" else "others"},
    "training_files.file": lambda method: several("pairs" if method == "dpo" else "many"),
    "training_files.weight": lambda method: several("pairs" if method == "dpo" else "many", weight=0.5),
    "training_files.name": lambda method: several("pairs" if method == "dpo" else "many", name="fables"),
    "validation_file": lambda method: {"validation_file": "pairs" if method == "dpo" else "others"},
    "method.type": same(method={"type": "dpo"}),
    **hyperparameters("n_epochs", 7),
    **hyperparameters("batch_size", 3),
    **hyperparameters("learning_rate_multiplier", 0.5),
    **hyperparameters("beta", 0.7),
    "n_epochs": same(n_epochs=7),
    "batch_size": same(batch_size=3),
    "seed": same(seed=99),
    "lora.rank": same(lora={"rank": 5}),
    "lora.alpha": same(lora={"alpha": 3.0}),
    "lora.dropout": same(lora={"dropout": 0.2}),
    "lora.target_modules": same(lora={"target_modules": ["q_proj"]}),
    "lora.use_rslora": same(lora={"use_rslora": True}),
    "lora.lora_plus_ratio": same(lora={"lora_plus_ratio": 16.0}),
    "lora.init": same(lora={"init": "eva"}),
    "lora.eva_rho": same(lora={"eva_rho": 1.5}),
    "adapter.type": same(adapter={"type": "ia3"}),
    "adapter.rank": same(adapter={"type": "dora", "rank": 5}),
    "adapter.alpha": same(adapter={"type": "lora", "alpha": 3.0}),
    "adapter.dropout": same(adapter={"type": "dora", "dropout": 0.2}),
    "adapter.target_modules": same(adapter={"type": "dora", "target_modules": ["q_proj"]}),
    "adapter.use_rslora": same(adapter={"type": "lora", "use_rslora": True}),
    "adapter.lora_plus_ratio": same(adapter={"type": "lora", "lora_plus_ratio": 16.0}),
    "adapter.init": same(adapter={"type": "lora", "init": "eva"}),
    "adapter.eva_rho": same(adapter={"type": "lora", "eva_rho": 1.5}),
    "adapter.reduction_factor": same(adapter={"type": "bottleneck", "reduction_factor": 7}),
    "adapter.non_linearity": same(adapter={"type": "bottleneck", "non_linearity": "relu"}),
    "adapter.placement": same(adapter={"type": "bottleneck", "placement": "pfeiffer"}),
    "adapter.num_virtual_tokens": same(adapter={"type": "prompt", "num_virtual_tokens": 3}),
    "adapter.scaling": same(adapter={"type": "parallel", "scaling": 2.0}),
    "learning_rate": same(learning_rate=3e-3),
    "scheduler": same(scheduler="constant"),
    "warmup_ratio": same(warmup_ratio=0.5),
    "weight_decay": same(weight_decay=0.2),
    "max_grad_norm": same(max_grad_norm=0.1),
    "max_seq_length": same(max_seq_length=8),
    "max_steps": same(max_steps=3),
    "truncate": same(training_file="long", truncate=True),
    "packing": same(packing=False),
    "eval_interval": same(eval_interval=2),
    "early_stopping": same(early_stopping=2),
    "sweep.rank": same(sweep={"rank": [3, 5]}),
    "sweep.learning_rate": same(sweep={"learning_rate": [1e-4, 2e-4]}),
    "sweep.n_epochs": same(sweep={"n_epochs": [1, 2]}),
    "sweep.batch_size": same(sweep={"batch_size": [1, 2]}),
    "sweep.sampler": same(sweep={"rank": list(range(1, 31)), "sampler": "random"}),
    "sweep.trials": same(sweep={"rank": {"min": 1, "max": 30}, "trials": 3}),
}

LABELS = {"name": "desk", "suffix": "tail", "publish": "always", "min_gain": 0.5}
"""They change nothing of the run, and are kept with the job."""
ELSEWHERE = {
    "model": "tests/control/jobs/test_transfer.py",
    "lora.init_from": "tests/control/jobs/test_transfer.py",
    "adapter.init_from": "tests/control/jobs/test_adapter_kinds.py",
    "adapter.invocation": "tests/control/jobs/test_invocation.py",
    "metadata": "tests/control/jobs/test_jobs.py",
    "integrations": "test_integrations_are_refused",
    **{
        f"method.full.{f'hyperparameters.{name}' if name in FULL.hyperparameters else setting.at}": (
            "tests/control/jobs/test_full_requests.py"
        )
        for name, setting in FULL.asked.items()
    },
}


OF_METHODS = {
    "method.feature_extraction.": "tests/api/test_head_jobs.py, tests/api/test_trained_heads.py",
    "method.full.": "tests/control/jobs/test_full_requests.py",
}
"""Methods whose rows or results are of another kind, by the beginning of their fields."""


def several(file: str, **second: Any) -> dict[str, Any]:
    return {"training_file": None, "training_files": [{"file": file}, {"file": f"{file}-2", **second}]}


def test_every_field_is_here() -> None:
    known = {*CHANGES, *LABELS, *ELSEWHERE}
    asked = set(leaves(JobCreateRequest))
    assert {field for field in asked - known if not field.startswith(tuple(OF_METHODS))} == set()
    assert known - asked == set()


class Prepared:
    """What runs come of requests, without a service."""

    def __init__(self, directory: Path, tokenizer: Tokenizer) -> None:
        self._directory, self._tokenizer = directory, tokenizer
        for name, rows in FILES.items():
            for file in (name, f"{name}-2"):
                (directory / file).write_bytes(jsonl(rows))

    def run(self, body: Mapping[str, Any]) -> str:
        """Everything that the run is told, rows and all."""
        request = JobCreateRequest(**{"model": BASE, "seed": 1, **body}).to_request()
        asked = check_request(request, LIMITS)
        sources = name_sources(check_sources(request), [f"{one.file}.jsonl" for one in check_sources(request)])
        row = new_job("tenant", request, asked, LIMITS, sources, None)
        job = Preparation(
            job_id="job",
            tenant_id="tenant",
            workdir=str(self._directory / "work"),
            sources=sources,
            paths=[str(self._directory / source.file) for source in sources],
            validation_path=None if row.validation_file is None else str(self._directory / row.validation_file),
            asked=asked,
            parent=None,
            seed=row.seed,
        )
        found = prepare(job, self._tokenizer, LIMITS, tokens_per_microbatch=2048)
        files = sorted(Path(job.workdir).glob("*.npz"))
        digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in files]
        return msgspec.json.encode([found.plan, digests]).decode()


@pytest.fixture
def prepared(tmp_path: Path, tokenizer: Tokenizer) -> Prepared:
    return Prepared(tmp_path, tokenizer)


REFUSED: Mapping[tuple[str, str], str] = {
    ("sweep", "lora.rank"): "sweep.rank",
    ("sweep", "adapter.type"): "sweep.rank",
    ("sweep", "adapter.rank"): "sweep.rank",
    ("sweep", "adapter.reduction_factor"): "sweep.rank",
    ("sweep", "adapter.non_linearity"): "sweep.rank",
    ("sweep", "adapter.placement"): "sweep.rank",
    ("sweep", "adapter.num_virtual_tokens"): "sweep.rank",
    ("sweep", "adapter.scaling"): "sweep.rank",
    ("sweep", "learning_rate"): "sweep.learning_rate",
    ("sweep", "hyperparameters.learning_rate_multiplier"): "sweep.learning_rate",
    ("sweep", "method.supervised.hyperparameters.learning_rate_multiplier"): "sweep.learning_rate",
    ("sweep", "method.dpo.hyperparameters.learning_rate_multiplier"): "sweep.learning_rate",
}
"""Where a field cannot be used beside the others, and the field that the error names."""


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("field", CHANGES)
def test_it_changes_the_run_or_is_refused(prepared: Prepared, method: str, field: str) -> None:
    base, change = METHODS[method], CHANGES[field](method)
    kind = change.get("method", base.get("method", {})).get("type", "supervised")
    if kind == "dpo" and base.get("method") != DPO:
        base = {**base, "method": DPO, "training_file": "pairs"}
        if field == "method.type":
            base = METHODS[method]  # rows of the other kind
    if method == "dpo" and kind == "supervised" and field != "method.type":
        base = {**base, "method": {"type": "supervised"}, "training_file": "many"}
    if field == "method.type" and method == "dpo":
        change = {"method": {"type": "supervised"}}
    if field in {"training_file", "truncate"} and method == "dpo":
        pytest.skip("the other files have no pairs; the paths are the supervised ones")
    expected = REFUSED.get((method, field))
    if expected is not None:
        with pytest.raises(InvalidRequestError) as refused:
            prepared.run({**base, **change})
        assert refused.value.param == expected
    elif field in {"method.type", "max_seq_length", "truncate"}:
        with pytest.raises(DatasetError):  # rows of the other kind, or longer than that
            prepared.run({**base, **change, "truncate": None})
        if field == "truncate":
            prepared.run({**base, **change})
    else:
        assert prepared.run({**base, **change}) != prepared.run(base)


@pytest.mark.parametrize("method", METHODS)
def test_equal_requests_are_equal_runs(prepared: Prepared, method: str) -> None:
    assert prepared.run(METHODS[method]) == prepared.run(METHODS[method])


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_steps": 3, "n_epochs": 2}, "n_epochs"),
        ({"max_steps": 3, "hyperparameters": {"n_epochs": 2}}, "n_epochs"),
        ({"sweep": {"rank": [1, 2, 3, 4], "sampler": "grid", "trials": 2}}, "sweep.trials"),
        ({"publish": "never", "min_gain": 0.1}, "min_gain"),
        ({"method": {"type": "dpo", "supervised": {"hyperparameters": {"n_epochs": 2}}}}, "method.supervised"),
    ],
)
def test_what_another_field_would_make_useless_is_refused(
    prepared: Prepared, fields: dict[str, Any], param: str
) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        prepared.run({"training_file": "many", **fields})
    assert refused.value.param == param


def test_the_passes_that_max_steps_comes_to_are_shown(prepared: Prepared) -> None:
    """`n_epochs` of the plan is what is echoed: 54 rows in batches of 8 make seven steps a pass."""
    for steps, passes in ((3, 1), (7, 1), (8, 2), (30, 5)):
        (plan, _) = msgspec.json.decode(prepared.run({"training_file": "many", "batch_size": 8, "max_steps": steps}))
        assert (plan["max_steps"], plan["n_epochs"]) == (steps, passes)


def test_labels_are_kept_with_the_job() -> None:
    for fields in ({**LABELS, "min_gain": None}, {"min_gain": 0.5, "suffix": "tail"}):
        request = JobCreateRequest(model=BASE, training_file="f", **fields).to_request()
        asked = check_request(request, LIMITS)
        row = new_job("tenant", request, asked, LIMITS, name_sources(check_sources(request), ["f"]), None)
        kept = {"name": row.name, "suffix": row.suffix, **row.settings}
        assert {name: value for name, value in fields.items() if value is not None}.items() <= kept.items()


def test_integrations_are_refused() -> None:
    given: Sequence[Any] = [{"type": "wandb"}]
    with pytest.raises(InvalidRequestError, match=r"Integrations are not supported\. Leave the field out\."):
        JobCreateRequest(model=BASE, training_file="f", integrations=list(given))
