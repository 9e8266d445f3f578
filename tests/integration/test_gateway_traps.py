"""What goes wrong on a socket, and the sharp edges of trio-websocket that an upgrade may move: a client that stalls,
lies, cuts, floods or says nothing is its own loss only.
"""

import json

import pytest
import structlog.testing
import trio
import trio.testing

from bamboo.core.types import SessionId
from bamboo.gateway.listener import MAX_HANDSHAKES
from bamboo.gateway.outbox import ANSWERS_BYTES
from tests.support.gateway import GatewayWorld, gateway_config, open_gateway_world
from tests.support.ws_client import (
    RawClient,
    client_frame,
    connect,
    open_raw,
    open_upgraded,
    open_ws,
    upgrade_request,
)

DEADLINE_S = 10

TEXT, BINARY, CLOSE, PING, PONG = 1, 2, 8, 9, 10


async def close_code(client: RawClient) -> int:
    """Read to the close frame; 1006 if the connection ends without one."""
    while True:
        opcode, payload = await client.receive()
        if opcode == CLOSE:
            return int.from_bytes(payload[:2])
        if opcode == 0:
            return 1006


async def assert_alive(world: GatewayWorld) -> None:
    async with world.connect() as client:
        assert (await client.call({"type": "ping"}))["type"] == "pong"


async def no_handshake_left(world: GatewayWorld) -> None:
    while world.gateway._handshakes.value < MAX_HANDSHAKES - 1:  # the accept loop has one for the next connection
        await trio.testing.wait_all_tasks_blocked(0.001)


async def next_json(client: RawClient) -> dict[str, object]:
    """The next text frame; pings on the way are answered."""
    while True:
        opcode, payload = await client.receive()
        if opcode == PING:
            await client.send(client_frame(payload, opcode=PONG))
        else:
            assert opcode == TEXT, (opcode, payload)
            return dict(json.loads(payload))


async def beat(client: RawClient, pings: int) -> None:
    """Answer this many pings of the server: for a test, a clock that needs no sleep."""
    while pings:
        opcode, payload = await client.receive()
        assert opcode in (PING, TEXT)
        if opcode == PING:
            await client.send(client_frame(payload, opcode=PONG))
            pings -= 1


async def stall(client: RawClient, world: GatewayWorld, session_id: str) -> None:
    """Make `client`, which does not read, follow a session with more to say than the kernel holds; wait for it."""
    await client.send_frame({"type": "connect", "session_id": session_id, "after": "none.0"})
    while not any(connection._stream.writing for connection in world.gateway._connections):
        await trio.testing.wait_all_tasks_blocked(0.01)


async def big_session(world: GatewayWorld, megabytes: int = 16) -> str:
    """A finished session with a log of this size."""
    async with world.connect(session_id="big") as client:
        await client.chat("talk")
        call = await world.next_call()
        for _ in range(megabytes * 16):
            call.say("x" * 65536)
        call.end()
        await client.until_terminal()
    return "big"


# Handshakes


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
                await no_handshake_left(world)
                await assert_alive(world)
            assert [entry for entry in logs if entry["event"] == "connection_failed"] == []


async def test_a_host_that_no_name_can_have_harms_nobody() -> None:
    with trio.fail_after(DEADLINE_S):
        async with open_gateway_world() as world:
            with structlog.testing.capture_logs() as logs:
                async with open_raw(world.url) as client:
                    await client.send(upgrade_request(world.url).replace(b"Host: ", b"Host: \xff"))
                    assert b"101" not in await client.rest()
                await assert_alive(world)
            assert [entry["log_level"] for entry in logs if entry["event"].endswith("_failed")] == ["info"]


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
            await assert_alive(world)


async def test_a_client_that_leaves_in_its_handshake_leaves_nothing() -> None:
    with trio.fail_after(DEADLINE_S):
        async with open_gateway_world(gateway_config(connect_timeout_s=60)) as world:
            for length in (0, 1, 30, None):
                async with open_raw(world.url) as client:
                    await client.send(upgrade_request(world.url)[:length])
            await world.until_idle()
            await no_handshake_left(world)
            await assert_alive(world)


