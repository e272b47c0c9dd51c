"""A row as token ids with a mark on each one that is learned. Free of torch.

Serving tokenizes the prompt alone and lets the model write the rest, so a row is tokenized in the same pieces: what
stands before a learned span, the span, and so on. That gives the ids that the served model will see even where a
tokenizer would merge the last character of the prompt with the first of the answer.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from tenora.data.rows import (
    ChatRow,
    LabelledRow,
    PairRow,
    PreferenceRow,
    ReadRow,
    Row,
    RowChecker,
    SupervisedRow,
    TextRow,
)
from tenora.errors import InvalidRequestError, TenoraError
from tenora.model.tokenizer import Tokenizer

_THINK_BLOCK = re.compile(r"<(\w+)>\s*\Z")
_ANSWER_FIRST = (
    "The conversation begins with an assistant message, which nothing asks for; begin with a user message, or set "
    "`weight` 0 on that one."
)
_MOVING_TEMPLATE = (
    "The base model's chat template renders messages[{index}] differently once other messages follow it; split the "
    "conversation into rows that each end with the message to learn, and set `weight` 0 on the others."
)
_THINKING = (
    "The base model's chat template opens a think block before an answer and leaves it out of earlier ones, so only a "
    "conversation's last message can be learned as it is served; split the conversation into rows that each end with "
    "the message to learn, and set `weight` 0 on the others."
)
_ENDLESS = (
    "The base model's chat template ends an assistant's message with {text!r}, which holds no end token, so an adapter "
    "could not learn where to stop; write rows of `prompt` and `completion`, which end with the end-of-text token."
)

SAYS_NOTHING = "The two answers are equal as the model sees them, so the pair is left out of training."

Encoded = tuple[list[int], list[int]]
"""Token ids and, for each, 1 if it is learned, else 0."""


@dataclass(frozen=True, slots=True)
class Example:
    """A row as the model sees it.

    Attributes:
        sequences: one; of a preference two, the chosen and the rejected; of a pair its texts.
        cut: how many tokens each of them lost at its end.
        says_nothing: whether it is a preference between equal answers, of which nothing can be learned.
    """

    sequences: tuple[Encoded, ...]
    cut: tuple[int, ...]
    says_nothing: bool = False

    @property
    def truncated(self) -> bool:
        """Whether the row was cut to fit."""
        return any(self.cut)


def encode_example(
    row: Row, tokenizer: Tokenizer, checker: RowChecker, *, max_length: int, truncate: bool
) -> Example | None:
    """Tokenize a row within `max_length` tokens; None if it cannot be rendered, with the reason given to `checker`.

    A longer row is cut at its right end if `truncate`, so that what remains starts as a served prompt does; otherwise
    it is reported and comes back whole. A row that has lost every learned token is reported.

    What a head reads is followed by the end-of-text token, as the only learned one: the model does not read it, and its
    place says where the head reads, which is the last token before it.
    """
    if isinstance(row, LabelledRow | PairRow):
        texts = (row.content,) if isinstance(row, LabelledRow) else row.texts
        return _read_to_the_end(texts, tokenizer, checker, max_length=max_length, truncate=truncate)
    rows = (row.chosen, row.rejected) if isinstance(row, PreferenceRow) else (row,)
    encoded = [_encode(part, tokenizer, checker) for part in rows]
    sequences = [sequence for sequence in encoded if sequence is not None]
    if len(sequences) < len(rows):
        return None
    if _too_long([tokens for tokens, _ in sequences], checker, max_length, truncate=truncate):
        return Example(tuple(sequences), (0,) * len(sequences))
    cut = tuple(max(len(tokens) - max_length, 0) for tokens, _ in sequences)
    kept = tuple((tokens[:max_length], weights[:max_length]) for tokens, weights in sequences)
    if not all(any(weights) for _, weights in kept):
        checker.report(
            "no_trainable_tokens", "No learned token is left in the row after truncation; shorten its prompt."
        )
    return Example(kept, cut, says_nothing=len(kept) > 1 and kept[0] == kept[1])


def _too_long(texts: Sequence[Sequence[int]], checker: RowChecker, max_length: int, *, truncate: bool) -> bool:
    """Report a row that has too many tokens, if it may not be cut."""
    longest = max(map(len, texts))
    if longest > max_length and not truncate:
        checker.report(
            "too_long", f"The row has {longest} tokens and may have {max_length}; shorten it or ask for truncation."
        )
        return True
    return False


def _read_to_the_end(
    texts: Sequence[ReadRow], tokenizer: Tokenizer, checker: RowChecker, *, max_length: int, truncate: bool
) -> Example | None:
    encoded = [_read(text.content, tokenizer, checker) for text in texts]
    found = [tokens for tokens in encoded if tokens]
    if len(found) < len(texts):
        return None
    cut = (0,) * len(found)
    if not _too_long(found, checker, max_length, truncate=truncate):
        cut = tuple(max(len(tokens) - max_length, 0) for tokens in found)
        found = [tokens[:max_length] for tokens in found]
    end = end_of_text(tokenizer)
    return Example(tuple(([*tokens, end], [0] * len(tokens) + [1]) for tokens in found), cut)


def _read(content: ChatRow | TextRow, tokenizer: Tokenizer, checker: RowChecker) -> list[int] | None:
    """The tokens of a text, or of a whole conversation as the template writes it; None if `checker` says why not."""
    if isinstance(content, TextRow):
        tokens = tokenizer.encode(content.text, add_special_tokens=True)
    else:
        try:
            text = tokenizer.render_chat(content.messages, add_generation_prompt=False, tools=content.tools)
        except TenoraError as error:
            checker.report("data_type", f"The base model's chat template refuses the conversation: {error.message}")
            return None
        if not _renders_tools(content, text, tokenizer, checker):
            return None
        tokens = tokenizer.encode(text, add_special_tokens=False)
    if not tokens:
        checker.report("missing_content", "The text has no tokens; give it some words, or remove the row.")
    return tokens


def check_opening(row: Row, tokenizer: Tokenizer, checker: RowChecker) -> None:
    """Report why a conversation in which the assistant speaks first cannot be used, if it cannot.

    Templates differ in what they take of those; nothing is tokenized, and other rows are not looked at.
    """
    for part in (row.chosen, row.rejected) if isinstance(row, PreferenceRow) else (row,):
        if isinstance(part, ChatRow):
            roles = (message["role"] for message in part.messages)
            if next((role for role in roles if role != "system"), None) == "assistant":
                _render(part, tokenizer, checker)


def _encode(row: SupervisedRow, tokenizer: Tokenizer, checker: RowChecker) -> Encoded | None:
    """Tokenize a row; None if it cannot be, with the reason reported to `checker`.

    Chat: learned are the content of each assistant message that counts and the token that ends its turn, at which
    serving stops, not the template's text around them. Prompt and completion: learned are the completion and the
    end-of-text token that is appended to it. Text: everything, and that token.
    """
    if isinstance(row, ChatRow):
        rendered = _render(row, tokenizer, checker)
        if rendered is None:
            return None
        tokens, weights = encode_spans(*rendered, tokenizer, add_special_tokens=False)
        if not _learns_to_end(tokens, weights, tokenizer):
            text = "" if tokenizer.turn_end is None else tokenizer.turn_end.text
            checker.report("ambiguous_format", _ENDLESS.format(text=text))
            return None
    else:
        if isinstance(row, TextRow):
            tokens = tokenizer.encode(row.text, add_special_tokens=True)
            weights = [1] * len(tokens)
        else:
            text = row.prompt + row.completion
            tokens, weights = encode_spans(text, [(len(row.prompt), len(text))], tokenizer, add_special_tokens=True)
        tokens.append(end_of_text(tokenizer))
        weights.append(1)
    weights[:1] = [0] * len(weights[:1])  # nothing precedes the first token, so nothing can predict it
    if not any(weights):
        checker.report(
            "no_trainable_tokens", "No token of the row would be learned; give the assistant's answer some text."
        )
        return None
    return tokens, weights


def encode_spans(
    text: str, spans: Sequence[tuple[int, int]], tokenizer: Tokenizer, *, add_special_tokens: bool
) -> Encoded:
    """Tokenize `text`, marking what lies in the character spans [start, stop).

    A span ends after its last end-of-turn token if it has one: the line end that many templates put behind it is never
    generated, so it is not learned.
    """
    cuts = sorted({0, len(text), *(edge for span in spans for edge in span)})
    pieces = [
        tokenizer.encode(text[start:stop], add_special_tokens=add_special_tokens and start == 0)
        for start, stop in pairwise(cuts)
    ]
    tokens = [token for piece in pieces for token in piece]
    whole = tokenizer.encode(text, add_special_tokens=add_special_tokens)
    edges = {0: 0}
    if tokens == whole or tokenizer.decode(tokens, skip_special_tokens=False) == tokenizer.decode(
        whole, skip_special_tokens=False
    ):
        for cut, piece, previous in zip(cuts[1:], pieces, cuts, strict=False):
            edges[cut] = edges[previous] + len(piece)
    else:
        # Some tokenizers put a space before whatever they are given (SentencePiece's dummy prefix), so pieces would not
        # add up to the text: cut the whole text's ids where those of its beginning end.
        tokens = whole
        for cut in cuts[1:]:
            edges[cut] = _common_prefix(tokens, tokenizer.encode(text[:cut], add_special_tokens=add_special_tokens))
        edges[len(text)] = len(tokens)
    weights = [0] * len(tokens)
    for start, stop in spans:
        first, last = edges[start], edges[stop]
        ends = [index for index in range(first, last) if tokens[index] in tokenizer.eos_token_ids]
        last = ends[-1] + 1 if ends else last
        weights[first:last] = [1] * (last - first)
    return tokens, weights


def _learns_to_end(tokens: list[int], weights: list[int], tokenizer: Tokenizer) -> bool:
    """Whether every learned message ends with an end token, once those that the template puts elsewhere are learned.

    Some templates write the end only between messages: then it is the token behind the learned ones, and after the last
    message it is added here. Both lists are changed in place.
    """
    between = None if tokenizer.turn_end is None else tokenizer.turn_end.token_id
    for index in [index for index, weight in enumerate(weights) if weight and not any(weights[index + 1 : index + 2])]:
        if tokens[index] in tokenizer.eos_token_ids:
            continue
        if between is None or (index + 1 < len(tokens) and tokens[index + 1] != between):
            return False
        if index + 1 == len(tokens):
            tokens.append(between)
            weights.append(1)
        weights[index + 1] = 1
    return True


def end_of_text(tokenizer: Tokenizer) -> int:
    """The token appended to a completion: the tokenizer's own eos, else the lowest id that ends generation.

    Raises:
        InvalidRequestError: the base model has no such token.
    """
    if not tokenizer.eos_token_ids:
        raise InvalidRequestError("The base model names no end-of-text token, so it cannot learn where to stop.")
    own = tokenizer.encode(tokenizer.special_tokens.get("eos_token", ""))
    return own[0] if len(own) == 1 and own[0] in tokenizer.eos_token_ids else min(tokenizer.eos_token_ids)


def _render(row: ChatRow, tokenizer: Tokenizer, checker: RowChecker) -> tuple[str, list[tuple[int, int]]] | None:
    """The conversation as text and the character spans of its learned messages.

    The spans are found by rendering the conversation up to each message, so they hold for any template: each begins
    where the served prompt ends. A template that renders earlier turns differently once later ones follow is refused
    for such rows.
    """
    closing = "" if tokenizer.turn_end is None else tokenizer.turn_end.closing
    written = "" if tokenizer.turn_end is None else tokenizer.turn_end.text
    if row.trained[0]:
        checker.report("ambiguous_format", _ANSWER_FIRST)
        return None
    try:
        text = tokenizer.render_chat(row.messages, add_generation_prompt=False, tools=row.tools)
        if not _renders_tools(row, text, tokenizer, checker):
            return None
        spans = []
        for index in (index for index, learn in enumerate(row.trained) if learn):
            before = tokenizer.render_chat(row.messages[:index], add_generation_prompt=True, tools=row.tools)
            through = tokenizer.render_chat(row.messages[: index + 1], add_generation_prompt=False, tools=row.tools)
            if not through.startswith(before):
                asked, said = (row.messages[place]["content"] for place in (index - 1, index))
                opened = _THINK_BLOCK.search(before)
                answer = _moved(before, through, asked) if opened is None else _thought(opened, through, said)
                if answer is None or index + 1 < len(row.messages):
                    reason = _MOVING_TEMPLATE.format(index=index) if opened is None else _THINKING
                    checker.report("ambiguous_format", reason)
                    return None
                through = text = before + answer
            # What a template writes behind the end of a turn may depend on whether more follows.
            stop = len(through) - len(written) + len(closing) if closing and through.endswith(written) else len(through)
            if not text.startswith(through[:stop]):
                checker.report("ambiguous_format", _MOVING_TEMPLATE.format(index=index))
                return None
            spans.append((len(before), stop))
    except TenoraError as error:
        checker.report("data_type", f"The base model's chat template refuses the conversation: {error.message}")
        return None
    return text, spans


def _moved(before: str, through: str, asked: str) -> str | None:
    """What the template writes for an answer, where it renders what stands before it differently once it is there.

    Mistral's templates put the system message into a user message that nothing follows. None if there is no telling.
    """
    question = asked.strip()
    if not question or question not in before:
        return None
    _, found, answer = through.rpartition(question + before.rpartition(question)[2])
    return answer if found else None


def _thought(opened: re.Match[str], through: str, content: str) -> str | None:
    """What follows a prompt whose end opens a think block, for a message that `through` shows otherwise.

    The message's own reasoning, if its content has any, goes into the block; without it the block is closed at once, as
    a model does that answers without thinking. None if more than that is different.
    """
    if not through.startswith(opened.string[: opened.start()]):
        return None
    begin, end = f"<{opened[1]}>", f"</{opened[1]}>"
    shown = through[opened.start() :]
    if shown.startswith(begin):
        return shown.removeprefix(begin).lstrip()
    reasoning = content.rpartition(end)[0].rpartition(begin)[2].strip()
    return f"{reasoning}\n{end}\n\n{shown}"


def _renders_tools(row: ChatRow, text: str, tokenizer: Tokenizer, checker: RowChecker) -> bool:
    """Report, and return False, if the template leaves out tools or tool calls: they would be lost in silence."""
    if row.tools and tokenizer.render_chat(row.messages, add_generation_prompt=False) == text:
        checker.report(
            "data_type",
            "The base model's chat template does not render `tools`; put their description into the system message.",
        )
    if any("tool_calls" in message for message in row.messages):
        without = [{key: value for key, value in message.items() if key != "tool_calls"} for message in row.messages]
        if tokenizer.render_chat(without, add_generation_prompt=False, tools=row.tools) == text:
            checker.report(
                "data_type",
                "The base model's chat template does not render `tool_calls`; write the call as the message's content.",
            )
    return not checker.issues


def _common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    length = min(len(left), len(right))
    return next((index for index in range(length) if left[index] != right[index]), length)
