"""PEFT and a plain torch loop, in a process of its own: `python -m tests.bench.training.peft_loop BASE THREADS`.

Each line on stdin is a run as JSON, the arguments of `train`; its answer is a JSON object. Batches are padded to their
longest row, as `Trainer` with a collator does; the loss is the mean over a batch's learned tokens.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from tenora.data.dataset import TokenizedDataset

ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class PeftLoop:
    """The process, asked for one run after the other."""

    def __init__(self, base: Path, threads: int) -> None:
        command = [sys.executable, "-m", "tests.bench.training.peft_loop", str(base), str(threads)]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(threads)}
        self._process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.communicate(timeout=60)

    def run(self, **wanted: Any) -> dict[str, Any]:
        """Train once; seconds of the steps and of all, real tokens per second, held-out losses, peak memory."""
        if self._process.stdin is None or self._process.stdout is None:
            raise RuntimeError("no pipes")
        self._process.stdin.write(json.dumps(wanted, default=str) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"PEFT ended with status {self._process.wait()}")
        found: dict[str, Any] = json.loads(answer)
        return found


def main(base: str, threads: int) -> None:
    """Train whenever a line comes."""
    import torch

    torch.set_num_threads(threads)
    for line in sys.stdin:
        wanted = json.loads(line)
        print(json.dumps(train(base, **wanted)), flush=True)


def train(
    base: str,
    *,
    train: str,
    valid: str = "",
    epochs: int = 1,
    batch_size: int = 16,
    learning_rate: float = 5e-4,
    dtype: str = "float32",
    rank: int = 16,
    max_batches: int = 0,
    parts: int = 1,
) -> dict[str, Any]:
    """One run from the base on. `parts` of a batch, of rows of like length, one after the other: less padding.

    The gradient is the same, the mean over the learned tokens of the whole batch.
    """
    import peft
    import torch
    from transformers import AutoModelForCausalLM, get_cosine_schedule_with_warmup

    began = time.perf_counter()
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, dtype))
    shape = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=ALL_LINEAR, task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, shape)
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=learning_rate, weight_decay=0.0)
    rows = TokenizedDataset.load(Path(train))
    steps = epochs * -(-len(rows) // batch_size)
    schedule = get_cosine_schedule_with_warmup(optimizer, round(0.05 * steps), steps)
    losses = [evaluate(model, valid)] if valid else []
    seconds, tokens, done = 0.0, 0, 0
    for epoch in range(epochs):
        started = time.perf_counter()
        for batch in batches(rows, batch_size, seed=epoch, parts=parts):
            learned_here = sum(learned_tokens(labels) for _, _, labels in batch)
            for ids, mask, labels in batch:
                loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
                (loss * (learned_tokens(labels) / learned_here)).backward()
                tokens += int(mask.sum())
            torch.nn.utils.clip_grad_norm_(learned, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            done += 1
            if done == max_batches:
                break
        seconds += time.perf_counter() - started
        if valid:
            losses.append(evaluate(model, valid))
        if done == max_batches:
            break
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
    return {
        "seconds": seconds,
        "wall": time.perf_counter() - began,
        "tokens": tokens,
        "tokens_per_second": tokens / seconds,
        "losses": losses,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def batches(rows: TokenizedDataset, size: int, *, seed: int | None, parts: int = 1) -> Iterator[list[Any]]:
    """Batches of `size` rows, each in `parts` of ids, mask and labels, [rows, longest], padded on the right."""
    order = np.arange(len(rows)) if seed is None else np.random.default_rng(seed).permutation(len(rows))
    for first in range(0, len(rows), size):
        picked = [rows.row(int(row)) for row in order[first : first + size]]
        if parts > 1:
            picked.sort(key=lambda row: len(row[0]))
        each = -(-len(picked) // parts)
        yield [padded(picked[start : start + each]) for start in range(0, len(picked), each)]


def padded(picked: list[Any]) -> Any:
    """ids, mask and labels of some rows."""
    import torch

    longest = max(len(tokens) for tokens, _ in picked)
    ids = torch.zeros(len(picked), longest, dtype=torch.int64)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for index, (tokens, weights) in enumerate(picked):
        length = len(tokens)
        ids[index, :length] = torch.from_numpy(tokens.astype(np.int64))
        mask[index, :length] = 1
        kept = torch.from_numpy(weights.astype(bool))
        labels[index, :length][kept] = ids[index, :length][kept]
    return ids, mask, labels


def learned_tokens(labels: Any) -> int:
    """How many tokens the loss is a mean over."""
    return int((labels[:, 1:] != -100).sum())


def evaluate(model: Any, path: str) -> float:
    """Held-out loss in nats per learned token."""
    import torch

    total, count = 0.0, 0
    model.eval()
    with torch.no_grad():
        for batch in batches(TokenizedDataset.load(Path(path)), 8, seed=None):
            for ids, mask, labels in batch:
                tokens = learned_tokens(labels)
                total += float(model(input_ids=ids, attention_mask=mask, labels=labels).loss) * tokens
                count += tokens
    model.train()
    return total / count


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
