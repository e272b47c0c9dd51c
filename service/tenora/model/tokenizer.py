"""Text to token ids and back, equal to transformers' AutoTokenizer for the same directory.

Free of torch and transformers: the API process tokenizes.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from tenora.errors import InvalidRequestError, UnsupportedModelError
from tenora.model.byte_level import byte_of_character
from tenora.model.ends import declared_ends, find_turn_end
from tenora.model.spec import read_json
from tenora.model.template import ChatTemplate
from tenora.model.text_bound import TextBound, text_bound

_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_LARGE = frozenset({"vocab", "merges"})
_LONG_TOKEN = 8  # characters: a text with fewer per token is not unusual
_PIECE = 2**15  # characters
_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
# What is found out about the vocabulary when it is first asked for: tenths of a second, so once for all copies.
_FOUND_OUT = ("text_bound", "_added", "_added_ids", "_special_ids", "_lengths", "_spelled", "_declared", "_decoders")


class Tokenizer:
    """The tokenizer of a base model with its chat template.

    Attributes:
        eos_token_ids: all the tokens that end a text: those that were given, the tokenizer's own, and the one that ends
            an assistant's message in the chat template.
        check: called before each text that is encoded; see `watched`.
        turn_end: how the chat template ends an assistant's message; None without a template.
        special_tokens: the named ones, such as `{"bos_token": "<s>"}`.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        special_tokens: Mapping[str, str],
        eos_token_ids: Iterable[int],
        templates: Mapping[str, str],
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self.special_tokens = dict(special_tokens)
        self.check: Callable[[], None] | None = None
        self._templates = {name: ChatTemplate(source) for name, source in templates.items()}
        own = _own_end(backend, self.special_tokens)
        # An id that the vocabulary lacks ends nothing, and no request could name it.
        known = {end for end in eos_token_ids if 0 <= end < 2**31 and backend.id_to_token(end) is not None}
        ends = frozenset(known if own is None else known | {own})
        self.turn_end = find_turn_end(self._plain_chat, self._added_ids, ends) if "default" in self._templates else None
        turn = None if self.turn_end is None else self.turn_end.token_id
        self.eos_token_ids = ends if turn is None else ends | {turn}

    @classmethod
    def load(cls, directory: Path) -> Tokenizer:
        """Read `tokenizer.json`, `tokenizer_config.json` and the chat template of a Hugging Face directory.

        Raises:
            UnsupportedModelError: `tokenizer.json` is missing or cannot be read, or the template is not valid.
        """
        path = directory / "tokenizer.json"
        if not path.is_file():
            raise UnsupportedModelError(
                f"{path} is missing; Tenora needs the tokenizer in the tokenizers library's format."
            )
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the tokenizers library raises nothing narrower
            raise UnsupportedModelError(f"{path} is not a tokenizer that can be read: {error}.") from error
        config = read_json(directory / "tokenizer_config.json")
        named = {**read_json(directory / "special_tokens_map.json"), **config}
        special = {name: _content(named[name]) for name in _SPECIAL_TOKENS if named.get(name) is not None}
        return cls(
            backend,
            special_tokens=special,
            eos_token_ids=declared_ends(directory, _own_end(backend, special)),
            templates=_templates(directory, config),
        )

    @property
    def vocab_size(self) -> int:
        """Tokens of the tokenizer, added ones included; the model's table may be longer (padded)."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    @property
    def has_chat_template(self) -> bool:
        """Whether conversations can be rendered."""
        return bool(self._templates)

    def watched(self, check: Callable[[], None]) -> Tokenizer:
        """The same tokenizer, which calls `check` before each text that it encodes: it may raise to end a long work."""
        for name in _FOUND_OUT:
            getattr(self, name)
        watched = copy.copy(self)
        watched.check = check
        return watched

    def least_tokens(self, text: str, enough: int) -> int:
        """So many tokens the text has at least. Looked at no longer than it takes to know of more than `enough`.

        A text that may well have no more is left to `encode`: then the answer is small, 0 perhaps.
        """
        bound = self.text_bound
        if bound is None or len(text) <= enough:
            return 0
        least = bound.least_tokens(text)
        if least > enough or len(text) <= _LONG_TOKEN * enough or not bound.counts_all(text):
            return least
        # Cut into pieces a text has more tokens, but only around the cuts, at each no more than a long token has bytes;
        # pieces so long that each has at least as many make it never twice as many.
        counted, piece = 0, max(_PIECE, int(2 * bound.bytes_per_token**2))
        for start in range(0, len(text), piece):
            counted += len(self.encode(text[start : start + piece]))
            if counted > 2 * enough:
                return counted // 2
        return least

    @cached_property
    def text_bound(self) -> TextBound | None:
        """How few tokens a text may have; None if there is no telling."""
        return text_bound(self._declared, self._backend.get_vocab(with_added_tokens=True))

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Token ids of a text. With `add_special_tokens` the tokenizer adds what it adds to a plain prompt (a bos)."""
        if self.check is not None:
            self.check()
        return self._backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of token ids; bytes that are not UTF-8 become U+FFFD."""
        return self._backend.decode(ids, skip_special_tokens=skip_special_tokens)

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """A conversation as the text that the model was trained on.

        Raises:
            InvalidRequestError: the model has no chat template, or the template refuses the messages.
        """
        name = "tool_use" if tools is not None and "tool_use" in self._templates else "default"
        if name not in self._templates:
            raise InvalidRequestError("The base model has no chat template; use /v1/completions.", param="messages")
        return self._templates[name].render(
            messages, add_generation_prompt=add_generation_prompt, tools=tools, special_tokens=self.special_tokens
        )

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[int]:
        """Token ids of a conversation. The template writes its special tokens itself, so none is added.

        Raises:
            InvalidRequestError: as `render_chat`.
        """
        return self.encode(self.render_chat(messages, add_generation_prompt=add_generation_prompt, tools=tools))

    def offsets(self, ids: Iterable[int]) -> list[int]:
        """For each token the character of the ids' text, special tokens included, at which it begins."""
        detokenizer, written, offsets = Detokenizer(self, skip_special_tokens=False), 0, []
        for token_id in ids:
            piece = detokenizer.push([token_id])
            offsets.append(written + beginning(piece, self.token_text(token_id)))
            written += len(piece)
        return offsets

    def token_text(self, token_id: int) -> str:
        """A single token for display, special ones included; part of a character shows as U+FFFD."""
        return self._spell(token_id)[0]

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for inside a text; empty for an id that the tokenizer does not know."""
        return self._spell(token_id)[1]

    def _spell(self, token_id: int) -> tuple[str, bytes]:
        """A token's text and bytes, found out once: a scored prompt asks for twenty at each of its places."""
        spelled = self._spelled.get(token_id)
        if spelled is None:
            raw = self._bytes_of(token_id)
            spelled = self._spelled[token_id] = raw.decode("utf-8", errors="replace"), raw
        return spelled

    def _bytes_of(self, token_id: int) -> bytes:
        token = self._backend.id_to_token(token_id)
        if token is None:
            return b""
        if token_id in self._added:
            return self._added[token_id].encode()
        if "ByteLevel" in self._decoders:
            table = byte_of_character()
            if all(character in table for character in token):
                return bytes(table[character] for character in token)
            return token.encode()
        if "ByteFallback" in self._decoders and (match := _BYTE_TOKEN.fullmatch(token)):
            return bytes.fromhex(match[1])
        return token.replace("▁", " ").encode()

    def length_alone(self, token_id: int) -> int:
        """Characters of the token as a text of its own, specials included; decoded once for each token."""
        length = self._lengths.get(token_id)
        if length is None:
            length = self._lengths[token_id] = len(self.decode([token_id], skip_special_tokens=False))
        return length

    def is_special(self, token_id: int) -> bool:
        """Whether `decode` leaves the token out by default."""
        return token_id in self._special_ids

    def special_token_id(self, text: str) -> int | None:
        """The special token that `text` is, to the character; None if it is not exactly one."""
        token_id = self._added_ids.get(text)
        return token_id if token_id is not None and self.is_special(token_id) else None

    def _plain_chat(self, messages: Sequence[Mapping[str, Any]]) -> str:
        return self.render_chat(messages, add_generation_prompt=False)

    @cached_property
    def _added_ids(self) -> dict[str, int]:
        return {text: token_id for token_id, text in self._added.items()}

    @cached_property
    def _spelled(self) -> dict[int, tuple[str, bytes]]:
        return {}

    @cached_property
    def _lengths(self) -> dict[int, int]:
        return {}

    @cached_property
    def _added(self) -> dict[int, str]:
        return {index: token.content for index, token in self._backend.get_added_tokens_decoder().items()}

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        return frozenset(index for index, token in self._backend.get_added_tokens_decoder().items() if token.special)

    @cached_property
    def _declared(self) -> dict[str, Any]:
        """What `tokenizer.json` says but for the vocabulary and the merges, which are large."""
        declared: dict[str, Any] = json.loads(self._backend.to_str())
        declared["model"] = {name: value for name, value in declared["model"].items() if name not in _LARGE}
        return declared

    @cached_property
    def _decoders(self) -> frozenset[str]:
        """Kinds of the decoder's steps, such as ByteLevel."""
        decoder = self._declared.get("decoder") or {}
        return frozenset(step["type"] for step in decoder.get("decoders", [decoder]) if "type" in step)


