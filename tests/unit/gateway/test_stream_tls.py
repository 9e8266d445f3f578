"""What is different for a connection through TLS: its handshake, its end, and what is between it and the wire."""

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from bamboo.gateway.stream import LAST_WORDS_S
from tests.support.streams import read_all, sockets, tls_pair, tls_stream
from tests.support.tls import Authority

MEGABYTE = bytes(1 << 20)


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("tls"))


async def test_a_peer_that_speaks_no_tls_is_broken(authority: Authority) -> None:
    with trio.fail_after(10):
        server, client = await sockets()
        stream = tls_stream(server, authority)
        async with client:
            await client.send_all(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            with pytest.raises(trio.BrokenResourceError):
                await stream.handshake()
        stream.close()


async def test_abort_ends_a_handshake_that_does_not(authority: Authority) -> None:
    with trio.fail_after(10):
        server, client = await sockets()
        stream = tls_stream(server, authority)
        ended: list[bool] = []

        async def handshake() -> None:
            with pytest.raises(trio.ClosedResourceError):
                await stream.handshake()
            ended.append(True)

        async with client, trio.open_nursery() as nursery:
            nursery.start_soon(handshake)
            await trio.testing.wait_all_tasks_blocked()
            stream.abort()
        assert ended


async def test_the_end_before_the_handshake_says_and_waits_for_nothing(
    authority: Authority, mock_clock: MockClock
) -> None:
    assert mock_clock.rate == 0  # so nothing that waits for time ends
    server, client = await sockets()
    stream = tls_stream(server, authority)
    async with client:
        await stream.aclose()
        assert await client.receive_some(1) == b""
    stream.close()


async def test_a_tls_peer_that_takes_nothing_does_not_hold_up_the_end(
    authority: Authority, mock_clock: MockClock
) -> None:
    stream, client = await tls_pair(authority)
    while stream._send(MEGABYTE):
        pass
    stream.failure_code = lambda: 1009
    ended: list[bool] = []

    async def end() -> None:
        await stream.aclose()
        ended.append(True)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(end)
        await trio.testing.wait_all_tasks_blocked()
        assert not ended
        mock_clock.jump(LAST_WORDS_S)
        await trio.testing.wait_all_tasks_blocked()
        assert ended
    stream.abort()
    client.transport_stream.socket.close()


async def test_a_write_that_is_cancelled_between_tls_and_the_wire_aborts_the_connection(authority: Authority) -> None:
    """Its records were numbered already: nothing that follows could be read."""
    with trio.fail_after(10):
        stream, client = await tls_pair(authority)
        assert stream._tls is not None
        answering = stream._tls._inner_send_lock  # as TLS has it while it answers what it reads
        async with answering, trio.open_nursery() as nursery:
            nursery.start_soon(stream.send_all, b"lost")
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        with pytest.raises(trio.ClosedResourceError):
            await stream.send_all(b"more")
        with pytest.raises(trio.BrokenResourceError):
            await read_all(client)
        client.transport_stream.socket.close()
