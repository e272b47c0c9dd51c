"""DPO against TRL's DPOTrainer: the same pairs and weights, TRL's own loss, rewards, autograd and training loop."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file

from tenora.adapters.peft_format import write_adapter
from tenora.data.dataset import TokenizedDataset, tokenize_file
from tenora.data.rows import PREFERENCES
from tenora.model.decoder import Decoder
from tenora.model.tokenizer import Tokenizer
from tenora.training import learner
from tenora.training.arena import TrainedAdapter
from tenora.training.commands import AdamWSettings
from tenora.training.corpus import Corpus
from tenora.training.events import CheckpointEvent, EvalEvent, FinishedEvent, StepEvent, StoppedEvent, TrainEvent
from tenora.training.optimizer import AdamW
from tenora.training.packing import PackedRows, microbatches
from tenora.training.pass_queue import Work
from tenora.training.spec import LoraSpec, TaskSpec, TrainSpec
from tests.data.rows import random_rows, write_lines

from .runs import TrainingRun, assert_same_bits, comparable, default_spec, events_of, failure, weights_of
from .test_step import make_adapter

# peft and TRL read a property that transformers renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

PAIRS = [
    {"prompt": prompt, "chosen": f" {chosen}", "rejected": f" {rejected}"}
    for prompt, chosen, rejected in (
        ("What is an adapter?", "A small set of weights that turns one base model into many.", "A fox."),
        ("Define: dog.", "lazy", "0123456789 (a + b) * c = d;"),
        ("Define: fox.", "The quick brown fox jumps.", "The lazy dog jumps over the quick fox."),
        ("You are a helpful assistant. Return True if x < y.", "if x < y: return True", "naïve café"),
        ("Answer the question in one or two sentences: 東京?", "東京, 🙂.", "Œuvre."),
        ("Ärzte?", "Answer.", "Question."),
        ("0123", "456789", "(a + b)"),
        ("The", "quick brown fox", "dog lazy the over jumps fox brown quick The"),
        ("You are", "a helpful assistant.", "a fox."),
    )
]
ROWS = range(2 * len(PAIRS))
LORA = LoraSpec(rank=4, alpha=8.0)
LN2 = math.log(2.0)
Tensors = dict[str, torch.Tensor]  # A [r, in] and B [out, r] of each module, or their gradients, named as in PEFT files
MakeDpo = Callable[..., TrainSpec]
MakeOracle = Callable[..., "Oracle"]


@pytest.fixture(scope="module")
def pairs(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> TokenizedDataset:
    """`PAIRS` as a job tokenizes them."""
    path = write_lines(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", PAIRS)
    return tokenize_file(path, tokenizer, max_length=512, kind=PREFERENCES)


@pytest.fixture(scope="module")
def parent(decoder: Decoder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter to start from, far from the base."""
    directory = tmp_path_factory.mktemp("parents") / "parent"
    with torch.no_grad():
        write_adapter(directory, base_model="tiny", lora=LORA, modules=make_adapter(decoder, LORA, seed=5).export())
    return directory


@pytest.fixture(params=["base", "adapter"])
def start(request: pytest.FixtureRequest) -> str:
    """What training starts from, which is also the reference: the base, or another adapter."""
    return str(request.param)


@pytest.fixture
def make_dpo(tmp_path: Path, pairs: TokenizedDataset, parent: Path) -> MakeDpo:
    """`make_dpo(start, **changes)`: 9 pairs in batches of 3, the first 4 of them measured on; several parts a step."""
    pairs.save(tmp_path / "train.npz")
    pairs.select(np.arange(4)).save(tmp_path / "valid.npz")
    numbers = itertools.count()

    def make(start: str, **changes: Any) -> TrainSpec:
        settings = {
            "method": "dpo",
            "method_settings": {"beta": 0.3},
            "init_path": str(parent) if start == "adapter" else "",
            "lora": LORA,
        }
        settings |= {"batch_size": 3, "tokens_per_microbatch": 60, "max_grad_norm": 0.0}
        return default_spec(tmp_path, f"dpo-{next(numbers)}", **{**settings, **changes})

    return make


