"""The byte stream under a connection, on a pair of real sockets within the process: plain, and through TLS."""

import socket
from collections.abc import Awaitable, Callable
from functools import partial

import pytest
import trio
import trio.testing

from bamboo.gateway.stream import ClientStream
from bamboo.wire.frames import close_message, text_messages
from tests.support.streams import Client, plain_pair, read_all, tls_pair
from tests.support.tls import Authority

MEGABYTE = bytes(1 << 20)

Pair = Callable[..., Awaitable[tuple[ClientStream, Client]]]


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("tls"))


@pytest.fixture(params=["plain", "tls"])
def pair(request: pytest.FixtureRequest, authority: Authority) -> Pair:
    """Opens our end and the client's, behind the TLS handshake if there is one."""
    return plain_pair if request.param == "plain" else partial(tls_pair, authority)


async def test_writes_of_several_tasks_never_mix_and_keep_their_order(pair: Pair) -> None:
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


async def test_nothing_follows_a_close_frame(pair: Pair) -> None:
    with trio.fail_after(10):
        stream, client = await pair()
        async with client:
            await stream.send_all(text_messages([b"{}"]))
            await stream.send_all(close_message(1001))
            with pytest.raises(trio.ClosedResourceError):
                await stream.send_all(text_messages([b"late"]))
            await stream.aclose()
            assert await read_all(client) == text_messages([b"{}"]) + close_message(1001)
        stream.close()


async def test_a_write_that_waited_behind_a_close_frame_is_refused(pair: Pair) -> None:
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


async def test_a_peer_that_takes_nothing_is_cut_and_its_socket_gone(pair: Pair) -> None:
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


async def test_the_deadline_follows_progress(pair: Pair) -> None:
    """A slow peer is no stalled one: in all it was waited for longer than the deadline."""
    with trio.fail_after(20):
        stream, client = await pair(write_timeout_s=0.2)
        async with client, trio.open_nursery() as nursery:

            async def write() -> None:
                while stream.stalled_s < 0.5:
                    await stream.send_all(MEGABYTE * 4)
                await stream.aclose()

            nursery.start_soon(write)
            while await client.receive_some(1 << 20):
                await trio.testing.wait_all_tasks_blocked(0.002)
        assert stream.stalled_s >= 0.5
        stream.close()


async def test_a_write_that_is_cancelled_in_the_middle_aborts_the_connection(pair: Pair) -> None:
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


async def test_abort_wakes_a_writer_and_a_reader(pair: Pair) -> None:
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


async def test_a_protocol_failure_is_told_before_the_end(pair: Pair) -> None:
    with trio.fail_after(10):
        stream, client = await pair()
        stream.failure_code = lambda: 1007
        async with client:
            await stream.aclose()
            await stream.aclose()
            assert await read_all(client) == close_message(1007)
        stream.close()


async def test_after_our_own_close_frame_no_other_is_told(pair: Pair) -> None:
    with trio.fail_after(10):
        stream, client = await pair()
        stream.failure_code = lambda: 1002
        async with client:
            await stream.send_all(close_message(1001))
            await stream.aclose()
            assert await read_all(client) == close_message(1001)
        stream.close()


async def test_lingering_lets_the_last_bytes_arrive_though_the_peer_sent_more(pair: Pair) -> None:
    with trio.fail_after(10):
        stream, client = await pair()
        async with client:
            await client.send_all(bytes(1 << 16))
            await stream.send_all(close_message(1009))
            await stream.aclose()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(stream.linger)
                assert await read_all(client) == close_message(1009)
                await client.aclose()
            stream.close()


async def test_the_end_is_told_once(pair: Pair) -> None:
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
        stream, client = await plain_pair()
        async with client:
            for byte in head:
                await client.send_all(bytes((byte,)))
                await stream.receive_some(100)
            assert stream.take_host() == host
        stream.close()


async def test_a_peer_that_resets_the_connection_is_the_end_too(pair: Pair) -> None:
    with trio.fail_after(10):
        stream, client = await pair()
        told: list[str] = []
        stream.on_end = lambda: told.append("end")
        raw = client.transport_stream.socket if isinstance(client, trio.SSLStream) else client.socket
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        raw.close()
        with pytest.raises(trio.BrokenResourceError):
            await stream.receive_some(10)
        assert told == ["end"]
        stream.close()


async def test_nothing_is_written_once_the_socket_is_closed_though_its_number_is_anothers_now() -> None:
    with trio.fail_after(10):
        stream, client = await plain_pair()
        number = stream._inner.socket.fileno()
        stream.close()
        ours, theirs = socket.socketpair()
        with ours, theirs:
            assert number in (ours.fileno(), theirs.fileno()), "the kernel gives the lowest number that is free"
            with pytest.raises(trio.BrokenResourceError):
                stream._send(b"meant for somebody else")
            for end in (ours, theirs):
                end.settimeout(0)
                with pytest.raises(BlockingIOError):
                    end.recv(1)
        await client.aclose()


async def test_what_is_read_waits_for_leave_to_read(pair: Pair) -> None:
    with trio.fail_after(10):
        stream, client = await pair()
        leave = trio.Event()
        stream.before_receive = leave.wait
        read: list[bytes] = []

        async def receive() -> None:
            read.append(await stream.receive_some(10))

        async with client, trio.open_nursery() as nursery:
            await client.send_all(b"x")
            nursery.start_soon(receive)
            await trio.testing.wait_all_tasks_blocked(0.01)
            assert read == []
            leave.set()
        assert read == [b"x"]
        assert stream.received == 1
        stream.close()
