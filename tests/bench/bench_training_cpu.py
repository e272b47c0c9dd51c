"""A training pass on a CPU beside PEFT and a plain torch loop, on the same rows.

    python -m tests.bench.bench_training_cpu BASE [ROWS.jsonl] --count 64 --tokens 512 1024

BASE is a Hugging Face directory. Streams of equal random rows first: tokens per second forward, and forward and
backward, of the compiled layers and of the decoder's modules. Then the chats of ROWS: real tokens per second with the
rows' common beginning computed once, with every row whole, and by PEFT in padded batches of 16. Medians of `--repeats`
passes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tenora.model.attention import PackedAttention
from tenora.model.context import ForwardContext
from tenora.model.decoder import Decoder
from tenora.model.executors.choice import layer_pass
from tenora.model.executors.layers import Keep
from tenora.model.loading import load_decoder
from tenora.model.readouts.tokens import TokenReadout
from tenora.model.spec import target_modules
from tenora_kernels.cpu.runtime.team import Team
from tenora_kernels.layout import LoraBatch, LoraTables, build_segments

RANK, ALPHA, BATCH, RATE = 16, 32.0, 16, 2e-4


@dataclass
class Row:
    """A row's tokens, and how many of the last ones are learned."""

    tokens: Tensor
    learned: int


@dataclass
class Stream:
    """Rows end to end; `real`: how many tokens the rows have, each of them counted whole."""

    ids: Tensor
    context: ForwardContext
    predict_at: Tensor
    targets: Tensor
    real: int


def main() -> None:
    """Print one line per measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("rows", type=Path, nargs="?")
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 1024])
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--count", type=int, default=64)
    parser.add_argument("--capacity", type=int, default=512)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    decoder = load_decoder(options.base, team=Team.shared(options.threads))
    tables = make_tables(decoder)
    for tokens in options.tokens:
        count = tokens // options.length
        rows = [Row(torch.randint(0, decoder.spec.vocab_size, (options.length + 1,)), options.length // 2)] * count
        stream = lay(decoder, rows, tables, 0)
        for name, way in (("compiled", compiled_pass), ("modules", module_pass)):
            forward = median(lambda: way(decoder, stream, backward=False), options.repeats)  # noqa: B023
            both = median(lambda: way(decoder, stream, backward=True), options.repeats)  # noqa: B023
            print(
                f"{name:9} {tokens:5} tokens: forward {tokens / forward:5.0f}/s, forward and backward "
                f"{tokens / both:5.0f}/s ({both:.2f} s)",
                flush=True,
            )
    if options.rows is not None:
        compare(decoder, tables, options)


def compare(decoder: Decoder, tables: LoraTables, options: argparse.Namespace) -> None:
    """Real tokens per second on the rows of a file."""
    rows = read_rows(options.base, options.rows, options.count)
    shared = common_beginning(rows)
    real = sum(len(row.tokens) for row in rows)
    print(f"{len(rows)} rows, {real} tokens, {sum(row.learned for row in rows)} learned, {shared} begin every row")
    speeds = {}
    for name, prefix in (("shared beginning", shared), ("whole rows", 0)):
        streams = [
            lay(decoder, [rows[index] for index in group], tables, prefix)
            for group in pack([len(row.tokens) - prefix for row in rows], options.capacity - prefix)
        ]
        seconds = median(
            lambda: [compiled_pass(decoder, stream, backward=True) for stream in streams],  # noqa: B023
            options.repeats,
        )
        speeds[name] = real / seconds
        print(f"{name}: {len(streams)} streams, {seconds:.2f} s, {real / seconds:.0f} real tokens/s", flush=True)
    step = peft_step(options.base)
    batches = [rows[start : start + BATCH] for start in range(0, len(rows), BATCH)]
    seconds = median(lambda: [step(batch) for batch in batches], max(1, options.repeats // 2))
    print(f"PEFT, batches of {BATCH}: {seconds:.2f} s, {real / seconds:.0f} real tokens/s", flush=True)
    for name, speed in speeds.items():
        print(f"{name}: {speed * seconds / real:.2f} x PEFT")


def make_tables(decoder: Decoder) -> LoraTables:
    """One adapter of every linear layer with a random B."""
    modules = target_modules(decoder.spec)
    inputs, outputs = [m.in_features for m in modules], [m.out_features for m in modules]
    size = sum(RANK * (i + o) for i, o in zip(inputs, outputs, strict=True))
    arena = torch.randn(size).mul_(0.02)
    tables = LoraTables.empty(arena, in_features=inputs, out_features=outputs, slots=1, grad=torch.zeros(size))
    tables.place(0, 0, [RANK] * len(modules), [ALPHA / RANK] * len(modules))
    return tables


def lay(decoder: Decoder, rows: Sequence[Row], tables: LoraTables, shared: int) -> Stream:
    """A stream of rows, their first `shared` tokens only once. The last token of a row is predicted, not read."""
    ids: list[Tensor] = []
    positions: list[Tensor] = []
    lengths: list[int] = []
    prefixes: list[tuple[int, int] | None] = []
    at: list[Tensor] = []
    targets: list[Tensor] = []
    if shared:
        ids.append(rows[0].tokens[:shared])
        positions.append(torch.arange(shared))
        lengths.append(shared)
        prefixes.append(None)
    for row in rows:
        tokens, start = row.tokens, sum(lengths)
        ids.append(tokens[shared:-1])
        positions.append(torch.arange(shared, len(tokens) - 1))
        learned = torch.arange(len(tokens) - row.learned, len(tokens))
        at.append(start + learned - 1 - shared)
        targets.append(tokens[learned])
        lengths.append(len(tokens) - 1 - shared)
        prefixes.append((0, shared) if shared else None)
    where = torch.cat(positions)
    context = ForwardContext(
        positions=where,
        rope=decoder.rope(where),
        attention=PackedAttention(list(accumulate(lengths, initial=0)), prefixes),
        lora=LoraBatch(tables, build_segments([0] * len(where))),
    )
    real = sum(len(row.tokens) for row in rows)
    return Stream(torch.cat(ids), context, torch.cat(at), torch.cat(targets), real)


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """First-fit decreasing."""
    bins: list[tuple[list[int], int]] = []
    for index in sorted(range(len(lengths)), key=lambda item: -lengths[item]):
        for number, (group, free) in enumerate(bins):
            if lengths[index] <= free:
                group.append(index)
                bins[number] = (group, free - lengths[index])
                break
        else:
            bins.append(([index], capacity - lengths[index]))
    return [group for group, _ in bins]


@torch.no_grad()
def compiled_pass(decoder: Decoder, stream: Stream, *, backward: bool) -> None:
    """Losses, and the gradient of their mean."""
    layers = layer_pass(decoder, stream.context, Keep.ALL if backward else Keep.NOTHING)
    hidden = decoder.embed(stream.ids)
    for index in range(len(decoder.layers)):
        hidden = layers.forward(index, hidden)
    coefficients = torch.full((len(stream.targets),), 1 / len(stream.targets)) if backward else None
    slope = finish(TokenReadout(decoder).read(hidden, stream.predict_at, stream.targets, coefficients)).slope
    if slope is not None:
        for index in reversed(range(len(decoder.layers))):
            slope = layers.backward(index, slope, need_dx=index > 0)
    layers.close()


def module_pass(decoder: Decoder, stream: Stream, *, backward: bool) -> None:
    """The same on the decoder's modules, with one autograd graph."""
    with torch.set_grad_enabled(backward):
        hidden = decoder.embed(stream.ids)
        for layer in decoder.layers:
            hidden = layer(hidden, stream.context)
        logits = decoder.logits(decoder.finish(hidden[stream.predict_at]))
        loss = torch.nn.functional.cross_entropy(logits, stream.targets)
        if backward:
            torch.autograd.backward(loss)