class Oracle:
    """TRL's DPOTrainer on `PAIRS`. Its policy's weights are set from outside; its reference is its own affair."""

    def __init__(self, base: Path, parent: Path | None, output: Path, **settings: Any) -> None:
        """Let TRL add an adapter to the base, or give it a loaded one, of which it keeps a frozen copy."""
        from datasets import Dataset  # seconds, with trl, that the tests without an oracle do not need
        from trl import DPOConfig, DPOTrainer

        model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        fresh = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
        here = {"use_cpu": True, "bf16": False, "activation_checkpointing": False, "dataloader_pin_memory": False}
        self.trainer = DPOTrainer(
            model=model if parent is None else PeftModel.from_pretrained(model, parent, is_trainable=True),
            args=DPOConfig(output_dir=str(output), beta=0.3, save_strategy="no", **here, **settings),
            train_dataset=Dataset.from_list(PAIRS),
            processing_class=transformers.AutoTokenizer.from_pretrained(base),
            peft_config=fresh if parent is None else None,
        )
        assert ("ref" in self.trainer.model.peft_config) == (parent is not None)

    @property
    def policy(self) -> Tensors:
        """Parameters of the adapter in training."""
        parameters = self.trainer.model.named_parameters()
        return {name.replace(".default.", "."): found for name, found in parameters if ".default." in name}

    @torch.no_grad()
    def set(self, weights: Tensors) -> None:
        """Make these the policy."""
        policy = self.policy
        assert policy.keys() == weights.keys()
        for name, tensor in weights.items():
            policy[name].copy_(tensor)

    def batch(self, examples: list[int]) -> Any:
        """As TRL's collator makes it: padded, the chosen answers first."""
        return self.trainer.data_collator([self.trainer.train_dataset[example] for example in examples])

    def measure(self, examples: list[int], mode: str = "train") -> tuple[float, dict[str, float], Any]:
        """TRL's loss, metrics and gradients of a batch."""
        trainer = self.trainer
        trainer.model.zero_grad()
        trainer.model.train(mode == "train")
        loss = trainer.compute_loss(trainer.model, self.batch(examples))
        loss.backward()
        metrics = {name: values[-1] for name, values in trainer._metrics[mode].items()}
        return float(loss.detach()), metrics, {name: parameter.grad for name, parameter in self.policy.items()}


@pytest.fixture
def make_oracle(tiny_base: Path, parent: Path, tmp_path: Path) -> MakeOracle:
    """`make_oracle(start, **settings)`: settings of TRL's DPOConfig."""
    parents = {"base": None, "adapter": parent}
    return lambda start, **settings: Oracle(tiny_base, parents[start], tmp_path / "trl", **settings)


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensors, Tensors]]:
    """Weights and gradients at every optimizer step from here on, just before it is taken."""
    found: list[tuple[Tensors, Tensors]] = []
    step = AdamW.step

    def recording(self: AdamW, settings: AdamWSettings) -> None:
        adapter = self.parameters
        assert isinstance(adapter, TrainedAdapter)
        tables, slot = adapter.tables, adapter.slot
        weights: Tensors = {}
        grads: Tensors = {}
        for module in adapter._modules():
            a, b = (f"base_model.model.{module.path}.lora_{side}.weight" for side in "AB")
            weights |= {a: tables.a(module.row, slot).clone(), b: tables.bt(module.row, slot).t().clone()}
            grads |= {a: tables.grad_a(module.row, slot).clone(), b: tables.grad_bt(module.row, slot).t().clone()}
        found.append((weights, grads))
        step(self, settings)

    monkeypatch.setattr(AdamW, "step", recording)
    return found


@pytest.fixture
def works(monkeypatch: pytest.MonkeyPatch) -> list[Work]:
    """Every work of a step from here on: with an objective, or without one what computes its reference."""
    found: list[Work] = []

    def recording(*args: Any, **keywords: Any) -> Work:
        found.append(Work(*args, **keywords))
        return found[-1]

    monkeypatch.setattr(learner, "Work", recording)
    return found


def rows_of(works: list[Work], *, of_reference: bool) -> Counter[int]:
    """How often each row is in works."""
    chosen = (work.parts for work in works if (work.objective is None) == of_reference)
    return Counter(row for parts in chosen for part in parts for row in part.rows)


