"""Stop is a fact: when its receipt is given, nothing of the run is alive and its end is committed."""

import pytest
import trio
import trio.testing

from bamboo.core.events import AgentComplete, AgentMessage, AgentStopped
from bamboo.core.types import RunId, RunStatus, SessionId, StopReceipt, content_text
from bamboo.errors import BambooError, ErrorCode
from tests.support.agents import World, chat, open_world, types
from tests.support.stores import GatedStore

S = SessionId("s")


async def statuses(store: GatedStore) -> list[RunStatus]:
    return [run.status for run in await store.runs(S, limit=100)]


async def test_stop_of_a_streaming_run_keeps_its_text_and_closes_the_upstream_first(store: GatedStore) -> None:
    with trio.fail_after(5):
        async with open_world(store) as world:
            accepted = await world.agents.chat(chat("hi", "s"))
            call = await world.model.next_call()
            call.say("half a sen")
            await seen(world, accepted.run_id, "agent_token")
            receipt = await world.agents.stop(S)
            assert call.closed.is_set()
            assert world.agents.active_runs == 0
            log = await world.events("s")
    assert receipt.stopped == (accepted.run_id,)
    assert types(log)[-2:] == ["agent_message", "agent_stopped"]
    message, end = log[-2].body, log[-1].body
    assert isinstance(message, AgentMessage)
    assert message.partial
    assert content_text(message.content) == "half a sen"
    assert end == AgentStopped("user")
    assert receipt.cursor.seq >= log[-1].seq
    assert [entry.partial for entry in await store.messages(S)] == [False, True]


async def test_stop_without_a_run_takes_the_queue_along(store: GatedStore) -> None:
    with trio.fail_after(5):
        async with open_world(store) as world:
            runs = [(await world.agents.chat(chat(text, "s"))).run_id for text in "abc"]
            receipt = await world.agents.stop(S)
            assert await statuses(store) == [RunStatus.STOPPED] * 3
            assert world.agents.queued_runs == 0
    assert receipt.stopped == tuple(runs)
    assert [content_text(message.content) for message in await store.messages(S)] == ["a"]


async def test_stop_of_one_queued_run_leaves_the_others(store: GatedStore) -> None:
    with trio.fail_after(5):
        async with open_world(store) as world:
            runs = [(await world.agents.chat(chat(text, "s"))).run_id for text in "abc"]
            receipt = await world.agents.stop(S, runs[1])
            assert await statuses(store) == [RunStatus.QUEUED, RunStatus.STOPPED, RunStatus.RUNNING]
            (await world.model.next_call()).end()
            call = await world.model.next_call()
            assert [content_text(message.content) for message in call.call.messages] == ["a", "c"]
            call.end()
    assert receipt.stopped == (runs[1],)


async def test_a_stop_that_finds_the_run_sealed_waits_for_it_and_stopped_nothing(store: GatedStore) -> None:
    receipts: list[StopReceipt] = []

    async def stop(world: World) -> None:
        receipts.append(await world.agents.stop(S))

    with trio.fail_after(5):
        async with open_world(store) as world:
            await world.agents.chat(chat("hi", "s"))
            call = await world.model.next_call()
            call.say("all of it")
            store.gate.close()
            call.end()
            await call.closed.wait()  # the answer is whole, its commit is held up
            await store.gate.arrived()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(stop, world)
                await trio.testing.wait_all_tasks_blocked()
                assert receipts == []
                store.gate.open()
            log = await world.events("s")
    assert receipts[0].stopped == ()
    assert isinstance(log[-1].body, AgentComplete)


async def test_two_stops_at_once_name_the_run_once(store: GatedStore) -> None:
    receipts: list[StopReceipt] = []

    async def stop(world: World) -> None:
        receipts.append(await world.agents.stop(S))

    with trio.fail_after(5):
        async with open_world(store) as world:
            accepted = await world.agents.chat(chat("hi", "s"))
            async with trio.open_nursery() as nursery:
                nursery.start_soon(stop, world)
                nursery.start_soon(stop, world)
            log = await world.events("s")
    assert sorted(receipt.stopped for receipt in receipts) == [(), (accepted.run_id,)]
    assert types(log).count("agent_stopped") == 1


