"""adapter_config.json: what Tenora serves of it, and a reason for everything that it does not. Free of torch."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tenora.adapters.matching import Expressions, KeyTable, ends_with_any, layer_number, suffixes
from tenora.adapters.pattern import Pattern
from tenora.adapters.safetensors_file import parse_json_object
from tenora.adapters.targets import TargetModule
from tenora.errors import AdapterFormatError

MAX_CONFIG_BYTES = 2**20
_MAX_PATTERNS = 2048
ALL_LINEAR = "all-linear"
_PEFT_DEFAULT = 8  # of r and of lora_alpha, where a configuration leaves them out
_NOT_ADAPTED = ("embed_tokens", "lm_head")

# Every field that changes what the adapter computes in a way that the low-rank op does not, with what to do about it.
_UNSUPPORTED = {
    "use_dora": "DoRA also rescales the base weights; train plain LoRA",
    "bias": "trained biases are not served; train with bias='none'",
    "lora_bias": "biases of the low-rank layers are not served; train with lora_bias=False",
    "modules_to_save": "modules that are trained in full are not served; train without modules_to_save",
    "fan_in_fan_out": "transposed layers do not occur in the bases served here; train with fan_in_fan_out=False",
    "layer_replication": "the layers of the shared base cannot be repeated; train without layer_replication",
    "trainable_token_indices": "trained embeddings are not served; train without trainable_token_indices",
    "target_parameters": "bare parameters cannot be adapted; name linear modules in target_modules",
    "auto_map": "code in an upload is never run; remove auto_map",
    "alora_invocation_tokens": "activated LoRA is not served; train plain LoRA",
    "use_qalora": "QALoRA is not served; train plain LoRA",
    "use_bdlora": "block-diagonal LoRA is not served; train plain LoRA",
    "arrow_config": "Arrow routing is not served; train plain LoRA",
    "kasa_config": "KaSA is not served; train plain LoRA",
    "monteclora_config": "MonteCLoRA is not served; train plain LoRA",
    "velora_config": "VeLoRA is not served; train plain LoRA",
    "megatron_config": "Megatron layers are not served; export the adapter to plain PEFT",
    "target_modules_to_tie": "tied embeddings cannot be adapted; train without it",
}
# Fields that only matter while training or that only describe; their values are kept and not looked at.
_DESCRIPTIVE = {
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision", "runtime_config"),
    *("corda_config", "eva_config", "loftq_config", "lora_ga_config", "lora_dropout"),
    *("ensure_weight_tying", "megatron_core", "qalora_group_size"),
}
_READ = {
    *("peft_type", "task_type", "init_lora_weights", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
}
# PEFT's other initialisations (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) also change the base weights.
_HARMLESS_INITS: tuple[Any, ...] = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
_NEUTRAL: tuple[Any, ...] = (None, False, "", "none", [], {})


@dataclass(frozen=True, slots=True)
class PeftConfig:
    """The fields of an adapter_config.json that decide what an adapter computes.

    Attributes:
        rank, alpha: where no pattern says otherwise.
        target_modules: names that paths end with, or one regular expression for the whole path.
        exclude_modules: the same for modules that are left out.
        layers: layers that are adapted; None is all of them.
        layers_pattern: plain names that come before the number of a layer in a path; empty is anything.
        rank_pattern, alpha_pattern: the first key that matches the end of a path wins, so their order matters.
        raw: the whole file.
    """

    rank: int
    alpha: float
    use_rslora: bool
    target_modules: tuple[str, ...] | str
    exclude_modules: tuple[str, ...] | str
    layers: frozenset[int] | None
    layers_pattern: tuple[str, ...]
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    raw: Mapping[str, Any]

    def resolve(self, targets: Sequence[TargetModule]) -> dict[str, tuple[int, float]]:
        """Rank and scaling of each target module that the adapter covers, by path, as PEFT resolves them.

        Raises:
            AdapterFormatError: if nothing is covered, the embeddings or the head are, or the patterns are too many or
                cannot be read.
        """
        expressions = Expressions()
        ranks = KeyTable("rank_pattern", self.rank_pattern, expressions)
        alphas = KeyTable("alpha_pattern", self.alpha_pattern, expressions)
        wanted = _selection("target_modules", self.target_modules, expressions)
        left_out = _selection("exclude_modules", self.exclude_modules, expressions)
        covered: dict[str, tuple[int, float]] = {}
        for target in targets:
            if self._covers(target.path, wanted) and not _selects(left_out, target.path):
                rank = ranks.get(target.path, self.rank)
                alpha = alphas.get(target.path, self.alpha)
                covered[target.path] = (rank, alpha / (math.sqrt(rank) if self.use_rslora else rank))
        self._refuse_missing(targets, covered)
        return covered

    def _refuse_missing(self, targets: Sequence[TargetModule], covered: Collection[str]) -> None:
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
            f"target_modules is {_shown(self.target_modules)}, which with its layers and exclusions matches none; "
            f"this base has {names}."
        )

    def _covers(self, path: str, wanted: _Selection) -> bool:
        if not _selects(wanted, path):
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


def parse_config(text: bytes) -> PeftConfig:
    """Read and check an adapter_config.json.

    Raises:
        AdapterFormatError: if it is too large, not JSON, not LoRA, of a kind that is not served, or holds a field that
            is not known; the message names the field. `base_model_name_or_path` and `auto_mapping` are never followed.
    """
    if len(text) > MAX_CONFIG_BYTES:
        raise AdapterFormatError(
            f"adapter_config.json is over {MAX_CONFIG_BYTES} bytes; that is no LoRA configuration."
        )
    raw = parse_json_object(text, what="adapter_config.json")
    if raw.get("peft_type") != "LORA":
        raise AdapterFormatError(f"peft_type is {raw.get('peft_type')!r}; only LORA adapters are served.")
    if raw.get("task_type") not in (None, "CAUSAL_LM"):
        raise AdapterFormatError(f"task_type is {raw['task_type']!r}; only CAUSAL_LM adapters are served.")
    for name, value in raw.items():
        if name in _UNSUPPORTED and value not in _NEUTRAL:
            raise AdapterFormatError(f"{name} is {_shown(value)}: {_UNSUPPORTED[name]}.")
        if name not in _UNSUPPORTED and name not in _DESCRIPTIVE | _READ and value not in _NEUTRAL:
            raise AdapterFormatError(
                f"{name} is {_shown(value)}, a field that this version does not know; export the adapter without it."
            )
    if raw.get("init_lora_weights") not in _HARMLESS_INITS:
        raise AdapterFormatError(
            f"init_lora_weights is {_shown(raw['init_lora_weights'])}, which changes the base weights too; export the "
            "adapter with path_initial_model_for_weight_conversion."
        )
    return PeftConfig(
        rank=_positive_int("r", raw.get("r", _PEFT_DEFAULT)),
        alpha=_finite("lora_alpha", raw.get("lora_alpha", _PEFT_DEFAULT)),
        use_rslora=_flag("use_rslora", raw.get("use_rslora", False)),
        target_modules=_names("target_modules", raw.get("target_modules"), required=True),
        exclude_modules=_names("exclude_modules", raw.get("exclude_modules"), required=False),
        layers=_layers(raw.get("layers_to_transform")),
        layers_pattern=_plain_names("layers_pattern", raw.get("layers_pattern")),
        rank_pattern={k: _positive_int(f"rank_pattern[{k!r}]", v) for k, v in _pattern("rank_pattern", raw).items()},
        alpha_pattern={k: _finite(f"alpha_pattern[{k!r}]", v) for k, v in _pattern("alpha_pattern", raw).items()},
        raw=raw,
    )


_Selection = frozenset[str] | Pattern | None  # names, an expression, or every module


def _selection(field: str, value: tuple[str, ...] | str, expressions: Expressions) -> _Selection:
    if not isinstance(value, str):
        return frozenset(value)
    if field == "target_modules" and value.lower() == ALL_LINEAR:
        return None
    return expressions.compile(field, value)


def _selects(selection: _Selection, path: str) -> bool:
    if isinstance(selection, Pattern):
        return selection.fullmatch(path)
    return selection is None or ends_with_any(path, selection)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _positive_int(name: str, value: Any) -> int:
    if type(value) is not int or not 1 <= value < 2**31:
        raise AdapterFormatError(f"{name} is {_shown(value)}; a rank is a whole number from 1 on.")
    return value


def _finite(name: str, value: Any) -> float:
    if type(value) not in (int, float) or not abs(value) < 1e9:
        raise AdapterFormatError(f"{name} is {_shown(value)}; it must be a number of ordinary size.")
    return float(value)


def _flag(name: str, value: Any) -> bool:
    if value is None or type(value) is bool:
        return bool(value)
    raise AdapterFormatError(f"{name} is {_shown(value)}; it must be true or false.")


def _names(name: str, value: Any, *, required: bool) -> tuple[str, ...] | str:
    if value in (None, [], "") and not required:
        return ()
    if isinstance(value, str) and value:
        return value
    if isinstance(value, list) and value and all(isinstance(item, str) and item for item in value):
        if len(value) > _MAX_PATTERNS:
            raise AdapterFormatError(f"{name} has {len(value)} entries; at most {_MAX_PATTERNS} are read.")
        return tuple(value)
    raise AdapterFormatError(f"{name} is {_shown(value)}; it must be a list of module names or one regular expression.")


def _plain_names(name: str, value: Any) -> tuple[str, ...]:
    names = _names(name, value, required=False)
    listed = (names,) if isinstance(names, str) else names
    if not all(part.isidentifier() for item in listed for part in item.split(".")):
        raise AdapterFormatError(f"{name} is {_shown(value)}; only plain names such as 'layers' are read.")
    return listed


def _layers(value: Any) -> frozenset[int] | None:
    numbers = [value] if type(value) is int else value
    if numbers in (None, []):
        return None
    if isinstance(numbers, list) and len(numbers) <= _MAX_PATTERNS and all(type(number) is int for number in numbers):
        return frozenset(numbers)
    raise AdapterFormatError(f"layers_to_transform is {_shown(value)}; it must be a layer number or a list of them.")


def _pattern(name: str, raw: Mapping[str, Any]) -> dict[str, Any]:
    value = raw.get(name)
    if value is None:
        return {}
    if not isinstance(value, dict) or len(value) > _MAX_PATTERNS:
        raise AdapterFormatError(f"{name} must map at most {_MAX_PATTERNS} module patterns to numbers.")
    return value
