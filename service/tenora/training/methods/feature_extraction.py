"""Heads on what the base makes of a text: classes, numbers or an embedding instead of further tokens.

`train_layers` says how much of the base learns with the head. 0: nothing; every row is read once, and the head is found
in closed form (`tenora.training.plans.features`). N: the last N layers; "lora": LoRA in all of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from tenora.data.labels import MAX_LABEL, Labels, most_common, table_of
from tenora.data.rows import LABELLED, PAIRS, RowKind
from tenora.errors import DatasetError, InvalidRequestError
from tenora.training.methods.method import Learner, Learning, Method, Unit
from tenora.training.settings import Setting

if TYPE_CHECKING:
    from tenora.data.dataset import TokenizedDataset

MAX_CLASSES = 256
EVERY_LAYER = "lora"
_AT = "method.feature_extraction"


class FeatureExtraction(Method):
    """Its rate is of the adapter below a head that is trained by gradient."""

    name = "feature_extraction"
    summary = "learns labels with a head on the base's hidden states"
    rows = LABELLED
    learning_rate = 2e-4
    small_file_epochs = 3
    settings = (
        Setting(
            "What the head says: a class, a number that is told in its labels' units (regression), a number to compare "
            "by (scalar), or a vector (embedding, from rows of anchor and positive).",
            name="head_type",
            at="head.type",
            kind=str,
            choices=("classification", "regression", "scalar", "embedding"),
            default="classification",
            flag="--head",
        ),
        Setting(
            "What requests call the head; its type if absent.",
            name="head_name",
            at="head.name",
            kind=str,
            least=1,
            most=64,
            noun="a name of 1 to 64 characters",
            default="",
        ),
        Setting(
            "The classes, in the order of their numbers; those of the training rows, sorted, if absent.",
            name="head_labels",
            at="head.labels",
            kind=tuple,
            least=1,
            most=MAX_LABEL,
            noun="class names",
            default=(),
        ),
        Setting(
            "A row may have any number of the classes; true where `label` is a list.",
            name="head_multi_label",
            at="head.multi_label",
            kind=bool,
            default=False,
        ),
        Setting(
            "Which tokens the head reads: the last one, or the mean of all.",
            name="head_pooling",
            at="head.pooling",
            kind=str,
            choices=("last", "mean"),
            auto="by cross-validation if the base is frozen, else last (mean for an embedding)",
            flag="--pooling",
        ),
        Setting(
            "Which layer's output the head reads: -1 is the last one, after the final norm.",
            name="head_layer",
            at="head.layer",
            kind=int,
            least=-4,
            most=-1,
            auto="by cross-validation if the base is frozen, else -1",
        ),
        Setting(
            "Length of an embedding; 0 is that of a hidden state.",
            name="head_dims",
            at="head.dims",
            kind=int,
            least=0,
            most=4096,
            default=0,
        ),
        Setting(
            f'What learns with the head: 0 nothing of the base, N its last N layers, "{EVERY_LAYER}" all of them.',
            name="train_layers",
            at="train_layers",
            kind=int,
            least=0,
            most=1024,
            every=EVERY_LAYER,
            default=0,
            flag="--train-layers",
        ),
        Setting(
            "How little the head's weights are held back, with train_layers 0; scikit-learn's C.",
            name="inverse_regularization",
            least=1e-9,
            most=1e9,
            auto="by cross-validation",
        ),
    )
    has_head = True
    no_few_shot = (
        "A head is measured by its labels and not by tokens; where it says classes, the base with examples in its "
        "prompt stands beside it under `head`."
    )
    unit = Unit("loss per row")
    metrics = MappingProxyType(
        {
            "macro_f1": "Mean F1 of the classes.",
            "micro_f1": "F1 over all labels of all rows, where a row may have several.",
            "auroc": "Mean area under the ROC curve, each class against the others.",
            "calibration_error": "Mean distance of confidence and accuracy.",
            "mean_absolute_error": "Of a number, in the labels' unit.",
            "r2": "Share of the labels' variance that a number explains.",
            "recall_at_1": "Anchors whose positive is the nearest text.",
            "recall_at_5": "Anchors whose positive is among the five nearest.",
            "recall_at_10": "Anchors whose positive is among the ten nearest.",
        }
    )
    loss_note = (
        "The loss is the head's: of classes minus the log-probability of the right one (of several the mean over all "
        "labels), of a number its squared error in units of the labels' variance. The start says what is most common."
    )
    accuracy_label = "Rows that the head gets right"

    def rows_of(self, settings: Mapping[str, Any]) -> RowKind:
        """See `Method`."""
        return PAIRS if settings["head_type"] == "embedding" else LABELLED

    def check(self, settings: Mapping[str, Any], given: Collection[str]) -> None:
        """See `Method`."""
        kind = settings["head_type"]
        only = {"head_labels": "classification", "head_multi_label": "classification", "head_dims": "embedding"}
        for name, wanted in only.items():
            if settings[name] and kind != wanted:
                key = name.removeprefix("head_")
                raise InvalidRequestError(
                    f"head.{key} is for heads of the type {wanted}, and this one is of {kind}; leave it out.",
                    param=f"{_AT}.head.{key}",
                )
        labels = settings["head_labels"]
        if len(set(labels)) < len(labels) or len(labels) == 1 or len(labels) > MAX_CLASSES:
            raise InvalidRequestError(
                f"head.labels must be 2 to {MAX_CLASSES} classes, each once.", param=f"{_AT}.head.labels"
            )
        if settings["train_layers"] != 0:
            self._check_trained(settings)
            return
        if kind == "embedding":
            raise InvalidRequestError(
                "An embedding head learns by gradient, and with train_layers 0 nothing does; set train_layers to a "
                f'number of layers or "{EVERY_LAYER}".',
                param=f"{_AT}.train_layers",
            )
        if given:
            first = min(given)
            raise InvalidRequestError(
                f"{first} would change nothing: with train_layers 0 no step is taken, and there is no adapter below "
                "the head. Leave it out, or train layers.",
                param=first,
            )

    def settle(
        self, settings: Mapping[str, Any], train: Sequence[TokenizedDataset], valid: TokenizedDataset | None
    ) -> tuple[list[TokenizedDataset], TokenizedDataset | None]:
        """See `Method`: labels as numbers, or under one table of classes."""
        return _Settled(settings).rows(train, valid)

    def is_frozen(self, settings: Mapping[str, Any]) -> bool:
        """See `Method`."""
        return bool(settings["train_layers"] == 0)

    def _check_trained(self, settings: Mapping[str, Any]) -> None:
        """What a head that is trained by gradient cannot have."""
        if settings["head_layer"] not in (None, -1):
            raise InvalidRequestError(
                "A head that is trained with layers reads the last one; leave head.layer out, or set train_layers to "
                "0.",
                param=f"{_AT}.head.layer",
            )
        if settings["inverse_regularization"] is not None:
            raise InvalidRequestError(
                "inverse_regularization is for train_layers 0; a head that is trained with layers is held back by "
                "weight_decay.",
                param=f"{_AT}.hyperparameters.inverse_regularization",
            )

    def head_rows(self, settings: Mapping[str, Any], train: TokenizedDataset) -> int:
        """See `Method`."""
        if settings["head_type"] == "embedding":
            return int(settings["head_dims"])
        labels = _labels(train)
        return len(labels.names) if labels.names else 1

    def last_layers(self, settings: Mapping[str, Any]) -> int:
        """See `Method`."""
        return 0 if settings["train_layers"] == EVERY_LAYER else int(settings["train_layers"])

    def learning(self, learner: Learner) -> Learning:
        """See `Method`."""
        from tenora.training.head_learning import HeadLearning

        settings = self.own_settings(learner.spec.method_settings)
        return HeadLearning(learner, settings, self.head_rows(settings, learner.corpus.train))


class _Settled:
    """Labels of a job's files as its head learns them."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self._settings = settings

    def rows(
        self, train: Sequence[TokenizedDataset], valid: TokenizedDataset | None
    ) -> tuple[list[TokenizedDataset], TokenizedDataset | None]:
        kind = self._settings["head_type"]
        if kind == "embedding":
            return list(train), valid
        if kind != "classification":
            return [_numbers(rows, "training_file") for rows in train], valid and _numbers(valid, "validation_file")
        wanted = "classes" if self._settings["head_multi_label"] else "class"
        train = [_classes(rows, wanted, "training_file") for rows in train]
        names = tuple(self._settings["head_labels"]) or table_of([_labels(rows) for rows in train])
        self._require_several(train, names)
        whose = "not in head.labels" if self._settings["head_labels"] else "in no training row"
        found = [_under(rows, names, "training_file", whose) for rows in train]
        return found, valid and _under(_classes(valid, wanted, "validation_file"), names, "validation_file", whose)

    def _require_several(self, train: Sequence[TokenizedDataset], names: Sequence[str]) -> None:
        """Classes that training rows have and others lack: otherwise there is nothing to tell apart."""
        if len(names) > MAX_CLASSES:
            raise DatasetError(
                f"The rows have {len(names)} different labels and a head has at most {MAX_CLASSES} classes; for "
                "numbers ask for a regression head, or make fewer classes.",
                param="training_file",
            )
        if len(table_of([_labels(rows) for rows in train])) < 2:
            only = most_common(_labels(train[0]))
            raise DatasetError(
                f"Every row, from line {int(train[0].lines[0])} on, has the label {only!r}; add rows of at least one "
                "other class.",
                param="training_file",
            )


