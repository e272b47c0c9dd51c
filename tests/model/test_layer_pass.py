"""The training pass layer by layer: gradients of PEFT in float64, and bits that depend on nobody else's rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tenora.model.attention import PackedAttention
from tenora.model.decoder import Decoder
from tenora.model.executors.choice import kept_bytes_per_token, layer_pass, release_buffers
from tenora.model.executors.compiled_layers import CompiledPass
from tenora.model.executors.layers import Keep
from tenora.model.executors.module_layers import ModuleLayers
from tenora.model.loading import load_decoder
from tenora.model.readouts.tokens import TokenReadout
from tenora.model.spec import target_modules
from tenora_kernels.cpu.runtime.team import Team
from tenora_kernels.layout import LoraTables
from tests.model.streams import RANKS, SCALES, Part, Stream, finish, lay, make_rows, make_tables, run
from tests.support.full import full_but

# Of the largest value of a result: float32 against float64.
TOLERANCE = 2e-5
# A window of 8 is shorter than the rows; with 512 it does nothing.
FAMILIES = {"smollm2": {}, "llama": {}, "qwen2": {}, "qwen3": {}, "mistral": {"sliding_window": 512}}
# peft reads a property that transformers renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


PARTS = [
    Part(1, make_rows(1, [9, 30, 17])),
    Part(-1, make_rows(2, [12])),
    Part(0, make_rows(3, [40, 25, 60, 8], shared=7), shared=7),
    Part(2, make_rows(4, [6, 70, 11])),
]
COLUMNS = {0: 0, 1: 1, 2: 2}


def is_compiled(decoder: Decoder, stream: Stream) -> bool:
    return isinstance(layer_pass(decoder, stream.context, Keep.NOTHING), CompiledPass)


def assert_close(got: Tensor, wanted: Tensor, what: str, tolerance: float = TOLERANCE) -> None:
    largest = float(wanted.abs().max()) if wanted.numel() else 0.0
    difference = float((got.double() - wanted.double()).abs().max()) if wanted.numel() else 0.0
    assert difference <= tolerance * max(largest, 1e-6), f"{what}: {difference} of {largest}"


@pytest.fixture(name="family", params=full_but(["smollm2", "qwen3", "mistral"], FAMILIES))
def _family(request: pytest.FixtureRequest, tiny: Callable[..., Path]) -> Path:
    return tiny(request.param, **FAMILIES[request.param])


def peft_gradients(directory: Path, tables: LoraTables, column: int, part: Part) -> tuple[dict[str, Any], Tensor]:
    """Gradients by module path in float64, and the losses, one row at a time."""
    import peft
    import transformers

    base = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float64, attn_implementation="eager"
    )
    ranks = {name: rank for name, rank in RANKS[part.slot].items() if rank}
    config = peft.LoraConfig(
        r=1, lora_alpha=SCALES[part.slot], rank_pattern=ranks, target_modules=list(ranks), task_type="CAUSAL_LM",
        alpha_pattern={name: SCALES[part.slot] * rank for name, rank in ranks.items()},
    )  # fmt: skip
    model = peft.get_peft_model(base, config).double().eval()
    modules = target_modules(decoder_spec(directory))
    for module in modules:
        if module.name in ranks:
            layer = model.get_submodule(f"base_model.model.{module.path}")
            layer.lora_A["default"].weight.copy_(tables.a(module.row, column))
            layer.lora_B["default"].weight.copy_(tables.bt(module.row, column).t())
    found = []
    with torch.enable_grad():
        for row in part.rows:
            logits = model(input_ids=row[None, :-1]).logits[0]
            learned = torch.arange(max(4, part.shared), len(row) - 1)
            wanted = row[learned + 1]
            loss = F.cross_entropy(logits[learned], wanted, reduction="none")
            torch.autograd.backward((loss * (0.01 + (wanted % 7).float() * 0.01)).sum())
            found.append(loss.detach())
    gradients = {}
    for module in modules:
        if module.name in ranks:
            layer = model.get_submodule(f"base_model.model.{module.path}")
            a, b = layer.lora_A["default"].weight.grad, layer.lora_B["default"].weight.grad
            gradients[module.path] = (module.row, a, b.t())
    return gradients, torch.cat(found)


def decoder_spec(directory: Path) -> Any:
    from tenora.model.spec import ModelSpec

    return ModelSpec.from_directory(directory)


def test_gradients_of_a_mixed_stream_are_those_of_peft_in_float64(family: Path) -> None:
    decoder = load_decoder(family, team=Team(2))
    tables = make_tables(decoder)
    stream = lay(decoder, PARTS, tables, COLUMNS)
    assert is_compiled(decoder, stream)
    got = run(decoder, stream)
    start = 0
    for part in PARTS:
        count = sum(len(row) - 1 - max(4, part.shared) for row in part.rows if len(row) - 1 > max(4, part.shared))
        if part.slot >= 0:
            gradients, wanted = peft_gradients(family, tables, COLUMNS[part.slot], part)
            assert_close(got.loss[start : start + count], wanted, "loss")
            for path, (row, a, b) in gradients.items():
                assert_close(tables.grad_a(row, COLUMNS[part.slot]), a, f"dA of {path}")
                assert_close(tables.grad_bt(row, COLUMNS[part.slot]), b, f"dB of {path}")
        start += count
    assert start == len(stream.targets)


@pytest.mark.parametrize("activation", ["gelu", "gelu_pytorch_tanh", "relu"])
def test_other_activations(tiny: Callable[..., Path], activation: str) -> None:
    directory = tiny("smollm2", hidden_act=activation, mlp_bias=True, attention_bias=True)
    packed, modules = load_decoder(directory, team=Team(2)), load_decoder(directory, dtype=torch.float64)
    compare(packed, modules, PARTS)


def test_hidden_states_and_their_gradients_are_those_of_the_modules_in_float64(family: Path) -> None:
    """The modules' norms are float32 even then, which the tolerance has room for."""
    compare(load_decoder(family, team=Team(2)), load_decoder(family, dtype=torch.float64), PARTS)


