"""What one client can make us hold: every way in which it could grow has its bound, and who goes beyond is told."""

import json

import pytest
import structlog.testing
import trio
import trio.testing
from trio.testing import MockClock

from bamboo.gateway.connection import _MAX_PIECES, _PIECE_BYTES, MAX_CONNECT_BYTES, READ_AHEAD_BYTES, Connection
from bamboo.gateway.requests import MAX_STOPS
from tests.support.gateway import GatewayWorld, gateway_config, open_gateway_world
from tests.support.ws_client import CLOSE, CONTINUATION, PING, PONG, TEXT, RawClient, client_frame, open_upgraded

DEADLINE_S = 10

RECEIVE_BYTES = 4096
"""What is read at once."""


def only_connection(world: GatewayWorld) -> Connection:
    (connection,) = world.gateway._connections
    return connection


async def connected(client: RawClient) -> None:
    await client.send_frame({"type": "connect"})
    assert (await client.receive_json())["type"] == "connected"


async def flood(client: RawClient, data: bytes) -> None:
    """Send this again and again until the server ends the connection, or somebody cancels."""
    try:
        while True:
            await client.send(data)
    except trio.BrokenResourceError:
        pass


# Pieces of one message


async def test_trio_websocket_keeps_the_pieces_of_a_message_where_we_count_them() -> None:
    with trio.fail_after(DEADLINE_S):
        async with open_gateway_world() as world, open_upgraded(world.url) as client:
            await connected(client)
            parts = only_connection(world)._websocket
            await client.send(client_frame(b'{"type":', final=False))
            await client.send(client_frame(b"", opcode=CONTINUATION, final=False) * 2)
            await client.send(client_frame(b"behind", opcode=PING))
            assert await client.receive() == (PONG, b"behind")
            assert len(parts._message_parts) == 3
            await client.send(client_frame(b'"ping"}', opcode=CONTINUATION))
            assert (await client.receive_json())["type"] == "pong"
            assert len(parts._message_parts) == 0


@pytest.mark.parametrize("piece", [b"", b"x"])
async def test_a_message_in_endless_pieces_is_told_1009(piece: bytes) -> None:
    limit = 100_000
    most = _MAX_PIECES + limit // _PIECE_BYTES
    with trio.fail_after(DEADLINE_S):
        async with open_gateway_world(gateway_config(max_message_bytes=limit)) as world:
            async with open_upgraded(world.url) as client, trio.open_nursery() as nursery:
                await connected(client)
                websocket = only_connection(world)._websocket
                await client.send(client_frame(b'{"type":"', final=False))
                nursery.start_soon(flood, client, client_frame(piece, opcode=CONTINUATION, final=False) * 100)
                assert await client.close_code() == 1009
                assert len(websocket._message_parts) <= most + RECEIVE_BYTES // 6
                nursery.cancel_scope.cancel()
            await world.until_idle()


async def test_as_many_pieces_as_there_may_be_are_a_message() -> None:
    with trio.fail_after(DEADLINE_S):
        config = gateway_config(max_message_bytes=100_000)
        async with open_gateway_world(config) as world, open_upgraded(world.url) as client:
            await connected(client)
            await client.send(client_frame(b'{"type":"ping"', final=False))
            most = _MAX_PIECES + 100_000 // _PIECE_BYTES
            await client.send(client_frame(b"", opcode=CONTINUATION, final=False) * (most - 1))
            while len(only_connection(world)._websocket._message_parts) < most:
                await trio.testing.wait_all_tasks_blocked(0.001)
            await client.send(client_frame(b"}", opcode=CONTINUATION))
            assert (await client.receive_json())["type"] == "pong"


# Before connect


async def test_a_frame_before_connect_is_cut_at_its_own_limit_before_it_is_whole() -> None:
    with trio.fail_after(DEADLINE_S):
        async with open_gateway_world() as world, open_upgraded(world.url) as client:
            whole = client_frame(b'{"type":"connect","x":"' + b"x" * 1_000_000 + b'"}')
            await client.send(whole[: READ_AHEAD_BYTES + 4 * RECEIVE_BYTES])
            assert await client.close_code() == 1009


@pytest.mark.parametrize(("excess", "answer"), [(0, "connected"), (1, "1009")])
async def test_the_first_frame_may_be_as_big_as_is_said(excess: int, answer: str) -> None:
    frame = b'{"type":"connect","x":"' + b"x" * (MAX_CONNECT_BYTES + excess - 25) + b'"}'
    assert len(frame) == MAX_CONNECT_BYTES + excess
    with trio.fail_after(DEADLINE_S):
        async with open_gateway_world() as world, open_upgraded(world.url) as client:
            await client.send(client_frame(frame))
            if answer == "connected":
                assert (await client.receive_json())["type"] == "connected"
            else:
                assert await client.close_code() == 1009


async def test_what_comes_behind_connect_may_be_as_big_as_any_frame() -> None:
    with trio.fail_after(DEADLINE_S):
        async with open_gateway_world() as world, open_upgraded(world.url) as client:
            chat = json.dumps({"type": "chat", "content": "x" * 1_000_000, "ref": "big"}).encode()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(client.send, client_frame(b'{"type":"connect"}') + client_frame(chat))
                assert (await client.receive_json())["type"] == "connected"
                assert (await client.receive_json())["ref"] == "big"


# Behind the frame in work


