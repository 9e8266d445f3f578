"""Frames as they come in: whole and in pieces, broken, too big, and a bug of ours behind one."""

import pytest
import structlog.testing
import trio
import trio.testing

from tests.support.gateway import gateway_config, open_gateway_world
from tests.support.ws_client import PING, PONG, client_frame, open_upgraded, open_ws

DEADLINE_S = 10


async def test_a_frame_in_pieces_is_one_frame_and_pings_may_come_between() -> None:
    with trio.fail_after(DEADLINE_S):
        async with open_gateway_world() as world, open_upgraded(world.url) as client:
            await client.send(client_frame(b'{"type": "conn', final=False))
            await client.send(client_frame(b"are you there", opcode=PING))
            await client.send(client_frame(b'ect", "session_id"', opcode=0, final=False))
            await client.send(client_frame(b': "s"}', opcode=0))
            assert await client.receive() == (PONG, b"are you there")
            assert (await client.receive_json())["session_id"] == "s"


async def test_a_binary_frame_is_an_invalid_message() -> None:
    with trio.fail_after(DEADLINE_S):
        async with open_gateway_world() as world, world.connect() as client:
            await client.send_raw(b'{"type": "ping"}')
            assert (await client.receive())["code"] == "invalid_message"
            assert (await client.call({"type": "ping"}))["type"] == "pong"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "nonsense",
        "[]",
        "null",
        '"text"',
        "{",
        '{"type": null}',
        '{"type": ["ping"]}',
        '{"type": "Ping"}',
        "[" * 100_000,
        '{"type": "ping", "timestamp": NaN}',
        '{"type": "ping", "ref": {"a": 1}}',
        r'{"type": "chat", "content": "\ud800"}',
        '{"type": "ping", "timestamp": 1' + "0" * 5000 + "}",
    ],
)
async def test_text_that_is_no_frame_is_an_invalid_message(text: str) -> None:
    with trio.fail_after(DEADLINE_S):
        async with open_gateway_world() as world, world.connect() as client:
            await client.send_raw(text)
            error = await client.receive()
            assert (error["type"], error["code"]) == ("error", "invalid_message"), error
            assert "ref" not in error
            assert (await client.call({"type": "ping"}))["type"] == "pong"


async def test_text_that_is_not_utf8_is_told_with_1007() -> None:
    with trio.fail_after(DEADLINE_S):
        async with open_gateway_world() as world:
            async with open_upgraded(world.url) as client:
                await client.send(client_frame(b'{"type": "\xff\xfe"}'))
                assert await client.close_code() == 1007
            await world.assert_alive()


@pytest.mark.parametrize(
    "broken", [b"\x83\x80\x00\x00\x00\x00", b"\x81\x05hello", b"\xc1\x80\x00\x00\x00\x00", b"\x80\x80\x00\x00\x00\x00"]
)
async def test_a_frame_that_breaks_the_protocol_is_told_with_1002(broken: bytes) -> None:
    with trio.fail_after(DEADLINE_S):
        async with open_gateway_world() as world:
            async with open_upgraded(world.url) as client:
                await client.send(broken)
                assert await client.close_code() == 1002
            await world.assert_alive()


