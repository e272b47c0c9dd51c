"""Training activated LoRA: PEFT's losses and gradients, with the tokens before the invocation as the base's."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path

import numpy as np
import pytest
import torch

from tenora.adapters.invocation import NEVER, adapted_from
from tenora.data.dataset import TokenizedDataset
from tenora.model.decoder import Decoder
from tenora.model.loading import load_decoder
from tenora.model.spec import target_modules
from tenora.training.events import FinishedEvent
from tenora.training.packing import microbatches, pack, shared_prefix
from tenora.training.spec import LoraSpec
from tenora.training.step import Part, forward, load_pass
from tenora_kernels.cpu.runtime.team import Team
from tests.engine.driver import Driver, load_peft, ref_of
from tests.engine.requests import generate, sampling
from tests.training.runs import TrainingRun, default_spec
from tests.training.test_step import finish, load, make_adapter, peft_losses, peft_model, train

INVOCATION = [301, 302]
BEGINNING = [20, 21, 22, 23, 24]
# peft reads a property that transformers renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(autouse=True)
def _no_grad() -> Generator[None, None, None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module", params=["modules", "compiled"])
def base(request: pytest.FixtureRequest, tiny_base: Path) -> Decoder:
    return load_decoder(tiny_base, team=Team(1) if request.param == "compiled" else None)


def dataset() -> TokenizedDataset:
    """Rows that begin alike: invoked early, late, twice, and not at all; the last token of each is learned."""
    random = np.random.default_rng(3)
    bodies = [
        [*INVOCATION, *random.integers(3, 300, 9)],
        [*random.integers(3, 300, 7), *INVOCATION, *random.integers(3, 300, 4)],
        [5, *INVOCATION, *random.integers(3, 300, 5), *INVOCATION, *random.integers(3, 300, 3)],
        [*random.integers(3, 300, 8)],
    ]
    rows = [np.array([*BEGINNING, *body], np.int32) for body in bodies]
    weights = [np.concatenate([np.zeros(len(row) - 3, np.uint8), np.ones(3, np.uint8)]) for row in rows]
    return TokenizedDataset(
        tokens=np.concatenate(rows),
        weights=np.concatenate(weights),
        offsets=np.cumsum([0, *map(len, rows)]).astype(np.int64),
        lines=np.arange(1, len(rows) + 1, dtype=np.int64),
    )


def test_losses_and_gradients_equal_peft(base: Decoder, tiny_base: Path) -> None:
    lora, rows = LoraSpec(rank=4, alpha=8.0), dataset()
    adapter = make_adapter(base, lora)
    model = peft_model(tiny_base, lora, adapter, alora_invocation_tokens=INVOCATION)
    with torch.enable_grad():
        losses = peft_losses(model, rows)
        (torch.cat(losses).sum() / rows.num_trained).backward()
    shared = shared_prefix(rows, INVOCATION)
    assert shared == len(BEGINNING)
    found: dict[int, torch.Tensor] = {}
    for packed in microbatches(rows, range(len(rows)), 40, shared=shared, invocation=INVOCATION):
        told = train(base, load(base, packed, adapter), 1 / rows.num_trained)
        found |= {row: told.loss[torch.from_numpy(packed.target_row == at)] for at, row in enumerate(packed.rows)}
    for row, loss in enumerate(losses):
        torch.testing.assert_close(found[row], loss.detach(), rtol=0, atol=1e-5)
    for target in target_modules(base.spec):
        module = model.get_submodule(f"base_model.model.{target.path}")
        grads = (adapter.tables.grad_a(target.row, 0), adapter.tables.grad_bt(target.row, 0).t())
        for grad, want in zip(grads, (module.lora_A, module.lora_B), strict=True):
            torch.testing.assert_close(grad, want["default"].weight.grad, rtol=1e-5, atol=1e-5)


def test_a_row_without_the_invocation_is_the_base(base: Decoder) -> None:
    rows, adapter = dataset(), make_adapter(base, LoraSpec(rank=4))
    packed = pack(rows, [3], invocation=INVOCATION)
    losses = [finish(forward(base, load_pass(base, [Part(packed, a)], adapter.tables))).loss for a in (adapter, None)]
    assert torch.equal(*losses)
    train(base, load(base, packed, adapter), 1.0)
    assert not adapter.grad.any()


def test_adapters_that_act_on_all_tokens_train_beside_activated_ones(base: Decoder) -> None:
    rows = dataset()
    one = make_adapter(base, LoraSpec(rank=4), seed=1)
    other = one._arena.add(LoraSpec(rank=8))
    other.weights.copy_(torch.randn(other.numel, generator=torch.Generator().manual_seed(2)) * 0.03)
    parts = [Part(pack(rows, [0, 1], invocation=INVOCATION), one), Part(pack(rows, [2, 3]), other)]

    def gradients(together: list[list[Part]]) -> list[torch.Tensor]:
        one._arena.tables.grad.zero_()  # type: ignore[union-attr]  # an arena of training has one
        for pass_parts in together:
            train(base, load_pass(base, pass_parts, one.tables), 1.0)
        return [one.grad.clone(), other.grad.clone()]

    alone, mixed = gradients([parts[:1], parts[1:]]), gradients([parts])
    for own, beside in zip(alone, mixed, strict=True):
        assert own.any()
        torch.testing.assert_close(own, beside, rtol=1e-5, atol=1e-6)


def test_what_rows_share_ends_before_the_invocation_of_each() -> None:
    alike = [*BEGINNING, *INVOCATION, 7, 8, 9]
    later = [*alike[:-1], *INVOCATION, 10, 11]
    rows = TokenizedDataset(
        tokens=np.array([*alike, *later], np.int32),
        weights=np.array([*[0] * 9, 1, *[0] * 12, 1], np.uint8),
        offsets=np.array([0, 10, 23], np.int64),
        lines=np.array([1, 2], np.int64),
    )
    assert shared_prefix(rows) == 8
    assert shared_prefix(rows, INVOCATION) == len(BEGINNING)
    packed = pack(rows, [0, 1], shared=len(BEGINNING), invocation=INVOCATION)
    assert packed.adapted is not None
    assert [adapted_from(row, INVOCATION) for row in (alike, later, BEGINNING)] == [5, 9, NEVER]
    assert packed.positions[packed.adapted].tolist() == [*range(5, 9), *range(9, 12)]


def test_a_run_leaves_an_adapter_that_acts_from_its_invocation_on(
    base: Decoder, tiny_base: Path, tmp_path: Path
) -> None:
    rows = dataset()
    rows.save(tmp_path / "train.npz")
    rows.save(tmp_path / "valid.npz")
    lora = LoraSpec(rank=4, alpha=8.0, invocation=tuple(INVOCATION))
    run = TrainingRun(base, default_spec(tmp_path, "work", lora=lora, learning_rate=0.02, n_epochs=6))
    (finished,) = [event for event in run if isinstance(event, FinishedEvent)]
    ref = ref_of(Path(finished.path))
    driver = Driver(base, block_size=4)
    model = load_peft(tiny_base, ref)
    for row in range(len(rows)):
        tokens = rows.row(row)[0].tolist()
        scored = generate(tokens, sampling(max_tokens=1, prompt_logprobs=0), adapter=ref)
        plain = generate(tokens, sampling(max_tokens=1, prompt_logprobs=0))
        (ours,), (bare,) = driver.run(scored), driver.run(plain)
        found, without = (
            torch.tensor([entry.logprob for entry in (each.outputs[0].prompt_logprobs or ())[1:] if entry])
            for each in (ours, bare)
        )
        want = torch.cat(peft_losses(model, _all_learned(rows, row)))
        torch.testing.assert_close(-found, want, rtol=0, atol=1e-5)
        first = min(adapted_from(tokens, INVOCATION), len(tokens))
        assert (found - without)[first:].abs().max() > 0.01 if first < len(tokens) else torch.equal(found, without)
    driver.close()


def _all_learned(rows: TokenizedDataset, row: int) -> TokenizedDataset:
    """One row, of which every token but the first counts."""
    one = rows.select(np.array([row]))
    one.weights[1:] = 1
    return one
