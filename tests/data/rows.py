"""Rows of data sets, in files and tokenized."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from tenora.data.dataset import TokenizedDataset
from tenora.model.tokenizer import Tokenizer
from tests.support.tiny import VOCAB


def random_rows(rows: int, seed: int, longest: int = 24) -> TokenizedDataset:
    """Rows of random tokens and random learned marks, at least one learned each."""
    rng = np.random.default_rng(seed)
    tokens, weights = [], []
    for _ in range(rows):
        length = int(rng.integers(3, longest))
        tokens.append(rng.integers(3, VOCAB, length).astype(np.int32))
        mark = rng.integers(0, 2, length).astype(np.uint8)
        mark[0], mark[length // 2] = 0, 1
        weights.append(mark)
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in tokens])]).astype(np.int64)
    return TokenizedDataset(
        tokens=np.concatenate(tokens),
        weights=np.concatenate(weights),
        offsets=offsets,
        lines=np.arange(1, rows + 1, dtype=np.int64),
    )


def write_lines(path: Path, rows: list[Any]) -> Path:
    """A JSON Lines file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def chat(question: str = "What?", answer: str = "That.", **extra: Any) -> dict[str, Any]:
    """A two-message row."""
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer, **extra}]}


def learned_text(dataset: TokenizedDataset, tokenizer: Tokenizer, row: int = 0) -> list[str]:
    """The learned runs of a row, as text."""
    tokens, weights = dataset.row(row)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], weights, [0]])))
    return [tokenizer.decode(tokens[start:stop].tolist(), False) for start, stop in edges.reshape(-1, 2)]
