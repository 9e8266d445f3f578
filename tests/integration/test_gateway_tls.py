"""The gateway through TLS: the same contract, and the same bounds for clients that stall, cut or lie."""

import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import structlog.testing
import trio
import trio.testing
from trio.testing import MockClock

from bamboo.errors import StartError
from tests.support.gateway import GatewayWorld, gateway_config, open_gateway_world
from tests.support.tls import Authority
from tests.support.ws_client import (
    CLOSE,
    CONTINUATION,
    PING,
    RawClient,
    client_frame,
    connect,
    handshake,
    open_raw,
    open_upgraded,
    upgrade_request,
)

DEADLINE_S = 10


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("tls"))


@asynccontextmanager
async def tls_world(authority: Authority, **config: Any) -> AsyncIterator[GatewayWorld]:
    config = {**config, **authority.files}
    async with open_gateway_world(gateway_config(**config), tls=authority.client_context()) as world:
        yield world


def plain(world: GatewayWorld) -> str:
    """Its URL for a client that does not speak TLS."""
    return world.url.replace("wss:", "ws:")


async def test_a_run_streams_through_tls(authority: Authority) -> None:
    with trio.fail_after(DEADLINE_S):
        async with tls_world(authority) as world:
            assert world.url == f"wss://127.0.0.1:{world.gateway.port}/"
            session_id, events = await world.finished_session(*(f"{n} " for n in range(100)))
            async with world.connect(session_id=session_id, after=events[0]["cursor"]) as client:
                assert await client.until_terminal() == events[1:]


async def test_the_servers_certificate_is_the_gateways_too_unless_it_has_its_own(
    authority: Authority, tmp_path: Path
) -> None:
    own = Authority(tmp_path)
    with trio.fail_after(DEADLINE_S):
        for config, trusted in (
            (gateway_config(server=authority.files), authority),
            (gateway_config(server=authority.files, **own.files), own),
        ):
            async with open_gateway_world(config, tls=trusted.client_context()) as world:
                await world.assert_alive()


async def test_a_certificate_that_cannot_be_used_is_one_clear_line(authority: Authority, tmp_path: Path) -> None:
    config = gateway_config(certfile=authority.certfile, keyfile=tmp_path / "none.pem")
    with trio.fail_after(DEADLINE_S), pytest.raises(ExceptionGroup) as caught:
        async with open_gateway_world(config):
            pass
    assert caught.group_contains(StartError, match=r"^gateway\.keyfile: [^\n]+\Z")


async def test_only_http_1_is_offered(authority: Authority) -> None:
    with trio.fail_after(DEADLINE_S):
        async with tls_world(authority) as world:
            context = authority.client_context("h2", "http/1.1")
            stream = trio.SSLStream(
                await trio.open_tcp_stream("127.0.0.1", world.gateway.port), context, server_hostname="127.0.0.1"
            )
            await stream.do_handshake()
            assert stream.selected_alpn_protocol() == "http/1.1"
            await trio.aclose_forcefully(stream)


async def test_who_may_come_in_is_the_same(authority: Authority) -> None:
    server = {"auth_token": "right-token", "cors_origins": ("https://cors.example",)}
    with trio.fail_after(DEADLINE_S):
        async with tls_world(authority, server=server, allowed_origins=("https://bamboo.example",)) as world:
            right = {"Authorization": "Bearer right-token"}

            async def status(**headers: str) -> int:
                return (await handshake(world.url, tls=world.tls, **headers)).status

            assert await status(Host="evil.example", **right) == 403
            assert await status(Origin="https://evil.example", **right) == 403
            assert await status(Origin="https://cors.example", **right) == 403
            assert await status(Origin="http://bamboo.example", **right) == 403
            assert await status(Authorization="Bearer wrong") == 401
            assert await status(Origin="https://bamboo.example", **right) == 101
            async with connect(world.url, tls=world.tls, auth="right-token") as client:
                assert (await client.call({"type": "ping"}))["type"] == "pong"


