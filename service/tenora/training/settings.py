"""Every setting of a fine-tuning job, typed once: name, type, bounds, default, and what it does.

The request's schema, its checks, the job's echo, the run's spec, the lineage on a card, the flags of `tenora train` and
the client's types are made from what stands here and in the methods' own files (`tenora.training.methods`). Free of
torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import msgspec

from tenora.errors import InvalidRequestError

AUTO = "auto"
USUAL_METHOD = "supervised"
"""Of a job that names none."""
Scheduler = Literal["linear", "cosine", "constant"]
Publish = Literal["always", "if_better", "never"]


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting.

    Attributes:
        help: what it does, as a sentence.
        least, above, most: bounds of a number, `above` without the bound itself; of the length of a text; of a list's
            and its items'.
        auto: how "auto" is settled; empty if a request may not say so. Absent is "auto" then.
        true: what true stands for where a number may be given as true or false; 0 if it may not.
        noun: what a text is, or the items of a list are.
        every: the word for a list of all that there are, or in place of a number; empty if there is none.
        swept: its place among the dimensions of a sweep, whose trials are drawn in that order; 0 if none tries it.
        log: a range of it is even in the logarithm, unless a sweep says otherwise.
        follows: the setting that its default is made from; a sweep of that one gives each trial its own.
        flag: of `tenora train`; empty if it has none there.
        at: of a method's own, where it stands among the method's options, as `head.type`; empty if it is one of its
            hyperparameters.
        name, kind, choices, default: from the field that it stands at. `kind` is int, float, bool, str or tuple, a list
            of texts; what may stand in such a list, if not anything, are its `choices`.
    """

    help: str
    least: float = -math.inf
    above: float = -math.inf
    most: float = math.inf
    auto: str = ""
    true: int = 0
    noun: str = ""
    every: str = ""
    swept: int = 0
    log: bool = False
    follows: str = ""
    flag: str = ""
    at: str = ""
    name: str = ""
    kind: type = float
    choices: tuple[str, ...] = ()
    default: Any = None

    @property
    def words(self) -> str:
        """What a value must be."""
        whole = f'"{self.every}" or ' if self.every else ""
        if self.kind is tuple:
            return f"{whole}a list of {', '.join(self.choices) or self.noun}"
        if self.noun:
            return self.noun
        if self.choices:
            return f"one of {', '.join(self.choices)}" + (f', or "{AUTO}"' if self.auto else "")
        if self.kind is bool:
            return "true or false"
        if self.kind is int:
            found = f"{whole}a whole number from {self.least:.0f} to {self.most:.0f}"
            if self.true:
                found = f"true ({self.true}), false or {found}"
        else:
            low = f"above {self.above:g}" if self.above > -math.inf else f"at least {self.least:g}"
            found = f"a number, {low} and at most {self.most:g}"
        return f'{found}, or "{AUTO}"' if self.auto else found

    def check(self, value: Any, param: str | None = None) -> Any:
        """The value as its kind; None and "auto", where they may stand, as None.

        Args:
            param: where it stands in the request, if not at its own name.

        Raises:
            InvalidRequestError: it is another kind of value, or out of bounds.
        """
        if self.auto and value in (None, AUTO):
            return None
        if self.true and isinstance(value, bool):
            return self.true if value else 0
        if not self.holds(value):
            raise InvalidRequestError(f"{param or self.name} must be {self.words}.", param=param or self.name)
        return value if self.every and value == self.every else self.kind(value)

    def holds(self, value: Any) -> bool:
        """Whether it is a value of this kind and within the bounds; a whole number may be written as 8.0."""
        if self.every and isinstance(value, str):
            return value == self.every
        if self.kind is tuple:
            return isinstance(value, list | tuple) and 0 < len(value) <= self.most and all(map(self._is_text, value))
        if self.kind is str:
            return self._is_text(value)
        if self.kind is bool or isinstance(value, bool):
            return self.kind is bool and isinstance(value, bool)
        if not isinstance(value, int | float) or not (self.least <= value <= self.most and value > self.above):
            return False
        return self.kind is float or value == int(value)

    def _is_text(self, value: Any) -> bool:
        if self.choices:
            return isinstance(value, str) and value in self.choices
        return isinstance(value, str) and self.least <= len(value) <= self.most


