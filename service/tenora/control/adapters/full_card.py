"""README.md of a downloaded model: Hugging Face's front matter, then the card as tables."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from tenora.control.adapters.model_card import sections


def full_card(said: Mapping[str, Any]) -> str:
    """The text, from a job's evaluation; equal evaluations give equal text."""
    lineage: Mapping[str, Any] = said.get("lineage") or {}
    base = json.dumps(lineage.get("base_model", ""))
    front = [
        f"base_model: {base}",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags:",
        *(f"- {json.dumps(tag)}" for tag in ("text-generation", "tenora", f"base_model:finetune:{json.loads(base)}")),
    ]
    parts = [
        "\n".join(["---", *front, "---"]),
        f"# A full fine-tuning of {json.loads(base)}",
        "A model of its own, trained by Tenora; every figure is of held-out rows.",
        *sections(said),
        _USE,
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


_USE = """## Use

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("path/of/this/directory")
```

`tenora serve --model path/of/this/directory` serves it as a base."""