async def test_the_upgrade_is_refused_before_it_is_accepted() -> None:
    with trio.fail_after(DEADLINE_S):
        async with open_gateway_world(gateway_config(max_connections=1)) as world, world.connect():
            async with open_raw(world.url) as client:
                await client.send(upgrade_request(world.url))
                answer = await client.rest()
            assert answer.startswith(b"HTTP/1.1 503 ")
            assert answer.count(b"HTTP/1.1") == 1


# Frames


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
                assert await close_code(client) == 1007
            await assert_alive(world)


@pytest.mark.parametrize(
    "broken", [b"\x83\x80\x00\x00\x00\x00", b"\x81\x05hello", b"\xc1\x80\x00\x00\x00\x00", b"\x80\x80\x00\x00\x00\x00"]
)
async def test_a_frame_that_breaks_the_protocol_is_told_with_1002(broken: bytes) -> None:
    with trio.fail_after(DEADLINE_S):
        async with open_gateway_world() as world:
            async with open_upgraded(world.url) as client:
                await client.send(broken)
                assert await close_code(client) == 1002
            await assert_alive(world)


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
                assert await close_code(raw) == 1009
            async with open_upgraded(world.url) as raw:  # several in one read
                await raw.send(client_frame(b"{" * 2500) * 10)
                assert await close_code(raw) == 1009
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
                    assert await close_code(client) == 4429
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


# Bugs


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
            await assert_alive(world)


async def test_an_accept_loop_that_fails_ends_everything() -> None:
    with trio.fail_after(DEADLINE_S):

        async def lose_the_socket() -> None:
            async with open_gateway_world() as world:
                world.gateway._listeners[0].socket.close()
                await trio.sleep_forever()

        with pytest.raises(ExceptionGroup) as caught:
            await lose_the_socket()
        assert caught.group_contains(trio.ClosedResourceError, depth=None)


# Heartbeat


async def test_a_client_that_answers_pings_stays_and_one_that_does_not_is_closed_with_4502() -> None:
    config = gateway_config(heartbeat_interval_secs=0.05, heartbeat_timeout_secs=0.2)
    with trio.fail_after(DEADLINE_S):
        async with (
            open_gateway_world(config) as world,
            open_upgraded(world.url) as good,
            open_upgraded(world.url) as bad,
        ):
            for client in (good, bad):
                await client.send_frame({"type": "connect"})
                assert (await client.receive_json())["heartbeat_interval_s"] == 0.05
            async with trio.open_nursery() as nursery:
                nursery.start_soon(beat, good, 10)
                assert await close_code(bad) == 4502
            await good.send_frame({"type": "ping", "timestamp": 1})
            assert (await next_json(good))["type"] == "pong"


async def test_a_client_that_stops_reading_is_not_blamed_for_its_silence_and_gets_everything_later() -> None:
    config = gateway_config(heartbeat_interval_secs=0.1, heartbeat_timeout_secs=0.4)
    with trio.fail_after(DEADLINE_S):
        async with open_gateway_world(config) as world:
            session_id = await big_session(world)
            async with open_upgraded(world.url, receive_buffer=65536) as stalled, open_upgraded(world.url) as other:
                await stall(stalled, world, session_id)
                await other.send_frame({"type": "connect"})
                await beat(other, 8)  # well beyond the timeout
                assert world.gateway.connections == 2
                seqs: list[object] = []
                frame: dict[str, object] = {"type": ""}
                while frame["type"] != "agent_complete":
                    frame = await next_json(stalled)
                    seqs += [frame["seq"]] if "seq" in frame else []
                assert seqs == list(range(1, len(seqs) + 1))
                await stalled.send_frame({"type": "ping", "ref": 1})
                assert (await next_json(stalled))["ref"] == 1


