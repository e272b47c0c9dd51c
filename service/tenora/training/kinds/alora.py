"""Activated LoRA (Greenewald et al. 2025, arXiv 2504.12397): low-rank terms that act from an invocation on."""

from __future__ import annotations

from tenora.training.kinds.lora import Lora
from tenora.training.settings import Setting
from tenora.training.spec import FIRST


class ActivatedLora(Lora):
    """As LoRA; what comes before the invocation is the base's, so that its keys and values are shared."""

    name = "alora"
    summary = "learns a low-rank change of the weights that acts from a string in the prompt on"
    shared = FIRST
    settings = (
        Setting(
            "The string from which on the adapter acts, where it occurs last; empty: what the chat template puts "
            "before an answer.",
            name="invocation",
            kind=str,
            least=0,
            most=600,
            noun="a text of up to 600 characters",
            default="",
            flag="--invocation",
        ),
    )


KIND = ActivatedLora()
