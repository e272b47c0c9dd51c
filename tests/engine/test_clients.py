"""An engine with several clients: each has ids of its own and hears of its own alone; one that goes leaves nothing."""

from __future__ import annotations

import asyncio
import socket
import tempfile
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing
from pathlib import Path

import pytest
import zmq

from tenora.adapters.ref import AdapterRef
from tenora.config import Settings
from tenora.engine import door
from tenora.engine.channel import SocketChannel
from tenora.engine.client.client import AsyncEngine
from tenora.engine.client.link import decode_event, encode
from tenora.engine.loop import run_loop
from tenora.engine.messages import Acknowledge, Event, EvictAdapter, PinAdapter, Shutdown
from tenora.errors import UnavailableError
from tenora.training.events import StepEvent, StoppedEvent, TrainEvent
from tenora.training.spec import TrainSpec
from tenora.unix_socket import MAX_MESSAGE, Unpacker, connect, pack
from tests.engine.requests import generate, sampling
from tests.support.patience import PATIENCE
from tests.support.scripted_engine import Script, ScriptedEngine


class Owned:
    """A fake engine in a thread behind a real socket channel, and the owner's end of its line."""

    def __init__(self, place: Path) -> None:
        self.door = place / ("deep" * 30) / "engine.sock"  # longer than a socket's address may be
        self.door.parent.mkdir()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.owner = self._context.socket(zmq.PAIR)
        self.owner.setsockopt(zmq.LINGER, 0)
        address = f"ipc://{place / 'owner'}"
        self.owner.bind(address)
        self.channel = SocketChannel(address, self.door)
        self.engine = ScriptedEngine(Script.counting(), self.channel.wake)
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        run_loop(self.engine, self.channel)
        self.channel.close()

    def end(self) -> None:
        self.owner.send(encode(Shutdown()))
        self._thread.join(PATIENCE)
        self.owner.close()
        self._context.term()

    def heard(self, kind: type[Event]) -> Event:
        """The owner's next event of this kind."""
        while True:
            assert self.owner.poll(PATIENCE * 1000)
            event = decode_event(self.owner.recv())
            if isinstance(event, kind):
                return event


@pytest.fixture
def owned() -> Iterator[Owned]:
    with tempfile.TemporaryDirectory(dir="/tmp") as place:
        engine = Owned(Path(place))
        yield engine
        engine.end()


@pytest.fixture
async def clients(owned: Owned) -> AsyncIterator[list[AsyncEngine]]:
    pair = [AsyncEngine.attached(Settings(), owned.door) for _ in range(2)]
    for client in pair:
        await client.start()
    yield pair
    for client in pair:
        await client.close(0)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not condition():  # noqa: ASYNC110  # the state of a thread
            await asyncio.sleep(0.005)


def spec(run_id: str, *, acknowledged: bool = False) -> TrainSpec:
    return TrainSpec(run_id=run_id, share_group="", tasks=(), workdir="", base_model="", acknowledged=acknowledged)


async def test_clients_with_equal_request_ids_hear_each_its_own_tokens(clients: list[AsyncEngine]) -> None:
    async def tokens(client: AsyncEngine, first: int) -> list[int]:
        request = generate([first], sampling(max_tokens=50), request_id="the-same")
        return [token async for output in client.generate(request) for token in output.token_ids]

    answers = await asyncio.gather(tokens(clients[0], 1000), tokens(clients[1], 2000))
    assert answers == [list(range(1001, 1051)), list(range(2001, 2051))]
    assert all(client.stats is not None and client.healthy for client in clients)


async def test_a_client_that_leaves_a_stream_ends_its_own_sequence_alone(
    clients: list[AsyncEngine], owned: Owned
) -> None:
    streams = [client.generate(generate([7], sampling(max_tokens=10**9), request_id="x")) for client in clients]
    first = [await anext(stream) for stream in streams]
    assert len(first) == 2
    await streams[0].aclose()
    await owned.engine.script.until(lambda: owned.engine.script.aborted == ["client-1/x"])
    assert "client-2/x" in owned.engine.running
    assert (await anext(streams[1])).token_ids
    await streams[1].aclose()


@pytest.mark.parametrize("acknowledged", [True, False])
async def test_a_client_that_goes_away_ends_its_sequences_and_its_runs(
    clients: list[AsyncEngine], owned: Owned, acknowledged: bool
) -> None:
    script = owned.engine.script
    script.hold_after = 1
    goes, stays = (client.generate(generate([7], sampling(max_tokens=2), request_id="x")) for client in clients)
    for stream in (goes, stays):
        await anext(stream)
    run = clients[0].train(spec("a", acknowledged=acknowledged))
    await anext(run)
    await clients[0].close(0)
    with pytest.raises(UnavailableError):
        await anext(goes)
    await script.until(lambda: bool(script.aborted and script.stopped))
    assert script.aborted == ["client-1/x"]
    assert script.stopped == [("a", acknowledged)], "saved only if what it said until then is kept with that"
    script.hold_after = None
    owned.engine.wake()
    assert (await anext(stays)).finish_reason == "length", "the other client's stream goes on"
    await run.aclose()


