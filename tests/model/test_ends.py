"""Which tokens end a text: every place that names one counts, and so does what the chat template writes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tenora.model.tokenizer import Tokenizer

Tiny = Callable[..., Path]
TURNS = "{{% for m in messages %}}{{{{ '<|im_start|>' + m.role + '\n' + m.content }}}}{end}{{% endfor %}}"


def changed(tiny: Tiny, directory: Path, *, template: str | None = None, **files: dict[str, Any]) -> Tokenizer:
    """The tokenizer of a tiny base (its own end is <|im_end|>, 2) with other configurations."""
    shutil.copytree(tiny(), directory)
    for name, values in files.items():
        path = directory / f"{name}.json"
        kept = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**kept, **values}))
    if template is not None:
        (directory / "chat_template.jinja").write_text(template)
    return Tokenizer.load(directory)


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        ({"eos_token_id": 0}, {"eos_token_id": 0}, {0, 2}),
        ({"eos_token_id": 0}, {"eos_token_id": [5, 7]}, {0, 2, 5, 7}),
        ({"eos_token_id": [5]}, {"eos_token_id": None}, {2, 5}),
        ({"eos_token_id": None}, {"eos_token_id": None}, {2}),
        ({"eos_token_id": -1}, {"eos_token_id": [100_000, 2**40]}, {2}),  # ids of nothing
    ],
)
def test_every_place_that_names_an_end_counts(
    tiny: Tiny, tmp_path: Path, config: dict[str, Any], generation: dict[str, Any], expected: set[int]
) -> None:
    assert changed(tiny, tmp_path / "m", config=config, generation_config=generation).eos_token_ids == expected


def test_the_familys_default_counts_only_where_no_place_names_an_end(tiny: Tiny, tmp_path: Path) -> None:
    nothing: dict[str, Any] = {"config": {"eos_token_id": None}, "generation_config": {"eos_token_id": None}}
    plain = {"tokenizer_config": {"eos_token": None}, "special_tokens_map": {"eos_token": None}}
    template = TURNS.format(end="")
    assert changed(tiny, tmp_path / "a", template=template, **nothing, **plain).eos_token_ids == {2}
    named = {"config": {"eos_token_id": 7}, "generation_config": {"eos_token_id": None}}
    assert changed(tiny, tmp_path / "b", template=template, **named, **plain).eos_token_ids == {7}


@pytest.mark.parametrize(
    ("end", "token", "written"),
    [
        ("{{ '<|im_end|>\n' }}", 2, True),
        ("{{ ' <|im_end|>' }}", 2, True),  # Llama 2 writes a space before it
        ("{% if not loop.last %}{{ '<|im_end|>' }}{% endif %}", 2, False),
        ("{{ '\n\n' }}", None, False),
        ("", None, False),
        ("{{ '<|no token|>' }}", None, False),
    ],
)
def test_what_the_template_writes_after_an_answer_ends_a_turn(
    tiny: Tiny, tmp_path: Path, end: str, token: int | None, written: bool
) -> None:
    """The base's own end is <|endoftext|>, as that of Qwen2.5's bases, whose template ends turns with another."""
    ends = {"config": {"eos_token_id": 0}, "generation_config": {"eos_token_id": 0 if written else [0, 2]}}
    own = {"tokenizer_config": {"eos_token": "<|endoftext|>"}}
    tokenizer = changed(tiny, tmp_path / "m", template=TURNS.format(end=end), **ends, **own)
    assert tokenizer.turn_end is not None
    assert (tokenizer.turn_end.token_id, bool(tokenizer.turn_end.closing)) == (token, written)
    assert tokenizer.eos_token_ids == {0, 2}


def test_a_template_that_cannot_render_a_plain_conversation_ends_nothing(tiny: Tiny, tmp_path: Path) -> None:
    for number, template in enumerate(("{{ raise_exception('no') }}", "constant")):
        assert changed(tiny, tmp_path / str(number), template=template).turn_end is None
