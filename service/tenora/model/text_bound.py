"""How few tokens a text may have, from its length alone, so that what cannot fit need not be tokenized to be refused.

The bound must never refuse a text that fits. A token stands for at most as many bytes of the text as the longest one is
spelled with, times what a normalizer may shorten; a tokenizer with a part that can swallow text without limit has no
bound here. Free of torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from tenora.model.byte_level import byte_of_character

# Bytes before a normalization for each byte after it, at most: U+212A (3 bytes) becomes K, U+1D400 (4 bytes) becomes A,
# Hangul of three parts one of as many bytes as each had, and all else shrinks by less.
_SHRINKS = {"NFC": 3.0, "NFD": 3.0, "NFKC": 4.0, "NFKD": 4.0, "Lowercase": 3.0, "Prepend": 1.0, "ByteLevel": 1.0}
_KEEPING = frozenset({"ByteLevel", "Digits", "Metaspace", "Split", "Punctuation", "UnicodeScripts"})


@dataclass(frozen=True, slots=True)
class TextBound:
    """The most bytes of a text that one token may stand for.

    Attributes:
        bytes_per_token: of UTF-8.
        spares_space: white space is not counted, because special tokens may swallow what stands around them.
        unknown: bytes that are not counted, because the vocabulary has no token for them and drops them.
    """

    bytes_per_token: float
    spares_space: bool
    unknown: bytes

    def least_tokens(self, text: str) -> int:
        """So many tokens the text has at least."""
        return int(len(self._counted(text)) / self.bytes_per_token)

    def counts_all(self, text: str) -> bool:
        """Whether every part of the text makes tokens."""
        return not self.spares_space and (not self.unknown or len(self._counted(text)) == len(_utf8(text)))

    def _counted(self, text: str) -> bytes:
        return _utf8("".join(text.split()) if self.spares_space else text).translate(None, self.unknown)


def text_bound(declared: Mapping[str, Any], vocabulary: Iterable[str]) -> TextBound | None:
    """The bound of a tokenizer; None if some part of it may stand for text of any length.

    Args:
        declared: the object of a `tokenizer.json`.
        vocabulary: all its tokens.
    """
    splitters = _steps(declared.get("pre_tokenizer"), "pretokenizers")
    unknown = _unknown_bytes(declared["model"], frozenset(vocabulary), splitters)
    if unknown is None:
        return None
    if any(step["type"] not in _KEEPING or step.get("behavior") == "Removed" for step in splitters):
        return None
    normalizers = _steps(declared.get("normalizer"), "normalizers")
    stripping = any(step["type"] == "Strip" for step in normalizers)
    factors = [_shrinks(step) for step in normalizers if step["type"] != "Strip"]
    if any(factor is None for factor in factors):
        return None
    swallowing = any(token.get("lstrip") or token.get("rstrip") for token in declared.get("added_tokens", ()))
    longest = max(len(token.encode()) for token in vocabulary)
    return TextBound(
        longest * prod(factor for factor in factors if factor is not None), stripping or swallowing, unknown
    )


def _unknown_bytes(
    model: Mapping[str, Any], vocabulary: frozenset[str], splitters: Iterable[Mapping[str, Any]]
) -> bytes | None:
    """The bytes that may vanish; None if any characters may be dropped, or become one token however many they are."""
    if model.get("type") != "BPE":
        return None
    if model.get("byte_fallback"):
        return b"" if all(f"<0x{byte:02X}>" in vocabulary for byte in range(256)) else None
    if not any(step["type"] == "ByteLevel" for step in splitters):
        return None
    return bytes(byte for character, byte in byte_of_character().items() if character not in vocabulary)


def _utf8(text: str) -> bytes:
    return text.encode(errors="surrogatepass")


def _shrinks(step: Mapping[str, Any]) -> float | None:
    if step["type"] == "Replace":
        found, content = step["pattern"].get("String"), step["content"]
        return max(1.0, len(found.encode()) / len(content.encode())) if found and content else None
    return _SHRINKS.get(step["type"])


def _steps(part: Mapping[str, Any] | None, inner: str) -> list[Mapping[str, Any]]:
    if part is None:
        return []
    if part["type"] == "Sequence":
        return [step for each in part[inner] for step in _steps(each, inner)]
    return [part]
