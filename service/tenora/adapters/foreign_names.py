"""Tensor names that PEFT did not write: what wrote them, and what to do. Free of torch."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

PREFIX = "base_model.model."
_RENAME = f"rename its tensors to {PREFIX}<module>.lora_A.weight, or save it with PeftModel.save_pretrained"

# What the name of an unexpected tensor tells about the kind of adapter; the first that fits.
_KINDS = (
    (r"lora_magnitude_vector", "belongs to DoRA, which also rescales the base weights; train plain LoRA"),
    (r"lora_embedding|\.embed_tokens\.", "adapts the embeddings, which is not served; train linear modules only"),
    (r"^lora_(unet|te\d?|transformer)_", "is of a kohya adapter for image models; no language model can use it"),
    (
        r"^(unet|text_encoder\w*|transformer|diffusion_model)\.",
        "is of a diffusers adapter for image models; if it is of a language model, " + _RENAME,
    ),
    (r"\.lora_(down|up)\.|\.alpha$", f"is named as kohya's tools name it (lora_down, lora_up, alpha); {_RENAME}"),
    (r"\.lora_[ab]$", f"is of MLX, which also stores A and B transposed; convert it: transpose both and {_RENAME}"),
    (
        r"(^|\.)(_orig_mod|module|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.",
        f"is of a wrapped model; {_RENAME}",
    ),
    (
        r"\.lora_[AB]\.\w+\.weight$",
        "is of a state_dict, with the adapter's name in it; save the adapter with PeftModel.save_pretrained",
    ),
    (rf"^{re.escape(PREFIX)}{re.escape(PREFIX)}", f"is of a PEFT model within a PEFT model; {_RENAME}"),
    (
        r"(language_model|visual|vision_tower)\.",
        f"is of a model for images and text; train on the text model itself, or keep only {PREFIX}model.layers.…",
    ),
    (
        rf"^{re.escape(PREFIX)}layers\.",
        "was trained on AutoModel, without the head; train on AutoModelForCausalLM, or put 'model.' before 'layers.'",
    ),
    (r"\.bias$", "is a bias, which is not served; train with bias='none' and lora_bias=False"),
)


def foreign_name(names: Iterable[str]) -> str | None:
    """The sentence for the first name that tells of another format; None if all could be PEFT's."""
    for name in names:
        for pattern, reason in _KINDS:
            if re.search(pattern, name):
                return f"{name} {reason}."
        if ".lora_" not in name:
            return f"{name} is not a low-rank weight; train without modules_to_save and without trained tokens."
        if not name.startswith(PREFIX) or not name.endswith((".lora_A.weight", ".lora_B.weight")):
            return f"{name} is not named as PEFT saves it ({PREFIX}<module>.lora_A.weight); {_RENAME}."
    return None


def unexpected_name(name: str, paths: Collection[str]) -> str:
    """The sentence for a well-named tensor that belongs to no module which the configuration covers."""
    path = name.removeprefix(PREFIX).partition(".lora_")[0]
    if path in paths:
        return f"{name} is in the file, but target_modules and layers leave it out; they must agree."
    return f"{name} adapts {path}, which this base does not have or which cannot be adapted."
