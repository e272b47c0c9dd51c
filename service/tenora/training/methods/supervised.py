"""Supervised fine-tuning: cross-entropy of the answers' tokens."""

from __future__ import annotations

from tenora.training.methods.answers import AnswerLearning
from tenora.training.methods.method import Learner, Learning, Method
from tenora.training.settings import USUAL_METHOD


class Supervised(Method):
    """The usual rate and epochs were chosen by held-out loss of SmolLM2-135M; see `tenora.training.recipes`."""

    name = USUAL_METHOD
    summary = "learns the answers of its rows"
    learning_rate = 5e-4
    small_file_epochs = 3
    cross_validates = True

    def learning(self, learner: Learner) -> Learning:
        """See `Method`."""
        return AnswerLearning(learner)


METHOD = Supervised()
