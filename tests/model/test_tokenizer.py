from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from tenora.errors import InvalidRequestError, UnsupportedModelError
from tenora.model.tokenizer import Detokenizer, Tokenizer
from tests.support.tiny import VOCAB

CHAT = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "Naïve café? 東京 🙂"},
    {"role": "assistant", "content": "  Yes.\n"},
    {"role": "user", "content": "<|im_end|> & <b>"},
]
TEMPLATES = {
    "special tokens": "{{ bos_token }}{% for m in messages %}{{ m.content | trim }}{{ eos_token }}{% endfor %}",
    "undefined": "{{ cls_token }}|{{ nothing }}|{% if nothing is defined %}x{% endif %}{{ messages | length }}",
    "tools": "{% if tools %}{{ tools | tojson(indent=2) }}{{ tools[0] | tojson }}{% endif %}{{ messages[-1].content }}",
    "date": "{{ strftime_now('%Y') }}{{ messages[0]['content'] }}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "loop controls": "{% for m in messages %}{% if loop.index == 3 %}{% break %}{% endif %}{{ m.role }}{% endfor %}",
    "namespace": "{% set n = namespace(i=0) %}{% for m in messages %}{% set n.i = n.i + 1 %}{% endfor %}{{ n.i }}",
    "dict": "{{ dict(a=1) }}{{ dict.fromkeys('ab', 2) }}",
    "whitespace": "{% for m in messages %}\n    {% if true %}\n  {{ m.content }}\n    {% endif %}\n{% endfor %}\n\n",
    "reasoning": "{% for m in messages %}{{ m.reasoning_content }}|{{ m.thinking }}|{% endfor %}",
    "nulls": "{% for m in messages %}{{ 'name' in m }}{{ m.name }}{% endfor %}{{ add_generation_prompt }}",
}
TOOLS = [
    {
        "type": "function",
        "function": {"name": "größe", "parameters": {"type": "object", "z": 1, "a": [True, None, 1.5]}},
    }
]


@pytest.fixture(scope="module")
def tokenizer(tiny: Callable[..., Path]) -> Tokenizer:
    return Tokenizer.load(tiny())


@pytest.fixture(scope="module")
def theirs(tiny: Callable[..., Path]) -> Any:
    return transformers.AutoTokenizer.from_pretrained(tiny())


@given(text=st.text())
@settings(max_examples=150, deadline=None)
def test_ids_and_decoded_text_equal_transformers(text: str, tokenizer: Tokenizer, theirs: Any) -> None:
    for special in (False, True):
        ids = tokenizer.encode(text, add_special_tokens=special)
        assert ids == theirs.encode(text, add_special_tokens=special)
    assert tokenizer.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert tokenizer.decode(ids, skip_special_tokens=False) == theirs.decode(ids)


def test_properties_equal_transformers(tokenizer: Tokenizer, theirs: Any) -> None:
    assert tokenizer.vocab_size == len(theirs)
    assert tokenizer.special_tokens == theirs.special_tokens_map
    assert tokenizer.eos_token_ids == {theirs.eos_token_id}
    assert [tokenizer.is_special(i) for i in range(4)] == [True, True, True, False]


@pytest.mark.parametrize("generation", [True, False])
def test_chat_equals_transformers(generation: bool, tokenizer: Tokenizer, theirs: Any) -> None:
    text = theirs.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=generation)
    ids = theirs.apply_chat_template(CHAT, add_generation_prompt=generation, return_dict=False)
    assert tokenizer.render_chat(CHAT, add_generation_prompt=generation) == text
    assert tokenizer.encode_chat(CHAT, generation) == ids
    assert ids.count(2) == 5  # the template's four, and the one that a user wrote, as transformers has it


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_render_as_in_transformers(name: str, tiny: Callable[..., Path], theirs: Any, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(tiny(), tmp_path / "model"))
    (directory / "chat_template.jinja").write_text(TEMPLATES[name])
    messages = [
        *CHAT,
        {"role": "assistant", "content": "x", "name": None, "reasoning": "because", "tool_calls": [{"id": 1}]},
    ]
    for tools in (None, TOOLS):
        expected = theirs.apply_chat_template(messages, chat_template=TEMPLATES[name], tools=tools, tokenize=False)
        actual = Tokenizer.load(directory).render_chat(messages, add_generation_prompt=False, tools=tools)
        assert actual == expected


