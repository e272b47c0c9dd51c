"""Many adapters in one batch say, token for token, what each says alone."""

from __future__ import annotations

import asyncio
from pathlib import Path

from tenora_client import AsyncClient
from tests.e2e.material import SHAPES, ask, write_adapter
from tests.e2e.serving import Server

STREAMS = 16
TOKENS = 48
Tokens = list[tuple[int, ...]]


async def tokens_of(client: AsyncClient, model: str, question: str) -> Tokens:
    """The bytes of each token of a greedy streamed answer."""
    said: Tokens = []
    stream = await client.chat.create(
        ask(question), model, stream=True, temperature=0.0, max_tokens=TOKENS, ignore_eos=True, logprobs=True
    )
    async with stream:
        async for chunk in stream:
            for choice in chunk.choices:
                said += [tuple(token["bytes"]) for token in (choice.logprobs or {}).get("content") or ()]
    return said


async def test_sixteen_streams_over_eight_adapters_equal_each_alone(
    server: Server, tiny_base: Path, tmp_path: Path
) -> None:
    async with server.async_client() as client:
        names = []
        for number, (rank, modules) in enumerate(SHAPES):
            directory = write_adapter(tmp_path / f"mixed-{number}", tiny_base, seed=number, rank=rank, modules=modules)
            names.append((await client.adapters.import_(f"mixed-{number}", directory)).name)
        # Prompts differ in length, so rows prefill and decode in the same steps.
        asked = [(names[i % len(names)], f"Question {i}? " + "and so on, " * (i % 5)) for i in range(STREAMS)]
        together = await asyncio.gather(*(tokens_of(client, *pair) for pair in asked))
        alone = [await tokens_of(client, *pair) for pair in asked]
        assert together == alone
        assert all(len(said) == TOKENS for said in alone)

        # The test could not fail if the adapters said what the base says.
        base = (await client.models.base()).id
        plain = [await tokens_of(client, base, question) for _, question in asked[: len(names)]]
        assert all(said != base_said for said, base_said in zip(alone, plain, strict=False))


async def test_two_hundred_requests_at_once_are_all_answered(server: Server, tiny_base: Path, tmp_path: Path) -> None:
    async with server.async_client() as client:
        directory = write_adapter(tmp_path / "crowd", tiny_base, seed=99)
        name = (await client.adapters.import_("crowd", directory)).name
        base = (await client.models.base()).id
        calls = [
            client.chat.create(
                ask(f"Question {i % 3}?"), (name, base)[i % 2], temperature=0.0, max_tokens=4, ignore_eos=True
            )
            for i in range(200)
        ]
        answers = await asyncio.gather(*calls)
    for model in (name, base):
        assert len({answer.text for answer in answers if answer.model == model}) <= 3
    assert all(answer.usage is not None and answer.usage.completion_tokens == 4 for answer in answers)
