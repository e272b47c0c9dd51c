"""The base asked for classes: labelled training rows in its prompt, and of a held-out row the class that it finds
likeliest."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tenora.control.inference.scoring import Scorer
from tenora.data.dataset import TokenizedDataset

if TYPE_CHECKING:
    from tenora.model.tokenizer import Tokenizer

LEAST_SHOTS, MOST_SHOTS = 4, 8
MOST_ROWS = 64
MOST_TOKENS = 24_576
"""That are read for it, as if nothing were shared; all prompts begin alike, so that most of it is cached."""
MOST_CLASSES = 16


@dataclass(frozen=True, slots=True)
class Question:
    """A held-out row behind its shots.

    Attributes:
        row: its place among the held-out rows.
        tokens: up to where a class is to be named.
        answers: for each class what would follow.
    """

    row: int
    tokens: list[int]
    answers: list[list[int]]


def questions(
    tokenizer: Tokenizer, train: TokenizedDataset, held_out: TokenizedDataset, *, max_length: int, seed: int
) -> tuple[list[Question], int]:
    """Held-out rows behind the same training rows, drawn by `seed`, each class in its turn; and how many these are.

    Empty if the rows have no class each, or more than are asked for.
    """
    labels, wanted = train.labels, held_out.labels
    if labels is None or wanted is None or labels.kind != "class" or len(labels.names) > MOST_CLASSES:
        return [], 0
    drawn = np.random.default_rng(seed).permutation(len(train))
    by_class = [drawn[labels.values[drawn] == number].tolist() for number in range(len(labels.names))]
    turns = [row for turn in range(MOST_SHOTS) for rows in by_class for row in rows[turn : turn + 1]]
    shots = turns[: min(max(LEAST_SHOTS, len(labels.names)), MOST_SHOTS)]

    def text(rows: TokenizedDataset, row: int) -> str:
        return f"Text: {tokenizer.decode(rows.row(row)[0][:-1].tolist())}\nLabel:"

    before = "".join(f"{text(train, row)} {labels.names[int(labels.values[row])]}\n\n" for row in shots)
    answers = [tokenizer.encode(f" {name}\n") for name in labels.names]
    found: list[Question] = []
    budget = MOST_TOKENS
    for row in range(min(len(held_out), MOST_ROWS)):
        tokens = tokenizer.encode(before + text(held_out, row), add_special_tokens=True)
        budget -= len(tokens)
        if found and budget < 0:
            break
        if len(tokens) + max(map(len, answers)) <= max_length:
            found.append(Question(row, tokens, answers))
    return found, len(shots)


async def answered(scorer: Scorer, asked: Sequence[Question]) -> AsyncIterator[int]:
    """Of each question the class whose name and line end the base finds likeliest."""
    for question in asked:
        start = len(question.tokens)
        found = []
        for answer in question.answers:
            places = range(start, start + len(answer))
            found.append(sum(await scorer.score([*question.tokens, *answer], places)))
        yield int(np.argmax(found))