def _labels(rows: TokenizedDataset) -> Labels:
    if rows.labels is None:
        raise DatasetError("The rows have no labels.", param="training_file")
    return rows.labels


def _with(rows: TokenizedDataset, labels: Labels) -> TokenizedDataset:
    return dataclasses.replace(rows, labels=labels)


def _numbers(rows: TokenizedDataset, param: str) -> TokenizedDataset:
    try:
        found = _labels(rows).numbers(rows.lines)
    except DatasetError as error:
        raise DatasetError(error.message, param=param) from error
    if param == "training_file" and len(rows) and float(found.values.std()) == 0.0:
        raise DatasetError(
            f"Every row, from line {int(rows.lines[0])} on, has the label {float(found.values[0]):g}; add rows with "
            "others.",
            param=param,
        )
    return _with(rows, found)


def _classes(rows: TokenizedDataset, wanted: str, param: str) -> TokenizedDataset:
    """The rows, if their labels are a class each, or any number of them, as the head wants it."""
    kind = _labels(rows).kind
    if kind == wanted:
        return rows
    line = int(rows.lines[0])
    if kind == "classes":
        advice = f"The label of line {line} is a list of classes; set head.multi_label to true."
    elif kind == "number":
        advice = (
            f"The labels, from line {line} on, are numbers; ask for a regression head, or write classes as strings."
        )
    else:
        advice = f"The label of line {line} is no list; with head.multi_label every `label` is a list of classes."
    raise DatasetError(advice, param=param)


def _under(rows: TokenizedDataset, names: Sequence[str], param: str, whose: str) -> TokenizedDataset:
    try:
        return _with(rows, _labels(rows).under(names, rows.lines, whose=whose))
    except DatasetError as error:
        raise DatasetError(error.message, param=param) from error


METHOD = FeatureExtraction()
