"""The heartbeat over real sockets: who is silent is gone, but nobody is blamed for our own slowness."""

import json

import trio
import trio.testing
from trio.testing import MockClock

from tests.support.gateway import gateway_config, open_gateway_world
from tests.support.ws_client import CLOSE, PING, PONG, TEXT, RawClient, client_frame, open_upgraded

DEADLINE_S = 10


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
                nursery.start_soon(good.beat, 10)
                assert await bad.close_code() == 4502
            await good.send_frame({"type": "ping", "timestamp": 1})
            assert (await good.next_json())["type"] == "pong"


async def test_a_client_that_stops_reading_is_not_blamed_for_its_silence_and_gets_everything_later() -> None:
    config = gateway_config(heartbeat_interval_secs=0.1, heartbeat_timeout_secs=0.4)
    with trio.fail_after(DEADLINE_S):
        async with open_gateway_world(config) as world:
            session_id = await world.big_session()
            async with open_upgraded(world.url, receive_buffer=65536) as stalled, open_upgraded(world.url) as other:
                await world.stall(stalled, session_id)
                await other.send_frame({"type": "connect"})
                await other.beat(8)  # well beyond the timeout
                assert world.gateway.connections == 2
                seqs: list[object] = []
                frame: dict[str, object] = {"type": ""}
                while frame["type"] != "agent_complete":
                    frame = await stalled.next_json()
                    seqs += [frame["seq"]] if "seq" in frame else []
                assert seqs == list(range(1, len(seqs) + 1))
                await stalled.send_frame({"type": "ping", "ref": 1})
                assert (await stalled.next_json())["ref"] == 1


async def test_the_time_for_a_pong_stands_still_while_something_waits_to_be_written() -> None:
    config = gateway_config(heartbeat_interval_secs=0.1, heartbeat_timeout_secs=0.4)
    with trio.fail_after(DEADLINE_S):
        async with open_gateway_world(config) as world:
            session_id = await world.big_session()
            async with open_upgraded(world.url, receive_buffer=65536) as stalled, open_upgraded(world.url) as other:
                opcode, ping = await stalled.receive()
                assert opcode == PING
                await world.stall(stalled, session_id)
                await other.send_frame({"type": "connect"})
                await other.beat(8)
                while (await stalled.next_json())["type"] != "agent_complete":
                    pass
                await stalled.send(client_frame(ping, opcode=PONG))
                await stalled.send_frame({"type": "ping", "ref": 1})
                assert (await stalled.next_json())["ref"] == 1


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
            await other.beat(8)
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
            await other.beat(8)
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


# By a clock that only the test moves, so that it is known to the second for what a client is blamed.


async def alive(client: RawClient) -> bool:
    """Whether a ping of the client is answered; False: its connection is being closed."""
    await trio.testing.wait_all_tasks_blocked()  # the heartbeat has seen what time it is
    await client.send_frame({"type": "ping", "ref": "alive"})
    while True:
        opcode, payload = await client.receive()
        if opcode == CLOSE:
            return False
        if opcode == TEXT and json.loads(payload).get("ref") == "alive":
            return True


async def test_the_time_that_we_are_busy_is_not_the_clients(mock_clock: MockClock) -> None:
    config = gateway_config(heartbeat_interval_secs=30, heartbeat_timeout_secs=10)
    async with open_gateway_world(config) as world, open_upgraded(world.url) as client:
        await client.send_frame({"type": "connect"})
        await client.receive_json()
        mock_clock.jump(30)
        assert (await client.receive())[0] == PING  # never answered: due at 40
        mock_clock.jump(1)
        world.agents.chat_gate.close()
        await client.send_frame({"type": "chat", "content": "hi"})
        await world.agents.chat_gate.arrived()
        mock_clock.jump(8)
        world.agents.chat_gate.open()
        assert (await client.receive_json())["type"] == "accepted"
        mock_clock.jump(2)
        assert await alive(client)  # at 41: due at 48
        mock_clock.jump(6)
        assert await alive(client)
        mock_clock.jump(1)
        assert not await alive(client)
        await client.send(client_frame(b"\x03\xe8", opcode=CLOSE))


async def test_the_time_that_the_client_takes_to_read_is_not_the_pongs(mock_clock: MockClock) -> None:
    config = gateway_config(heartbeat_interval_secs=30, heartbeat_timeout_secs=10)
    async with open_gateway_world(config) as world:
        session_id = await world.big_session()
        async with open_upgraded(world.url, receive_buffer=1 << 19) as client:
            await client.send_frame({"type": "connect"})
            await client.receive_json()
            mock_clock.jump(30)
            assert (await client.receive())[0] == PING
            mock_clock.jump(1)
            await client.send_frame({"type": "subscribe", "session_id": session_id, "after": "none.0"})
            while not any(connection._stream.writing for connection in world.gateway._connections):
                await trio.testing.wait_all_tasks_blocked()
            mock_clock.jump(8)
            while (await client.receive_json())["type"] != "agent_complete":
                pass
            mock_clock.jump(2)
            assert await alive(client)
            mock_clock.jump(6)
            assert await alive(client)
            mock_clock.jump(1)
            assert not await alive(client)
            await client.send(client_frame(b"\x03\xe8", opcode=CLOSE))
