"""Chat templates of well-known models: a row is learned as it is served, or refused for the true reason.

The templates are those that ship with trl; where two of a kind matter and it has none, they are written out here.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import trl
from tokenizers import decoders, models, pre_tokenizers

from tenora.data.encoding import Encoded, encode_example
from tenora.data.rows import ChatRow, RowChecker
from tenora.model.tokenizer import Tokenizer

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
SPECIAL = re.compile(r"<[|｜][^<>\n]{1,40}[|｜]>|<(?:start|end)_of_turn>|\[/?INST\]|</s>")  # noqa: RUF001
# The last user message carries the system's, as in Mistral's; the first one does, as in Llama 2's.
MISTRAL = (
    "{% set s = messages[0].content if messages[0].role == 'system' else '' %}{{ bos_token }}"
    "{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + (s + '\n\n' if s and m is eq(messages[-1]) else '')"
    " + m.content + '[/INST]' }}{% elif m.role == 'assistant' %}{{ ' ' + m.content + '</s>' }}{% endif %}{% endfor %}"
)
LLAMA2 = (
    "{% set s = messages[0].content if messages[0].role == 'system' else '' %}"
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + ('<<SYS>>\n' + s + '\n<</SYS>>\n\n' if"
    " s and loop.index0 == 1 else '') + m.content + ' [/INST]' }}{% elif m.role == 'assistant' %}"
    "{{ ' ' + m.content + ' </s>' }}{% endif %}{% endfor %}"
)
OF_TRL = (
    *("cohere", "cohere2", "deepseek_r1_distill", "deepseekv3", "gemma", "gemma3", "gptoss", "llama3", "llama3_1"),
    *("nemotron_3_nano", "phi3", "phi3_5", "qwen2_5", "qwen3", "qwen3_5_nothink", "qwen3_5_think"),
    "qwen3_instruct_2507",
)
THINKING = ("deepseek_r1_distill", "deepseekv3", "nemotron_3_nano", "qwen3_5_think")


def made(template: str) -> Tokenizer:
    """A byte-level tokenizer that knows the special tokens of a template, with the name of one or the text of it."""
    path = TEMPLATES / f"{template}.jinja"
    source = template if "{" in template else path.read_text()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE({piece: index for index, piece in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<eos>", "<bos>", *sorted(set(SPECIAL.findall(source)))])
    special = {"eos_token": "<eos>", "bos_token": "<bos>"}
    return Tokenizer(backend, special_tokens=special, eos_token_ids=[], templates={"default": source})


def turns(*contents: str, system: str = "") -> list[dict[str, Any]]:
    said = [{"role": ("user", "assistant")[place % 2], "content": content} for place, content in enumerate(contents)]
    return [{"role": "system", "content": system}, *said] if system else said


def encode(tokenizer: Tokenizer, messages: list[dict[str, Any]], *, all_of_them: bool = False) -> Encoded | str:
    """The row with its last message, or each of the assistant's, learned; or why not."""
    learned = tuple(message["role"] == "assistant" and (all_of_them or message is messages[-1]) for message in messages)
    checker = RowChecker(1)
    example = encode_example(ChatRow(messages, learned), tokenizer, checker, max_length=10_000, truncate=False)
    return checker.issues[0].message if example is None else example.sequences[0]


def parts(tokenizer: Tokenizer, encoded: Encoded) -> tuple[str, str]:
    """What stands before the learned tokens of a row with one answer, and what they say."""
    tokens, weights = encoded
    first, last = weights.index(1), len(weights) - weights[::-1].index(1)
    assert all(weights[first:last])
    before, learned = tokens[:first], tokens[first:last]
    return tokenizer.decode(before, False), tokenizer.decode(learned, False)


@pytest.mark.parametrize("template", [*OF_TRL, MISTRAL, LLAMA2], ids=[*OF_TRL, "mistral", "llama2"])
@pytest.mark.parametrize("system", ["", "Be brief."])
def test_the_last_message_is_learned_where_the_served_prompt_ends_or_refused_as_serving_refuses_it(
    template: str, system: str
) -> None:
    tokenizer = made(template)
    for messages in (turns("q1", "an answer", system=system), turns("q1", "a1", "q2", "an answer", system=system)):
        encoded = encode(tokenizer, messages)
        if (template, bool(system)) == ("gemma", True):
            assert "System role not supported" in str(encoded)
            continue
        served = tokenizer.render_chat(messages[:-1], add_generation_prompt=True)
        assert not isinstance(encoded, str), encoded
        before, learned = parts(tokenizer, encoded)
        assert before == served
        ends = [token for token in encoded[0] if token in tokenizer.eos_token_ids]
        assert tokenizer.turn_end is not None
        assert learned.rstrip().endswith(f"an answer{tokenizer.turn_end.closing}")
        assert ends


@pytest.mark.parametrize("template", THINKING)
def test_an_answer_stands_behind_the_think_block_that_the_prompt_opens(template: str) -> None:
    tokenizer = made(template)
    encoded = encode(tokenizer, turns("q", "an answer"))
    assert not isinstance(encoded, str)
    before, learned = parts(tokenizer, encoded)
    assert before.endswith("<think>\n")
    assert re.match(r"\n?</think>\n*an answer", learned)  # a block without a thought
    thought = encode(tokenizer, turns("q", "<think>\nbecause\n</think>\n\nan answer"))
    assert not isinstance(thought, str)
    before, learned = parts(tokenizer, thought)
    assert before.endswith("<think>\n")
    assert re.match(r"because\n*</think>\n*an answer", learned)


@pytest.mark.parametrize("template", ["deepseek_r1_distill", "deepseekv3", "nemotron_3_nano"])
def test_earlier_answers_of_a_thinking_template_are_refused_for_the_true_reason(template: str) -> None:
    reason = encode(made(template), turns("q1", "a1", "q2", "a2"), all_of_them=True)
    assert isinstance(reason, str)
    assert "opens a think block before an answer and leaves it out of earlier ones" in reason
    assert "`weight` 0" in reason


def test_a_system_message_that_moves_is_refused_for_the_earlier_answers() -> None:
    conversation = turns("q1", "a1", "q2", "a2", system="Be brief.")
    reason = encode(made(MISTRAL), conversation, all_of_them=True)
    assert isinstance(reason, str)
    assert "renders messages[2] differently once other messages follow it" in reason
    assert not isinstance(encode(made(MISTRAL), turns("q1", "a1", "q2", "a2"), all_of_them=True), str)
    assert not isinstance(encode(made(LLAMA2), conversation, all_of_them=True), str)


def test_what_a_template_writes_behind_the_end_of_the_conversation_is_not_learned() -> None:
    """Phi-3 writes its end of text behind the last turn alone; generation stops before it."""
    tokenizer = made("phi3")
    encoded = encode(tokenizer, turns("q1", "a1", "q2", "a2"), all_of_them=True)
    assert not isinstance(encoded, str), encoded
    tokens, weights = encoded
    learned = [token for token, weight in zip(tokens, weights, strict=True) if weight]
    assert tokenizer.decode(learned, False) == "a1<|end|>a2<|end|>"
