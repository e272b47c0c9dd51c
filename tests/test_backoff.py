"""Pauses grow while something fails, and begin anew after it has lived long enough."""

from __future__ import annotations

import asyncio

from tenora.backoff import Backoff, is_set_within
from tests.support.patience import PATIENCE


def test_pauses_double_up_to_the_longest_and_begin_anew_after_a_stable_life() -> None:
    backoff = Backoff(0.1, 1.0, stable=60.0)
    assert [backoff.after(0.0) for _ in range(5)] == [0.1, 0.2, 0.4, 0.8, 1.0]
    assert backoff.after(60.0) == 1.0
    assert [backoff.after(lived) for lived in (60.1, 0.0)] == [0.1, 0.2]


async def test_an_event_is_waited_for_no_longer_than_asked() -> None:
    event = asyncio.Event()
    assert not await is_set_within(event, 0.01)
    asyncio.get_running_loop().call_soon(event.set)
    assert await is_set_within(event, PATIENCE)
