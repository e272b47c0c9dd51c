"""What the service does on a GPU, item by item: the engine's steps, a training pass, streams, a profile."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from tenora.config import Settings
from tenora.engine.core import Engine
from tests.bench.gpu import engine_loop, mixed_loop, stream_loop, training_pass

LINES = 25  # of the profile


def items() -> Iterator[tuple[str, Any]]:
    """Names and figures, the most valuable first."""
    prepared = engine_loop.prepare()
    if isinstance(prepared, str):
        yield "engine_loop", [{"skipped": prepared}]
        return
    loop, lora = prepared
    yield "engine_loop", engine_loop.run(loop, lora)
    yield "mixed_steps", mixed_loop.run(loop, lora)
    yield "training_pass", training_pass.run(loop.decoder)
    decoder = loop.decoder
    del loop, lora, prepared
    torch.cuda.empty_cache()
    engine = Engine(decoder, Settings())  # as it is by default: memory, sequences and tokens from the device
    engine.runner.warm_up(engine.settings.max_num_batched_tokens)
    with tempfile.TemporaryDirectory() as directory:
        yield "streams", stream_loop.run(engine, Path(directory))
    yield "profile", profile(engine)


def profile(engine: Engine, seconds: float = 2.0, **sizes: int) -> list[str]:
    """The kernels that a few seconds of streams spend their time in."""
    kinds = [torch.profiler.ProfilerActivity.CPU]
    on_gpu = engine.decoder.device.type == "cuda"
    if on_gpu:
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=kinds) as found:
        stream_loop.stream(engine, seconds, **sizes)
    order = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    return str(found.key_averages().table(sort_by=order, row_limit=LINES)).splitlines()