def compare(packed: Decoder, modules: Decoder, parts: Sequence[Part]) -> None:
    stream = lay(packed, parts, make_tables(packed), COLUMNS)
    other = lay(modules, parts, make_tables(modules, dtype=torch.float64), COLUMNS)
    assert is_compiled(packed, stream)
    assert not is_compiled(modules, other)
    got, wanted = run(packed, stream), run(modules, other)
    assert_close(got.hidden, wanted.hidden, "hidden")
    assert_close(got.loss, wanted.loss, "loss")
    assert torch.equal(got.correct, wanted.correct)
    assert got.grad is not None
    assert wanted.grad is not None
    assert_close(got.grad, wanted.grad, "gradient")
    for ours, theirs in zip(got.slopes, wanted.slopes, strict=True):
        assert ours is not None
        assert theirs is not None
        assert_close(ours, theirs, "dX")


def test_a_part_has_the_same_bits_alone_and_beside_others(family: Path) -> None:
    """Hidden states, losses, dX and its adapter's gradient, whatever shares the stream and on 1, 2 or 3 threads."""
    decoder = load_decoder(family, team=Team(2))
    tables = make_tables(decoder)
    stream = lay(decoder, PARTS, tables, COLUMNS)
    whole = run(decoder, stream)
    assert whole.grad is not None
    again = run(decoder, stream)
    assert again.grad is not None
    assert torch.equal(again.grad, whole.grad)
    start = 0
    for part, span, size in zip(PARTS, stream.spans, (1, 2, 3, 1), strict=True):
        solo = load_decoder(family, team=Team(size))
        own = make_tables(solo, [part.slot]) if part.slot >= 0 else None
        alone = lay(solo, [part], own, {part.slot: 0})
        result = run(solo, alone)
        assert torch.equal(result.hidden, whole.hidden[span])
        count = len(alone.targets)
        assert torch.equal(result.loss, whole.loss[start : start + count])
        start += count
        for ours, theirs in zip(result.slopes, whole.slopes, strict=True):
            assert ours is not None
            assert theirs is not None
            assert torch.equal(ours, theirs[span])
        if own is not None:
            assert own.grad is not None
            tables.grad = whole.grad
            for module in target_modules(decoder.spec):
                column = COLUMNS[part.slot]
                assert torch.equal(own.grad_a(module.row, 0), tables.grad_a(module.row, column))
                assert torch.equal(own.grad_bt(module.row, 0), tables.grad_bt(module.row, column))
            assert result.grad is not None
            assert bool(result.grad.any())


