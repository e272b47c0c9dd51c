"""Drives an Engine by hand, without threads or processes: add, step, collect."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Rows
from concurrent.futures import wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tenora.adapters.digest import digest_of
from tenora.adapters.ref import AdapterRef
from tenora.config import Settings
from tenora.engine.core import Engine
from tenora.engine.messages import (
    Generate,
    Outputs,
    Pool,
    SamplingParams,
    SequenceFailed,
    SequenceOutput,
    TokenLogprob,
    Training,
)
from tenora.model.cache import KVCache
from tenora.model.decoder import Decoder
from tenora.training.events import TrainEvent
from tests.engine.requests import generate
from tests.support.patience import PATIENCE


@dataclass
class Answer:
    """Everything one request got."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    outputs: list[SequenceOutput] = field(default_factory=list)
    failure: SequenceFailed | None = None

    @property
    def done(self) -> bool:
        return self.failure is not None or bool(self.outputs and self.outputs[-1].finish_reason)

    @property
    def finish_reason(self) -> str | None:
        return self.outputs[-1].finish_reason

    @property
    def cached(self) -> int:
        return self.outputs[0].cached_tokens


class Driver:
    def __init__(
        self, decoder: Decoder, *, start_run: Any = None, kv_blocks: int | None = None, **settings: Any
    ) -> None:
        """`kv_blocks` sets the KV memory below what an operator may."""
        given = Settings(
            **{"kv_cache_bytes": 2**20, "adapter_pool_bytes": 2**20, "max_adapters": 8, "block_size": 4, **settings}
        )
        if kv_blocks is not None:
            size = kv_blocks * KVCache.bytes_per_block(decoder.spec, given.block_size, decoder.dtype)
            given = given.model_copy(update={"kv_cache_bytes": size})
        extra = {} if start_run is None else {"start_run": start_run}
        self.engine = Engine(decoder, given, **extra)
        self.answers: defaultdict[str, Answer] = defaultdict(Answer)
        self.training: list[TrainEvent] = []

    def add(self, request: Generate | Pool) -> Answer:
        assert request.request_id not in self.answers, "a request is used once"
        self.engine.add(request)
        return self.answers[request.request_id]

    def step(self) -> None:
        for event in self.engine.step():
            match event:
                case Outputs(items=items):
                    for item in items:
                        self._collect(item)
                case Training(event=training):
                    self.training.append(training)
        self.engine.scheduler.check_integrity()
        if not self.engine.has_work:
            self.wait_for_loads()

    def wait_for_loads(self) -> None:
        wait(self.engine.loader._reads.values(), timeout=PATIENCE)

    def run(self, *requests: Generate | Pool, steps: int = 2000) -> list[Answer]:
        """Answer requests that arrive together; afterwards everything is back at the baseline."""
        answers = [self.add(request) for request in requests]
        for _ in range(steps):
            if all(answer.done for answer in answers):
                break
            self.step()
        assert all(answer.done for answer in answers)
        if not self.engine.scheduler.live():
            self.check_baseline()
        return answers

    def tokens(self, prompt: Rows[int], params: SamplingParams, adapter: AdapterRef | None = None) -> list[int]:
        (answer,) = self.run(generate(prompt, params, adapter=adapter))
        assert answer.failure is None
        return answer.tokens

    def check_baseline(self) -> None:
        self.engine.check_integrity()
        stats = self.engine.stats()
        assert stats.kv_blocks_used == 0
        assert stats.running == stats.waiting == 0
        assert all(resident.references == 0 for resident in self.engine.pool._residents.values())

    def close(self) -> None:
        self.engine.loader.close()

    def _collect(self, item: SequenceOutput | SequenceFailed) -> None:
        answer = self.answers[item.request_id]
        assert not answer.done, "nothing may follow the end"
        if isinstance(item, SequenceFailed):
            answer.failure = item
            return
        answer.outputs.append(item)
        answer.tokens += item.token_ids
        answer.logprobs += item.logprobs or []


def greedy(model: Any, prompt: Rows[int], count: int) -> tuple[list[int], torch.Tensor]:
    """transformers' greedy continuation, and the log-probabilities [count, vocab] behind it."""
    ids, rows = list(prompt), []
    with torch.no_grad():
        for _ in range(count):
            logits = model(torch.tensor([ids])).logits[0, -1].float()
            rows.append(torch.log_softmax(logits, dim=-1))
            ids.append(int(logits.argmax()))
    return ids[len(prompt) :], torch.stack(rows)


@contextmanager
def peft_warnings() -> Iterator[None]:
    """peft reads a property of transformers that is deprecated, and remarks on rsLoRA: none of it is ours."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
        warnings.filterwarnings("ignore", message=".*rslora.*")
        yield


def load_peft(base: Path, adapter: AdapterRef, dtype: torch.dtype = torch.float32) -> Any:
    """The base with one adapter, as peft and transformers load it."""
    import peft
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    with peft_warnings():
        return peft.PeftModel.from_pretrained(model, adapter.path)


def make_adapter(
    base: Path,
    directory: Path,
    *,
    rank: int = 4,
    targets: Rows[str] = ("q_proj", "v_proj"),
    seed: int = 0,
    narrow: bool = True,
    **lora: Any,
) -> AdapterRef:
    """Write a PEFT adapter of `base` with random A and B that change its tokens; `narrow` ones fit bfloat16."""
    import peft
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = peft.LoraConfig(
        r=rank, lora_alpha=lora.pop("alpha", 2 * rank), target_modules=list(targets), task_type="CAUSAL_LM", **lora
    )
    torch.manual_seed(seed)
    with peft_warnings():
        adapted = peft.get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=4 / (rank * parameter.shape[0]) ** 0.5)
        if narrow and "lora_" in name:
            parameter.data = parameter.data.bfloat16().float()  # the same values in every type of the pool
    adapted.save_pretrained(directory)
    return ref_of(directory)


def ref_of(directory: Path) -> AdapterRef:
    """The files as they lie there now."""
    return AdapterRef(digest=digest_of(directory) or "gone", path=str(directory))


MakeDriver = Callable[..., Driver]