async def test_a_client_stops_no_run_of_another(clients: list[AsyncEngine], owned: Owned) -> None:
    async with aclosing(clients[0].train(spec("a"))) as run:
        await anext(run)
        await clients[1].stop_training("a")
        events = clients[1].train(spec("b"))
        await anext(events)  # so the engine has seen what came before it
        assert owned.engine.script.stopped == []
        assert isinstance(await anext(run), StepEvent)
        await events.aclose()


async def test_what_a_client_has_recorded_is_added_up_and_no_other_acknowledges_it(
    clients: list[AsyncEngine], owned: Owned
) -> None:
    async with aclosing(clients[0].train(spec("a"))) as run, aclosing(clients[1].train(spec("b"))) as other:
        await collect(run, 5)
        await anext(other)
        await clients[0].acknowledge("a", 2)
        await clients[0].acknowledge("a", 3)
        await clients[1].acknowledge("a", 7)
        with connect(owned.door) as rude:
            rude.sendall(pack(encode(Acknowledge("a", 9))))
            await until(lambda: owned.engine.script.acknowledged.get("a") == 5)
        await clients[1].acknowledge("b", 1)
        await until(lambda: "b" in owned.engine.script.acknowledged)
    assert owned.engine.script.acknowledged == {"a": 5, "b": 1}


async def test_a_run_that_another_client_holds_begins_when_that_one_has_ended(
    clients: list[AsyncEngine], owned: Owned
) -> None:
    first = clients[0].train(spec("a"))
    await anext(first)
    second = asyncio.create_task(collect(clients[1].train(spec("a")), 1))
    other = clients[1].train(spec("b"))
    await anext(other)  # the engine has seen that the second client wants run a
    assert not second.done()
    await clients[0].close(0)
    (event,) = await second
    assert isinstance(event, StepEvent)
    assert event.step == 1, "it was started anew"
    assert owned.engine.script.stopped[0] == ("a", False)
    await other.aclose()
    await first.aclose()


async def test_a_run_that_waits_for_another_clients_can_be_stopped(clients: list[AsyncEngine], owned: Owned) -> None:
    async with aclosing(clients[0].train(spec("a"))) as first:
        await anext(first)
        second = asyncio.create_task(collect(clients[1].train(spec("a")), 1))
        await asyncio.sleep(0)
        await clients[1].stop_training("a", pause=True)
        assert await second == [StoppedEvent(run_id="a", step=0, paused=True)]
        assert owned.engine.script.stopped == []
        assert isinstance(await anext(first), StepEvent)


async def collect(events: AsyncIterator[TrainEvent], count: int) -> list[TrainEvent]:
    return [await anext(events) for _ in range(count)]


async def test_the_owner_hears_what_another_client_pins_and_evicts(clients: list[AsyncEngine], owned: Owned) -> None:
    ref = AdapterRef(digest="d" * 64, path="/nowhere")
    await clients[0].pin(ref)
    assert owned.heard(PinAdapter) == PinAdapter(ref)
    await clients[0].evict(ref.digest)
    assert owned.heard(EvictAdapter) == EvictAdapter(ref.digest)
    assert owned.engine.script.pins == [(ref, True)]
    assert owned.engine.script.evicted == [ref.digest]


async def test_only_the_owner_ends_the_engine(clients: list[AsyncEngine], owned: Owned) -> None:
    with connect(owned.door) as rude:
        rude.sendall(pack(encode(Shutdown())))
        request = generate([7], sampling(max_tokens=2))
        assert [output async for output in clients[0].generate(request)]
    await until(lambda: clients[1].healthy)


async def test_a_client_that_sends_what_cannot_be_read_is_cut_off(clients: list[AsyncEngine], owned: Owned) -> None:
    for nonsense in (pack(b"\xff\xff"), (MAX_MESSAGE + 1).to_bytes(4, "big")):
        with connect(owned.door) as rude:
            rude.sendall(nonsense)
            rude.setblocking(True)
            rude.settimeout(PATIENCE)
            while rude.recv(2**16):
                pass
    assert [output async for output in clients[0].generate(generate([7], sampling(max_tokens=2)))]


async def test_a_client_that_does_not_read_is_cut_off_and_holds_up_nobody(
    clients: list[AsyncEngine], owned: Owned, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(door, "MAX_BACKLOG", 2**16)
    lazy = connect(owned.door)
    lazy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**12)
    lazy.sendall(pack(encode(generate([7], sampling(max_tokens=10**9), request_id="lazy"))))
    await until(lambda: len(owned.engine.script.aborted) == 1)
    assert [output async for output in clients[0].generate(generate([7], sampling(max_tokens=2)))]
    lazy.close()


def test_the_door_is_open_to_this_user_alone(owned: Owned) -> None:
    assert owned.door.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("size", [1, 3, 4, 5, 1000])
def test_messages_are_whole_however_they_are_cut(size: int) -> None:
    messages = [b"", b"a", b"bc" * 100]
    stream = b"".join(map(pack, messages))
    unpacker = Unpacker()
    found = [message for at in range(0, len(stream), size) for message in unpacker.feed(stream[at : at + size])]
    assert found == messages
