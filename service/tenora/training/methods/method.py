"""What a training method says of itself, and what it does for an adapter that learns by it.

A method is one object with two sides. What it declares (`Method`) is read by the whole service: which rows it takes,
its own settings, the numbers of its recipe, what its losses mean on a card. What it does (`Learning`) is called by the
learner, in the engine. Both stand in the method's own file; importing it loads no torch, so what needs torch imports
it where it is used.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np
import numpy.typing as npt

from tenora.data.rows import ANSWERS, RowKind
from tenora.training.packing import PackedRows
from tenora.training.settings import AUTO, HYPERPARAMETERS, Setting
from tenora.training.spec import TrainSpec

if TYPE_CHECKING:
    from tenora.adapters.head_files import HeadTensors
    from tenora.adapters.weights import AdapterWeights
    from tenora.data.dataset import TokenizedDataset
    from tenora.model.readouts.base import ReadoutKind
    from tenora.training.arena import TrainedAdapter
    from tenora.training.corpus import Corpus
    from tenora.training.evaluation import Evaluation
    from tenora.training.events import HeadOutcome
    from tenora.training.pass_queue import Objective
    from tenora.training.step import TokenLosses

Float64Array = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Unit:
    """What the losses of a method are means of.

    Attributes:
        name: in words, as a card says it.
        examples: what is compared, and drawn again for an interval.
        by_token: the mean is over learned tokens; otherwise over examples, which count alike however long they are.
    """

    name: str
    examples: str = "rows"
    by_token: bool = False


PER_TOKEN = Unit("nats per token", by_token=True)


@dataclass(frozen=True, slots=True)
class Figures:
    """What the rows of a step came to.

    Attributes:
        loss: the objective, in the method's unit.
        accuracy: share of tokens that were the likeliest, or what the method counts in its place.
        metrics: further numbers, those of `Method.metrics`.
    """

    loss: float
    accuracy: float
    metrics: dict[str, float] = field(default_factory=dict)


class Learner(Protocol):
    """The adapter in training, as its method sees it: `tenora.training.learner.Learner`."""

    @property
    def spec(self) -> TrainSpec:
        """Of this adapter."""

    @property
    def corpus(self) -> Corpus:
        """The rows."""

    @property
    def adapter(self) -> TrainedAdapter:
        """What is trained."""

    @property
    def parent(self) -> AdapterWeights | None:
        """The adapter that it began as, if it is another one."""

    def frozen_copy(self) -> TrainedAdapter:
        """A second adapter with the weights of now, in the same arena; whoever asks for it removes it."""

    def measured(
        self, parts: Sequence[PackedRows], adapter: TrainedAdapter | None
    ) -> Generator[None, None, list[TokenLosses]]:
        """Of each part the losses of its learned tokens under an adapter, or the base, without a gradient."""


class Learning:
    """A method at work on one adapter. Generators yield where they wait for rows to pass through the base."""

    def __init__(self, learner: Learner) -> None:
        """Begin where the adapter is now; what an earlier run knew comes back into `state`."""
        self.learner = learner

    @property
    def readout(self) -> ReadoutKind:
        """What makes losses of the hidden states of its rows: the next token's, unless it has a head of its own."""
        from tenora.model.readouts.tokens import TOKENS

        return TOKENS

    @property
    def corpus(self) -> Corpus:
        """The rows as it learns them."""
        return self.learner.corpus

    @property
    def begins_as_base(self) -> bool:
        """Whether an adapter that was not trained yet measures as the base does."""
        return True

    @property
    def reads_whole_rows(self) -> bool:
        """Whether its readout looks at every token of a row, so that rows cannot share what they begin with."""
        return False

    @property
    def needs_whole_steps(self) -> bool:
        """Whether the loss of a row depends on the others of its step, so that all of them must be in one part."""
        return False

    def begin(self) -> None:
        """Set what of the adapter's weights is its own before the first step: its head."""

    def heads(self) -> HeadTensors | None:
        """The heads of the adapter as it is now, which are written with it."""
        return None

    def outcome(self, found: Evaluation) -> HeadOutcome | None:
        """What a head says of the held-out rows, of an evaluation."""
        return None

    def prepare(self, parts: Sequence[PackedRows]) -> Generator[None, None, None]:
        """Find out what the objective needs to know of a step's rows."""
        yield from ()

    def objective(self, parts: Sequence[PackedRows]) -> Objective:
        """What a step over all these rows minimises."""
        raise NotImplementedError

    def measure(self, step: int, parts: Sequence[PackedRows], found: Sequence[TokenLosses]) -> Figures:
        """What step `step`, counted from 1, came to.

        Args:
            found: the losses of each part before the step.

        Raises:
            TrainingError: going on is no use.
        """
        raise NotImplementedError

    def judge(self, found: Evaluation, start: Sequence[float] | None) -> Evaluation:
        """An evaluation in the method's own terms; it comes as the mean loss per learned token.

        Args:
            start: loss of each held-out row under what training started from; None if that is what was measured.
        """
        return found

    def state(self) -> Mapping[str, npt.NDArray[np.float32]]:
        """What is saved beside weights and moments, and restored in place."""
        return {}

    def close(self) -> None:
        """Free what it has taken."""


