"""What waits between the engine and a reader."""

from __future__ import annotations

import asyncio

import pytest

from tenora.engine.client.streams import SequenceStream
from tenora.engine.messages import SequenceOutput, TokenLogprob
from tenora.errors import UnavailableError


def output(*tokens: int, last: bool = False, **given: object) -> SequenceOutput:
    reason = "length" if last else None
    return SequenceOutput(request_id="r", token_ids=list(tokens), finish_reason=reason, **given)  # type: ignore[arg-type]


async def test_a_reader_that_is_behind_gets_all_that_waits_as_one_output() -> None:
    stream = SequenceStream(limit=16)
    told = [TokenLogprob(token, -1.0) for token in range(5)]
    stream.put(output(0, logprobs=[told[0]], prompt_logprobs=[None], cached_tokens=3, queue_seconds=0.5))
    for token in range(1, 4):
        stream.put(output(token, logprobs=[told[token]]))
    assert await stream.get() == output(
        0, 1, 2, 3, logprobs=told[:4], prompt_logprobs=[None], cached_tokens=3, queue_seconds=0.5
    )
    stream.put(output(4, logprobs=[told[4]]))
    stream.put(output(logprobs=[], last=True, stop_token_id=9))
    assert await stream.get() == output(4, logprobs=[told[4]], last=True, stop_token_id=9)


async def test_what_was_said_before_an_error_is_read_before_it() -> None:
    stream = SequenceStream(limit=3)
    assert [stream.put(output(token)) for token in range(4)] == [True, True, True, False]
    assert (await stream.get()).token_ids == [0, 1, 2]
    for _ in range(2):
        with pytest.raises(UnavailableError, match="fell 3 outputs behind"):
            await stream.get()


async def test_a_reader_in_no_hurry_is_woken_for_the_first_output_then_for_many_or_the_end() -> None:
    stream = SequenceStream(limit=100, batch=4)
    woken: list[list[int]] = []

    async def read() -> None:
        while True:
            got = await stream.get()
            woken.append(got.token_ids)
            if got.finish_reason is not None:
                return

    reader = asyncio.create_task(read())
    for token in range(12):
        await asyncio.sleep(0)
        stream.put(output(token, last=token == 11))
    await reader
    assert woken == [[0], [1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11]]


async def test_a_reader_that_waits_hears_of_the_end_of_the_engine() -> None:
    stream = SequenceStream(limit=100, batch=64)
    stream.put(output(1))
    assert (await stream.get()).token_ids == [1]
    reader = asyncio.create_task(stream.get())
    await asyncio.sleep(0)
    stream.put(output(2))
    stream.fail(UnavailableError("gone"))
    assert (await reader).token_ids == [2]
    with pytest.raises(UnavailableError, match="gone"):
        await stream.get()