def with_template(tiny: Callable[..., Path], directory: Path, template: str) -> Tokenizer:
    shutil.copytree(tiny(), directory)
    (directory / "chat_template.jinja").write_text(template)
    return Tokenizer.load(directory)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[9].content + 1 }}", "no element 9"),
        ("{{ messages[0].content + 1 }}", "str"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe|append"),
        ("{% set ns = namespace(_x=1) %}", "_x"),
        ("{% set ns = namespace() %}{% set ns.__class__ = 1 %}", "__class__"),
    ],
)
def test_a_template_that_fails_is_the_requests_error(
    template: str, reason: str, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    tokenizer = with_template(tiny, tmp_path / "model", template)
    with pytest.raises(InvalidRequestError, match=reason) as caught:
        tokenizer.render_chat(CHAT, add_generation_prompt=True)
    assert caught.value.param == "messages"


def test_other_refusals(tokenizer: Tokenizer, tiny: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match="at least one message"):
        tokenizer.render_chat([], add_generation_prompt=True)
    with pytest.raises(UnsupportedModelError, match="not valid Jinja"):
        with_template(tiny, tmp_path / "bad", "{% if %}")
    shutil.copytree(tiny(), tmp_path / "none")
    (tmp_path / "none" / "chat_template.jinja").unlink()
    bare = Tokenizer.load(tmp_path / "none")
    assert not bare.has_chat_template
    with pytest.raises(InvalidRequestError, match="no chat template"):
        bare.render_chat(CHAT, add_generation_prompt=True)
    (tmp_path / "none" / "tokenizer.json").write_text("{}")
    with pytest.raises(UnsupportedModelError, match=r"is not a tokenizer that can be read"):
        Tokenizer.load(tmp_path / "none")
    (tmp_path / "none" / "tokenizer.json").unlink()
    with pytest.raises(UnsupportedModelError, match="is missing"):
        Tokenizer.load(tmp_path / "none")


def test_templates_in_the_tokenizer_config(tiny: Callable[..., Path], tmp_path: Path) -> None:
    directory = Path(shutil.copytree(tiny(), tmp_path / "model"))
    (directory / "chat_template.jinja").unlink()
    config = json.loads((directory / "tokenizer_config.json").read_text())
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    for declared, plain, with_tools in (("one", "one", "one"), (named, "plain", "tools")):
        (directory / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": declared}))
        tokenizer = Tokenizer.load(directory)
        assert tokenizer.render_chat(CHAT, add_generation_prompt=True) == plain
        assert tokenizer.render_chat(CHAT, add_generation_prompt=True, tools=TOOLS) == with_tools


def test_eos_ids_of_the_generation_config_are_added(tiny: Callable[..., Path], tmp_path: Path) -> None:
    directory = Path(shutil.copytree(tiny(), tmp_path / "model"))
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 0]}))
    assert Tokenizer.load(directory).eos_token_ids == {0, 2, 5}


@given(ids=st.lists(st.integers(0, VOCAB - 1)), chunks=st.lists(st.integers(1, 4)), skip=st.booleans())
@settings(max_examples=400, deadline=None)
def test_detokenizer_pieces_make_up_the_decoded_text(
    ids: list[int], chunks: list[int], skip: bool, tokenizer: Tokenizer
) -> None:
    """Any ids at all, invalid UTF-8 included, in any chunks."""
    detokenizer = Detokenizer(tokenizer, skip_special_tokens=skip)
    pieces, rest = [], ids
    for size in [*chunks, len(ids) or 1]:
        pieces.append(detokenizer.push(rest[:size]))
        rest = rest[size:]
    assert not any(piece.endswith("\ufffd") for piece in pieces)
    assert "".join(pieces) + detokenizer.flush() == tokenizer.decode(ids, skip_special_tokens=skip)
    assert detokenizer.flush() == ""


@given(text=st.text())
@settings(max_examples=150, deadline=None)
def test_detokenizer_never_breaks_a_character(text: str, tokenizer: Tokenizer) -> None:
    detokenizer = Detokenizer(tokenizer, skip_special_tokens=False)
    written = ""
    for token_id in tokenizer.encode(text):
        written += detokenizer.push([token_id])
        assert text.startswith(written)
    assert written + detokenizer.flush() == text


def test_detokenizer_emits_as_early_as_it_can(tokenizer: Tokenizer) -> None:
    smile = tokenizer.encode("🙂")
    assert len(smile) > 1
    detokenizer = Detokenizer(tokenizer)
    assert [detokenizer.push([i]) for i in smile] == [""] * (len(smile) - 1) + ["🙂"]
    assert detokenizer.push(smile[:1]) == ""
    assert detokenizer.push(tokenizer.encode("a")) == "\ufffda"  # the character will not be completed any more
    assert detokenizer.push(smile[:1]) == ""
    assert detokenizer.flush() == "\ufffd"


@pytest.fixture(scope="module")
def straddling() -> Tokenizer:
    """A byte-level vocabulary with tokens that begin, end, or both, inside a character, as large ones have them."""
    level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    ((spelled, _),) = level.pre_tokenize_str("aé🙂")
    a, lead, tail, *smile = list(spelled)
    merges = [(a, lead), (tail, lead), (smile[0], smile[1]), (smile[3], smile[0] + smile[1])]
    pieces = ["</s>", *sorted(level.alphabet()), *("".join(pair) for pair in merges)]
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({piece: i for i, piece in enumerate(pieces)}, merges))
    backend.pre_tokenizer = level
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["</s>"])
    return Tokenizer(backend, special_tokens={"eos_token": "</s>"}, eos_token_ids=(), templates={})