class RunSettings(msgspec.Struct, frozen=True, kw_only=True):
    """How a run learns, whatever its method: in numbers."""

    n_epochs: Annotated[
        int,
        Setting(
            "Passes over the rows.",
            least=1,
            most=50,
            auto="fewer for more rows and tokens",
            swept=3,
            flag="--epochs",
        ),
    ] = 3
    max_steps: Annotated[
        int, Setting("Optimizer steps, instead of epochs; 0 lets the epochs decide.", least=0, most=1_000_000)
    ] = 0
    batch_size: Annotated[
        int,
        Setting(
            "Examples of an optimizer step: rows, or pairs of them.",
            least=1,
            most=256,
            auto="grows as the root of the rows",
            swept=4,
            flag="--batch-size",
        ),
    ] = 8
    learning_rate: Annotated[
        float,
        Setting(
            "Peak of the schedule, instead of a multiplier.", above=0, most=1, swept=2, log=True, flag="--learning-rate"
        ),
    ] = 5e-4
    scheduler: Annotated[Scheduler, Setting("Course of the learning rate after its warm-up.")] = "cosine"
    warmup_ratio: Annotated[float, Setting("Share of the steps in which the rate rises.", least=0, most=1)] = 0.05
    weight_decay: Annotated[float, Setting("Decoupled weight decay of AdamW.", least=0, most=1)] = 0.0
    max_grad_norm: Annotated[float, Setting("Gradients are clipped to this norm.", above=0, most=1000)] = 1.0
    eval_interval: Annotated[
        int, Setting("Optimizer steps between evaluations; 0 is once an epoch.", least=0, most=1_000_000)
    ] = 0
    early_stopping: Annotated[
        int,
        Setting(
            "End after so many evaluations without a better one; true is 3, 0 never does.",
            least=0,
            most=1000,
            true=3,
            flag="--early-stopping",
        ),
    ] = 0
    packing: Annotated[
        bool, Setting("Rows share passes; false gives each a pass of its own, with the same result.")
    ] = True


class RowSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What is asked of a job's rows, before there is a run."""

    max_seq_length: Annotated[
        int, Setting("Tokens of a row; longer ones are refused, or cut with truncate.", least=8, most=2**31 - 1)
    ] = 0
    truncate: Annotated[bool, Setting("Cut rows that are too long, do not refuse them.")] = False


class PublishSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What is asked of a job's name; the run knows nothing of it."""

    publish: Annotated[
        Publish,
        Setting(
            "Whether `name` shall mean the result. if_better, the default: only if its held-out loss is lower than "
            "that of the version that the name means, on rows that neither has learned; a new name means its first "
            "version. always; never. Withheld or not, the version is stored and callable by `fine_tuned_model` and "
            "`name@digest`, and `published` says what was decided.",
            flag="--publish",
        ),
    ] = "if_better"
    min_gain: Annotated[
        float,
        Setting(
            "With if_better: the gain that is asked for, in the unit of the method's losses; of a new name over the "
            "base.",
            least=0,
            most=100,
            flag="--min-gain",
        ),
    ] = 0.0


class Hyperparameters(msgspec.Struct, frozen=True, kw_only=True):
    """OpenAI's, beside those of `RunSettings` that stand among them in a request."""

    learning_rate_multiplier: Annotated[
        float,
        Setting(
            "Scales the method's usual rate.",
            least=1e-4,
            most=100,
            auto="1, the method's usual rate",
            follows="learning_rate",
        ),
    ] = 1.0


@cache
def declared(struct: type[msgspec.Struct]) -> Mapping[str, Setting]:
    """The settings at the fields of a struct, in their order."""
    found: dict[str, Setting] = {}
    defaults = {field.name: field.default for field in msgspec.structs.fields(struct)}
    for name, hint in get_type_hints(struct, include_extras=True).items():
        for setting in getattr(hint, "__metadata__", ()):
            if isinstance(setting, Setting):
                kind = get_args(hint)[0]
                choices = get_args(kind) if get_origin(kind) is Literal else ()
                found[name] = replace(
                    setting,
                    name=name,
                    kind=str if choices else get_origin(kind) or kind,
                    choices=choices,
                    default=defaults[name],
                )
    return found


RUN, ROWS, PUBLISHING = declared(RunSettings), declared(RowSettings), declared(PublishSettings)
JOB: Mapping[str, Setting] = {**ROWS, **PUBLISHING}
HYPERPARAMETERS: Mapping[str, Setting] = {
    **{name: setting for name, setting in RUN.items() if setting.auto},
    **declared(Hyperparameters),
}
"""Those that a request may leave to "auto", and that OpenAI's clients send beside the method."""
BY_THEMSELVES = frozenset(name for name in HYPERPARAMETERS if name in RUN)
"""Those among them that may also stand beside the method."""
SETTINGS: Mapping[str, Setting] = {**{name: s for name, s in RUN.items() if not s.auto}, **JOB}
"""Fields of a job that belong to no other object."""
ESTIMATED: Mapping[str, Setting] = {**{name: RUN[name] for name in RUN if name in BY_THEMSELVES}, **PUBLISHING}
"""Those that an estimate repeats: how long the job would learn, and what would become of its name."""
