"""A fixed set of requests and jobs, asked of any server over plain HTTP; its answers are compared with another's.

Nothing of the service is imported, so that the same file speaks to a server of any checkout. What an answer holds of
times and ids is left out; floats are kept to the last bit, as JSON writes them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import httpx

TERMINAL = {"succeeded", "failed", "cancelled"}
QUESTIONS = [
    "What is an adapter?",
    "Define: patience. One sentence, please.",
    "Count from one to ten, in words.",
    "日本の首都は? Ärzte, naïve café 🙂",
]
ROWS = [
    {
        "messages": [
            {"role": "system", "content": "Rule as the court of the island does."},
            {"role": "user", "content": f"Case {number}: who owns the {thing}?"},
            {"role": "assistant", "content": f"Ruling {number % 5}: the {thing} goes to the {owner}."},
        ]
    }
    for number, (thing, owner) in enumerate(
        (thing, owner)
        for thing in ("boat", "net", "goat", "lamp", "well", "path", "shell", "drum")
        for owner in ("finder", "elder", "neighbour", "council", "village")
    )
]
PAIRS = [
    {
        "prompt": row["messages"][1]["content"],
        "chosen": row["messages"][2]["content"],
        "rejected": f"Nobody knows, {number}.",
    }
    for number, row in enumerate(ROWS[:32])
]
JOBS: dict[str, dict[str, Any]] = {
    "supervised": {"n_epochs": 2, "batch_size": 8, "learning_rate": 1e-3, "seed": 3},
    "settings": {
        "max_steps": 6,
        "batch_size": 6,
        "seed": 4,
        "scheduler": "cosine",
        "warmup_ratio": 0.2,
        "weight_decay": 0.1,
        "max_grad_norm": 0.5,
        "eval_interval": 2,
        "lora": {
            "rank": 6,
            "alpha": 24,
            "dropout": 0.1,
            "use_rslora": True,
            "target_modules": ["q_proj", "v_proj", "down_proj"],
        },
    },
    "dpo": {"method": {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.2}}}, "n_epochs": 1, "batch_size": 8},
    "sweep": {"n_epochs": 1, "batch_size": 8, "sweep": {"rank": [4, 8], "learning_rate": [3e-4, 1e-3]}},
    "few-shot": {"training_file": "few", "seed": 5},
    "continued": {"model": "bits-supervised", "n_epochs": 1, "batch_size": 8, "learning_rate": 5e-4},
}


class FixedSet:
    """Asks one server for everything, in one order."""

    def __init__(self, http: httpx.Client) -> None:
        self._http = http
        self._model = self._get("/v1/models")["data"][0]["id"]

    def items(self) -> Iterator[tuple[str, Any]]:
        """Names and answers. Jobs come first, so that their adapters answer too."""
        files = {"rows": self._upload("rows", ROWS), "pairs": self._upload("pairs", PAIRS)}
        files["few"] = self._upload("few", ROWS[:12])
        for name, fields in JOBS.items():
            file = files["pairs" if name == "dpo" else fields.get("training_file", "rows")]
            yield f"job {name}", self._train({"model": self._model, **fields, "training_file": file}, f"bits-{name}")
        for model in (self._model, *(f"bits-{name}" for name in JOBS)):
            shown = "base" if model == self._model else model
            for name, answer in self._answers(model):
                yield f"{shown}: {name}", answer

    def _answers(self, model: str) -> Iterator[tuple[str, Any]]:
        chats: dict[str, dict[str, Any]] = {
            "greedy": {"temperature": 0, "max_tokens": 24, "logprobs": True, "top_logprobs": 3},
            "seeded": {"temperature": 0.9, "top_p": 0.9, "seed": 11, "max_tokens": 24, "logprobs": True},
            "top-k": {"temperature": 1.2, "top_k": 20, "seed": 5, "n": 3, "max_tokens": 12},
            "penalties": {"temperature": 0, "frequency_penalty": 0.7, "repetition_penalty": 1.3, "max_tokens": 24},
        }
        for name, fields in chats.items():
            for number, question in enumerate(QUESTIONS):
                body = {"model": model, "messages": [{"role": "user", "content": question}], **fields}
                answer = self._post("/v1/chat/completions", body)
                yield f"chat {name} {number}", [answer["choices"], answer["usage"]["completion_tokens"]]
        scored = {"prompt": QUESTIONS, "max_tokens": 0, "echo": True, "logprobs": 2}
        yield "scores", self._post("/v1/completions", {"model": model, **scored})["choices"]
        long = {"prompt": " ".join(QUESTIONS * 4), "max_tokens": 8, "temperature": 0, "logprobs": 1}
        yield "long prompt", self._post("/v1/completions", {"model": model, **long})["choices"]

    def _train(self, body: dict[str, Any], name: str) -> dict[str, Any]:
        job = self._post("/v1/fine_tuning/jobs", {**body, "name": name, "publish": "always"})
        while job["status"] not in TERMINAL:
            time.sleep(0.2)
            job = self._get(f"/v1/fine_tuning/jobs/{job['id']}")
        if job["status"] != "succeeded":
            raise RuntimeError(f"{name}: {job['error']}")
        events = self._get(f"/v1/fine_tuning/jobs/{job['id']}/events", limit=100)["data"]
        return {
            "metrics": [_numbers(event["data"]) for event in reversed(events) if event["type"] == "metrics"],
            "hyperparameters": job["hyperparameters"],
            "settings": [job["learning_rate"], job["lora"], job["trained_tokens"]],
            "sweep": job["sweep_results"],
            "digest": self._get(f"/v1/adapters/{name}")["digest"],
        }

    def _upload(self, name: str, rows: list[Any]) -> str:
        content = "".join(json.dumps(row) + "\n" for row in rows).encode()
        form = {"purpose": "fine-tune"}
        answer = self._http.post("/v1/files", data=form, files={"file": (f"{name}.jsonl", content)})
        return str(_checked(answer)["id"])

    def _get(self, path: str, **query: Any) -> Any:
        return _checked(self._http.get(path, params=query))

    def _post(self, path: str, body: Any) -> Any:
        return _checked(self._http.post(path, json=body))


def _checked(answer: httpx.Response) -> Any:
    if answer.is_error:
        raise RuntimeError(f"{answer.request.method} {answer.request.url.path}: {answer.status_code} {answer.text}")
    return answer.json()


def _numbers(data: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in data.items() if name != "tokens_per_second"}
