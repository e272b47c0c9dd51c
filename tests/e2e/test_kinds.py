"""Every kind of adapters over HTTP: trained, told on its card, called by name, downloaded, and the same in PEFT."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

from tests.e2e.material import write_rows
from tests.e2e.serving import Server
from tests.support.full import full_but

PROMPT = list(range(20, 34))


def greedy(model: Any, prompt: list[int], tokens: int) -> tuple[list[int], list[float]]:
    """The likeliest continuation of the prompt, and the log-probability of each of its tokens."""
    ids, logprobs = list(prompt), []
    with torch.no_grad():
        for _ in range(tokens):
            scores = model(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(-1)
            ids.append(int(scores.argmax()))
            logprobs.append(float(scores.max()))
    return ids[len(prompt) :], logprobs


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize(
    "kind", full_but(["dora", "prefix"], ["dora", "ia3", "bottleneck", "parallel", "prefix", "prompt", "alora"])
)
def test_a_kind_goes_from_rows_to_answers_and_into_peft(
    server: Server, tiny_base: Path, tmp_path: Path, kind: str
) -> None:
    name = f"of-type-{kind}"
    with server.client() as client:
        rows = client.files.upload(write_rows(tmp_path / "rows.jsonl", 24))
        job = client.jobs.create(
            rows, name=name, adapter={"type": kind}, hyperparameters={"n_epochs": 3, "learning_rate_multiplier": 10}
        ).wait(poll=0.2)
        assert job.status == "succeeded", job.error
        assert job.adapter.type == kind
        adapter = client.adapters.get(name)
        archive = client.adapters.download(name, tmp_path / "adapter.zip")
    assert adapter.method == ("bottleneck" if kind == "parallel" else kind)  # AdapterHub's format knows one kind
    assert adapter.evaluation is not None
    assert adapter.evaluation.parity is not None
    assert adapter.evaluation.parity["gap"] < 1e-4
    assert adapter.evaluation.parity["effect"] > 1e-3
    with zipfile.ZipFile(archive) as file:
        file.extractall(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text("utf-8"))
    prompt = [*PROMPT, *(config.get("alora_invocation_tokens") or ())]
    with server.raw() as raw:
        answers = {
            model: raw.post(
                "/v1/completions",
                json={"model": model, "prompt": prompt, "max_tokens": 6, "temperature": 0, "logprobs": 1},
            ).json()["choices"][0]["logprobs"]["token_logprobs"]
            for model in (name, adapter.base_model)
        }
    assert answers[name] != answers[adapter.base_model]
    assert job.id in (tmp_path / "adapter" / "README.md").read_text("utf-8")
    if kind in {"bottleneck", "parallel"}:  # AdapterHub's, whose library needs another transformers
        assert config["config"]["is_parallel"] == (kind == "parallel")
        return
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    _, wanted = greedy(peft.PeftModel.from_pretrained(base, tmp_path / "adapter"), prompt, 6)
    assert answers[name], "the turn's end may come before the sixth token"
    assert answers[name] == pytest.approx(wanted[: len(answers[name])], abs=1e-4)