def finish(items: Generator[None, None, Any]) -> Any:
    """Run a generator to its result."""
    while True:
        try:
            next(items)
        except StopIteration as stop:
            return stop.value


def median(run: Callable[[], object], repeats: int) -> float:
    """Seconds of the middle one of several runs, after one that does not count."""
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def read_rows(base: Path, path: Path, count: int) -> list[Row]:
    """The first chats of a file; the last message is learned."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines()[:count]:
        messages = json.loads(line)["messages"]
        whole, before = (
            tokenizer.apply_chat_template(part, return_dict=False, add_generation_prompt=asks)
            for part, asks in ((messages, False), (messages[:-1], True))
        )
        rows.append(Row(torch.tensor(whole), len(whole) - len(before)))
    return rows


def common_beginning(rows: Sequence[Row]) -> int:
    """Tokens with which every row begins; at least two of each row are left, and none of them is learned."""
    most = min(len(row.tokens) - max(row.learned, 2) for row in rows)
    shared = 0
    while shared < most and len({int(row.tokens[shared]) for row in rows}) == 1:
        shared += 1
    return shared


def peft_step(base: Path) -> Callable[[Sequence[Row]], None]:
    """A training step of PEFT on a padded batch."""
    import peft
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE)

    def step(rows: Sequence[Row]) -> None:
        width = max(len(row.tokens) for row in rows)
        ids, mask = torch.zeros(len(rows), width, dtype=torch.int64), torch.zeros(len(rows), width, dtype=torch.int64)
        labels = torch.full_like(ids, -100)
        for number, row in enumerate(rows):
            length = len(row.tokens)
            ids[number, :length], mask[number, :length] = row.tokens, 1
            labels[number, length - row.learned : length] = row.tokens[length - row.learned :]
        model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


if __name__ == "__main__":
    main()
