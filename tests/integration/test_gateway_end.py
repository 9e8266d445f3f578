"""The gateway over real sockets: its start, its end, and what is left of a connection."""

import pytest
import trio
import trio.testing

from bamboo.bus.event_bus import EventBus
from bamboo.core.events import AgentToken, Event, SessionCreated
from bamboo.core.types import RunId, SessionId
from bamboo.errors import StartError
from bamboo.gateway.listener import open_gateway
from bamboo.store.base import Commit, Session
from bamboo.store.memory import MemoryStore
from tests.support.gateway import gateway_config, open_gateway_world
from tests.support.ws_client import JsonFrame, connect, open_ws, seqs, types

DEADLINE_S = 10


async def test_draining_is_told_to_all_and_to_those_who_come_later_and_chats_are_refused() -> None:
    with trio.fail_after(DEADLINE_S):
        async with open_gateway_world() as world, world.connect() as client, world.connect() as other:
            world.gateway.draining(12.5)
            for each in (client, other):
                assert await each.receive() == {"type": "draining", "grace_s": 12.5}
            async with open_ws(world.url) as late:
                await late.send({"type": "connect"})
                frames = await late.until_type("connected")
                assert "draining" in types(frames) or (await late.receive())["type"] == "draining"
            world.world.agents.draining = True
            answer = await client.call({"type": "chat", "content": "hi"})
            assert (answer["code"], answer["retryable"]) == ("draining", True)
            assert answer["retry_after_ms"] > 0


async def test_at_the_end_clients_get_what_there_is_and_then_1001() -> None:
    with trio.fail_after(DEADLINE_S):
        endings: list[tuple[int, list[JsonFrame]]] = []

        async def stay(url: str, session_id: str, task_status: trio.TaskStatus[None]) -> None:
            """Asks for the whole session as the last thing before the server goes, and reads to the end."""
            async with open_ws(url) as client:
                await client.call({"type": "connect"})
                await client.send({"type": "subscribe", "session_id": session_id, "after": "none.0", "ref": 1})
                await client.answer(1)
                task_status.started()
                endings.append((await client.close_code(), client.seen))

        async with trio.open_nursery() as nursery, open_gateway_world() as world:
            session_id, events = await world.finished_session(*(f"{n} " for n in range(50)))
            for _ in range(5):
                await nursery.start(stay, world.url, session_id)

        assert [code for code, _ in endings] == [1001] * 5
        for _, seen in endings:
            assert seen[-len(events) :] == events


async def test_what_was_published_in_the_last_moment_comes_before_1001() -> None:
    with trio.fail_after(DEADLINE_S):
        session_id, run_id = SessionId("s"), RunId("r")
        endings: list[tuple[int, list[JsonFrame]]] = []

        async def stay(url: str, task_status: trio.TaskStatus[None]) -> None:
            async with connect(url, session_id=session_id) as client:
                task_status.started()
                endings.append((await client.close_code(), client.seen))

        async with (
            trio.open_nursery() as nursery,
            open_gateway_world() as world,
            world.world.store.own(session_id) as log,
        ):
            created = Event(session_id, log.epoch, 1, 0, None, SessionCreated())
            await log.commit(Commit(events=[created], session=Session(session_id, 0, 0)))
            window = world.world.bus.open_window(session_id, log.epoch, 1, first_seq=1)
            await nursery.start(stay, world.url)
            for seq in range(2, 10):
                window.publish(Event(session_id, log.epoch, seq, 0, run_id, AgentToken("x")))

        ((code, seen),) = endings
        assert (code, seqs(seen)) == (1001, list(range(2, 10)))


async def test_after_the_end_nobody_listens() -> None:
    with trio.fail_after(DEADLINE_S):
        async with open_gateway_world() as world:
            url = world.url
        with pytest.raises(OSError, match=r"refused|connect"):
            await trio.open_tcp_stream("127.0.0.1", int(url.split(":")[2].strip("/")))


async def test_a_port_that_is_taken_is_one_clear_line() -> None:
    with trio.fail_after(DEADLINE_S):
        async with open_gateway_world() as world, trio.open_nursery() as nursery:
            config = gateway_config()
            config = config.model_copy(
                update={"gateway": config.gateway.model_copy(update={"bind": f"127.0.0.1:{world.gateway.port}"})}
            )
            store = MemoryStore(lambda: 0)
            with pytest.raises(StartError) as caught:
                async with open_gateway(
                    config,
                    nursery,
                    agents=world.agents,
                    bus=EventBus(store, window_bytes=1024),
                    store=store,
                    page_origins=list,
                    addresses=world.addresses,
                ):
                    pass
            assert str(caught.value).startswith(f"gateway.bind: cannot listen on 127.0.0.1:{world.gateway.port}: ")
            assert "\n" not in str(caught.value)


async def test_nothing_of_a_connection_is_left_when_it_is_gone() -> None:
    with trio.fail_after(DEADLINE_S):
        async with open_gateway_world() as world:
            session_id, _ = await world.finished_session()
            for _ in range(20):
                async with world.connect(session_id=session_id) as client:
                    await client.chat("hello", session_id="another")
            await world.until_idle()
            assert world.gateway.connections == 0
            assert world.world.bus.subscriptions == 0