def of_kind(events: list[TrainEvent], kind: type) -> list[Any]:
    return [event for event in events if isinstance(event, kind)]


def assert_rewards(ours: Mapping[str, float], theirs: Mapping[str, float], *, rel: float, atol: float) -> None:
    names = ("rewards/chosen", "rewards/rejected", "rewards/margins")
    assert ours == pytest.approx({name: theirs[name] for name in names}, rel=rel, abs=atol)


def holds_whole_pairs(part: PackedRows) -> bool:
    return list(part.rows) == [row for chosen in part.rows[::2] for row in (chosen, chosen + 1) if chosen % 2 == 0]


class TestTrl:
    def test_rows_are_trls(self, pairs: TokenizedDataset, make_oracle: MakeOracle) -> None:
        for example, row in enumerate(make_oracle("base").trainer.train_dataset):
            for place, name in enumerate(("chosen_ids", "rejected_ids")):
                tokens, learned = pairs.row(2 * example + place)
                assert tokens.tolist() == row["prompt_ids"] + row[name]
                assert learned.tolist() == [0] * len(row["prompt_ids"]) + [1] * len(row[name])

    def test_every_step_has_trls_loss_rewards_and_gradients(
        self,
        decoder: Decoder,
        make_dpo: MakeDpo,
        make_oracle: MakeOracle,
        taken: list[tuple[Tensors, Tensors]],
        start: str,
    ) -> None:
        spec, oracle = make_dpo(start, learning_rate=2e-3), make_oracle(start)
        steps = of_kind(events_of(TrainingRun(decoder, spec)), StepEvent)
        corpus = Corpus.load(spec.tasks, kind=PREFERENCES)
        assert len(steps) == len(taken) == 6
        for event, (weights, ours) in zip(steps, taken, strict=True):
            oracle.set(weights)
            loss, metrics, grads = oracle.measure(corpus.batch(event.step - 1, spec.batch_size, seed=spec.seed))
            assert event.train_loss == pytest.approx(loss, rel=1e-5, abs=1e-5)
            assert_rewards(event.metrics, metrics, rel=1e-5, atol=3e-5)
            assert ours.keys() == grads.keys()
            for name, grad in grads.items():
                atol = 1e-4 * float(grad.abs().max()) + 1e-7
                torch.testing.assert_close(ours[name], grad, rtol=1e-3, atol=atol)
            norm = torch.cat([grad.flatten() for grad in grads.values()]).norm()
            assert event.grad_norm == pytest.approx(float(norm), rel=1e-4)
            if event.step > 1:  # before it all margins are 0, but for the order of additions
                assert event.train_accuracy == pytest.approx(metrics["rewards/accuracies"])
                assert abs(event.metrics["rewards/margins"]) > 0.01, "the policy is still its reference"
        assert steps[0].train_loss == pytest.approx(LN2, abs=1e-5)

    def test_evaluations_and_the_reference_are_trls(
        self, decoder: Decoder, make_dpo: MakeDpo, make_oracle: MakeOracle, start: str
    ) -> None:
        spec, oracle = make_dpo(start), make_oracle(start)
        events = events_of(TrainingRun(decoder, spec))
        first, *later = of_kind(events, EvalEvent)
        assert (first.valid_loss, first.base_loss, first.best) == (pytest.approx(LN2), pytest.approx(LN2), False)
        for event, written in zip(later, of_kind(events, CheckpointEvent), strict=True):
            oracle.set(load_file(Path(written.path) / "adapter_model.safetensors"))
            loss, metrics, _ = oracle.measure([0, 1, 2, 3], mode="eval")
            assert event.valid_loss == pytest.approx(loss, rel=1e-5, abs=1e-5)
            assert event.valid_accuracy == pytest.approx(metrics["rewards/accuracies"])
            assert_rewards(event.metrics, metrics, rel=1e-5, atol=3e-5)
            assert event.base_loss == pytest.approx(LN2)
        kept = load_file(Path(spec.workdir) / "resume.safetensors")["reference"]
        theirs = oracle.trainer.compute_ref_log_probs(oracle.trainer.model, oracle.batch(list(range(len(PAIRS)))))
        torch.testing.assert_close(kept, torch.stack(theirs, dim=1).flatten(), rtol=1e-5, atol=1e-4)

    def test_a_whole_run_is_trls_training_loop(
        self,
        decoder: Decoder,
        make_dpo: MakeDpo,
        make_oracle: MakeOracle,
        taken: list[tuple[Tensors, Tensors]],
        start: str,
    ) -> None:
        """All pairs in every step, so that the order in which they are drawn does not matter."""
        same: dict[str, Any] = {"learning_rate": 1e-3, "weight_decay": 0.1, "max_grad_norm": 1.0}
        spec = make_dpo(start, batch_size=9, n_epochs=4, scheduler="constant", warmup_ratio=0.0, **same)
        events = events_of(TrainingRun(decoder, spec))
        theirs = {"per_device_train_batch_size": 9, "num_train_epochs": 4, "lr_scheduler_type": "constant"}
        oracle = make_oracle(start, logging_steps=1, **theirs, **same)
        oracle.set(taken[0][0])
        oracle.trainer.train()
        for event, log in zip(of_kind(events, StepEvent), oracle.trainer.state.log_history[:-1], strict=True):
            assert event.train_loss == pytest.approx(log["loss"], rel=1e-3)
            assert event.grad_norm == pytest.approx(log["grad_norm"], rel=1e-3)
            assert_rewards(event.metrics, log, rel=1e-3, atol=1e-3)
        ours = load_file(Path(of_kind(events, CheckpointEvent)[-1].path) / "adapter_model.safetensors")
        for name, parameter in oracle.policy.items():
            torch.testing.assert_close(ours[name], parameter.detach(), rtol=0, atol=2e-4)


