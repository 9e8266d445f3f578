"""The way in: how many are on it, who is cut for the others, and what happens when no file can be opened."""

import errno
import json

import pytest
import structlog.testing
import trio
import trio.testing
from trio.testing import MockClock

from bamboo.gateway.admission import RETRY_AFTER_S, NoRoomError
from bamboo.gateway.door import FAIR_S, Door, refusal
from bamboo.gateway.stream import ClientStream
from tests.support.streams import plain_pair, sockets


class Listener(trio.abc.Listener[trio.SocketStream]):
    """Has these errors, then these connections, then nothing more."""

    def __init__(self, *outcomes: Exception | trio.SocketStream) -> None:
        self._outcomes = list(outcomes)
        self.asked = 0

    async def accept(self) -> trio.SocketStream:
        await trio.lowlevel.checkpoint()
        self.asked += 1
        if not self._outcomes:
            await trio.sleep_forever()
        outcome = self._outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()


class Visitors:
    """Connections of real sockets, closed at the end."""

    def __init__(self) -> None:
        self.streams: list[ClientStream] = []
        self.clients: list[trio.SocketStream] = []

    async def one(self) -> ClientStream:
        stream, client = await plain_pair()
        self.streams.append(stream)
        self.clients.append(client)
        return stream

    async def close(self) -> None:
        for stream in self.streams:
            stream.close()
        for client in self.clients:
            await trio.aclose_forcefully(client)


def is_open(stream: ClientStream) -> bool:
    return stream._inner.socket.fileno() >= 0


async def test_with_the_way_full_nothing_is_accepted_until_somebody_is_in_or_gone(mock_clock: MockClock) -> None:
    assert mock_clock.rate == 0
    door, visitors = Door(2), Visitors()
    accepted, client = await sockets()
    listener = Listener(accepted)
    first, second = await visitors.one(), await visitors.one()
    door.enter(first)
    door.enter(second)
    got: list[trio.SocketStream] = []

    async def accept() -> None:
        got.append(await door.accept(listener))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(accept)
        await trio.testing.wait_all_tasks_blocked()
        assert listener.asked == 0
        door.leave(second)
        door.leave(second)
    assert (got, door.waiting) == ([accepted], 1)
    assert is_open(first)
    visitors.clients += [accepted, client]
    await visitors.close()


async def test_the_oldest_is_cut_for_those_who_wait_and_nobody_when_none_does(mock_clock: MockClock) -> None:
    door, visitors = Door(2), Visitors()
    oldest = await visitors.one()
    door.enter(oldest)
    mock_clock.jump(100)
    other = await visitors.one()
    door.enter(other)
    assert is_open(oldest)

    accepted, client = await sockets()
    assert await door.accept(Listener(accepted)) is accepted  # at once: the oldest had its time
    assert (is_open(oldest), is_open(other), door.waiting) == (False, True, 1)

    door.enter(await visitors.one())
    async with trio.open_nursery() as nursery:
        nursery.start_soon(door.accept, Listener(accepted))
        mock_clock.jump(FAIR_S / 2)
        await trio.testing.wait_all_tasks_blocked()
        assert is_open(other)
        mock_clock.jump(FAIR_S / 2)
    assert (is_open(other), door.waiting) == (False, 1)
    visitors.clients += [accepted, client]
    await visitors.close()


async def test_several_accept_loops_share_the_door(mock_clock: MockClock) -> None:
    assert mock_clock.rate == 0
    door, visitors = Door(1), Visitors()
    pairs = [await sockets(), await sockets()]
    only = await visitors.one()
    door.enter(only)
    async with trio.open_nursery() as nursery:
        for accepted, client in pairs:
            nursery.start_soon(door.accept, Listener(accepted))
            visitors.clients += [accepted, client]
        await trio.testing.wait_all_tasks_blocked()
        door.leave(only)
    await visitors.close()


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM])
async def test_without_a_file_descriptor_it_is_tried_again_and_told_once(
    number: int, autojump_clock: MockClock
) -> None:
    assert autojump_clock.autojump_threshold == 0
    accepted, client = await sockets()
    door = Door()
    with structlog.testing.capture_logs() as logs:
        listener = Listener(*(OSError(number, "no more") for _ in range(50)), accepted)
        assert await door.accept(listener) is accepted
    assert [(entry["event"], entry["log_level"]) for entry in logs] == [
        ("accept_failed", "error"),
        ("accept_resumed", "info"),
    ]
    assert trio.current_time() >= 50 * 0.05, "not in a busy loop"
    for end in (accepted, client):
        await trio.aclose_forcefully(end)


@pytest.mark.parametrize("error", [trio.ClosedResourceError(), OSError(errno.EBADF, "broken")])
async def test_a_listener_that_is_closed_or_broken_is_told(error: Exception) -> None:
    with pytest.raises(type(error)):
        await Door().accept(Listener(error))


def test_a_refusal_is_an_answer_of_http() -> None:
    head, _, body = refusal(NoRoomError("full")).partition(b"\r\n\r\n")
    status, *lines = head.decode().split("\r\n")
    headers = dict(line.split(": ") for line in lines)
    assert status == "HTTP/1.1 503 Service Unavailable"
    assert headers == {
        "Content-Type": "application/json",
        "Content-Length": str(len(body)),
        "Retry-After": f"{RETRY_AFTER_S:.0f}",
        "Connection": "close",
    }
    error = json.loads(body)["error"]
    assert (error["code"], error["message"], error["retryable"]) == ("overloaded", "full", True)
