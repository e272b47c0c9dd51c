"""What a card says of a head, as Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tenora.control.adapters.card_tables import number, share, table

_NAMES = {
    "macro_f1": "F1, mean over classes",
    "micro_f1": "F1, over all labels",
    "auroc": "Area under the ROC curve, mean over classes",
    "calibration_error": "Expected calibration error",
    "mean_absolute_error": "Mean absolute error",
    "r2": "Share of the variance that is explained (R²)",
}
_SHOWN = 4  # candidates


def head_section(said: Mapping[str, Any]) -> str:
    """Accuracy, what it stands beside, and the confusions; empty for an adapter without a head."""
    found = said.get("head")
    if not found:
        return ""
    rows = [(_NAMES.get(name, name), number(value)) for name, value in found["metrics"].items()]
    if found["accuracy"] is not None:
        interval = f"{share(found['accuracy'])} ({share(found['low'])} to {share(found['high'])})"
        rows.insert(0, (f"Accuracy on {found['rows']} held-out rows, 95% interval", interval))
    parts = ["## Head", table((found["type"], ""), rows)]
    if found["beside"]:
        parts.append(table(("beside", "rows", "measure", "head", "other", "difference", "verdict"), _beside(found)))
    if found["confusion"]:
        labels = found["labels"]
        lines = ((f"is {label}", *row) for label, row in zip(labels, found["confusion"], strict=True))
        parts.append(table(("", *(f"said {label}" for label in labels)), lines))
    if found["candidates"]:
        parts.append(
            f"What it reads was chosen by {found['folds']}-fold cross-validation on the training rows; the best of "
            f"{len(found['candidates'])}:"
        )
        shown = found["candidates"][:_SHOWN]
        keys = ("layer", "pooling", "strength", "loss", "accuracy")
        parts.append(
            table(keys, ((one["layer"], one["pooling"], *map(_short, (one[k] for k in keys[2:]))) for one in shown))
        )
    return "\n\n".join(parts)


def _beside(found: Mapping[str, Any]) -> list[tuple[Any, ...]]:
    rows = []
    for one in found["beside"]:
        name = f"{one['name']}, {one['shots']} shots" if one["shots"] else one["name"]
        interval = f"{number(one['difference'])} ({number(one['low'])} to {number(one['high'])})"
        rows.append(
            (name, one["rows"], one["measure"], number(one["head"]), number(one["other"]), interval, one["verdict"])
        )
    return rows


def _short(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.4g}"
