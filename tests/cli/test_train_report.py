"""What `tenora train` says at the end: what the result is worth, and what its name means now."""

from __future__ import annotations

from typing import Any

import pytest

from tenora.cli.train import report
from tenora_client import Job
from tests.client.fake import job

MODEL = "ft:smollm2-135m:default:desk:1"
STAYS = "desk still means version 1, than which it is not better."


def compared(adapter: float, verdict: str) -> dict[str, Any]:
    return {"rows": 6, "tokens": 60, "adapter_loss": adapter, "other_loss": 3.0, "verdict": verdict}


def ended(*, moved: bool, reason: str) -> Job:
    task = {"file": "file-1", "weight": 1.0, "trained": 54, "held_out": 6, "cut": 0}
    return Job.model_validate(
        job(
            "succeeded",
            name="desk",
            fine_tuned_model=MODEL,
            published={"alias_moved": moved, "version": 2, "digest": "ab" * 32, "code": "not_better", "reason": reason},
            evaluation={
                "base_loss": 3.0,
                "valid_loss": 3.2,
                "verdicts": {
                    "start": {"verdict": "worse"},
                    "base": {"verdict": "no difference"},
                    "few_shot_base": {"verdict": "not measured", "reason": "No rows."},
                },
                "tasks": [
                    {"name": "fables", "comparison": compared(2.5, "better"), **task},
                    {"name": "poems", "comparison": compared(3.5, "worse"), **task},
                ],
            },
        )
    )


def test_a_result_that_does_not_take_its_name_over_says_why_and_how_to_call_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    report(ended(moved=False, reason=STAYS))
    said = capsys.readouterr().out
    assert f"name           {STAYS}\n" in said
    assert "tenora adapters rollback desk 2 has it mean this one." in said
    assert f"try it         tenora chat {MODEL} " in said, "the name would answer with the version before"


def test_a_result_that_takes_its_name_over_is_called_by_it(capsys: pytest.CaptureFixture[str]) -> None:
    report(ended(moved=True, reason="The name is new."))
    said = capsys.readouterr().out
    assert "name           The name is new.\n" in said
    assert "rollback" not in said
    assert "try it         tenora chat desk " in said


def test_the_loss_of_each_task_and_every_verdict_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    report(ended(moved=True, reason="The name is new."))
    said = capsys.readouterr().out
    assert "held-out loss  3.000 (base)  ->  3.200 (adapter)\n" in said
    assert "  fables: 3.000  ->  2.500  (better)\n  poems: 3.000  ->  3.500  (worse)\n" in said
    assert "against start  worse\nagainst base   no difference\nagainst shots  not measured\n" in said