async def test_the_time_for_a_pong_stands_still_while_something_waits_to_be_written() -> None:
    config = gateway_config(heartbeat_interval_secs=0.1, heartbeat_timeout_secs=0.4)
    with trio.fail_after(DEADLINE_S):
        async with open_gateway_world(config) as world:
            session_id = await big_session(world)
            async with open_upgraded(world.url, receive_buffer=65536) as stalled, open_upgraded(world.url) as other:
                opcode, ping = await stalled.receive()
                assert opcode == PING
                await stall(stalled, world, session_id)
                await other.send_frame({"type": "connect"})
                await beat(other, 8)
                while (await next_json(stalled))["type"] != "agent_complete":
                    pass
                await stalled.send(client_frame(ping, opcode=PONG))
                await stalled.send_frame({"type": "ping", "ref": 1})
                assert (await next_json(stalled))["ref"] == 1


async def test_a_ping_that_waits_to_be_written_is_not_late() -> None:
    config = gateway_config(heartbeat_interval_secs=0.1, heartbeat_timeout_secs=0.2)
    with trio.fail_after(DEADLINE_S):
        async with (
            open_gateway_world(config) as world,
            open_upgraded(world.url, receive_buffer=4096) as flood,
            open_upgraded(world.url) as other,
            trio.open_nursery() as nursery,
        ):

            async def ping_for_ever() -> None:
                while True:
                    await flood.send(client_frame(b"x" * 125, opcode=PING) * 100)

            nursery.start_soon(ping_for_ever)  # and reads no pong
            while not any(connection._stream.writing for connection in world.gateway._connections):
                await trio.testing.wait_all_tasks_blocked(0.01)
            await other.send_frame({"type": "connect"})
            await beat(other, 8)
            assert [connection._close_code for connection in world.gateway._connections] == [None, None]
            nursery.cancel_scope.cancel()


async def test_a_server_that_is_busy_does_not_blame_the_client_for_pongs_that_it_has_not_read() -> None:
    config = gateway_config(heartbeat_interval_secs=0.05, heartbeat_timeout_secs=0.1)
    with trio.fail_after(DEADLINE_S):
        async with (
            open_gateway_world(config) as world,
            open_upgraded(world.url) as other,
            world.connect() as client,
        ):
            world.agents.chat_gate.close()
            await client.send({"type": "chat", "content": "hi", "ref": "chat"})
            await world.agents.chat_gate.arrived()
            for n in range(20):  # more than is read ahead, so that pongs stand behind them
                await client.send({"type": "ping", "ref": n})
            await other.send_frame({"type": "connect"})
            await beat(other, 8)
            world.agents.chat_gate.open()
            assert (await client.answer("chat"))["type"] == "accepted"
            assert (await client.answer(19))["type"] == "pong"


async def test_pings_are_answered_while_a_chat_is_in_work() -> None:
    with trio.fail_after(DEADLINE_S):
        async with open_gateway_world() as world, world.connect() as client:
            world.agents.chat_gate.close()
            await client.send({"type": "chat", "content": "hi", "ref": "chat"})
            await world.agents.chat_gate.arrived()
            await client.websocket.ping(b"there?")
            world.agents.chat_gate.open()
            assert (await client.answer("chat"))["type"] == "accepted"


# Stalled and vanished clients


async def test_a_client_that_takes_nothing_is_cut_at_the_write_deadline() -> None:
    with trio.fail_after(DEADLINE_S):
        async with open_gateway_world(gateway_config(server={"write_timeout_s": 0.3})) as world:
            session_id = await big_session(world)
            async with open_upgraded(world.url, receive_buffer=4096) as stalled:
                await stall(stalled, world, session_id)
                await world.until_idle()
                assert b"agent_complete" not in await stalled.rest()


async def test_a_stalled_client_does_not_hold_up_the_others() -> None:
    with trio.fail_after(DEADLINE_S):
        async with open_gateway_world() as world:
            session_id = await big_session(world)
            async with open_upgraded(world.url, receive_buffer=4096) as stalled, world.connect() as client:
                await stall(stalled, world, session_id)
                await client.call({"type": "subscribe", "session_id": session_id})
                await client.chat("go on", session_id=session_id)
                await world.finish_run("here")
                assert (await client.until_terminal())[-1]["type"] == "agent_complete"