async def test_a_frame_that_is_too_big_closes_with_1009() -> None:
    limit = 2000
    with trio.fail_after(DEADLINE_S):
        async with open_gateway_world(gateway_config(max_message_bytes=limit)) as world:
            room = limit - len('{"type":"ping","timestamp":""}')
            async with world.connect() as client:
                await client.send_raw('{"type":"ping","timestamp":"' + "x" * room + '"}')
                assert (await client.receive())["type"] == "pong"
                await client.send_raw('{"type":"ping","timestamp":"' + "x" * (room + 1) + '"}')
                assert await client.close_code() == 1009
            async with world.connect() as client:  # bytes, not characters
                await client.send_raw('{"type":"ping","timestamp":"' + "é" * (room // 2 + 1) + '"}')
                assert await client.close_code() == 1009
            async with open_upgraded(world.url) as raw:  # in pieces, and with a lot unread when it is closed
                await raw.send(client_frame(b"{" * 1000, final=False))
                for _ in range(1000):
                    await raw.send(client_frame(b"{" * 1000, opcode=0, final=False))
                assert await raw.close_code() == 1009
            async with open_upgraded(world.url) as raw:  # several in one read
                await raw.send(client_frame(b"{" * 2500) * 10)
                assert await raw.close_code() == 1009
            await world.until_idle()


@pytest.mark.parametrize("row", ["from the start", "after a good one"])
async def test_twenty_bad_frames_in_a_row_close_with_4429(row: str) -> None:
    with trio.fail_after(DEADLINE_S):
        async with open_gateway_world() as world, world.connect() as client:
            for _ in range(19):
                assert (await client.call({"type": "nonsense"}))["code"] == "invalid_message"
            if row == "after a good one":
                await client.call({"type": "ping"})
                for _ in range(19):
                    assert (await client.call({"type": "command", "name": "x"}))["code"] == "unknown_command"
            assert (await client.call({"type": "nonsense"}))["code"] == "invalid_message"
            assert await client.close_code() == 4429


async def test_a_ping_behind_our_close_frame_is_no_bug_and_costs_the_client_nothing() -> None:
    with trio.fail_after(DEADLINE_S):
        async with open_gateway_world() as world:
            with structlog.testing.capture_logs() as logs:
                async with open_upgraded(world.url) as client:
                    await client.send(client_frame(b"nonsense") * 20)
                    while not any(connection._websocket.closed for connection in world.gateway._connections):
                        await trio.testing.wait_all_tasks_blocked()
                    await client.send(client_frame(b"there?", opcode=PING) * 1000)
                    assert await client.close_code() == 4429
                await world.until_idle()
            assert [entry for entry in logs if entry["log_level"] == "error"] == []


async def test_errors_that_are_no_bad_frames_do_not_count() -> None:
    with trio.fail_after(DEADLINE_S):
        async with open_gateway_world() as world, world.connect() as client:
            for _ in range(50):
                assert (await client.call({"type": "subscribe", "session_id": "x"}))["code"] == "session_not_found"
            assert (await client.call({"type": "ping"}))["type"] == "pong"


async def test_without_connect_in_time_it_is_4408() -> None:
    with trio.fail_after(DEADLINE_S):
        async with open_gateway_world(gateway_config(connect_timeout_s=0.1)) as world:
            async with open_ws(world.url) as client:
                assert await client.close_code() == 4408
            async with open_ws(world.url) as client:
                await client.send({"type": "ping"})
                assert await client.close_code() == 4408
                assert client.seen[-1]["code"] == "not_connected"
            async with world.connect() as client:
                async with open_ws(world.url) as later:
                    assert await later.close_code() == 4408
                assert (await client.call({"type": "ping"}))["type"] == "pong"


async def test_a_bug_in_one_connection_closes_it_with_4500_and_harms_nobody_else() -> None:
    with trio.fail_after(DEADLINE_S):
        async with open_gateway_world() as world, world.connect() as other:
            with structlog.testing.capture_logs() as logs:
                async with world.connect() as client:
                    world.agents.bugs.append(RuntimeError("a bug"))
                    await client.send({"type": "chat", "content": "hi"})
                    assert await client.close_code() == 4500
                    assert [frame["type"] for frame in client.seen] == ["connected"]
                while not (told := [entry for entry in logs if entry["event"] == "connection_failed"]):
                    await trio.testing.wait_all_tasks_blocked(0.001)
            assert [entry["connection_id"] for entry in told] == [client.connected["connection_id"]]
            assert told[0]["log_level"] == "error"
            assert (await other.call({"type": "ping"}))["type"] == "pong"
            await world.assert_alive()


async def test_an_accept_loop_that_fails_ends_everything() -> None:
    with trio.fail_after(DEADLINE_S):

        async def lose_the_socket() -> None:
            async with open_gateway_world() as world:
                world.gateway._listeners[0].socket.close()
                await trio.sleep_forever()

        with pytest.raises(ExceptionGroup) as caught:
            await lose_the_socket()
        assert caught.group_contains(trio.ClosedResourceError, depth=None)
