"""A client that stalls, cuts, floods or says nothing is its own loss only."""

import json

import structlog.testing
import trio
import trio.testing

from bamboo.core.types import SessionId
from bamboo.gateway.outbox import ANSWERS_BYTES
from tests.support.gateway import gateway_config, open_gateway_world
from tests.support.ws_client import (
    CLOSE,
    RawClient,
    client_frame,
    connect,
    open_upgraded,
)

DEADLINE_S = 10


async def test_a_client_that_takes_nothing_is_cut_at_the_write_deadline() -> None:
    with trio.fail_after(DEADLINE_S):
        async with open_gateway_world(gateway_config(server={"write_timeout_s": 0.3})) as world:
            session_id = await world.big_session()
            async with open_upgraded(world.url, receive_buffer=4096) as stalled:
                await world.stall(stalled, session_id)
                await world.until_idle()
                assert b"agent_complete" not in await stalled.rest()


async def test_a_stalled_client_does_not_hold_up_the_others() -> None:
    with trio.fail_after(DEADLINE_S):
        async with open_gateway_world() as world:
            session_id = await world.big_session()
            async with open_upgraded(world.url, receive_buffer=4096) as stalled, world.connect() as client:
                await world.stall(stalled, session_id)
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
                session_id = await world.big_session()
                for _ in range(3):
                    await nursery.start(well_behaved, world.url)
                stalled = await nursery.start(hold, world.url)
                await world.stall(stalled, session_id)
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
            assert await silent.close_code() == 1001
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
            while await flood.next_json() is not None and connection._outbox._waiting_bytes:
                pass
            await world.assert_alive()


async def test_a_client_that_resets_its_connection_leaves_nothing() -> None:
    with trio.fail_after(DEADLINE_S):
        async with open_gateway_world() as world:
            session_id = await world.big_session(megabytes=4)
            with structlog.testing.capture_logs() as logs:
                for _ in range(5):
                    async with open_upgraded(world.url, receive_buffer=4096) as client:
                        await world.stall(client, session_id)
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
                assert await client.close_code() == 1000
            await world.finish_run("ok")
            await world.until_idle()
            session = await world.world.store.session(SessionId("s"))
            assert session is not None
