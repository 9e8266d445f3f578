"""Handshakes that are none, are slow, or are left: they cost nobody else anything."""

import pytest
import structlog.testing
import trio
import trio.testing

from tests.support.gateway import gateway_config, open_gateway_world
from tests.support.ws_client import client_frame, handshake, open_raw, upgrade_request

DEADLINE_S = 10


@pytest.mark.parametrize(
    "garbage",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500),
        b"SSH-2.0-OpenSSH_9.6\r\n\r\n",
        b"\x00" * 1000 + b"\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 0\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"X-Long: " + b"x" * 100_000,
    ],
)
async def test_bytes_that_are_no_handshake_are_refused_at_once(garbage: bytes) -> None:
    with trio.fail_after(DEADLINE_S):
        async with open_gateway_world(gateway_config(connect_timeout_s=60)) as world:
            with structlog.testing.capture_logs() as logs:
                async with open_raw(world.url) as client:
                    await client.send(garbage)
                    answer = await client.rest()
                assert answer.startswith((b"HTTP/1.1 400 ", b"HTTP/1.1 426 ")) or answer == b""
                await world.no_handshake_left()
                await world.assert_alive()
            assert [entry for entry in logs if entry["event"] == "connection_failed"] == []


@pytest.mark.parametrize(("padding", "status"), [(15_000, 101), (21_000, 400)])
async def test_the_head_of_the_handshake_is_bounded(padding: int, status: int) -> None:
    with trio.fail_after(DEADLINE_S):
        async with open_gateway_world() as world:
            assert (await handshake(world.url, X_Padding="x" * padding)).status == status


async def test_a_host_that_no_name_can_have_harms_nobody() -> None:
    with trio.fail_after(DEADLINE_S):
        async with open_gateway_world() as world:
            with structlog.testing.capture_logs() as logs:
                async with open_raw(world.url) as client:
                    await client.send(upgrade_request(world.url).replace(b"Host: ", b"Host: \xff"))
                    assert b"101" not in await client.rest()
                await world.assert_alive()
            assert [entry["log_level"] for entry in logs if entry["event"].endswith("_failed")] == ["debug"]


async def test_a_handshake_that_comes_byte_by_byte_is_a_handshake() -> None:
    with trio.fail_after(DEADLINE_S):
        async with open_gateway_world() as world, open_raw(world.url) as client:
            for byte in upgrade_request(world.url):
                await client.send(bytes((byte,)))
                await trio.testing.wait_all_tasks_blocked()
            assert (await client.head()).startswith(b"HTTP/1.1 101 ")
            for byte in client_frame(b'{"type": "connect", "session_id": "s"}'):
                await client.send(bytes((byte,)))
            assert (await client.receive_json())["session_id"] == "s"


async def test_a_handshake_that_never_ends_is_cut() -> None:
    with trio.fail_after(DEADLINE_S):
        async with (
            open_gateway_world(gateway_config(connect_timeout_s=0.1)) as world,
            open_raw(world.url) as silent,
            open_raw(world.url) as slow,
        ):
            await slow.send(upgrade_request(world.url)[:-4])
            assert await silent.rest() == b""
            assert await slow.rest() == b""


async def test_many_unfinished_handshakes_do_not_keep_others_out() -> None:
    with trio.fail_after(DEADLINE_S):
        config = gateway_config(connect_timeout_s=0.3)
        async with open_gateway_world(config) as world, trio.open_nursery() as nursery:

            async def dawdle() -> None:
                async with open_raw(world.url) as client:
                    await client.rest()

            for _ in range(200):
                nursery.start_soon(dawdle)
            await world.assert_alive()


async def test_a_client_that_leaves_in_its_handshake_leaves_nothing() -> None:
    with trio.fail_after(DEADLINE_S):
        async with open_gateway_world(gateway_config(connect_timeout_s=60)) as world:
            for length in (0, 1, 30, None):
                async with open_raw(world.url) as client:
                    await client.send(upgrade_request(world.url)[:length])
            await world.until_idle()
            await world.no_handshake_left()
            await world.assert_alive()


async def test_the_upgrade_is_refused_before_it_is_accepted() -> None:
    with trio.fail_after(DEADLINE_S):
        async with open_gateway_world(gateway_config(max_connections=1)) as world, world.connect():
            async with open_raw(world.url) as client:
                await client.send(upgrade_request(world.url))
                answer = await client.rest()
            assert answer.startswith(b"HTTP/1.1 503 ")
            assert answer.count(b"HTTP/1.1") == 1
