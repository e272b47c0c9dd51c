"""The bound on a text's tokens never refuses one that fits, whatever the tokenizer does to the text first."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from tenora.model import tokenizer as tokenizer_module
from tenora.model.tokenizer import Tokenizer

# Characters that normalizers shorten, white space that special tokens swallow, and what words are made of.
ALPHABET = "ab eé🙂\n\t\u212a\U0001d400\uff46한\u1112\u1161\u11ab\u0301\u00a0  "
TEXTS = st.lists(st.sampled_from([*ALPHABET, "the ", "<s>", "</s>", " " * 40]), max_size=60).map("".join)


def byte_level(
    *, normalizer: Any = None, strip: bool = False, merges: bool = True, lacking: str = "", letters: bool = False
) -> Tokenizer:
    level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(set(pre_tokenizers.ByteLevel.alphabet()) - set(lacking))
    pairs = [("t", "h"), ("th", "e"), ("Ġ", "Ġ"), ("ĠĠ", "ĠĠ"), ("Ġ", "the")] if merges else []
    pairs += [("a", "a"), ("aa", "aa"), ("aaaa", "aaaa")] if letters else []
    pieces = ["</s>", *alphabet, *("".join(pair) for pair in pairs)]
    backend = tokenizers.Tokenizer(models.BPE({piece: index for index, piece in enumerate(pieces)}, pairs))
    backend.pre_tokenizer, backend.decoder = level, decoders.ByteLevel()
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.add_special_tokens([AddedToken("</s>", lstrip=strip, rstrip=strip)])
    return made(backend)


def sentencepiece() -> Tokenizer:
    """As Llama 2's: bytes for what is unknown, a space before the text, spaces as ▁."""
    pieces = ["<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "t", "h", "e", "th", "the"]
    pieces += ["▁▁", "▁the"]
    merges = [("t", "h"), ("th", "e"), ("▁", "▁"), ("▁", "the")]
    model = models.BPE({piece: index for index, piece in enumerate(pieces)}, merges, byte_fallback=True)
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.add_special_tokens(["<s>", "</s>"])
    return made(backend)


def made(backend: tokenizers.Tokenizer) -> Tokenizer:
    return Tokenizer(backend, special_tokens={"eos_token": "</s>"}, eos_token_ids=(), templates={})


BOUNDED: dict[str, Callable[[], Tokenizer]] = {
    "bytes": byte_level,
    "bytes, no merges": lambda: byte_level(merges=False),
    "NFC": lambda: byte_level(normalizer=normalizers.NFC()),
    "NFKC": lambda: byte_level(normalizer=normalizers.NFKC()),
    "NFKD and lower case": lambda: byte_level(
        normalizer=normalizers.Sequence([normalizers.NFKD(), normalizers.Lowercase()])
    ),
    "stripped": lambda: byte_level(normalizer=normalizers.Strip()),
    "special tokens that swallow white space": lambda: byte_level(strip=True),
    "bytes without a token, as SmolLM2 has them": lambda: byte_level(lacking="bĊé"),
    "SentencePiece": sentencepiece,
}


@pytest.mark.parametrize("kind", BOUNDED)
@given(data=st.data())
@settings(max_examples=80, deadline=None)
def test_no_text_has_fewer_tokens_than_its_bound(kind: str, data: st.DataObject) -> None:
    tokenizer = BOUNDED[kind]()
    text = data.draw(TEXTS)
    assert tokenizer.text_bound is not None
    tokens = len(tokenizer.encode(text))
    assert tokenizer.text_bound.least_tokens(text) <= tokens
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer_module, "_PIECE", 7)
        patch.setattr(tokenizer_module, "_LONG_TOKEN", 1)
        for enough in {0, 3, tokens - 1, tokens}:
            assert tokenizer.least_tokens(text, max(0, enough)) <= tokens


WORST: dict[str, tuple[Tokenizer, str]] = {
    "bold letters become plain ones": (byte_level(normalizer=normalizers.NFKC(), letters=True), "\U0001d41a"),
    "and capitals small ones": (
        byte_level(normalizer=normalizers.Sequence([normalizers.NFKD(), normalizers.Lowercase()]), letters=True),
        "\U0001d400",
    ),
    "what a special token swallows": (byte_level(strip=True), "</s>" + " " * 40),
    "what is stripped": (byte_level(normalizer=normalizers.Strip()), " "),
    "what has no token": (byte_level(lacking="bĊé"), "b\n"),
}


@pytest.mark.parametrize("case", WORST)
def test_the_bound_holds_where_a_text_has_the_fewest_tokens(case: str) -> None:
    tokenizer, piece = WORST[case]
    text = piece * 4000
    assert tokenizer.text_bound is not None
    assert tokenizer.text_bound.least_tokens(text) <= len(tokenizer.encode(text))


@pytest.mark.parametrize("kind", BOUNDED)
def test_what_is_far_too_long_is_known_to_be(kind: str) -> None:
    tokenizer = BOUNDED[kind]()
    assert tokenizer.least_tokens("the the " * 20_000, 500) > 500


def test_what_may_swallow_any_text_has_no_bound() -> None:
    unknown = tokenizers.Tokenizer(models.BPE({"[UNK]": 0, "a": 1}, [], unk_token="[UNK]", fuse_unk=True))
    words = tokenizers.Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    for backend in (unknown, words):
        backend.add_special_tokens(["</s>"])
        assert made(backend).text_bound is None
    for normalizer in (normalizers.StripAccents(), normalizers.Replace("a", ""), normalizers.BertNormalizer()):
        assert byte_level(normalizer=normalizer).text_bound is None
    dropping = byte_level()
    dropping._backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    assert dropping.text_bound is None
    assert dropping.least_tokens("a" * 1000, 1) == 0


def test_the_tiny_base_is_bounded(tiny: Callable[..., Path]) -> None:
    assert Tokenizer.load(tiny()).text_bound is not None


@pytest.mark.real
def test_the_real_base_is_bounded(base: Path) -> None:
    tokenizer = Tokenizer.load(base)
    assert tokenizer.text_bound is not None
    assert tokenizer.least_tokens("the quick brown " * 490_000, 8192) > 8192


def test_what_is_found_out_of_a_vocabulary_is_found_out_once_for_all_requests() -> None:
    tokenizer = byte_level()
    first, second = tokenizer.watched(lambda: None), tokenizer.watched(lambda: None)
    assert first.text_bound is not None
    assert first.text_bound is second.text_bound
    assert first._declared is second._declared
    assert first._special_ids is second._special_ids
    the = first.encode("the")[0]
    assert first.token_bytes(the) == b"the"
    assert first.token_bytes(the) is second.token_bytes(the)
    assert first.token_text(the) is second.token_text(the)