class TestCourse:
    @pytest.mark.parametrize("share", [0.15, 0.3, 0.45, 0.7])
    def test_a_paused_run_goes_on_to_the_same_bits_and_keeps_the_reference(
        self, decoder: Decoder, make_dpo: MakeDpo, works: list[Work], start: str, share: float
    ) -> None:
        lora = msgspec.structs.replace(LORA, dropout=0.1)
        items = list(TrainingRun(decoder, make_dpo(start, lora=lora)))
        works.clear()
        spec, told = make_dpo(start, lora=lora), []
        run = TrainingRun(decoder, spec)
        for number, item in enumerate(run):
            told.append(item)
            if number == int(share * len(items)):
                run.stop(pause=True)
        *before, stopped = events_of(told)
        assert stopped == StoppedEvent(run_id="run-1", step=len(of_kind(before, StepEvent)), paused=True)
        rest, whole = events_of(TrainingRun(decoder, spec)), events_of(items)
        assert comparable(before + rest) == comparable(whole)
        assert_same_bits(weights_of(rest[-1]), weights_of(whole[-1]))
        asked = rows_of(works, of_reference=True)
        assert set(asked) == set(ROWS)
        again = [row for row, times in asked.items() if times > 1]
        assert len(again) <= 2 * spec.batch_size, "more than the step that was given up"

    def test_margins_grow_and_the_reference_is_computed_once_a_row(
        self, decoder: Decoder, make_dpo: MakeDpo, works: list[Work], start: str
    ) -> None:
        events = events_of(TrainingRun(decoder, make_dpo(start, n_epochs=5, learning_rate=2e-3)))
        assert rows_of(works, of_reference=True) == dict.fromkeys(ROWS, 1)
        assert rows_of(works, of_reference=False) == dict.fromkeys(ROWS, 5)
        steps = of_kind(events, StepEvent)
        epochs = np.array([event.metrics["rewards/margins"] for event in steps]).reshape(5, 3).mean(axis=1)
        assert (np.diff(epochs) > 0).all()
        assert steps[0].train_accuracy < 1.0
        assert [event.train_accuracy for event in steps[-3:]] == [1.0] * 3
        margins = [event.metrics["rewards/margins"] for event in of_kind(events, EvalEvent)[1:]]
        assert margins == sorted(margins)
        finished = events[-1]
        assert isinstance(finished, FinishedEvent)
        assert [finished.base_loss, finished.valid_accuracy] == pytest.approx([LN2, 1.0])
        assert finished.valid_loss < 0.2
        assert finished.held_out is not None
        assert len(finished.held_out.tokens) == len(finished.held_out.adapter) == 8  # both answers of four pairs

    def test_the_held_out_loss_of_a_task_is_the_objective(
        self, decoder: Decoder, make_dpo: MakeDpo, pairs: TokenizedDataset, tmp_path: Path
    ) -> None:
        """Per pair, as `valid_loss` is: ln 2 before the first step, and tasks of one size have it as their mean."""
        tasks = []
        for name, examples in (("law", [0, 1, 2, 3]), ("medicine", [4, 5, 6, 7])):
            path = str(tmp_path / f"{name}.npz")
            pairs.select(np.array(examples)).save(Path(path))
            tasks.append(TaskSpec(name=name, train_path=path, valid_path=path))
        first, *later = of_kind(events_of(TrainingRun(decoder, make_dpo("base", tasks=tuple(tasks)))), EvalEvent)
        assert first.tasks == pytest.approx({"law": LN2, "medicine": LN2})
        assert [sum(event.tasks.values()) / 2 for event in later] == pytest.approx([e.valid_loss for e in later])