async def test_behind_a_frame_in_work_little_is_read_and_nothing_is_lost() -> None:
    with trio.fail_after(DEADLINE_S):
        async with open_gateway_world() as world, open_upgraded(world.url) as client:
            await connected(client)
            connection = only_connection(world)
            world.agents.chat_gate.close()
            await client.send_frame({"type": "chat", "content": "hi", "ref": "chat"})
            await world.agents.chat_gate.arrived()
            before = connection._stream.received
            pings = [{"type": "ping", "timestamp": "x" * 300_000, "ref": n} for n in range(20)]
            async with trio.open_nursery() as nursery:

                async def send() -> None:
                    for ping in pings:
                        await client.send_frame(ping)

                nursery.start_soon(send)
                while connection._wanted is None:
                    await trio.testing.wait_all_tasks_blocked(0.001)
                await trio.testing.wait_all_tasks_blocked(0.05)
                assert connection._stream.received - before <= READ_AHEAD_BYTES + RECEIVE_BYTES
                world.agents.chat_gate.open()
                refs = []
                while 19 not in refs:
                    frame = await client.receive_json()
                    refs += [frame["ref"]] if "ref" in frame else []
            assert refs == ["chat", *range(20)]


async def test_what_was_done_with_does_not_count() -> None:
    with trio.fail_after(DEADLINE_S):
        async with open_gateway_world() as world, open_upgraded(world.url) as client:
            for _ in range(15):
                await client.send_frame({"type": "ping", "timestamp": "x" * 10_000})
                assert (await client.receive_json())["code"] == "not_connected"
            await connected(client)
            world.agents.chat_gate.close()
            await client.send_frame({"type": "chat", "content": "hi", "ref": "chat"})
            await world.agents.chat_gate.arrived()
            await client.send(client_frame(b"seen", opcode=PING))
            assert await client.receive() == (PONG, b"seen")
            world.agents.chat_gate.open()
            assert (await client.receive_json())["ref"] == "chat"


async def test_who_has_sent_a_lot_behind_the_frame_in_work_hears_our_goodbye_and_we_its_own(
    mock_clock: MockClock,
) -> None:
    """Nothing here takes time: neither the goodbye's deadline nor the lingering is needed."""
    assert mock_clock.rate == 0
    async with open_gateway_world() as world, open_upgraded(world.url) as client:
        await connected(client)
        connection = only_connection(world)
        world.agents.chat_gate.close()
        await client.send_frame({"type": "chat", "content": "hi"})
        await world.agents.chat_gate.arrived()
        await client.send(client_frame(b"x" * 60_000) * 2)
        while connection._wanted is None:
            await trio.testing.wait_all_tasks_blocked()
        connection.finish(1001)
        assert await client.close_code() == 1001
        await client.send(client_frame(b"\x03\xe9", opcode=CLOSE))
        assert await client.rest() == b""
        await world.until_idle()


async def test_stops_that_are_under_way_are_so_many_and_then_frames_wait() -> None:
    with trio.fail_after(DEADLINE_S):
        async with open_gateway_world() as world, world.connect() as client:
            sessions = [f"s{n}" for n in range(MAX_STOPS + 2)]
            for session_id in sessions:
                await client.chat("hi", session_id=session_id)
            for _ in sessions:
                await world.next_call()
            world.agents.stop_gate.close()
            for session_id in sessions:
                await client.send({"type": "stop", "session_id": session_id, "ref": session_id})
            await client.send({"type": "ping", "ref": "behind"})
            while world.agents.stop_gate.waiting < MAX_STOPS:
                await trio.testing.wait_all_tasks_blocked(0.001)
            await trio.testing.wait_all_tasks_blocked(0.05)
            assert world.agents.stop_gate.waiting == MAX_STOPS
            assert "behind" not in {frame.get("ref") for frame in client.seen}
            world.agents.stop_gate.open()
            await client.answer("behind")
            for session_id in sessions:
                assert (await client.answer(session_id))["type"] == "stopped"


# Control frames


async def test_pings_without_end_are_answered_while_they_are_read_and_grow_nothing(mock_clock: MockClock) -> None:
    with structlog.testing.capture_logs() as logs:
        async with open_gateway_world() as world, open_upgraded(world.url, receive_buffer=4096) as client:
            await connected(client)
            connection = only_connection(world)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(flood, client, client_frame(b"x" * 125, opcode=PING) * 100)
                for _ in range(2000):
                    assert await client.receive() == (PONG, b"x" * 125)
                await trio.testing.wait_all_tasks_blocked(0.05)  # nobody reads any more, so nobody is read from
                assert connection._stream.writing
                assert connection._outbox._waiting_bytes == 0
                mock_clock.jump(30)  # server.write_timeout_s
                await world.until_idle()
                nursery.cancel_scope.cancel()
    assert [entry for entry in logs if entry["log_level"] in ("error", "warning")] == []


async def test_pongs_that_nobody_asked_for_are_nothing() -> None:
    with trio.fail_after(DEADLINE_S):
        async with open_gateway_world() as world, open_upgraded(world.url) as client:
            await connected(client)
            for _ in range(100):
                await client.send(client_frame(b"unasked", opcode=PONG) * 100)
            assert len(only_connection(world)._websocket._pings) == 0
            await client.send(client_frame(b'{"type":"ping"}', opcode=TEXT))
            assert (await client.receive_json())["type"] == "pong"
