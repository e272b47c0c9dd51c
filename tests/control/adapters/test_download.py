"""Cards and downloads of adapters that the real engine trained on a tiny base."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import transformers
import yaml

from tenora.control.adapters.model_card import model_card
from tenora.model.tokenizer import Tokenizer
from tests.control.conftest import ROWS, create_job, tenant, until, upload
from tests.control.test_real_engine import Service, _one_thread, service
from tests.control.worker.test_publication import train, unpack

__all__ = ["_one_thread", "service"]  # fixtures


async def test_a_few_rows_are_reported_by_cross_validation(service: Service) -> None:
    control = service.control
    acme = await tenant(control, "acme")
    job = await create_job(control, acme, name="few", seed=1, lora={"rank": 4}, n_epochs=3, learning_rate=5e-3)
    done = await until(control, acme, job.id)
    assert done.status == "succeeded", done.error
    said = done.evaluation
    assert said is not None
    assert (said["source"], said["near_duplicates"], said["notes"]) == ("cross-validation", None, [])
    assert said["held_out"]["rows"] == len(ROWS)
    assert said["held_out"]["adapter_loss"] == pytest.approx(said["valid_loss"])
    assert said["held_out"]["other_loss"] == pytest.approx(said["base_loss"])
    assert said["few_shot"]["shots"] == 3
    assert said["few_shot"]["comparison"]["rows"] >= 10
    assert said["parity"]["gap"] < 1e-4 < said["parity"]["effect"]
    card = model_card(await control.adapters.get(acme, "few"))
    assert "(cross-validation)" in card
    assert "Base, 3 examples in the prompt" in card


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
async def test_preferences_pass_the_gate_and_are_judged(
    service: Service, tiny_base: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """The verdict's figures are what PEFT computes of DPO's objective from the downloaded adapter."""
    control = service.control
    acme = await tenant(control, "acme")
    pairs = [
        {
            "input": {"messages": row["messages"][:1]},
            "preferred_output": row["messages"][1:],
            "non_preferred_output": [{"role": "assistant", "content": "No idea."}],
        }
        for row in ROWS
    ]
    file = await upload(control, acme, pairs)
    job = await create_job(
        control,
        acme,
        name="polite",
        training_file=file.id,
        validation_file=(await upload(control, acme, pairs[:8])).id,
        method={"type": "dpo"},
        lora={"rank": 4},
        n_epochs=1,
        learning_rate=5e-3,
    )
    done = await until(control, acme, job.id)
    assert done.status == "succeeded", done.error
    said = done.evaluation
    assert said is not None
    assert said["few_shot"] is None
    assert {name: found["verdict"] for name, found in said["verdicts"].items()} == {
        "start": said["held_out"]["verdict"],
        "base": said["held_out"]["verdict"],
        "few_shot_base": "not measured",
        "replaced": "not measured",
    }
    card = await unpack(control, acme, "polite", tmp_path / "polite")
    assert "Few-shot base: **not measured**" in card
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(base, tmp_path / "polite")
    losses = []
    for pair in pairs[:8]:
        rewards = []
        for answer in (pair["preferred_output"], pair["non_preferred_output"]):
            ids = tokenizer.encode_chat([*pair["input"]["messages"], *answer], add_generation_prompt=False)
            start = len(tokenizer.encode_chat(pair["input"]["messages"]))
            end = ids.index(tokenizer.encode("<|im_end|>")[0], start) + 1
            policy = answer_logprob(model, ids, start, end)
            with model.disable_adapter():
                rewards.append(0.1 * (policy - answer_logprob(model, ids, start, end)))
        losses.append(float(np.logaddexp(0.0, rewards[1] - rewards[0])))
    assert said["held_out"]["adapter_loss"] == pytest.approx(np.mean(losses), rel=1e-4)
    assert said["held_out"]["other_loss"] == pytest.approx(np.log(2))
    assert said["parity"]["gap"] < 1e-4 < said["parity"]["effect"]
    assert said["lineage"]["settings"]["beta"] == 0.1


def answer_logprob(model: torch.nn.Module, ids: list[int], start: int, end: int) -> float:
    """The log-probability of the tokens from `start` to `end`."""
    with torch.no_grad():
        logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return float(logprobs[torch.arange(start - 1, end - 1), torch.tensor(ids[start:end])].sum())


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
async def test_peft_loads_the_download_and_computes_the_held_out_loss_of_the_card(
    service: Service, tiny_base: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    control = service.control
    acme = await tenant(control, "acme")
    done = await train(control, acme, learning_rate=5e-3, lora={"rank": 4}, n_epochs=2, batch_size=4)
    assert done.status == "succeeded", done.error
    card = await unpack(control, acme, "desk", tmp_path / "desk")
    matter = yaml.safe_load(card.split("---\n")[1])
    assert (matter["library_name"], matter["base_model"]) == ("peft", "tiny")
    assert done.id in card
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(base, tmp_path / "desk")
    loss, tokens = 0.0, 0
    for row in ROWS[:8]:
        ids = tokenizer.encode_chat(row["messages"], add_generation_prompt=False)
        start = len(tokenizer.encode_chat(row["messages"][:1]))
        end = ids.index(tokenizer.encode("<|im_end|>")[0], start) + 1
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0]
        loss += float(torch.nn.functional.cross_entropy(logits[start - 1 : end - 1], torch.tensor(ids[start:end]))) * (
            end - start
        )
        tokens += end - start
    said = done.evaluation
    assert said is not None
    assert said["held_out"]["tokens"] == tokens
    assert said["held_out"]["adapter_loss"] == pytest.approx(loss / tokens, rel=1e-4)
    assert f"| This adapter | {loss / tokens:.3f}"[:-1] in card