async def test_a_stalled_client_does_not_hold_up_the_end() -> None:
    with trio.fail_after(DEADLINE_S):
        async with trio.open_nursery() as nursery:
            goodbyes: list[int] = []

            async def well_behaved(url: str, task_status: trio.TaskStatus[None]) -> None:
                async with connect(url) as client:
                    task_status.started()
                    goodbyes.append(await client.close_code())

            async with open_gateway_world() as world:
                session_id = await big_session(world)
                for _ in range(3):
                    await nursery.start(well_behaved, world.url)
                stalled = await nursery.start(hold, world.url)
                await stall(stalled, world, session_id)
            assert goodbyes == [1001] * 3
            nursery.cancel_scope.cancel()


async def hold(url: str, task_status: trio.TaskStatus[RawClient]) -> None:
    async with open_upgraded(url, receive_buffer=4096) as client:
        task_status.started(client)
        await trio.sleep_forever()


async def test_a_client_that_answers_no_close_frame_does_not_hold_up_the_end() -> None:
    with trio.fail_after(DEADLINE_S):
        async with trio.open_nursery() as nursery:
            async with open_gateway_world() as world:
                silent = await nursery.start(hold, world.url)
                await silent.send_frame({"type": "connect"})
                await silent.receive_json()
            assert await close_code(silent) == 1001
            nursery.cancel_scope.cancel()


async def test_cancelling_from_outside_still_says_1001() -> None:
    with trio.fail_after(DEADLINE_S):
        async with trio.open_nursery() as nursery:
            goodbyes: list[int] = []

            async def stay(url: str, task_status: trio.TaskStatus[None]) -> None:
                async with connect(url) as client:
                    task_status.started()
                    goodbyes.append(await client.close_code())

            with trio.CancelScope() as scope:
                async with open_gateway_world() as world:
                    for _ in range(3):
                        await nursery.start(stay, world.url)
                    scope.cancel()
                    await trio.sleep_forever()
        assert goodbyes == [1001] * 3


async def test_a_client_that_sends_and_never_reads_is_not_read_from_for_ever() -> None:
    with trio.fail_after(DEADLINE_S):
        async with open_gateway_world() as world, open_upgraded(world.url, receive_buffer=4096) as flood:
            await flood.send_frame({"type": "connect"})
            ping = client_frame(json.dumps({"type": "ping", "timestamp": "x" * 10_000}).encode())
            async with trio.open_nursery() as nursery:

                async def send_for_ever() -> None:
                    while True:
                        await flood.send(ping)

                nursery.start_soon(send_for_ever)
                (connection,) = world.gateway._connections
                while not connection._outbox._waiting_bytes >= ANSWERS_BYTES:
                    await trio.testing.wait_all_tasks_blocked(0.01)
                await trio.testing.wait_all_tasks_blocked(0.1)
                assert connection._outbox._waiting_bytes < 2 * ANSWERS_BYTES
                assert not connection._receiving
                nursery.cancel_scope.cancel()
            while await next_json(flood) is not None and connection._outbox._waiting_bytes:
                pass
            await assert_alive(world)


async def test_a_client_that_resets_its_connection_leaves_nothing() -> None:
    with trio.fail_after(DEADLINE_S):
        async with open_gateway_world() as world:
            session_id = await big_session(world, megabytes=4)
            with structlog.testing.capture_logs() as logs:
                for _ in range(5):
                    async with open_upgraded(world.url, receive_buffer=4096) as client:
                        await stall(client, world, session_id)
                await world.until_idle()
            assert [entry for entry in logs if entry["event"] == "connection_failed"] == []


async def test_last_words_count() -> None:
    with trio.fail_after(DEADLINE_S):
        async with open_gateway_world() as world:
            async with open_upgraded(world.url) as client:
                await client.send(
                    client_frame(b'{"type": "connect", "session_id": "s"}')
                    + client_frame(b'{"type": "chat", "content": "last words"}')
                    + client_frame(b"\x03\xe8", opcode=CLOSE)
                )
                assert await close_code(client) == 1000
            await world.finish_run("ok")
            await world.until_idle()
            session = await world.world.store.session(SessionId("s"))
            assert session is not None
