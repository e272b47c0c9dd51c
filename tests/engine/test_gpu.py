"""The engine on a real GPU: prefill, paged decoding in CUDA graphs, adapters that come and go, training beside it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tenora.adapters.ref import AdapterRef
from tenora.engine.messages import Generate
from tenora.model.executors.cuda_graphs import GraphExecutor
from tenora.model.loading import load_decoder
from tests.engine.driver import Answer, MakeDriver
from tests.engine.requests import generate, prompt, sampling

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

SMALL = {"max_adapters": 3, "max_num_seqs": 7, "max_num_batched_tokens": 24}
"""Adapters are evicted and loaded again, prompts are cut into chunks."""


def requests(adapters: list[AdapterRef], count: int = 24) -> list[Generate]:
    """Nine kinds of rows of many lengths, greedy."""
    kinds = [None, *adapters]
    return [
        generate(
            prompt(3 + 5 * (index % 7), index),
            sampling(max_tokens=6 + index % 9, logprobs=0),
            adapter=kinds[index % 9],
        )
        for index in range(count)
    ]


def logprobs(answer: Answer, count: int | None = None) -> list[float]:
    return [entry.logprob for entry in answer.logprobs[:count]]


def test_float32_gives_the_cpus_tokens(tiny_base: Path, adapters: list[AdapterRef], driver: MakeDriver) -> None:
    host = driver(base=load_decoder(tiny_base), **SMALL)
    gpu = driver(base=load_decoder(tiny_base, device="cuda"), **SMALL)
    assert isinstance(gpu.engine.runner.executor, GraphExecutor)
    for one, other in zip(host.run(*requests(adapters)), gpu.run(*requests(adapters)), strict=True):
        assert other.failure is None
        assert other.tokens == one.tokens
        assert logprobs(other) == pytest.approx(logprobs(one), abs=1e-4)
    assert gpu.engine.stats().adapter_evictions > 3


@pytest.mark.parametrize(("dtype", "most"), [(torch.bfloat16, 0.6), (torch.float16, 0.1)], ids=str)
def test_half_types_are_near_float32(
    dtype: torch.dtype, most: float, tiny_base: Path, adapters: list[AdapterRef], driver: MakeDriver
) -> None:
    """Log-probabilities of the tokens up to the first other one; prompts go through flash attention, in chunks."""
    host = driver(base=load_decoder(tiny_base), **SMALL)
    gpu = driver(base=load_decoder(tiny_base, device="cuda", dtype=dtype), **SMALL)
    gaps = []
    for one, other in zip(host.run(*requests(adapters)), gpu.run(*requests(adapters)), strict=True):
        assert other.failure is None
        same = next((i for i, (a, b) in enumerate(zip(one.tokens, other.tokens, strict=True)) if a != b), None)
        gaps += [abs(a - b) for a, b in zip(logprobs(one, same), logprobs(other, same), strict=True)]
    assert len(gaps) > 100, "the answers part at once"
    assert max(gaps) < most
    assert sum(gaps) / len(gaps) < most / 10


def test_a_batch_changes_no_row(tiny_base: Path, adapters: list[AdapterRef], driver: MakeDriver) -> None:
    """float32, greedy: a request alone has the tokens that it has beside 23 others."""
    base = load_decoder(tiny_base, device="cuda")
    together = driver(base=base).run(*requests(adapters))
    alone = driver(base=base)
    for request, answer in zip(requests(adapters), together, strict=True):
        assert alone.run(request)[0].tokens == answer.tokens


LOST = """
import torch
from tenora.errors import DeviceLostError
from tenora.model.device import survive

device = torch.device("cuda")
survive(ValueError("nothing happened to the device"), device)
try:
    print(torch.zeros(1, device=device)[torch.tensor([10**6], device=device)].sum().item())
except Exception as error:
    try:
        survive(error, device)
    except DeviceLostError as lost:
        raise SystemExit(3) from lost
"""


def test_a_failed_assertion_of_a_kernel_loses_the_device_and_another_error_does_not() -> None:
    """In a process of its own, which is of no use afterwards."""
    done = subprocess.run([sys.executable, "-c", LOST], capture_output=True, text=True, check=False)
    assert done.returncode == 3, done.stderr