async def test_over_the_cap_it_is_503_and_over_an_addresses_limit_the_connection_is_closed(
    authority: Authority,
) -> None:
    server = {"auth_token": "right-token", "max_unauthenticated_per_address": 1}
    with trio.fail_after(DEADLINE_S):
        async with (
            tls_world(authority, server=server, max_connections=1) as world,
            world.connect(auth="right-token"),
        ):
            answer = await handshake(world.url, tls=world.tls)
            assert (answer.status, answer.error_code, answer.headers["retry-after"]) == (503, "overloaded", "5")
            while world.gateway.waiting:
                await trio.testing.wait_all_tasks_blocked(0.001)
            async with open_raw(plain(world)), open_raw(plain(world)) as second:
                assert await second.rest() == b""


# Clients that do not go on


@pytest.mark.parametrize("sent", [b"", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"])
async def test_a_tls_handshake_that_never_ends_is_cut(authority: Authority, sent: bytes) -> None:
    with trio.fail_after(DEADLINE_S):
        async with tls_world(authority, connect_timeout_s=0.2) as world, open_raw(plain(world)) as client:
            await client.send(sent)
            assert await client.rest() == b""
            await world.no_handshake_left()


async def test_the_time_for_both_handshakes_is_one(authority: Authority, mock_clock: MockClock) -> None:
    async with tls_world(authority) as world, open_raw(plain(world)) as client:
        while not world.gateway.waiting:
            await trio.testing.wait_all_tasks_blocked()
        await trio.testing.wait_all_tasks_blocked()  # its time runs
        mock_clock.jump(9)
        assert world.tls is not None
        stream = trio.SSLStream(client.stream, world.tls, server_hostname="127.0.0.1")
        await stream.do_handshake()
        await stream.send_all(upgrade_request(world.url)[:-2])
        await trio.testing.wait_all_tasks_blocked()
        mock_clock.jump(1)
        assert await stream.receive_some(1) == b""


@pytest.mark.parametrize("garbage", [b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", bytes(500), b"\xff" * 500])
async def test_bytes_that_are_no_tls_harm_nobody(authority: Authority, garbage: bytes) -> None:
    with trio.fail_after(DEADLINE_S):
        async with tls_world(authority, connect_timeout_s=60) as world:
            with structlog.testing.capture_logs() as logs:
                async with open_raw(plain(world)) as client:
                    await client.send(garbage)
                    await client.rest()
                await world.no_handshake_left()
                await world.assert_alive()
            assert [entry for entry in logs if entry["log_level"] in ("error", "warning", "info")] == []


async def test_a_client_that_does_not_trust_us_is_not_told_more_and_harms_nobody(authority: Authority) -> None:
    with trio.fail_after(DEADLINE_S):
        async with tls_world(authority, connect_timeout_s=60) as world:
            with structlog.testing.capture_logs() as logs:
                with pytest.raises(trio.BrokenResourceError):
                    async with open_raw(world.url, tls=ssl.create_default_context()):
                        pass
                await world.no_handshake_left()
                await world.assert_alive()
            assert [entry for entry in logs if entry["log_level"] in ("error", "warning", "info")] == []


@pytest.mark.parametrize("how", ["ends", "resets"])
async def test_a_client_that_is_gone_without_a_word_of_tls_leaves_nothing(authority: Authority, how: str) -> None:
    with trio.fail_after(DEADLINE_S):
        async with tls_world(authority) as world:
            session_id = await world.big_session(megabytes=4)
            with structlog.testing.capture_logs() as logs:
                for stalled in (False, True):
                    async with open_upgraded(world.url, tls=world.tls, receive_buffer=4096) as client:
                        if stalled:
                            await world.stall(client, session_id)
                        if how == "resets":
                            client.reset()
                    await world.until_idle()
            assert [entry for entry in logs if entry["event"] == "connection_failed"] == []


async def test_a_stalled_reader_is_cut_at_the_write_deadline(authority: Authority) -> None:
    with trio.fail_after(DEADLINE_S):
        async with tls_world(authority, server={"write_timeout_s": 0.3}) as world:
            session_id = await world.big_session()
            async with open_upgraded(world.url, tls=world.tls, receive_buffer=4096) as stalled:
                await world.stall(stalled, session_id)
                await world.until_idle()


async def test_a_slow_reader_gets_everything_and_is_not_blamed(authority: Authority, mock_clock: MockClock) -> None:
    async with tls_world(authority, heartbeat_interval_secs=30, heartbeat_timeout_secs=10) as world:
        session_id = await world.big_session()
        async with open_upgraded(world.url, tls=world.tls, receive_buffer=1 << 19) as client:
            await client.send_frame({"type": "connect"})
            await client.receive_json()
            mock_clock.jump(30)
            assert (await client.receive())[0] == PING  # never answered: due at 40
            await client.send_frame({"type": "subscribe", "session_id": session_id, "after": "none.0"})
            while not any(connection._stream.writing for connection in world.gateway._connections):
                await trio.testing.wait_all_tasks_blocked()
            seen = bytearray(client.unread)

            async def read_on() -> None:
                data = await client.stream.receive_some(65536)
                assert data, "cut"
                seen.extend(data)

            for wanted in (6_000_000, 12_000_000):  # more progress each time than the kernel can hold
                mock_clock.jump(29)
                while len(seen) < wanted:
                    await read_on()
            while b'"type":"agent_complete"' not in seen[-1000:]:
                await read_on()
            assert seen.count(b'"type":"agent_token"') == 16 * 16
            await client.send_frame({"type": "ping", "ref": "alive"})
            assert (await client.next_json())["ref"] == "alive"


# The end


async def hold(world: GatewayWorld, task_status: trio.TaskStatus[RawClient]) -> None:
    async with open_upgraded(world.url, tls=world.tls, receive_buffer=4096) as client:
        task_status.started(client)
        await trio.sleep_forever()


async def hold_plain(world: GatewayWorld, task_status: trio.TaskStatus[None]) -> None:
    async with open_raw(plain(world)) as client:
        await client.send(b"\x16\x03\x01")
        task_status.started()
        await trio.sleep_forever()


async def test_stalled_clients_and_half_handshakes_do_not_hold_up_the_end(authority: Authority) -> None:
    with trio.fail_after(DEADLINE_S):
        async with trio.open_nursery() as nursery:
            goodbyes: list[int] = []

            async def well_behaved(world: GatewayWorld, task_status: trio.TaskStatus[None]) -> None:
                async with world.connect() as client:
                    task_status.started()
                    goodbyes.append(await client.close_code())

            async with tls_world(authority) as world:
                session_id = await world.big_session()
                for _ in range(3):
                    await nursery.start(well_behaved, world)
                    await nursery.start(hold_plain, world)
                stalled = await nursery.start(hold, world)
                await world.stall(stalled, session_id)
                began = trio.current_time()
            assert trio.current_time() - began < 5
            assert goodbyes == [1001] * 3
            nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    ("frames", "code"),
    [
        (client_frame(b"\xff"), 1007),
        (b"\x83\x80\x00\x00\x00\x00", 1002),
        (client_frame(b"{" * 3000), 1009),
        (client_frame(b"\x03\xe8", opcode=CLOSE), 1000),
    ],
)
async def test_the_end_is_told_and_then_said_in_tls(authority: Authority, frames: bytes, code: int) -> None:
    """The client's TLS is strict: an end that is not said is an error."""
    with trio.fail_after(DEADLINE_S):
        async with (
            tls_world(authority, max_message_bytes=2000) as world,
            open_upgraded(world.url, tls=world.tls) as client,
        ):
            await client.send(frames)
            assert await client.close_code() == code
            while data := await client.stream.receive_some(65536):
                assert not data


async def test_who_still_sends_is_told_why_it_was_too_much(authority: Authority) -> None:
    """But its TLS is not ended properly: OpenSSL refuses to, while there is something unread."""
    with trio.fail_after(DEADLINE_S):
        async with (
            tls_world(authority, max_message_bytes=2000) as world,
            open_upgraded(world.url, tls=world.tls) as client,
        ):
            nothing = client_frame(b"", opcode=CONTINUATION, final=False)
            await client.send(client_frame(b"", final=False) + nothing * 3000)
            assert await client.close_code() == 1009
