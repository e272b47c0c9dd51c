"""One GGUF file into a Hugging Face directory: `python -m tenora.model.convert SOURCE.gguf DIRECTORY`.

A process of its own, so that the one that asks for it never imports torch. Standard output carries progress as JSON
lines, `{"done": 1, "total": 3}`, and nothing else.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def convert(source: Path, directory: Path) -> None:
    """Write bfloat16 safetensors, configuration, tokenizer and chat template of `source` into `directory`."""
    _report(0)
    import torch  # noqa: PLC0415  # heavy: the first report must not wait for it
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: PLC0415
    from transformers.utils.quantization_config import GgufConfig  # noqa: PLC0415

    model = AutoModelForCausalLM.from_pretrained(
        source.parent,
        gguf_file=source.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True, gguf_file=source.name),
    )
    _report(1)
    model.save_pretrained(directory)
    _report(2)
    AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(directory)
    _report(3)


def _report(done: int) -> None:
    sys.stdout.write(json.dumps({"done": done, "total": 3}) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