def test_a_shared_beginning_is_computed_once_and_gives_the_same_gradients(family: Path) -> None:
    decoder = load_decoder(family, team=Team(2))
    tables = make_tables(decoder)
    part = PARTS[2]
    apart = Part(part.slot, part.rows)
    short, long = lay(decoder, [part], tables, COLUMNS), lay(decoder, [apart], tables, COLUMNS)
    assert len(short.ids) == len(long.ids) - 7 * (len(part.rows) - 1)
    learned = torch.cat([torch.arange(len(row) - 5) >= part.shared - 4 for row in part.rows])
    long.predict_at, long.targets = long.predict_at[learned], long.targets[learned]
    long.coefficients = long.coefficients[learned]
    got, wanted = run(decoder, short), run(decoder, long)
    assert_close(got.loss, wanted.loss, "loss")
    assert got.grad is not None
    assert wanted.grad is not None
    assert_close(got.grad, wanted.grad, "gradient")


def test_running_layers_again_changes_no_bit_and_nothing_below_the_first_layer_is_needed(family: Path) -> None:
    decoder = load_decoder(family, team=Team(2))
    stream = lay(decoder, PARTS, make_tables(decoder), COLUMNS)
    everything, inputs, nothing = (
        run(decoder, stream, keep, lowest=1) for keep in (Keep.ALL, Keep.INPUTS, Keep.NOTHING)
    )
    assert everything.slopes[-1] is None
    for other in (inputs, nothing):
        assert torch.equal(other.hidden, everything.hidden)
        assert torch.equal(other.loss, everything.loss)
    assert everything.grad is not None
    assert inputs.grad is not None
    assert torch.equal(inputs.grad, everything.grad)
    lower = run(decoder, stream)
    assert lower.grad is not None
    assert torch.equal(lower.grad, everything.grad)
    assert lower.slopes[-1] is not None


def test_rows_of_the_base_alone_pass_gradients_down(family: Path) -> None:
    packed, modules = load_decoder(family, team=Team(2)), load_decoder(family, dtype=torch.float64)
    parts = [Part(-1, make_rows(8, [20, 50]))]
    got, wanted = (run(decoder, lay(decoder, parts, None, {})) for decoder in (packed, modules))
    assert_close(got.hidden, wanted.hidden, "hidden")
    assert got.slopes[-1] is not None
    assert wanted.slopes[-1] is not None
    assert_close(got.slopes[-1], wanted.slopes[-1], "dX")


def test_what_the_compiled_layers_do_not_take_runs_on_the_modules(tiny: Callable[..., Path]) -> None:
    directory = tiny("mistral")
    packed, modules = load_decoder(directory, team=Team(2)), load_decoder(directory, dtype=torch.float64)
    stream = lay(packed, PARTS, make_tables(packed), COLUMNS)
    assert not is_compiled(packed, stream)  # a window of 8
    got = run(packed, stream)
    wanted = run(modules, lay(modules, PARTS, make_tables(modules, dtype=torch.float64), COLUMNS))
    assert_close(got.hidden, wanted.hidden, "hidden")
    assert got.grad is not None
    assert wanted.grad is not None
    assert_close(got.grad, wanted.grad, "gradient")
    decoder = load_decoder(tiny("smollm2"), team=Team(2))
    stream = lay(decoder, PARTS, make_tables(decoder), COLUMNS)
    assert is_compiled(decoder, stream)
    stream.context.lora_dropout = lambda x: x
    assert not is_compiled(decoder, stream)
    assert stream.context.lora is not None
    stream.context.lora_dropout = None
    stream.context.lora.tables.is_bf16[1] = 1
    assert not is_compiled(decoder, stream)


def test_dropout_finds_its_numbers_before_every_run(tiny: Callable[..., Path]) -> None:
    decoder = load_decoder(tiny("smollm2"), team=Team(2))
    stream = lay(decoder, PARTS[:1], make_tables(decoder), COLUMNS)
    stream.context.lora_dropout = lambda x: x * 1.0
    seen: list[int] = []
    layers = layer_pass(decoder, stream.context, Keep.INPUTS, before=seen.append)
    hidden = decoder.embed(stream.ids)
    for index in range(3):
        hidden = layers.forward(index, hidden)
    for index in (2, 1, 0):
        layers.backward(index, hidden, need_dx=False)
    assert seen == [0, 1, 2, 2, 1, 0]


def test_buffers_are_used_again_and_given_back(tiny: Callable[..., Path]) -> None:
    decoder = load_decoder(tiny("smollm2"), team=Team(2))
    assert decoder.stack is not None
    stream = lay(decoder, PARTS, make_tables(decoder), COLUMNS)
    run(decoder, stream)
    free = {block.data_ptr() for block in decoder.stack.workspace._free}
    run(decoder, stream)
    assert {block.data_ptr() for block in decoder.stack.workspace._free} == free
    layers = layer_pass(decoder, stream.context, Keep.ALL)
    layers.forward(1, layers.forward(0, decoder.embed(stream.ids)))
    assert len(decoder.stack.workspace._free) == len(free) - 2
    layers.close()
    layers.close()
    assert len(decoder.stack.workspace._free) == len(free)
    release_buffers(decoder)
    assert not decoder.stack.workspace._free


