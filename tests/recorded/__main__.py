"""Record them anew, where a change of them is meant: `python -m tests.recorded`; then read what git shows of it."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch

from tests.recorded.fixed_answers import FixedAnswers
from tests.recorded.test_recorded import RECORDED
from tests.support.tiny import build_tiny


def main() -> None:
    """Write a line per answer."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        answers = FixedAnswers(build_tiny(work / "base"), work).items()
        lines = [f"{json.dumps(name)}: {json.dumps(answer, ensure_ascii=False)}" for name, answer in answers]
    RECORDED.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