class Detokenizer:
    """Turns a stream of token ids into a stream of text.

    Characters are given out as soon as they are whole: of a token that ends inside a character only that end is held
    back. The pieces together equal `Tokenizer.decode` of all the ids. (With byte-fallback tokenizers one case differs:
    when *invalid* bytes directly follow valid single-byte tokens, decode garbles both and the stream only the invalid
    ones.)
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        # Tokens up to the last piece, and those that gave none yet. The former are decoded again as context, because
        # decoders treat the first token of a text differently (SentencePiece strips its space), and because the last
        # of them may end inside a character.
        self._context: list[int] = []
        self._held: list[int] = []
        self._given = 0  # characters of the context's text that were given out

    def push(self, ids: Iterable[int]) -> str:
        """Add tokens and return the text that is now complete, which may be empty."""
        pieces = [self._push(index) for index in ids if not (self._skip and self._tokenizer.is_special(index))]
        return pieces[0] if len(pieces) == 1 else "".join(pieces)

    def flush(self) -> str:
        """Return what is held back, unfinished characters as U+FFFD. The stream may go on."""
        text = self._new_text()
        self._give(held_back=0)
        return text

    def _push(self, token_id: int) -> str:
        self._held.append(token_id)
        text = self._new_text()
        # U+FFFD at the end is an unfinished character, or a real one that the next token will release.
        whole = text.rstrip("\ufffd")
        if whole:
            self._give(held_back=len(text) - len(whole))
        return whole

    def _new_text(self) -> str:
        return self._tokenizer.decode(self._context + self._held, self._skip)[self._given :]

    def _give(self, held_back: int) -> None:
        """All but the last `held_back` characters are given out.

        The held tokens alone are context enough, though they may begin inside a character: each byte of its rest then
        counts as one U+FFFD here, and what follows decodes as before.
        """
        if self._held:
            self._context, self._held = self._held, []
        # Nearly always one token, which never is a special one that is left out.
        if len(self._context) == 1:
            self._given = self._tokenizer.length_alone(self._context[0]) - held_back
        else:
            self._given = len(self._tokenizer.decode(self._context, self._skip)) - held_back


def beginning(piece: str, token: str) -> int:
    """Where in a piece of a `Detokenizer` the token that brought it begins.

    Before it may stand what earlier tokens left unfinished. A token that is only a part of a character begins where the
    character does.

    Args:
        piece: what was given out when the token was pushed.
        token: the token's own text, as `Tokenizer.token_text` has it.
    """
    own = len(token.rstrip("\ufffd"))
    return max(0, len(piece) - own) if own else 0


def _own_end(backend: tokenizers.Tokenizer, special_tokens: Mapping[str, str]) -> int | None:
    """The id of the tokenizer's `eos_token`."""
    token = special_tokens.get("eos_token")
    found: int | None = None if token is None else backend.token_to_id(token)
    return found


def _content(token: Any) -> str:
    """A special token is a string or an object with its `content`."""
    return str(token["content"] if isinstance(token, Mapping) else token)


def _templates(directory: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Chat templates by name, from the newest of the three places where checkpoints keep them."""
    single = directory / "chat_template.jinja"
    more = directory / "additional_chat_templates"
    if single.is_file() or more.is_dir():
        templates = {path.stem: path.read_text("utf-8") for path in sorted(more.glob("*.jinja"))}
        if single.is_file():
            templates["default"] = single.read_text("utf-8")
        return templates
    declared = config.get("chat_template")
    if declared is None:
        return {}
    if isinstance(declared, str):
        return {"default": declared}
    return {entry["name"]: entry["template"] for entry in declared}