def test_kept_bytes_are_what_a_pass_keeps(tiny: Callable[..., Path]) -> None:
    decoder = load_decoder(tiny("smollm2"), team=Team(2))
    assert decoder.stack is not None
    rows = [Part(0, make_rows(5, [129] * 8))]
    stream = lay(decoder, rows, make_tables(decoder, [0]), {0: 0})
    layers = layer_pass(decoder, stream.context, Keep.ALL)
    hidden = decoder.embed(stream.ids)
    for index in range(len(decoder.layers)):
        hidden = layers.forward(index, hidden)
    kept = sum(block._block.numel() * 4 for block in layers._kept.values() if block._block is not None)  # type: ignore[attr-defined]
    told = kept_bytes_per_token(decoder, 16, Keep.ALL) * len(stream.ids)
    assert told <= kept <= 1.15 * told
    assert kept_bytes_per_token(decoder, 16, Keep.INPUTS) == 3 * 48 * 4
    assert kept_bytes_per_token(decoder, 16, Keep.NOTHING) == 0
    assert ModuleLayers(decoder).kept_bytes_per_token(16) > 3 * kept_bytes_per_token(decoder, 16, Keep.ALL)


def test_another_rows_nan_stays_there(tiny: Callable[..., Path]) -> None:
    """An adapter that has gone wrong spoils neither another adapter's gradient nor a row of the base."""
    decoder = load_decoder(tiny("smollm2"), team=Team(2))
    tables = make_tables(decoder)
    stream = lay(decoder, PARTS, tables, COLUMNS)
    clean = run(decoder, stream)
    tables.a(2, 1).fill_(float("nan"))
    spoilt = run(decoder, stream)
    assert clean.grad is not None
    assert spoilt.grad is not None
    first = int(tables.arrays.a_offset[2, 1]), int(tables.arrays.a_offset[0, 2])
    assert bool(spoilt.grad[slice(*first)].isnan().any())
    for span in (slice(0, first[0]), slice(first[1], None)):
        assert torch.equal(spoilt.grad[span], clean.grad[span])
    assert torch.equal(spoilt.hidden[stream.spans[1]], clean.hidden[stream.spans[1]])
    assert bool(spoilt.loss[: 4 + 25 + 12].isnan().all())
    assert torch.equal(spoilt.loss[4 + 25 + 12 :], clean.loss[4 + 25 + 12 :])


def test_no_learned_row_and_no_coefficients(tiny: Callable[..., Path]) -> None:
    decoder = load_decoder(tiny("smollm2"), team=Team(2))
    hidden, none = torch.ones(3, 48), torch.zeros(0, dtype=torch.int64)
    loss, correct, slope, _ = finish(TokenReadout(decoder).read(hidden, none, none, torch.zeros(0)))
    assert loss.shape == correct.shape == (0,)
    assert slope is not None
    assert not slope.any()
    one = torch.tensor([1])
    assert finish(TokenReadout(decoder).read(hidden, one, one, None))[2] is None


def test_a_row_that_predicts_several_targets_gets_all_their_gradients(tiny: Callable[..., Path]) -> None:
    directory = tiny("llama")
    at, targets = torch.tensor([2, 0, 2, 2]), torch.tensor([7, 9, 11, 7])
    hidden = torch.randn(4, 64, generator=torch.Generator().manual_seed(1))
    coefficients = torch.tensor([1.0, 0.5, -2.0, 3.0])
    results = [
        finish(TokenReadout(decoder).read(hidden.to(decoder.dtype), at, targets, coefficients.to(decoder.dtype)))
        for decoder in (load_decoder(directory, team=Team(2)), load_decoder(directory, dtype=torch.float64))
    ]
    assert_close(results[0][0], results[1][0], "loss")
    assert results[0][2] is not None
    assert results[1][2] is not None
    assert_close(results[0][2], results[1][2], "gradient")
    assert not results[0][2][[1, 3]].any()


def test_prefixes_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="no sequence can begin"):
        PackedAttention([0, 3, 5], [None, (0, 4)])
    with pytest.raises(ValueError, match="no sequence can begin"):
        PackedAttention([0, 3, 5, 9], [None, (0, 2), (1, 1)])
    assert PackedAttention(np.array([0, 3]).tolist(), [None]).prefixes is None
