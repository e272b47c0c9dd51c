"""Full fine-tuning: the base's own weights are trained, in a process of its own; see `tenora.training.full`."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from tenora.errors import InvalidRequestError
from tenora.training.methods.answers import AnswerLearning
from tenora.training.methods.method import Learner, Learning, Method
from tenora.training.settings import Setting


class Full(Method):
    """A tenth of an adapter's rate (Thinking Machines 2025, "LoRA Without Regret": an adapter's best is ten times)."""

    name = "full"
    summary = "changes the base's own weights, which takes a process and up to 24 bytes a weight"
    learning_rate = 5e-5
    small_file_epochs = 3
    runs_apart = True
    settings = (
        Setting(
            'Layers that are trained: all, "last 4", or numbers from 0 such as "0, 5-8".',
            name="layers",
            at="layers",
            kind=str,
            least=1,
            most=200,
            noun='all, "last N" or numbers of layers such as "0, 5-8"',
            default="all",
            flag="--layers",
        ),
        Setting(
            "Train the tokens' embeddings and the head too; an adapter cannot carry that.",
            name="embeddings",
            at="embeddings",
            kind=bool,
            default=False,
            flag="--embeddings",
        ),
        Setting(
            "Train the weights of norms, and biases, too; an adapter cannot carry that.",
            name="norms",
            at="norms",
            kind=bool,
            default=False,
            flag="--norms",
        ),
        Setting(
            "What is served: adapter, the difference to the base as an adapter, if the gate finds it close enough; "
            "none, only the model to download.",
            name="serve_as",
            at="serve_as",
            kind=str,
            choices=("adapter", "none"),
            default="adapter",
            flag="--serve-as",
        ),
    )

    def check(self, settings: Mapping[str, Any], given: Collection[str]) -> None:
        """See `Method`."""
        if "sweep" in given:
            raise InvalidRequestError(
                "A sweep would train the whole base once for each trial; give single values, or sweep adapters.",
                param="sweep",
            )
        for name in sorted(given):
            if name.startswith("lora.") and name not in {"lora.rank", "lora.init_from"}:
                raise InvalidRequestError(
                    f"Method full trains no adapter, so {name} would change nothing; leave it out. Only lora.rank is "
                    "looked at: the most, on the average, of the adapter that is served in the model's place.",
                    param=name,
                )

    def learning(self, learner: Learner) -> Learning:
        """See `Method`."""
        return AnswerLearning(learner)


METHOD = Full()
