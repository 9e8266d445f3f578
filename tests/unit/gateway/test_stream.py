"""The byte stream under a connection, on a pair of real sockets within the process."""

import pytest
import trio
import trio.testing

from bamboo.gateway.stream import ClientStream
from bamboo.wire.frames import close_message, text_messages

MEGABYTE = bytes(1 << 20)


async def pair(write_timeout_s: float = 5) -> tuple[ClientStream, trio.SocketStream]:
    """Our end, and the client's."""
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with listener:
        client = await trio.open_tcp_stream("127.0.0.1", listener.socket.getsockname()[1])
        server = await listener.accept()
    return ClientStream(server, write_timeout_s=write_timeout_s), client


async def read_all(client: trio.SocketStream) -> bytes:
    pieces = []
    while data := await client.receive_some(65536):
        pieces.append(data)
    return b"".join(pieces)


async def test_writes_of_several_tasks_never_mix_and_keep_their_order() -> None:
    with trio.fail_after(10):
        stream, client = await pair()
        pieces = [bytes((n,)) * (1 << 18) for n in range(20)]
        async with client, trio.open_nursery() as nursery:
            for piece in pieces:
                nursery.start_soon(stream.send_all, piece)
            received = b""
            while len(received) < sum(map(len, pieces)):
                received += await client.receive_some(1 << 20)
            chunks = [received[start : start + (1 << 18)] for start in range(0, len(received), 1 << 18)]
            assert sorted(chunks) == pieces
            assert not stream.writing
        stream.close()


async def test_nothing_follows_a_close_frame() -> None:
    with trio.fail_after(10):
        stream, client = await pair()
        async with client:
            await stream.send_all(text_messages([b"{}"]))
            await stream.send_all(close_message(1001))
            with pytest.raises(trio.ClosedResourceError):
                await stream.send_all(text_messages([b"late"]))
            stream.close()
            assert await read_all(client) == text_messages([b"{}"]) + close_message(1001)


async def test_a_write_that_waited_behind_a_close_frame_is_refused() -> None:
    with trio.fail_after(10):
        stream, client = await pair()
        refused: list[bool] = []

        async def late() -> None:
            with pytest.raises(trio.ClosedResourceError):
                await stream.send_all(b"late")
            refused.append(True)

        async with client, trio.open_nursery() as nursery:
            nursery.start_soon(stream.send_all, MEGABYTE * 8)
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(stream.send_all, close_message(1001))
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(late)
            await trio.testing.wait_all_tasks_blocked()
            received = 0
            while received < len(MEGABYTE) * 8 + 4:
                received += len(await client.receive_some(1 << 20))
        assert refused
        stream.close()


async def test_a_peer_that_takes_nothing_is_cut_and_its_socket_gone() -> None:
    with trio.fail_after(10):
        stream, client = await pair(write_timeout_s=0.1)
        async with client:
            with pytest.raises(trio.BrokenResourceError):
                await stream.send_all(MEGABYTE * 16)
            assert stream.stalled_s >= 0.1
            with pytest.raises(trio.BrokenResourceError):
                await read_all(client)
            with pytest.raises(trio.ClosedResourceError):
                await stream.send_all(b"more")


async def test_the_deadline_follows_progress() -> None:
    """A slow peer is no stalled one: in all it was waited for longer than the deadline."""
    with trio.fail_after(20):
        stream, client = await pair(write_timeout_s=0.2)
        async with client, trio.open_nursery() as nursery:

            async def write() -> None:
                while stream.stalled_s < 0.5:
                    await stream.send_all(MEGABYTE * 4)
                stream.close()

            nursery.start_soon(write)
            while await client.receive_some(1 << 20):
                await trio.testing.wait_all_tasks_blocked(0.002)
        assert stream.stalled_s >= 0.5


async def test_a_write_that_is_cancelled_in_the_middle_aborts_the_connection() -> None:
    with trio.fail_after(10):
        stream, client = await pair()
        async with client:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(stream.send_all, MEGABYTE * 16)
                await trio.testing.wait_all_tasks_blocked()
                nursery.cancel_scope.cancel()
            with pytest.raises(trio.ClosedResourceError):
                await stream.send_all(close_message(1001))
            with pytest.raises(trio.BrokenResourceError):
                await read_all(client)


async def test_abort_wakes_a_writer_and_a_reader() -> None:
    with trio.fail_after(10):
        stream, client = await pair()
        woken: list[str] = []

        async def write() -> None:
            with pytest.raises((trio.ClosedResourceError, trio.BrokenResourceError)):
                await stream.send_all(MEGABYTE * 16)
            woken.append("writer")

        async def read() -> None:
            with pytest.raises((trio.ClosedResourceError, trio.BrokenResourceError)):
                await stream.receive_some(1)
            woken.append("reader")

        async with client, trio.open_nursery() as nursery:
            nursery.start_soon(write)
            nursery.start_soon(read)
            await trio.testing.wait_all_tasks_blocked()
            stream.abort()
            stream.abort()
        assert sorted(woken) == ["reader", "writer"]


async def test_a_protocol_failure_is_told_before_the_end() -> None:
    with trio.fail_after(10):
        stream, client = await pair()
        stream.failure_code = lambda: 1007
        async with client:
            await stream.aclose()
            await stream.aclose()
            assert await read_all(client) == close_message(1007)
        stream.close()


async def test_after_our_own_close_frame_no_other_is_told() -> None:
    with trio.fail_after(10):
        stream, client = await pair()
        stream.failure_code = lambda: 1002
        async with client:
            await stream.send_all(close_message(1001))
            await stream.aclose()
            assert await read_all(client) == close_message(1001)
        stream.close()


async def test_lingering_lets_the_last_bytes_arrive_though_the_peer_sent_more() -> None:
    with trio.fail_after(10):
        stream, client = await pair()
        async with client:
            await client.send_all(bytes(1 << 16))
            await stream.send_all(close_message(1009))
            await stream.aclose()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(stream.linger)
                assert await read_all(client) == close_message(1009)
                await client.send_eof()
            stream.close()


async def test_the_end_is_told_once() -> None:
    with trio.fail_after(10):
        stream, client = await pair()
        told: list[str] = []
        stream.on_end = lambda: told.append("end")
        await client.send_all(b"x")
        assert await stream.receive_some(10) == b"x"
        assert told == []
        await client.aclose()
        assert await stream.receive_some(10) == b""
        await stream.aclose()
        stream.close()
        assert told == ["end"]


@pytest.mark.parametrize(
    ("head", "host"),
    [
        (b"GET / HTTP/1.1\r\nHost: a.example:5\r\nX: y\r\n\r\n", "a.example:5"),
        (b"GET / HTTP/1.1\r\nX: y\r\nhOsT:   a.example\r\n\r\n", "a.example"),
        (b"GET / HTTP/1.1\nHost: a.example\n\n", "a.example"),
        (b"GET / HTTP/1.1\r\nX: y\r\n Host: evil.example\r\nHost: a.example\r\n\r\n", "a.example"),
        (b"GET /?Host:evil.example HTTP/1.1\r\nX-Host: evil.example\r\n\r\nHost: evil.example", None),
        (b"GET / HTTP/1.1\r\nHost:\r\n\r\n", ""),
    ],
)
async def test_the_host_is_read_from_the_head_and_from_nothing_else(head: bytes, host: str | None) -> None:
    with trio.fail_after(10):
        stream, client = await pair()
        async with client:
            for byte in head:
                await client.send_all(bytes((byte,)))
                await stream.receive_some(100)
            assert stream.take_host() == host
        stream.close()