async def test_a_stop_that_finds_a_queued_run_stopped_waits_for_the_commit_of_that(store: GatedStore) -> None:
    receipts: list[StopReceipt] = []

    with trio.fail_after(5):
        async with open_world(store) as world:
            await world.agents.chat(chat("runs", "s"))
            queued = await world.agents.chat(chat("waits", "s"))

            async def stop() -> None:
                receipts.append(await world.agents.stop(S, queued.run_id))

            store.gate.close()
            async with trio.open_nursery() as nursery:
                for _ in range(2):
                    nursery.start_soon(stop)
                    await store.gate.arrived()
                    await trio.testing.wait_all_tasks_blocked()
                    assert receipts == []
                store.gate.open()
            await world.agents.stop(S)
    assert sorted(receipt.stopped for receipt in receipts) == [(), (queued.run_id,)]


async def test_stop_while_the_run_waits_for_its_first_commit(store: GatedStore) -> None:
    """The second run has its slot, but `run_started` is not durable yet."""
    receipts: list[StopReceipt] = []

    async def stop(world: World) -> None:
        receipts.append(await world.agents.stop(S, second.run_id))

    with trio.fail_after(5):
        async with open_world(store) as world:
            first = await world.agents.chat(chat("one", "s"))
            second = await world.agents.chat(chat("two", "s"))
            call = await world.model.next_call()
            store.gate.close()
            call.end()
            with world.bus.subscribe(S) as subscription:
                subscription.begin_at(second.cursor.seq)
                async with trio.open_nursery() as nursery:
                    await store.gate.arrived()
                    store.gate.open()
                    while world.agents.queued_runs:
                        await trio.lowlevel.checkpoint()
                    store.gate.close()
                    nursery.start_soon(stop, world)
                    await trio.testing.wait_all_tasks_blocked()
                    store.gate.open()
            log = [event for event in await world.events("s") if event.run_id == second.run_id]
            assert len(world.model.calls) == 1, "a stopped run asked the provider"
    assert first.run_id != second.run_id
    assert types(log) in (
        ["user_message", "run_queued", "run_started", "agent_stopped"],
        ["user_message", "run_queued", "agent_stopped"],
    )
    assert receipts[0].stopped == (second.run_id,)


async def test_what_is_not_there_cannot_be_stopped(store: GatedStore) -> None:
    with trio.fail_after(5):
        async with open_world(store) as world:
            with pytest.raises(BambooError) as refusal:
                await world.agents.stop(SessionId("nobody"))
            assert refusal.value.code is ErrorCode.SESSION_NOT_FOUND
            accepted = await world.agents.chat(chat("hi", "s"))
            with pytest.raises(BambooError) as refusal:
                await world.agents.stop(S, RunId("run_nobody"))
            assert refusal.value.code is ErrorCode.RUN_NOT_FOUND
            await world.agents.stop(S, accepted.run_id)
            assert (await world.agents.stop(S, accepted.run_id)).stopped == ()
            assert (await world.agents.stop(S)).stopped == ()


async def test_a_run_that_nobody_stopped_goes_on_after_its_readers_left(store: GatedStore) -> None:
    with trio.fail_after(5):
        async with open_world(store) as world:
            accepted = await world.agents.chat(chat("hi", "s"))
            call = await world.model.next_call()
            call.say("one")
            await seen(world, accepted.run_id, "agent_token")
            assert world.bus.subscriptions == 0
            call.say("two")
            call.end()
            events = await world.read_run("s", accepted.run_id, accepted.cursor)
    assert types(events)[-1] == "agent_complete"


async def seen(world: World, run_id: RunId, kind: str) -> None:
    """Return when an event of this type is published."""
    with world.bus.subscribe(S, run_id=run_id) as subscription:
        subscription.begin_at(0)
        while kind not in types(await subscription.receive()):
            pass