@given(text=st.text(alphabet="aéèê🙂🙃ñ"))
@settings(max_examples=200, deadline=None)
def test_detokenizer_gives_every_whole_character_at_once(text: str, straddling: Tokenizer) -> None:
    detokenizer = Detokenizer(straddling)
    written, sent = "", b""
    for token_id in straddling.encode(text):
        written += detokenizer.push([token_id])
        sent += straddling.token_bytes(token_id)
        assert written == sent.decode("utf-8", "ignore")  # "ignore" leaves only the unfinished end out
    assert detokenizer.flush() == ""
    assert written == text


@given(data=st.data(), chunk=st.integers(1, 3))
@settings(max_examples=300, deadline=None)
def test_detokenizer_pieces_of_straddling_tokens_make_up_the_text(
    data: st.DataObject, chunk: int, straddling: Tokenizer
) -> None:
    # The merged tokens and the bytes behind ASCII: unfinished and stray bytes everywhere.
    odd = [i for i in range(straddling.vocab_size) if i > 256 or not straddling.token_bytes(i).isascii()]
    ids = data.draw(st.lists(st.sampled_from(odd)))
    detokenizer = Detokenizer(straddling)
    pieces = [detokenizer.push(ids[i : i + chunk]) for i in range(0, len(ids), chunk)]
    assert "".join(pieces) + detokenizer.flush() == straddling.decode(ids)
    assert detokenizer.flush() == ""


def test_detokenizer_splits_a_token_at_the_unfinished_character(straddling: Tokenizer) -> None:
    ids = straddling.encode("aéé🙂🙂")
    assert [straddling.token_bytes(i) for i in ids[:3]] == [b"a\xc3", b"\xa9\xc3", b"\xa9"]
    detokenizer = Detokenizer(straddling)
    assert [detokenizer.push([i]) for i in ids[:3]] == ["a", "é", "é"]
    assert detokenizer.push(ids[3:]) == "🙂🙂"
    assert detokenizer.push(ids[:1]) == "a"
    assert detokenizer.flush() == "\ufffd"


@given(text=st.text())
@settings(max_examples=100, deadline=None)
def test_token_bytes_make_up_the_text(text: str, tokenizer: Tokenizer) -> None:
    assert b"".join(tokenizer.token_bytes(i) for i in tokenizer.encode(text)) == text.encode()


def test_single_tokens(tokenizer: Tokenizer) -> None:
    assert tokenizer.token_text(2) == "<|im_end|>"
    assert tokenizer.token_bytes(2) == b"<|im_end|>"
    assert tokenizer.token_bytes(10**6) == b""
    first = tokenizer.encode("🙂")[0]
    assert "🙂".encode().startswith(tokenizer.token_bytes(first))
    assert tokenizer.token_text(first).endswith("\ufffd")


@pytest.fixture(scope="module")
def sentencepiece() -> Tokenizer:
    """Llama 2's scheme: word-initial spaces as ▁, unknown characters as byte tokens."""
    pieces = ["<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁a", "▁b", "ab"]
    model = tokenizers.models.BPE(
        {piece: i for i, piece in enumerate(pieces)}, [("▁", "a"), ("▁", "b"), ("a", "b")], byte_fallback=True
    )
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
    )
    backend.decoder = tokenizers.decoders.Sequence(
        [
            tokenizers.decoders.Replace("▁", " "),
            tokenizers.decoders.ByteFallback(),
            tokenizers.decoders.Fuse(),
            tokenizers.decoders.Strip(" ", 1, 0),
        ]
    )
    backend.add_special_tokens(["<s>", "</s>"])
    return Tokenizer(backend, special_tokens={"eos_token": "</s>"}, eos_token_ids=(), templates={})


@given(text=st.text(alphabet="ab é🙂"))
@settings(max_examples=150, deadline=None)
def test_detokenizer_keeps_spaces_and_bytes_of_sentencepiece_vocabularies(text: str, sentencepiece: Tokenizer) -> None:
    ids = sentencepiece.encode(text)
    detokenizer = Detokenizer(sentencepiece)
    written = ""
    for token_id in [0, *ids[:1], 1, *ids[1:], 1]:  # skipped tokens in between must not eat a space
        written += detokenizer.push([token_id])
        assert text.startswith(written)
    assert written + detokenizer.flush() == text
    assert b"".join(sentencepiece.token_bytes(i) for i in ids).decode().removeprefix(" ") == text
    assert sentencepiece.eos_token_ids == {1}
