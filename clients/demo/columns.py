"""Two texts beside each other in a terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from itertools import zip_longest

NARROW = 60
"""Below this many columns the texts stand below each other."""
GAP = " | "


def side_by_side(titles: Sequence[str], texts: Sequence[str], width: int) -> str:
    """The texts under their titles, wrapped to `width` columns in all; line breaks in the texts stay."""
    if width < NARROW:
        blocks = [[title, *_wrap(text, width)] for title, text in zip(titles, texts, strict=True)]
        return "\n\n".join("\n".join(block) for block in blocks)
    column = (width - len(GAP) * (len(texts) - 1)) // len(texts)
    heads = [[title[:column], "-" * column] for title in titles]
    columns = [head + _wrap(text, column) for head, text in zip(heads, texts, strict=True)]
    rows = zip_longest(*columns, fillvalue="")
    return "\n".join(GAP.join(cell.ljust(column) for cell in row).rstrip() for row in rows)


def _wrap(text: str, width: int) -> list[str]:
    return [piece for line in text.splitlines() for piece in (textwrap.wrap(line, width) or [""])]
