"""Keys of a row that mean something which training here does not do: refused, because dropping them would train on
something else than the row says. Free of torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tenora.data.rows import RowChecker

_WEIGHTS = (
    "says how much is learned of the row, which is all or nothing here: remove rows that are not to be learned, and in "
    "a conversation set `weight` 0 on the assistant messages that are not"
)
_MASK = "says which tokens are learned; set `weight` 0 on the assistant messages that are not, and remove the mask"
_MEDIA = (
    "belongs to a model that sees or hears; only text is learned here, so remove the row, or this key if the text does "
    "without it"
)
_FUNCTIONS = "is the older form of tools; write `tools` and `tool_calls`"
_TEMPLATE = "changes how the conversation is rendered, and serving would not; remove it"

UNSERVED: Mapping[str, str] = {
    **dict.fromkeys(("weight", "weights", "sample_weight", "loss_weight", "train", "loss"), _WEIGHTS),
    **dict.fromkeys(("mask", "loss_mask", "train_mask", "completion_mask", "assistant_masks", "labels"), _MASK),
    **dict.fromkeys(("image", "images", "video", "videos", "audio", "audios"), _MEDIA),
    **dict.fromkeys(("functions", "function_call"), _FUNCTIONS),
    **dict.fromkeys(("chat_template", "chat_template_kwargs", "enable_thinking"), _TEMPLATE),
    "rejected_message": "is an answer not to be given; write a preference row with `prompt`, `chosen` and `rejected`",
}
"""What each says, and what to do."""

_EMPTY: tuple[object, ...] = (None, "", [], {}, "null", "[]", "{}")  # the latter three in CSV
_NEUTRAL: Mapping[str, frozenset[object]] = {
    **dict.fromkeys(("weight", "weights", "sample_weight", "loss_weight"), frozenset({1, "1", "1.0"})),
    "train": frozenset({True, "true", "True", "1"}),
}
"""Values that say what is done anyway."""


def refuse_unserved(value: Mapping[str, Any], checker: RowChecker) -> None:
    """Report the first key of a row that is not served. Keys that say nothing (null, empty, or the default) pass."""
    for key in UNSERVED.keys() & value.keys():
        said = value[key]
        if said not in _EMPTY and not _is_neutral(key, said):
            checker.report("unsupported_key", f"The row has `{key}`, which {UNSERVED[key]}.")


def _is_neutral(key: str, said: Any) -> bool:
    if key == "loss":  # mostly a number that some run has noted
        return isinstance(said, str | float | int) and said not in (False, "false", "False", "0")
    return isinstance(said, str | float | int) and said in _NEUTRAL.get(key, ())
