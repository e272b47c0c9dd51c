"""Adapters of eight kinds in one decode step beside the same number of LoRA adapters of rank 16.

Run `python -m tests.bench.bench_kinds --model DIR`. Every row has an adapter of its own, whose weights come from
memory. A step is what the engine runs, from token ids to greedily drawn tokens; the cases take turns. Ratios are of
tokens per second, of medians over all steps, to those of LoRA. VeRA is materialised, so its rank 256 costs what a LoRA
of that rank costs on the two modules that it adapts.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median

import torch

from tenora.engine.messages import Generate, SamplingParams
from tenora.engine.model_runner import ModelRunner
from tenora.engine.scheduler import Scheduled
from tenora.engine.sequence import SequenceState
from tenora.model.cache import KVCache
from tenora.model.executors.choice import executor_for
from tenora.model.loading import load_decoder
from tenora.model.spec import table_rows
from tenora_kernels.cpu.runtime.team import Team
from tenora_kernels.flags import BIAS_OUTSIDE, PARALLEL, WITH_RESIDUAL
from tests.bench.serving.quiet import NOISY, Quiet
from tests.model.kinds_of_adapters import ALL, Kind, tables_of

BLOCK, RANK = 16, 16
LORA = "LoRA r=16"
KINDS: Mapping[str, Kind] = {
    LORA: Kind(rank=RANK, is_bf16=True),
    "rsLoRA r=16": Kind(rank=RANK, scaling=RANK**-0.5, is_bf16=True),
    "DoRA r=16, float32": Kind(rank=RANK, scaled=ALL, flags=BIAS_OUTSIDE),
    "(IA)³": Kind(scaled=("k_proj", "v_proj", "up_proj"), is_bf16=True),
    "VeRA r=256 on q, v": Kind(rank=256, targets=("q_proj", "v_proj"), is_bf16=True),
    "Houlsby, 36 wide": Kind(width=36, is_bf16=True),
    "Pfeiffer, 36 wide": Kind(width=36, blocks=("mlp",), activation="relu", flags=WITH_RESIDUAL, is_bf16=True),
    "parallel, 288 wide": Kind(
        width=288, blocks=("mlp",), activation="relu", flags=PARALLEL, scaling=4.0, is_bf16=True
    ),
}
"""Widths are those of the `adapters` package's reduction factors for 576 columns: 16, and 2 for parallel ones. All lie
as bfloat16, as their files do, but DoRA: its scales come as float32, and an adapter has one type.
"""


class Rows:
    """Decode steps of some sequences, again and again at the same place."""

    def __init__(self, runner: ModelRunner, context: int, slots: list[int]) -> None:
        self._runner = runner
        self._work = []
        blocks = -(-context // BLOCK)
        for number, slot in enumerate(slots):
            sampling = SamplingParams(temperature=0.0, max_tokens=1)
            asked = Generate(request_id=str(number), token_ids=[5 + number] * context, sampling=sampling)
            sequence = SequenceState.start(asked, number)
            sequence.block_table, sequence.slot = list(range(number * blocks, (number + 1) * blocks)), slot
            self._work.append(Scheduled(sequence, context - 1, 1))

    def seconds(self) -> float:
        """Of one step."""
        started = time.perf_counter()
        self._runner.run(self._work)
        return time.perf_counter() - started


def main() -> None:
    """Print a line per case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="directory of the base")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--context", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--steps", type=int, default=5, help="of a case in a round")
    parser.add_argument("--each", action="store_true", help="every kind alone, too")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    count = options.streams
    chosen = {"mixed": [kind for kind in KINDS for _ in range(count // len(KINDS))]}
    chosen |= {kind: [kind] * count for kind in (KINDS if options.each else [LORA])}
    held = [kind for kind in KINDS for _ in range(count if kind in chosen else count // len(KINDS))]
    decoder = load_decoder(options.model, team=Team(options.threads))
    tables = tables_of(table_rows(decoder.spec), [KINDS[kind] for kind in held], deviation=0.02)
    cache = KVCache.allocate(decoder.spec, count * -(-options.context // BLOCK), BLOCK)
    executor = executor_for(
        decoder, cache, tables, max_rows=count, max_tokens=512, max_context=options.context, max_rank=256
    )
    runner = ModelRunner(decoder, cache, executor, tables)
    cases = {}
    for name, kinds in {"base": [], **chosen}.items():
        slots = [held.index(kind) + kinds[:row].count(kind) for row, kind in enumerate(kinds)] or [-1] * count
        cases[name] = Rows(runner, options.context, slots)
    taken: dict[str, list[float]] = {name: [] for name in cases}
    with Quiet() as quiet:
        for turn in range(options.rounds + 1):
            for name, rows in cases.items():
                seconds = [rows.seconds() for _ in range(options.steps)]
                taken[name] += seconds if turn else []
    print(f"{count} rows, {type(executor).__name__}, {options.threads} threads, medians of {len(taken[LORA])} steps")
    for name, seconds in taken.items():
        of_rounds = [
            median(taken[LORA][at : at + options.steps]) / median(seconds[at : at + options.steps])
            for at in range(0, len(seconds), options.steps)
        ]
        print(
            f"{name:22} {median(seconds) * 1e3:8.1f} ms {count / median(seconds):8.1f} tok/s   to {LORA}: "
            f"{median(taken[LORA]) / median(seconds):6.3f}, of rounds {min(of_rounds):.3f} … {max(of_rounds):.3f}"
            f"{'   NOISY' if quiet.foreign > NOISY else ''}"
        )


if __name__ == "__main__":
    main()
