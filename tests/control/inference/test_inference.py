"""From names and prompts to text: resolution, tokenizing, limits, streams of one and several choices."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tenora.control.adapters.records import Target
from tenora.control.control import Control
from tenora.control.inference.detokenizing import ChoiceStream
from tenora.control.inference.records import Delta, GenerationRequest
from tenora.control.tenancy.records import Principal
from tenora.engine.messages import Generate, SamplingParams, SequenceOutput, TokenLogprob
from tenora.errors import (
    ContextLengthError,
    InvalidRequestError,
    ModelNotFoundError,
    UnavailableError,
)
from tenora.model.tokenizer import Tokenizer
from tests.control.conftest import BASE, ImportAdapter
from tests.control.inference.test_stops import slowly
from tests.support.scripted_answers import outputs, refusal
from tests.support.scripted_engine import Answer
from tests.support.scripted_jobs import JobScript

TARGET = Target(BASE, None, "tenant-x", "tenant-x")


def asked(prompt: Sequence[int] = (3, 4), **fields: Any) -> GenerationRequest:
    sampling = SamplingParams(max_tokens=50, **fields.pop("sampling", {}))
    return GenerationRequest(target=TARGET, prompt_token_ids=prompt, sampling=sampling, **fields)


async def collect(control: Control, request: GenerationRequest) -> list[Delta]:
    return [delta async for _, delta in control.inference.generate([request])]


async def test_names_resolve(control: Control, acme: Principal, import_adapter: ImportAdapter) -> None:
    first = await import_adapter(control, acme, "desk", seed=1)
    second = await import_adapter(control, acme, "desk", seed=2)
    resolve = control.inference.resolve
    for name in ("desk", "acme/desk", f"desk@{second.digest[:8]}", f"acme/desk@{second.digest}"):
        target = await resolve(acme, name, None)
        assert target.adapter is not None
        assert (target.name, target.adapter.digest) == (name, second.digest)
    old = await resolve(acme, f"desk@{first.digest[:12]}", None)
    assert old.adapter is not None
    assert old.adapter.digest == first.digest
    for model, adapter_id, shown in ((None, "desk", "desk"), (BASE, "desk", BASE)):
        target = await resolve(acme, model, adapter_id)
        assert target.adapter is not None
        assert (target.adapter.digest, target.name) == (second.digest, shown)
    target = await resolve(acme, BASE, None)
    assert (target.adapter, target.name) == (None, BASE)
    for names, param in (((None, None), "model"), (("desk", "desk"), "adapter_id")):
        with pytest.raises(InvalidRequestError) as caught:
            await resolve(acme, *names)
        assert caught.value.param == param


async def test_unknown_and_foreign_names_are_the_same(
    control: Control, acme: Principal, umbrella: Principal, import_adapter: ImportAdapter
) -> None:
    theirs = await import_adapter(control, umbrella, "desk")
    names = ["desk", "umbrella/desk", f"umbrella/desk@{theirs.digest}", f"desk@{theirs.digest}", theirs.digest]
    names += ["", "nothing", "a/b/c", "desk@", "desk@abc", "desk@" + "g" * 8, "ft:", "ft:tiny:umbrella::x", "../desk"]
    names += ["%2e%2e", "desk\x00", "DESK", "tiny2", f"{BASE}@{theirs.digest}", f"acme/{BASE}"]
    for name in names:
        with pytest.raises(ModelNotFoundError) as caught:
            await control.inference.resolve(acme, name, None)
        message = caught.value.message.replace(repr(name), "?")
        assert message == ModelNotFoundError("x").message.replace(repr("x"), "?")
        assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    with pytest.raises(InvalidRequestError):
        await control.inference.resolve(acme, "a" * 10_000, None)


async def test_the_same_name_in_two_tenants_is_two_adapters(
    control: Control, acme: Principal, umbrella: Principal, import_adapter: ImportAdapter
) -> None:
    ours, theirs = (
        await import_adapter(control, acme, "desk", seed=1),
        await import_adapter(control, umbrella, "desk", seed=2),
    )
    mine = await control.inference.resolve(acme, "desk", None)
    other = await control.inference.resolve(umbrella, "desk", None)
    assert mine.adapter is not None
    assert other.adapter is not None
    assert (mine.adapter.digest, other.adapter.digest) == (ours.digest, theirs.digest)
    assert mine.cache_salt != other.cache_salt
    assert mine.cache_salt == (await control.inference.resolve(acme, BASE, None)).cache_salt


async def test_ambiguous_digests_are_refused(
    control: Control, acme: Principal, import_adapter: ImportAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    digests = iter(["ab" * 32, "ab" * 31 + "cd"])
    put = control._blobs._put

    async def colliding(directory: Any) -> Any:
        import dataclasses

        blob, hold = await put(directory)
        return dataclasses.replace(blob, digest=next(digests)), hold

    monkeypatch.setattr(control._blobs, "_put", colliding)
    await import_adapter(control, acme, "desk", seed=1)
    await import_adapter(control, acme, "desk", seed=2)
    with pytest.raises(InvalidRequestError, match="more digits"):
        await control.inference.resolve(acme, "desk@abababab", None)


async def test_prompts(control: Control, tokenizer: Tokenizer) -> None:
    prompts = control.inference.prompts
    messages = [{"role": "user", "content": "Hello"}]
    assert prompts.chat(messages) == tokenizer.encode_chat(messages)
    parts = [{"role": "user", "content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]}]
    assert prompts.chat(parts) == prompts.chat(messages)
    assert prompts.text("Hello") == tokenizer.encode("Hello", add_special_tokens=True)
    for broken in ([], [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]):
        with pytest.raises(InvalidRequestError) as caught:
            prompts.chat(broken)
        assert caught.value.param == "messages"
    with pytest.raises(InvalidRequestError, match="empty"):
        prompts.text("")
    assert prompts.ids([0, tokenizer.vocab_size - 1]) == [0, tokenizer.vocab_size - 1]
    for ids in ([], [-1], [tokenizer.vocab_size]):
        with pytest.raises(InvalidRequestError):
            prompts.ids(ids)


async def test_what_fits(control: Control) -> None:
    inference = control.inference
    assert inference.max_model_len == 256
    assert inference.fit_max_tokens(200, None) == 56
    assert inference.fit_max_tokens(200, 56) == 56
    assert inference.fit_max_tokens(255, None) == 1
    for prompt, wanted in ((200, 57), (256, None), (300, 1)):
        with pytest.raises(ContextLengthError, match="256"):
            inference.fit_max_tokens(prompt, wanted)


async def test_text_comes_as_it_is_made(control: Control, script: JobScript, tokenizer: Tokenizer) -> None:
    text = "Ärzte, 東京 and 🙂 too."
    ids = tokenizer.encode(text)
    script.reply = lambda request: outputs(request, ids, finish="stop", stop_token=2)
    deltas = await collect(control, asked())
    assert "".join(delta.text for delta in deltas) == text
    assert [token for delta in deltas for token in delta.token_ids] == ids
    assert [delta.finish_reason for delta in deltas[:-1]] == [None] * (len(deltas) - 1)
    last = deltas[-1]
    assert (last.finish_reason, last.stop_reason, last.prompt_tokens) == ("stop", None, 2)
    assert last.completion_tokens == len(ids) + 1  # the end token was generated too
    assert {delta.cached_tokens for delta in deltas} == {16}
    assert all(delta.logprobs is None for delta in deltas)
    assert not any("\ufffd" in delta.text for delta in deltas)
    assert script.aborted == []
    sent = script.generated[0]
    assert (sent.share_group, sent.cache_salt, sent.token_ids) == ("tenant-x", "tenant-x", [3, 4])


async def test_an_asked_for_stop_token_is_named(control: Control, script: JobScript) -> None:
    script.reply = lambda request: outputs(request, [40, 41], finish="stop", stop_token=7)
    (last,) = [
        delta for delta in await collect(control, asked(sampling={"stop_token_ids": (7,)})) if delta.finish_reason
    ]
    assert last.stop_reason == 7


async def test_a_stop_string_ends_and_aborts(control: Control, script: JobScript, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("one two three four" + " and so on" * 20)
    script.reply = lambda request: outputs(request, ids)
    deltas = await collect(control, asked(stop=["e f", "zzz"]))
    assert "".join(delta.text for delta in deltas) == "one two thre"
    assert (deltas[-1].finish_reason, deltas[-1].stop_reason) == ("stop", "e f")
    assert script.aborted == [script.generated[0].request_id]
    deltas = await collect(control, asked(stop=["e f"], include_stop=True))
    assert "".join(delta.text for delta in deltas) == "one two three f"


async def test_min_tokens_holds_stop_strings_off(control: Control, script: JobScript, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a stop b stop c")
    script.reply = lambda request: outputs(request, ids)
    first = tokenizer.encode("a stop b")
    deltas = await collect(control, asked(stop=["stop"], sampling={"min_tokens": len(first)}))
    assert "".join(delta.text for delta in deltas) == "a stop b "


texts = st.text(alphabet="abcé🙂 东\n", min_size=0, max_size=30)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150, deadline=None)
@given(
    text=texts,
    stops=st.lists(st.text(alphabet="abcé🙂 东\n", min_size=1, max_size=4), max_size=3),
    chunk=st.integers(1, 4),
    include=st.booleans(),
)
def test_tokens_go_with_their_text(
    tokenizer: Tokenizer, text: str, stops: list[str], chunk: int, include: bool
) -> None:
    """Whatever is held back: the tokens handed out spell the text, and never more than one token beyond it."""
    ids = tokenizer.encode(text)
    request = asked(stop=stops, include_stop=include, sampling={"logprobs": 1})
    command = Generate(request_id="r", token_ids=[1], sampling=request.sampling)
    stream = ChoiceStream(0, request, tokenizer)
    deltas: list[Delta] = []
    for output in outputs(command, ids, chunk=chunk):
        delta = stream.push(output)
        if delta is not None:
            deltas.append(delta)
        if stream.finished:
            break
    shown = "".join(delta.text for delta in deltas)
    expected, stop = slowly(text, stops, include)
    assert (shown, deltas[-1].stop_reason) == (expected, stop)
    assert deltas[-1].finish_reason == ("length" if stop is None else "stop")
    tokens = [token for delta in deltas for token in delta.token_ids]
    entries = [entry for delta in deltas for entry in delta.logprobs or ()]
    assert [entry.token_id for entry in entries] == tokens == ids[: len(tokens)]
    spelled = b"".join(bytes(entry.bytes) for entry in entries)
    assert spelled.startswith(shown.encode())
    if stop is None:
        assert tokens == ids
    elif tokens:
        assert len(spelled) - len(entries[-1].bytes) <= len(shown.encode())
    for earlier in deltas[:-1]:
        assert earlier.finish_reason is None
        assert earlier.text or earlier.token_ids


async def test_logprobs_are_text(control: Control, script: JobScript, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("hi 東")
    script.reply = lambda request: [
        SequenceOutput(
            request_id=request.request_id,
            token_ids=ids,
            logprobs=[TokenLogprob(token, -0.25, ((token, -0.25), (5, -1.0))) for token in ids],
            prompt_logprobs=[None, TokenLogprob(4, -1.5)],
            finish_reason="length",
        )
    ]
    (delta,) = await collect(control, asked(sampling={"logprobs": 2, "prompt_logprobs": 0}))
    assert delta.logprobs is not None
    assert delta.prompt_logprobs is not None
    assert b"".join(bytes(entry.bytes) for entry in delta.logprobs) == "hi 東".encode()
    entry = delta.logprobs[0]
    assert (entry.logprob, entry.token, bytes(entry.bytes).decode()) == (
        -0.25,
        tokenizer.token_text(ids[0]),
        entry.token,
    )
    assert entry.top[1] == (5, tokenizer.token_text(5), tuple(tokenizer.token_bytes(5)), -1.0)
    assert delta.prompt_logprobs[0] is None
    assert delta.prompt_logprobs[1] is not None
    assert delta.prompt_logprobs[1].logprob == -1.5


async def test_several_choices(control: Control, script: JobScript, tokenizer: Tokenizer) -> None:
    said = [tokenizer.encode(text) for text in ("first", "the second", "third")]
    script.reply = lambda request: outputs(request, said[int(request.request_id.rpartition("-")[2])])
    deltas = await collect(control, asked(n=3, sampling={"seed": 2**63 - 1}))
    for index, ids in enumerate(said):
        own = [delta for delta in deltas if delta.index == index]
        assert "".join(delta.text for delta in own) == tokenizer.decode(ids)
        assert [delta.finish_reason for delta in own if delta.finish_reason] == ["length"]
    assert [request.sampling.seed for request in script.generated] == [2**63 - 1, 0, 1]
    assert len({request.request_id for request in script.generated}) == 3


@pytest.mark.parametrize("n", [1, 3])
async def test_closing_aborts_every_choice(control: Control, script: JobScript, tokenizer: Tokenizer, n: int) -> None:
    ids = tokenizer.encode("a long story " * 20)
    script.reply = lambda request: outputs(request, ids)
    stream = control.inference.generate([asked(n=n)])
    await anext(stream)
    await stream.aclose()
    assert sorted(script.aborted) == sorted(request.request_id for request in script.generated)
    assert len(script.aborted) == n
    assert [task for task in asyncio.all_tasks() if "forward" in repr(task.get_coro())] == []


@pytest.mark.parametrize("n", [1, 3])
async def test_an_engine_error_ends_every_choice(
    control: Control, script: JobScript, tokenizer: Tokenizer, n: int
) -> None:
    def reply(request: Generate) -> Answer:
        if request.request_id.endswith("-0"):
            return refusal(request, "out_of_memory", "The step did not fit.")
        return outputs(request, tokenizer.encode("a long story " * 20))

    script.reply = reply
    with pytest.raises(UnavailableError, match="did not fit") as caught:
        await collect(control, asked(n=n))
    assert caught.value.code == "out_of_memory"
    assert len(script.aborted) == n - 1  # the others


async def test_draining_takes_nothing_new(control: Control, script: JobScript) -> None:
    control.begin_drain()
    with pytest.raises(UnavailableError) as caught:
        await collect(control, asked())
    assert caught.value.code == "draining"
    assert script.generated == []


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, derandomize=True)
@given(text=st.text(alphabet="ab \n東é👋", max_size=30), cuts=st.lists(st.integers(1, 3), max_size=30))
def test_a_text_is_the_same_whether_its_tokens_are_told_or_not(
    tokenizer: Tokenizer, text: str, cuts: list[int]
) -> None:
    """Tokens of which nobody asks for more than the text take a shorter way."""
    ids = tokenizer.encode(text)
    told: list[list[Any]] = []
    for wanted in (None, 0):
        stream, rest, deltas = ChoiceStream(0, asked(sampling={"logprobs": wanted}), tokenizer), list(ids), []
        for size in (*cuts, len(ids) + 1):
            piece, rest = rest[:size], rest[size:]
            output = SequenceOutput(
                request_id="r",
                token_ids=piece,
                logprobs=None if wanted is None else [TokenLogprob(token, -1.0) for token in piece],
                cached_tokens=3 if not deltas else 0,
                finish_reason="stop" if not rest else None,
            )
            deltas.append(stream.push(output))
            if not rest:
                break
        told.append([delta and (delta.text, list(delta.token_ids), delta.completion_tokens) for delta in deltas])
    assert told[0] == told[1]
    assert "".join(delta[0] for delta in told[0] if delta) == tokenizer.decode(ids)
