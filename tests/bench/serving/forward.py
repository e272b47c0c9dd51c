"""transformers' forward of the base, in a process of its own that answers when it is asked.

Run as a module it is that process: a line on stdin is a measurement, its answer a JSON object on stdout.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

KINDS = {"float32": "float32", "bfloat16": "bfloat16"}


class TransformersForward:
    """Seconds of `model(ids)`, by dtype and by whether all logits are computed, as transformers does by itself."""

    def __init__(self, base: Path, threads: int, *, tokens: int) -> None:
        command = [sys.executable, "-m", "tests.bench.serving.forward", str(base), str(threads), str(tokens)]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(threads)}
        self._process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.communicate(timeout=60)  # the end of its stdin is the end of it

    def seconds(self) -> dict[str, float]:
        """One measurement of each kind."""
        if self._process.stdin is None or self._process.stdout is None:
            raise RuntimeError("no pipes")
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"transformers ended with status {self._process.wait()}")
        found: dict[str, float] = json.loads(answer)
        return found


def main(base: str, threads: int, tokens: int) -> None:
    """Measure whenever a line comes."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    models: dict[str, Any] = {
        kind: AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, dtype)).eval()
        for kind, dtype in KINDS.items()
    }
    for line in sys.stdin:
        del line
        found = {}
        with torch.inference_mode():
            for kind, model in models.items():
                ids = torch.randint(100, model.config.vocab_size, (1, tokens))
                for label, options in ((kind, {}), (f"{kind}_last_logits", {"logits_to_keep": 1})):
                    started = time.perf_counter()
                    model(input_ids=ids, **options)
                    found[label] = time.perf_counter() - started
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
