"""An adapter in a full fine-tuning's place: what it is made of, how far it is from the model, and when it is served."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import transformers

from tenora.data.dataset import TokenizedDataset
from tenora.training.events import FinishedEvent, FullResult
from tenora.training.full import plan, serving
from tenora.training.full.low_rank import Factors, share_ranks
from tenora.training.plans.single import load_corpus
from tenora.training.spec import LoraSpec, TrainSpec
from tests.support.threads import one_thread
from tests.training.runs import events_of, write_rows

from .runs import full_spec, full_training

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    write_rows(tmp_path)
    return tmp_path


def served_spec(directory: Path, rank: int, **own: object) -> TrainSpec:
    return full_spec(
        directory, "work", own={"serve_as": "adapter", **own}, lora=LoraSpec(rank=rank), learning_rate=3e-3
    )


def result(base: Path, spec: TrainSpec) -> tuple[FinishedEvent, FullResult]:
    finished = events_of(full_training(base, spec))[-1]
    assert isinstance(finished, FinishedEvent), finished
    assert finished.full is not None
    return finished, finished.full


def merged(base: Path, adapter: str) -> transformers.PreTrainedModel:
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return peft.PeftModel.from_pretrained(model, adapter).merge_and_unload()  # type: ignore[no-any-return]


def test_merged_into_the_base_an_adapter_of_full_rank_is_the_model(
    tiny_base: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "SERVED_RANKS", (48,))
    finished, full = result(tiny_base, served_spec(rows, 48))
    model = transformers.AutoModelForCausalLM.from_pretrained(full.path).state_dict()
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32).state_dict()
    found = merged(tiny_base, finished.path).state_dict()
    for name, tensor in model.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=2e-6)
    assert max(float((model[name] - base[name]).abs().max()) for name in model) > 1e-3
    assert full.curve[-1].gap == pytest.approx(0.0, abs=1e-5)
    assert full.curve[-1].kl == pytest.approx(0.0, abs=1e-5)


def test_the_largest_singular_values_of_all_matrices_come_first_and_each_has_one() -> None:
    torch.manual_seed(3)
    matrices = {name: torch.randn(12, 8) * scale for name, scale in (("a", 1.0), ("b", 0.3), ("c", 1e-6))}
    factors = {name: Factors.of(matrix, 6) for name, matrix in matrices.items()}
    spectra = {name: np.linalg.svd(matrix.double().numpy(), compute_uv=False)[:6] for name, matrix in matrices.items()}
    for mean in (1, 2, 3):
        best = sorted(((value, name) for name, values in spectra.items() for value in values), reverse=True)[: 3 * mean]
        expected = {name: max(1, sum(name == one for _, one in best)) for name in matrices}
        assert share_ranks(factors, mean) == expected
    assert share_ranks(factors, 100) == {"a": 6, "b": 6, "c": 6}
    a, b = factors["a"].pair(3)
    rest = float((matrices["a"] - b @ a).norm())
    assert rest == pytest.approx(
        float(np.sqrt((np.linalg.svd(matrices["a"].double().numpy())[1][3:] ** 2).sum())), rel=1e-5
    )


def log_probs(model: transformers.PreTrainedModel, dataset: TokenizedDataset) -> tuple[torch.Tensor, torch.Tensor]:
    """Of every learned token the distribution in float64, and the token."""
    found, targets = [], []
    for row in range(len(dataset)):
        tokens, weights = dataset.row(row)
        ids, learned = torch.from_numpy(tokens.astype(np.int64)), torch.from_numpy(weights[1:].astype(bool))
        with torch.no_grad():
            found.append(model(input_ids=ids[None]).logits[0, :-1][learned].double().log_softmax(-1))
        targets.append(ids[1:][learned])
    return torch.cat(found), torch.cat(targets)


@pytest.mark.parametrize("own", [{}, {"embeddings": True, "norms": True}], ids=["matrices", "everything"])
def test_gap_and_divergence_are_those_of_transformers_and_peft_in_float64(
    tiny_base: Path, rows: Path, monkeypatch: pytest.MonkeyPatch, own: dict[str, bool]
) -> None:
    monkeypatch.setattr(serving, "SERVED_RANKS", (2,))
    monkeypatch.setattr(serving, "GAP_NATS", 100.0)
    monkeypatch.setattr(plan, "KL_NATS", 100.0)
    spec = served_spec(rows, 4, **own)
    finished, full = result(tiny_base, spec)
    held_out = load_corpus(spec).valid
    model, targets = log_probs(transformers.AutoModelForCausalLM.from_pretrained(full.path), held_out)
    adapter, _ = log_probs(merged(tiny_base, finished.path), held_out)
    kl = float((model.exp() * (model - adapter)).sum(-1).mean())
    loss, model_loss = (float(-one.gather(1, targets[:, None]).mean()) for one in (adapter, model))
    (point,) = full.curve
    assert point.kl == pytest.approx(kl, rel=1e-4)
    assert point.gap == pytest.approx(loss - model_loss, rel=1e-3, abs=1e-5)
    assert finished.valid_loss == pytest.approx(loss, rel=1e-5)  # what is said beside the base is said of the adapter
    assert full.valid_loss == pytest.approx(model_loss, rel=1e-5)
    assert ("embeddings and head by" in full.reason) == bool(own)


def test_ranks_are_tried_from_below_and_the_first_that_is_close_is_served(tiny_base: Path, rows: Path) -> None:
    finished, full = result(tiny_base, served_spec(rows, 48))
    tried = [point.rank for point in full.curve]
    assert tried == [4, 8, 16, 32, 48][: len(tried)]
    close = [point.gap <= full.allowed_gap and point.kl <= full.allowed_kl for point in full.curve]
    assert close == [False] * (len(close) - 1) + [True]
    assert full.rank == tried[-1]
    assert f"An adapter of a mean rank of {full.rank} is served" in full.reason
    assert finished.path
    assert [point.kl for point in full.curve] == sorted((point.kl for point in full.curve), reverse=True)
    assert full.allowed_gap >= 0.01
    assert finished.probe is not None
    config = json.loads(Path(finished.path, "adapter_config.json").read_text())
    assert max([config["r"], *config["rank_pattern"].values()]) == full.curve[-1].highest


def test_without_a_rank_that_is_close_nothing_is_served_and_the_model_is_still_there(
    tiny_base: Path, rows: Path
) -> None:
    finished, full = result(tiny_base, served_spec(rows, 1))
    assert (finished.path, finished.probe, full.rank) == ("", None, 0)
    assert [point.rank for point in full.curve] == [1]
    assert "The model is not served here: no adapter of a mean rank up to 1 is close enough" in full.reason
    assert Path(full.path, "model.safetensors").exists()
    assert finished.valid_loss == full.valid_loss


def test_of_some_layers_the_adapter_is_in_these_alone(
    tiny_base: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "SERVED_RANKS", (48,))
    finished, full = result(tiny_base, served_spec(rows, 48, layers="0, 2"))
    found, model = merged(tiny_base, finished.path), transformers.AutoModelForCausalLM.from_pretrained(full.path)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], tensor, rtol=0, atol=2e-6)
    config = json.loads(Path(finished.path, "adapter_config.json").read_text())
    assert config["layers_to_transform"] == [0, 2]
