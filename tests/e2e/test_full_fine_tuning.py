"""A full fine-tuning over HTTP: trained, served as an adapter beside others, downloaded, and served as a base."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest
import transformers

from tests.e2e.conftest import StartServer
from tests.e2e.material import ask, write_rows


@pytest.mark.full  # two servers, and a process that trains
def test_a_model_is_trained_called_downloaded_and_served_as_a_base(new_server: StartServer, tmp_path: Path) -> None:
    server = new_server(TENORA_THREADS="1")
    server.start()
    with server.client() as client:
        file = client.files.upload(write_rows(tmp_path / "rows.jsonl", 40))
        job = client.jobs.create(
            training_file=file.id,
            name="whole",
            method={"type": "full", "full": {"hyperparameters": {"n_epochs": 2}}},
            learning_rate=2e-3,
        ).wait()
        assert job.status == "succeeded", job.error
        assert job.evaluation is not None
        found = job.evaluation.full_model
        assert found is not None
        assert found.served, found.reason
        assert job.evaluation.parity is not None
        assert job.evaluation.parity["gap"] < job.evaluation.parity["tolerance"]
        assert [point["rank"] for point in found.curve][-1] == found.rank
        answer = client.chat.create(ask("Question 1?"), "whole", max_tokens=4, temperature=0)
        assert answer.choices[0].message.content is not None
        archive = client.files.download(job.result_files[-1], tmp_path / "model.tar")
        zipped = client.adapters.download("whole", tmp_path / "whole.zip")
        assert zipped.stat().st_size > 0
    with tarfile.open(fileobj=io.BytesIO(archive.read_bytes())) as files:
        files.extractall(tmp_path / "model", filter="data")
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model") is not None
    assert found.digest in (tmp_path / "model" / "README.md").read_text()
    base = new_server(tmp_path / "model", TENORA_THREADS="1")
    base.start()
    with base.client() as client:
        again = client.chat.create(ask("Question 1?"), "model", max_tokens=4, temperature=0)
    assert again.choices[0].message.content is not None
