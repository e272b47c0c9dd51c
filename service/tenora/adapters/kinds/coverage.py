"""Which modules of a base a configuration covers: `target_modules` and what narrows it, as PEFT reads them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tenora.adapters.kinds import fields
from tenora.adapters.matching import Expressions, ends_with_any, layer_number, suffixes
from tenora.adapters.pattern import Pattern
from tenora.adapters.targets import TargetModule
from tenora.errors import AdapterFormatError

ALL_LINEAR = "all-linear"
FIELDS = frozenset({"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"})
"""The fields of a configuration that are read here."""
_NOT_ADAPTED = ("embed_tokens", "lm_head")

_Selection = frozenset[str] | Pattern | None  # names, an expression, or every module


@dataclass(frozen=True, slots=True)
class Coverage:
    """What a configuration says of the modules that it adapts.

    Attributes:
        target_modules: names that paths end with, or one regular expression for the whole path.
        exclude_modules: the same for modules that are left out.
        layers: layers that are adapted; None is all of them.
        layers_pattern: plain names that come before the number of a layer in a path; empty is anything.
    """

    target_modules: tuple[str, ...] | str
    exclude_modules: tuple[str, ...] | str
    layers: frozenset[int] | None
    layers_pattern: tuple[str, ...]

    @classmethod
    def of(cls, raw: Mapping[str, Any]) -> Coverage:
        """Read the fields of an adapter_config.json. Raises AdapterFormatError that names the field."""
        return cls(
            target_modules=fields.names("target_modules", raw.get("target_modules"), required=True),
            exclude_modules=fields.names("exclude_modules", raw.get("exclude_modules"), required=False),
            layers=_layers(raw.get("layers_to_transform")),
            layers_pattern=fields.plain_names("layers_pattern", raw.get("layers_pattern")),
        )

    def modules(self, targets: Sequence[TargetModule], expressions: Expressions) -> list[TargetModule]:
        """The modules that are covered, in the order of the base.

        Args:
            targets: the modules of the base that can be adapted.
            expressions: those of the adapter, within one bound.

        Raises:
            AdapterFormatError: nothing is covered, the embeddings or the head are, or an expression cannot be read.
        """
        wanted = selection("target_modules", self.target_modules, expressions)
        left_out = selection("exclude_modules", self.exclude_modules, expressions)
        covered = [
            target for target in targets if self._covers(target.path, wanted) and not selects(left_out, target.path)
        ]
        self._refuse_missing(targets, covered)
        return covered

    def _refuse_missing(self, targets: Sequence[TargetModule], covered: Collection[TargetModule]) -> None:
        """Raise if nothing is covered, or a name is one of the base's modules that cannot be adapted.

        Other names that the base lacks are passed over beside those that match, as PEFT does.
        """
        names = ", ".join(sorted({target.name for target in targets}))
        listed = () if isinstance(self.target_modules, str) else self.target_modules
        for name in listed:
            if name.rpartition(".")[2] in _NOT_ADAPTED:
                raise AdapterFormatError(
                    f"target_modules names {name!r}, which cannot be adapted here; this base has {names}."
                )
        if covered:
            return
        known = {suffix for target in targets for suffix in suffixes(target.path)}
        if listed and (missing := [name for name in listed if name not in known]):
            raise AdapterFormatError(
                f"target_modules names {missing[0]!r}, which this base does not have or which cannot be adapted; "
                f"it has {names}."
            )
        raise AdapterFormatError(
            f"target_modules is {fields.shown(self.target_modules)}, which with its layers and exclusions matches "
            f"none; this base has {names}."
        )

    def _covers(self, path: str, wanted: _Selection) -> bool:
        if not selects(wanted, path):
            return False
        # layers_to_transform does not apply to expressions and whole paths: they name their layers themselves.
        if self.layers is None or not isinstance(wanted, frozenset) or path in wanted:
            return True
        return self._layer(path) in self.layers

    def _layer(self, path: str) -> int | None:
        if not self.layers_pattern:
            return layer_number(path, None)
        numbers = (layer_number(path, name) for name in self.layers_pattern)
        return next((number for number in numbers if number is not None), None)


def selection(field: str, value: tuple[str, ...] | str, expressions: Expressions) -> _Selection:
    """What a field of names or of one expression selects. Raises AdapterFormatError as `Expressions.compile`."""
    if not isinstance(value, str):
        return frozenset(value)
    if field == "target_modules" and value.lower() == ALL_LINEAR:
        return None
    return expressions.compile(field, value)


def selects(selected: _Selection, path: str) -> bool:
    """Whether a module is among them."""
    if isinstance(selected, Pattern):
        return selected.fullmatch(path)
    return selected is None or ends_with_any(path, selected)


def _layers(value: Any) -> frozenset[int] | None:
    numbers = [value] if type(value) is int else value
    if numbers in (None, []):
        return None
    if isinstance(numbers, list) and len(numbers) <= fields.MAX_ENTRIES and all(type(one) is int for one in numbers):
        return frozenset(numbers)
    raise AdapterFormatError(
        f"layers_to_transform is {fields.shown(value)}; it must be a layer number or a list of them."
    )