class Method(ABC):
    """What a method declares. Class attributes are its constants.

    Attributes:
        name: its `type` in a request.
        summary: what it is for, in half a sentence.
        rows: the kind of rows that it learns from.
        learning_rate: the peak of the schedule that a multiplier of 1 stands for.
        small_file_epochs: passes that a file of at most a few hundred examples gets, if a larger one's are not more.
        settings: its own, beside those that all methods have; `TrainSpec.method_settings` holds their values.
        cross_validates: few rows may be divided into folds, rather than hold some out.
        has_reference: each training row is measured under a reference once.
        runs_apart: it trains a copy of the base in a process of its own, not an adapter on the one that serves.
        has_head: its rows are labelled, and measured by what a head says of them, not by their tokens.
        no_few_shot: why the base with examples in its prompt has no figure to compare with; empty if it has one.
        unit: of its losses.
        metrics: further numbers that it measures at steps and evaluations, and what each is: their names in the job's
            log. The table of its steps has a column for each with `train_`, and with `valid_` before it.
        loss_note: what a reader should know of the loss; empty if it is what everybody expects.
        accuracy_label: what its accuracy counts.
        start_has_accuracy: whether the accuracy of what training started from says anything.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    rows: ClassVar[RowKind] = ANSWERS
    learning_rate: ClassVar[float]
    small_file_epochs: ClassVar[int] = 1
    settings: ClassVar[tuple[Setting, ...]] = ()
    cross_validates: ClassVar[bool] = False
    has_reference: ClassVar[bool] = False
    runs_apart: ClassVar[bool] = False
    has_head: ClassVar[bool] = False
    no_few_shot: ClassVar[str] = ""
    unit: ClassVar[Unit] = PER_TOKEN
    metrics: ClassVar[Mapping[str, str]] = MappingProxyType({})
    loss_note: ClassVar[str] = ""
    accuracy_label: ClassVar[str] = "Learned tokens that it finds likeliest"
    start_has_accuracy: ClassVar[bool] = True

    @property
    def asked(self) -> Mapping[str, Setting]:
        """All that a request may say beside the method's name."""
        return {**HYPERPARAMETERS, **{setting.name: setting for setting in self.settings}}

    @property
    def hyperparameters(self) -> Mapping[str, Setting]:
        """Those of them that stand under `hyperparameters`."""
        return {name: setting for name, setting in self.asked.items() if not setting.at}

    @property
    def options(self) -> Mapping[str, Mapping[str, Setting]]:
        """The others by the object that they stand in, `head`, and their key in it; those in none are under ""."""
        found: dict[str, dict[str, Setting]] = {}
        for setting in self.settings:
            if setting.at:
                group, _, key = setting.at.rpartition(".")
                found.setdefault(group, {})[key] = setting
        return found

    def placed(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The options of a request with these values, each where it stands; what is not settled is left out, unless it
        may be "auto".
        """
        settings = self.asked
        known = {name: value for name, value in values.items() if name in settings and value is not None}
        given = {name: value for name, value in known.items() if value != AUTO or settings[name].auto}
        found: dict[str, Any] = {}
        if own := {name: given[name] for name in self.hyperparameters if name in given}:
            found["hyperparameters"] = own
        for group, settings in self.options.items():
            if inner := {key: given[one.name] for key, one in settings.items() if one.name in given}:
                found |= {group: inner} if group else inner
        return found

    def own_settings(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The values of its own settings: the given ones, where they are not None, and defaults."""
        chosen = {name: value for name, value in given.items() if value is not None}
        return {setting.name: chosen.get(setting.name, setting.default) for setting in self.settings}

    def rows_of(self, settings: Mapping[str, Any]) -> RowKind:
        """The kind of rows that it learns from with these own settings."""
        return self.rows

    def check(self, settings: Mapping[str, Any], given: Collection[str]) -> None:  # noqa: B027 - most accept anything
        """Look at what is asked for as a whole.

        Args:
            settings: its own, resolved.
            given: where else the request says something about training, as `lora.rank`.

        Raises:
            InvalidRequestError: settings contradict each other, or one of them would change nothing.
        """

    def settle(
        self,
        settings: Mapping[str, Any],
        train: Sequence[TokenizedDataset],
        valid: TokenizedDataset | None,
    ) -> tuple[list[TokenizedDataset], TokenizedDataset | None]:
        """The rows of all files as it learns them, before any are held out.

        Raises:
            DatasetError: it cannot learn from these; `param` says of which file.
        """
        return list(train), valid

    def is_frozen(self, settings: Mapping[str, Any]) -> bool:
        """Whether nothing of the base or an adapter learns: no step is taken, and rows are read once."""
        return False

    def head_rows(self, settings: Mapping[str, Any], train: TokenizedDataset) -> int:
        """Rows of the head that learns with the adapter from these training rows; 0 without one."""
        return 0

    def last_layers(self, settings: Mapping[str, Any]) -> int:
        """How many of the last layers the adapter is in; 0: all."""
        return 0

    @abstractmethod
    def learning(self, learner: Learner) -> Learning:
        """The method at work on an adapter."""

    def example_losses(self, settings: Mapping[str, Any], rows: Float64Array, start: Float64Array) -> Float64Array:
        """The objective of each example, float64 [examples], from the losses of its rows as they are served.

        Args:
            settings: the method's own, resolved.
            rows: float64 [examples, rows of an example], summed over learned tokens.
            start: the same under what training started from.
        """
        return rows[:, 0]
