"""The decoder equals transformers, whatever way its tokens arrive.

Tolerance: float32, largest difference at most 1e-5 of the largest logit (which is 5 to 20 in these models).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from tenora.model.attention import PackedAttention
from tenora.model.context import ForwardContext
from tenora.model.decoder import Decoder
from tenora.model.loading import load_decoder
from tenora.model.spec import target_modules
from tenora.model.stack import can_pack
from tenora_kernels.cpu.runtime.team import Team
from tenora_kernels.layout import LoraBatch, LoraTables, build_segments
from tests.model.paged import PagedRun, Schedule
from tests.support.full import full_but
from tests.support.tiny import FAMILIES, VOCAB

TOLERANCE = 1e-5
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "short_factor": [1.0 + 0.05 * i for i in range(8)],
    "long_factor": [1.5 + 0.4 * i for i in range(8)],
    "original_max_position_embeddings": 16,
}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, {}) for family in FAMILIES},
    "dynamic_beyond_limit": ("dynamic_rope", {"max_position_embeddings": 16}),
    "longrope_short": ("llama", {"rope_parameters": {**LONGROPE, "original_max_position_embeddings": 128}}),
    "longrope_long": ("llama", {"rope_parameters": LONGROPE}),
    "llama_biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama_gelu": ("llama", {"hidden_act": "gelu_pytorch_tanh"}),
    "mistral_full": ("mistral", {"sliding_window": None}),
    "qwen2_sliding": ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    "qwen2_untied": ("qwen2", {"tie_word_embeddings": False}),
    "qwen3_sliding_biases": (
        "qwen3",
        {
            "use_sliding_window": True,
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "attention_bias": True,
        },
    ),
}


def load_reference(directory: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


def random_ids(length: int, seed: int) -> Tensor:
    return torch.randint(0, VOCAB, (length,), generator=torch.Generator().manual_seed(seed))


def packed_context(decoder: Decoder, lengths: list[int], **more: Any) -> ForwardContext:
    positions = torch.cat([torch.arange(n) for n in lengths])
    per_token = torch.cat([torch.full((n,), n) for n in lengths])
    starts = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    return ForwardContext(positions, decoder.rope(positions, per_token), PackedAttention(starts), **more)


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    assert actual.shape == expected.shape
    assert actual.dtype == torch.float32
    difference = (actual - expected).abs().max().item()
    assert difference <= tolerance * expected.abs().max().item()


@pytest.fixture(params=["modules", "packed"], name="team")
def _team(request: pytest.FixtureRequest) -> Team | None:
    """None: the decoder runs module by module. A team: its weights are packed, and serving runs as one job."""
    return Team(2) if request.param == "packed" else None


QUICK = ["smollm2", "qwen3", "mistral", "dynamic_beyond_limit", "longrope_long", "llama_biases", "qwen3_sliding_biases"]


@pytest.fixture(params=full_but(QUICK, VARIANTS), name="models")
def _models(request: pytest.FixtureRequest, tiny: Callable[..., Path], team: Team | None) -> tuple[Decoder, Any]:
    family, overrides = VARIANTS[request.param]
    directory = tiny(family, **overrides)
    decoder = load_decoder(directory, team=team)
    assert (decoder.stack is None) == (team is None or not can_pack(decoder.spec))
    return decoder, load_reference(directory)


SCHEDULES: dict[str, Schedule] = {
    "whole": [[(0, 37)], [(1, 21)], [(2, 9)]],
    "whole, together": [[(2, 9), (0, 37), (1, 21)]],
    "chunked": [[(0, 13), (1, 5)], [(0, 13), (1, 16)], [(0, 11), (2, 9)]],
    "token by token": [
        *([(0, 1), (1, 1), (2, 1)] for _ in range(9)),
        *([(1, 1), (0, 1)] for _ in range(12)),
        *([(0, 1)] for _ in range(16)),
    ],
    "mixed": [[(0, 20)], [(0, 1), (1, 7)], [(1, 1), (2, 4), (0, 1)], [(0, 15), (2, 1), (1, 1)], [(1, 12), (2, 4)]],
}


@torch.no_grad()
def test_paged_logits_equal_transformers(models: tuple[Decoder, Any]) -> None:
    decoder, reference = models
    prompts = [random_ids(37, 1), random_ids(21, 2), random_ids(9, 3)]
    # A fresh copy for each: transformers' dynamic RoPE remembers the longest sequence it has seen.
    expected = [copy.deepcopy(reference)(prompt[None]).logits[0] for prompt in prompts]
    for schedule in SCHEDULES.values():
        for actual, wanted in zip(PagedRun(decoder, prompts).run(schedule), expected, strict=True):
            assert_close(actual, wanted)


def test_packed_logits_and_input_gradients_equal_transformers(models: tuple[Decoder, Any]) -> None:
    decoder, _ = models
    prompts = [random_ids(30, 4), random_ids(1, 5), random_ids(12, 6)]
    lengths = [len(prompt) for prompt in prompts]
    with torch.no_grad():
        start = decoder.embed(torch.cat(prompts))
    start.requires_grad_()
    hidden, context = start, packed_context(decoder, lengths)
    for layer in decoder.layers:
        hidden = layer(hidden, context)
    logits = decoder.logits(decoder.finish(hidden))
    direction = torch.randn(logits.shape, generator=torch.Generator().manual_seed(7))
    (gradient,) = torch.autograd.grad((logits * direction).sum(), start)

    for part, actual, slope, push in zip(
        prompts, logits.split(lengths), gradient.split(lengths), direction.split(lengths), strict=True
    ):
        reference = copy.deepcopy(models[1])
        embedded = reference.get_input_embeddings()(part).detach().requires_grad_()
        wanted = reference(inputs_embeds=embedded[None]).logits[0]
        (wanted_slope,) = torch.autograd.grad((wanted * push).sum(), embedded)
        assert_close(actual.detach(), wanted.detach())
        assert_close(slope, wanted_slope, tolerance=1e-4)
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in decoder.parameters())


@pytest.mark.parametrize("variant", ["dynamic_beyond_limit", "longrope_long", "yarn_rope", "mistral"])
@torch.no_grad()
def test_generation_equals_transformers_cached_generation(variant: str, tiny: Callable[..., Path]) -> None:
    """Crossing the RoPE limit while decoding: earlier keys keep the rotation they were cached with."""
    family, overrides = VARIANTS[variant]
    directory = tiny(family, **overrides)
    decoder, reference = load_decoder(directory), load_reference(directory)
    ids, prompt = random_ids(26, 8), 12
    run = PagedRun(decoder, [ids], prompt_lens=[prompt])
    actual = run.run([[(0, prompt)], *([(0, 1)] for _ in range(14))])[0]
    cache = transformers.DynamicCache(config=reference.config)
    expected = [reference(ids[None, :prompt], past_key_values=cache).logits[0]]
    for position in range(prompt, 26):
        where = torch.tensor([[position]])
        step = reference(ids[None, position : position + 1], past_key_values=cache, position_ids=where)
        expected.append(step.logits[0])
    assert_close(actual, torch.cat(expected))


def test_no_tokens_at_all(tiny: Callable[..., Path]) -> None:
    decoder = load_decoder(tiny())
    hidden = decoder(torch.empty(0, dtype=torch.long), packed_context(decoder, [0]))
    assert decoder.logits(hidden).shape == (0, VOCAB)


def random_tables(decoder: Decoder, ranks_of_slot: list[dict[str, int]]) -> LoraTables:
    """Random adapters: a rank for each short module name, 0 or absent for a module that is not adapted."""
    modules = target_modules(decoder.spec)
    ranks = [[of.get(module.name, 0) for module in modules] for of in ranks_of_slot]
    inputs, outputs = [m.in_features for m in modules], [m.out_features for m in modules]
    size = sum(rank * (i + o) for row in ranks for rank, i, o in zip(row, inputs, outputs, strict=True))
    arena = torch.randn(size, generator=torch.Generator().manual_seed(9)) * 0.2
    tables = LoraTables.empty(arena, in_features=inputs, out_features=outputs, slots=len(ranks))
    offset = 0
    for slot, row in enumerate(ranks):
        offset += tables.place(slot, offset, row, [0.5 + slot] * len(row))
    return tables


@pytest.mark.parametrize("family", ["smollm2", "qwen2", "qwen3", "mistral"])
@torch.no_grad()
def test_each_row_gets_its_own_adapter(family: str, tiny: Callable[..., Path]) -> None:
    """One batch of base rows and two adapters equals transformers with each adapter merged into the weights by path."""
    directory = tiny(family)
    decoder = load_decoder(directory)
    everything = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"), 4)
    tables = random_tables(decoder, [everything, {"v_proj": 3, "down_proj": 8, "up_proj": 1}])
    prompts, slots = [random_ids(11, 10), random_ids(7, 11), random_ids(14, 12)], [1, -1, 0]
    lengths = [len(prompt) for prompt in prompts]
    rows = [slot for slot, length in zip(slots, lengths, strict=True) for _ in range(length)]
    ids = torch.cat(prompts)
    context = packed_context(decoder, lengths, lora=LoraBatch(tables, build_segments(rows)))
    logits = decoder.logits(decoder(ids, context)).split(lengths)

    for prompt, slot, actual in zip(prompts, slots, logits, strict=True):
        reference = load_reference(directory)
        for module in target_modules(decoder.spec) if slot >= 0 else ():
            if tables.rank(module.row, slot):
                weight = reference.get_submodule(module.path).weight
                a, bt = tables.a(module.row, slot), tables.bt(module.row, slot)
                weight += tables.scale(module.row, slot) * bt.T @ a
        assert_close(actual, reference(prompt[None]).logits[0])

    base_only = decoder.logits(decoder(ids, packed_context(decoder, lengths))).split(lengths)
    assert torch.equal(base_only[1], logits[1])  # base rows: to the bit
    assert not torch.equal(base_only[0], logits[0])


@torch.no_grad()
def test_dropout_touches_what_adapters_see_only(tiny: Callable[..., Path]) -> None:
    decoder = load_decoder(tiny())
    tables = random_tables(decoder, [{"q_proj": 2, "down_proj": 2}])
    lora, ids = LoraBatch(tables, build_segments([0] * 6)), random_ids(6, 13)

    def run(**more: Any) -> Tensor:
        return decoder.logits(decoder(ids, packed_context(decoder, [6], **more)))

    base, adapted = run(), run(lora=lora)
    assert torch.equal(run(lora=lora, lora_dropout=lambda x: x), adapted)
    assert torch.equal(run(lora=lora, lora_dropout=torch.zeros_like), base)
    assert not torch.equal(adapted, base)
