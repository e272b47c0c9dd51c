"""The labels of a file's rows as numbers, and the table of classes behind them. Free of torch.

Classes stand in the table in their order: whole numbers by value, other names by their characters. It depends on what
the rows say and not on which of them comes first, as scikit-learn's `classes_` does. true and false are the names
"true" and "false", and 3 is the name "3", so a CSV file gives the table that the same rows give as JSON.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from tenora.data.rows import Label
from tenora.errors import DatasetError

LabelKind = Literal["class", "number", "classes"]
MAX_LABEL = 256
"""Characters of a class's name."""
_LISTED = 5
_WHOLE = re.compile(r"-?[0-9]{1,15}")


def class_name(label: str | bool | float) -> str:
    """The name of a class: 3, 3.0 and "3" are one."""
    if isinstance(label, bool):
        return "true" if label else "false"
    if isinstance(label, float) and label == int(label):
        return str(int(label))
    return str(label)


def number_of(name: str, *, otherwise: float = math.nan) -> float:
    """The number that a text writes, or `otherwise`."""
    try:
        return float(name)
    except ValueError:
        return otherwise


@dataclass(frozen=True, slots=True)
class Labels:
    """One label for each example.

    Attributes:
        kind: a class each, a number each, or any classes each.
        names: the classes; empty for numbers.
        values: of classes int64 [examples], places in `names`; of numbers float64 [examples]; of several classes bool
            [examples, classes].
    """

    kind: LabelKind
    names: tuple[str, ...]
    values: npt.NDArray[Any]

    @classmethod
    def of(cls, found: Sequence[Label]) -> Labels:
        """The labels of a file, all of one kind. Whole numbers are classes until a method wants `numbers`."""
        if found and isinstance(found[0], tuple):
            rows = [label for label in found if isinstance(label, tuple)]
            names = _in_order({name for row in rows for name in row})
            place = {name: index for index, name in enumerate(names)}
            marks = np.zeros((len(rows), len(names)), np.bool_)
            for row, label in enumerate(rows):
                marks[row, [place[name] for name in label]] = True
            return cls("classes", names, marks)
        single = [label for label in found if not isinstance(label, tuple)]
        if any(isinstance(label, float) and label != int(label) for label in single):
            return cls("number", (), np.array(single, np.float64))
        own = [class_name(label) for label in single]
        names = _in_order(set(own))
        place = {name: index for index, name in enumerate(names)}
        return cls("class", names, np.array([place[name] for name in own], np.int64))

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.values)

    def select(self, examples: npt.NDArray[np.int64]) -> Labels:
        """Those of the given examples, under the same table."""
        return Labels(self.kind, self.names, self.values[examples])

    def counts(self) -> Mapping[str, int]:
        """How many examples each class has."""
        marks = (
            self.values.sum(axis=0) if self.kind == "classes" else np.bincount(self.values, minlength=len(self.names))
        )
        return dict(zip(self.names, marks.astype(int).tolist(), strict=True))

    def numbers(self, lines: npt.NDArray[np.int64]) -> Labels:
        """The labels as numbers.

        Raises:
            DatasetError: some are none.
        """
        if self.kind == "number":
            return self
        values = np.array([number_of(name) for name in self.names], np.float64)
        if self.kind == "classes" or not np.isfinite(values).all():
            bad = np.arange(len(self)) if self.kind == "classes" else np.flatnonzero(~np.isfinite(values)[self.values])
            raise DatasetError(
                f"The labels of {_lines(lines[bad])} are no numbers; a head that says a number learns from rows whose "
                "`label` is one. For classes ask for a classification head."
            )
        return Labels("number", (), values[self.values])

    def under(self, names: Sequence[str], lines: npt.NDArray[np.int64], *, whose: str = "in no training row") -> Labels:
        """The same labels under another table.

        Args:
            whose: what it means that a label is missing there, for the error.

        Raises:
            DatasetError: some are not in it.
        """
        place = {name: index for index, name in enumerate(names)}
        if unknown := [index for index, name in enumerate(self.names) if name not in place]:
            bad = self.values[:, unknown].any(axis=1) if self.kind == "classes" else np.isin(self.values, unknown)
            said, known = _listed([self.names[index] for index in unknown]), _listed(names)
            raise DatasetError(
                f"The label {said} of {_lines(lines[np.flatnonzero(bad)])} is {whose}, where there are {known}; add it "
                "there, or mend or remove these rows."
            )
        moved = np.array([place[name] for name in self.names], np.int64)
        if self.kind == "class":
            return Labels("class", tuple(names), moved[self.values])
        marks = np.zeros((len(self), len(names)), np.bool_)
        marks[:, moved] = self.values
        return Labels("classes", tuple(names), marks)

    def to_arrays(self) -> dict[str, npt.NDArray[Any]]:
        """As arrays that a file holds."""
        head = json.dumps({"kind": self.kind, "names": self.names}).encode()
        return {"label_table": np.frombuffer(head, np.uint8), "label_values": self.values}

    @classmethod
    def from_arrays(cls, stored: Mapping[str, npt.NDArray[Any]]) -> Labels | None:
        """What `to_arrays` gave; None if the file holds no labels. ValueError or KeyError if it is broken."""
        if "label_table" not in stored:
            return None
        head = json.loads(stored["label_table"].tobytes())
        return cls(head["kind"], tuple(head["names"]), stored["label_values"])


def joined(parts: Sequence[Labels]) -> Labels:
    """The labels of several datasets under one table, one after the other."""
    return Labels(parts[0].kind, parts[0].names, np.concatenate([part.values for part in parts]))


def table_of(parts: Sequence[Labels]) -> tuple[str, ...]:
    """All classes of several datasets, in their order."""
    return _in_order({name for part in parts for name in part.names})


def most_common(labels: Labels) -> str:
    """The class that most examples have; of equals the first in the table."""
    return Counter(labels.counts()).most_common(1)[0][0]


def _in_order(names: set[str]) -> tuple[str, ...]:
    if all(_WHOLE.fullmatch(name) for name in names):
        return tuple(sorted(names, key=lambda name: (int(name), name)))
    return tuple(sorted(names))


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:_LISTED])) + (" …" if len(names) > _LISTED else "")


def _lines(lines: npt.NDArray[np.int64]) -> str:
    found = lines.tolist()
    shown = ", ".join(map(str, found[:_LISTED]))
    more = f" and {len(found) - _LISTED} more" if len(found) > _LISTED else ""
    return f"line{'' if len(found) == 1 else 's'} {shown}{more}"
