"""What readers of the tests read is what came: also what came together with the end of the connection."""

import trio
from trio import SocketStream

from bamboo.wire.frames import close_message, text_messages
from tests.support.readers import READ_BYTES, WsReader
from tests.support.ws_client import RawClient

EVENT = b'{"type":"agent_error","seq":7,"cursor":"e.7"}'


async def reader_of(data: bytes) -> WsReader:
    """A reader to which all of this comes in one piece."""
    here, there = (SocketStream(sock) for sock in trio.socket.socketpair())
    await there.send_all(data)
    await there.aclose()
    return WsReader(RawClient(here), READ_BYTES)


async def test_a_gateways_reader_gets_the_events_that_come_with_the_close_frame() -> None:
    with trio.fail_after(5):
        reader = await reader_of(text_messages([EVENT]) + close_message(1001))
        async with reader.stream:
            item = await reader.next()
            assert item is not None
            assert item.data == EVENT
            assert await reader.next() is None
    assert (reader.ended, reader.close_code) == ("properly", 1001)


async def test_a_gateways_reader_gets_the_answer_that_comes_with_the_close_frame() -> None:
    with trio.fail_after(5):
        reader = await reader_of(text_messages([b'{"type":"connected"}']) + close_message(1001))
        async with reader.stream:
            assert await reader.answer("connected") == {"type": "connected"}
