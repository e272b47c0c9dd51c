"""What a card says of a model that was trained whole."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tenora.control.adapters.card_tables import code, number, signed, table


def full_section(said: Mapping[str, Any]) -> str:
    """The section of an evaluation; empty if its job trained an adapter."""
    found = said.get("full_model")
    if not found:
        return ""
    rows = [
        ("Weights that were trained", f"{found['trained']:,}"),
        ("Digest of the model's files", code(found["digest"])),
        ("Held-out loss of the model itself", number(found["valid_loss"])),
        ("Served as an adapter", "yes" if found["served"] else "**no**"),
    ]
    curve = ""
    if found["curve"]:
        head = ("mean rank", "highest rank", "weights", "gap in held-out loss", "KL(model ‖ adapter)")
        points = [
            (point["rank"], point["highest"], f"{point['weights']:,}", signed(point["gap"]), number(point["kl"]))
            for point in found["curve"]
        ]
        curve = "\n\n### Adapters beside the model, nats per held-out token\n\n" + table(head, points)
    return f"## The full fine-tuning\n\n{found['reason']}\n\n" + table(("", ""), rows) + curve
