"""What a trained adapter says of itself over HTTP, and that its download is a PEFT directory with a model card."""

from __future__ import annotations

import zipfile
from pathlib import Path

import peft
import pytest
import torch
import transformers
import yaml

from tests.e2e.material import write_rows
from tests.e2e.serving import Server


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_the_card_comes_with_job_adapter_and_download(server: Server, tiny_base: Path, tmp_path: Path) -> None:
    with server.client() as client:
        rows = client.files.upload(write_rows(tmp_path / "rows.jsonl", 24))
        valid = client.files.upload(write_rows(tmp_path / "valid.jsonl", 8))
        job = client.jobs.create(
            rows, validation_file=valid, name="carded", hyperparameters={"n_epochs": 4, "learning_rate_multiplier": 10}
        ).wait(poll=0.2)
        assert job.status == "succeeded", job.error
        said = client.adapters.get("carded").evaluation
        archive = client.adapters.download("carded", tmp_path / "carded.zip")
    assert said is not None
    assert said == job.evaluation
    assert said.held_out is not None
    assert said.held_out.verdict == said.verdicts["start"].verdict == "better"
    assert said.few_shot is not None
    assert said.few_shot["comparison"]["rows"] > 0
    assert said.parity is not None
    assert said.parity["gap"] < said.parity["tolerance"] < said.parity["effect"]
    assert said.near_duplicates == 8  # the same rows
    with zipfile.ZipFile(archive) as file:
        file.extractall(tmp_path / "carded")
    card = (tmp_path / "carded" / "README.md").read_text("utf-8")
    assert yaml.safe_load(card.split("---\n")[1])["library_name"] == "peft"
    assert job.id in card
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(base, tmp_path / "carded")
    assert any(bool(value.any()) for name, value in model.state_dict().items() if "lora_B" in name)
