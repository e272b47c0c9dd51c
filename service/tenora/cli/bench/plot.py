"""The latencies of a run as a picture: SVG written here, anything else by matplotlib where it is installed."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from tenora.cli.bench.figures import percentile
from tenora.errors import InvalidRequestError

WIDTH, HEIGHT, MARGIN, TITLE = 640, 240, 56, 34
POINTS = [*range(100), 99.5, 100]
COLOURS = ("#1f6feb", "#bc4c00")
Series = Mapping[str, Sequence[float]]
"""Title of a panel → its values."""


def save(path: Path, series: Series, caption: str) -> None:
    """Draw, one panel per series, which share of the values is below what.

    Raises:
        InvalidRequestError: if the format needs matplotlib and it is not installed, or the format is unknown to it.
    """
    if path.suffix.lower() == ".svg":
        path.write_text(svg(series, caption), encoding="utf-8")
        return
    try:
        pyplot: Any = importlib.import_module("matplotlib.pyplot")
    except ImportError as error:
        raise InvalidRequestError(
            f"{path.name} needs matplotlib, which is not installed: install it, or name the file *.svg."
        ) from error
    try:
        _with_matplotlib(pyplot, path, series, caption)
    except ValueError as error:
        raise InvalidRequestError(f"{path.name} cannot be drawn: {error}") from error


def check(path: Path) -> None:
    """Raise what `save` would raise, before minutes are spent on measuring."""
    if path.suffix.lower() != ".svg" and importlib.util.find_spec("matplotlib") is None:
        raise InvalidRequestError(
            f"{path.name} needs matplotlib, which is not installed: install it, or name the file *.svg."
        )


def svg(series: Series, caption: str) -> str:
    """The picture as the text of an SVG file."""
    height = TITLE + len(series) * (HEIGHT + MARGIN)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" font-family="sans-serif"',
        ' font-size="12"><rect width="100%" height="100%" fill="white"/>',
        f'<text x="{MARGIN}" y="22" font-size="14">{escape(caption)}</text>',
    ]
    for number, (title, values) in enumerate(series.items()):
        top = TITLE + number * (HEIGHT + MARGIN)
        parts.append(_panel(title, values, top, COLOURS[number % len(COLOURS)]))
    return "".join([*parts, "</svg>\n"])


def _panel(title: str, values: Sequence[float], top: int, colour: str) -> str:
    left, right, bottom = MARGIN, WIDTH - 16, top + HEIGHT
    high = max(values, default=0.0) or 1.0
    parts = [f'<text x="{left}" y="{top + 14}">{escape(title)}</text>']
    for share in (0, 25, 50, 75, 100):
        y = bottom - (HEIGHT - 24) * share / 100
        parts.append(f'<line x1="{left}" y1="{y:.1f}" x2="{right}" y2="{y:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{share}%</text>')
    for tick in range(5):
        x = left + (right - left) * tick / 4
        parts.append(f'<text x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">{high * tick / 4:.3g} ms</text>')
    if values:
        points = " ".join(
            f"{left + (right - left) * percentile(values, point) / high:.1f},{bottom - (HEIGHT - 24) * point / 100:.1f}"
            for point in POINTS
        )
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
    return "".join(parts)


def _with_matplotlib(pyplot: Any, path: Path, series: Series, caption: str) -> None:
    pyplot.switch_backend("Agg")
    figure, axes = pyplot.subplots(len(series), 1, figsize=(8, 3 * len(series)), squeeze=False)
    for row, (title, values) in zip(axes, series.items(), strict=True):
        row[0].plot([percentile(values, point) for point in POINTS], POINTS)
        row[0].set(title=title, xlabel="ms", ylabel="% of values below")
    figure.suptitle(caption)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
