"""Readers that stop reading: how they do it, and what can be known of them while they do."""

import select
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Final

import trio

from tests.support.readers import READ_BYTES, Addresses, Reader, Way, open_reader
from tests.support.tcp import sockets

STALLED_BUFFER_BYTES: Final = 4096
"""Of a stalled reader's socket: the smaller it is, the sooner the server feels that nobody reads."""

STALLED_STEP_BYTES: Final = 512
"""What a reader that is going to stall reads at once until then: hardly more than the answer's head."""


@asynccontextmanager
async def open_stalled(
    server: Addresses, way: Way, session_id: str, after: str, *, run_id: str | None = None
) -> AsyncIterator[Reader]:
    """A reader that has subscribed and reads no event until the test does."""
    async with open_reader(
        server,
        way,
        session_id,
        after,
        run_id=run_id,
        step=STALLED_STEP_BYTES,
        receive_buffer_bytes=STALLED_BUFFER_BYTES,
    ) as reader:
        yield reader


@asynccontextmanager
async def open_stalled_crowd(
    server: Addresses, count: int, session_id: str, after: str, *, ways: tuple[Way, ...] = ("after", "connect")
) -> AsyncIterator[list[Reader]]:
    """So many of them, in turn over each of the ways."""
    async with AsyncExitStack() as stack:
        yield [
            await stack.enter_async_context(open_stalled(server, ways[number % len(ways)], session_id, after))
            for number in range(count)
        ]


def read_on(reader: Reader) -> None:
    """From now on it reads as others do. With the small buffer the kernel would hand it a few bytes per timer of TCP's
    (RFC 9293 section 3.8.6.2: silly windows), and how long that takes is anybody's guess."""
    reader.stream.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, READ_BYTES)
    reader.step = READ_BYTES


async def wait_cut(reader: Reader) -> None:
    """Return when the server has reset the connection. Nothing is read for it."""
    poll = select.poll()
    poll.register(reader.stream.socket.fileno(), 0)  # errors and the end of both directions, no bytes
    while not await trio.to_thread.run_sync(poll.poll, 1000):  # in steps, so that a thread never outlives its test long
        pass


def bytes_in_kernel(readers: Sequence[Reader]) -> list[int]:
    """What the server has written for each of these readers and nobody has read: it is in neither process."""
    waiting = {reader.stream.socket.getsockname()[1]: 0 for reader in readers}
    for one in sockets():
        for port in {one.port, one.peer_port} & waiting.keys():
            waiting[port] += one.queued
    return list(waiting.values())