class TestRows:
    @pytest.mark.parametrize("place", ["train_path", "valid_path"])
    @pytest.mark.parametrize("method", ["dpo", "supervised"])
    def test_rows_for_the_other_method_are_refused(
        self, decoder: Decoder, make_dpo: MakeDpo, tmp_path: Path, method: str, place: str
    ) -> None:
        spec, pairs, rows = make_dpo("base", method=method), str(tmp_path / "train.npz"), str(tmp_path / "rows.npz")
        random_rows(6, seed=1).save(Path(rows))
        right, wrong = (pairs, rows) if method == "dpo" else (rows, pairs)
        task = msgspec.structs.replace(TaskSpec(name="rows", train_path=right, valid_path=right), **{place: wrong})
        failed = failure(TrainingRun(decoder, msgspec.structs.replace(spec, tasks=(task,))))
        kind = {"train_path": "training", "valid_path": "validation"}[place]
        wanted = {"dpo": "preference rows", "supervised": "rows with one answer each"}[method]
        said = f"The {kind} file must hold {wanted}"
        assert (failed.code, failed.message[: len(said)]) == ("invalid_training_file", said)

    @pytest.mark.parametrize("capacity", [1, 17, 40, 90, 1000])
    @pytest.mark.parametrize("seed", range(4))
    def test_pairs_are_never_torn_apart(self, seed: int, capacity: int) -> None:
        dataset = replace(random_rows(22, seed), rows_per_example=2)
        examples = np.random.default_rng(seed).permutation(11)[:7].tolist()
        parts = microbatches(dataset, examples, capacity)
        assert sorted(row // 2 for part in parts for row in part.rows[::2]) == sorted(examples)
        assert all(holds_whole_pairs(part) for part in parts)
        assert all(part.tokens <= capacity or len(part.rows) == 2 for part in parts)

    @pytest.mark.parametrize("changes", [{"tokens_per_microbatch": 1000}, {"packing": False}], ids=["one", "alone"])
    def test_a_step_is_the_same_however_its_pairs_are_packed(
        self, decoder: Decoder, make_dpo: MakeDpo, works: list[Work], changes: dict[str, Any]
    ) -> None:
        usual = of_kind(events_of(TrainingRun(decoder, make_dpo("base", max_steps=2))), StepEvent)
        works.clear()
        other = of_kind(events_of(TrainingRun(decoder, make_dpo("base", max_steps=2, **changes))), StepEvent)
        assert [event.train_loss for event in other] == pytest.approx([e.train_loss for e in usual], abs=1e-4)
        assert [event.grad_norm for event in other] == pytest.approx([e.grad_norm for e in usual], rel=1e-3)
        parts = [part for work in works if work.objective is not None for part in work.parts]
        assert [len(part.rows) for part in parts] == ([2] * 6 if "packing" in changes else [6, 6])
        assert all(holds_whole_pairs(part) for part in parts)
