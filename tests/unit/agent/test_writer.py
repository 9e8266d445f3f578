"""Numbering, committing, publishing: strictly in order, whatever the store does."""

from collections.abc import Sequence

import pytest
import trio
import trio.testing

from bamboo.config import Config, StorageConfig, StreamConfig
from bamboo.core.events import AgentToken, Event, Gap, Item
from bamboo.core.types import RunStatus, SessionId
from bamboo.errors import BambooError, ErrorCode, StoreError
from tests.support.agents import chat, config, open_world, types
from tests.support.stores import GatedStore

S = SessionId("s")


def tokens(items: Sequence[Item]) -> list[str]:
    return [item.body.token for item in items if isinstance(item, Event) and isinstance(item.body, AgentToken)]


async def test_a_healthy_reader_of_deltas_waits_for_no_commit(store: GatedStore) -> None:
    with trio.fail_after(5):
        async with open_world(store) as world:
            accepted = await world.agents.chat(chat("hi", "s"))
            call = await world.model.next_call()
            store.gate.close()
            with world.bus.subscribe(S, run_id=accepted.run_id) as subscription:
                await subscription.begin(accepted.cursor)
                await subscription.receive()
                call.say("one")
                assert tokens(await subscription.receive()) == ["one"]
                await store.gate.arrived()  # the first chunk is on its way to the store, and held up there
                call.say("two")
                assert tokens(await subscription.receive()) == ["two"]
            store.gate.open()
            await world.agents.stop(S)


async def test_what_is_no_delta_is_durable_before_it_is_seen_and_holds_back_what_is_behind(store: GatedStore) -> None:
    with trio.fail_after(5):
        async with open_world(store) as world:
            await world.agents.chat(chat("hi", "s"))
            call = await world.model.next_call()
            with world.bus.subscribe(S) as subscription:
                await subscription.begin(None)
                call.say("one")
                assert types(await subscription.receive()) == ["agent_token"]
                store.gate.close()
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(world.agents.chat, chat("two", "s"))
                    await store.gate.arrived()
                    call.say("behind")
                    await trio.testing.wait_all_tasks_blocked()
                    assert subscription.take_nowait() == []
                    durable = await store.extent(S)
                    store.gate.open()
                items: list[Item] = []
                while len(items) < 3:
                    items += await subscription.receive()
            assert types(items) == ["user_message", "run_queued", "agent_token"]
            assert durable is not None
            assert isinstance(items[0], Event)
            assert durable.head < items[0].seq
            await world.agents.stop(S)


async def test_deltas_are_committed_in_chunks_and_go_along_with_the_next_commit(
    store: GatedStore, autojump_clock: trio.testing.MockClock
) -> None:
    async with open_world(store) as world:
        accepted = await world.agents.chat(chat("hi", "s"))
        call = await world.model.next_call()
        before = len(store.commits)
        for _ in range(100):
            call.say("x")
            await trio.sleep(0.01)  # the provider's pace, on the mock clock
        call.end()
        await world.read_run("s", accepted.run_id, accepted.cursor)
    chunks = [len(commit.events) for commit in store.commits[before:]]
    assert sum(chunks) == 102
    assert 10 <= len(chunks) <= 12
    assert autojump_clock.current_time() < 60


async def test_a_refused_chat_gives_its_numbers_back(store: GatedStore) -> None:
    with trio.fail_after(5):
        async with open_world(store) as world:
            first = await world.agents.chat(chat("hi", "s"))
            await world.agents.stop(S)
            store.failures.append(StoreError("disk full"))
            with pytest.raises(BambooError) as refusal:
                await world.agents.chat(chat("lost", "s"))
            assert refusal.value.code is ErrorCode.STORE_UNAVAILABLE
            assert world.agents.active_runs == 0
            second = await world.agents.chat(chat("found", "s"))
            log = await world.events("s")
    assert first.run_id != second.run_id
    assert [event.seq for event in log] == list(range(1, len(log) + 1))
    assert types(log).count("user_message") == 2


async def test_a_runs_own_events_are_tried_again_with_the_same_seqs(
    store: GatedStore, autojump_clock: trio.testing.MockClock
) -> None:
    async with open_world(store) as world:
        accepted = await world.agents.chat(chat("hi", "s"))
        call = await world.model.next_call()
        with world.bus.subscribe(S, run_id=accepted.run_id) as subscription:
            await subscription.begin(accepted.cursor)
            store.failures += [StoreError("disk full")] * 7
            call.say("kept")
            seen: list[Item] = []
            while "agent_token" not in types(seen):
                seen += await subscription.receive()
            call.end()
            while batch := await subscription.receive():
                seen += batch
        log = await world.events("s")
    assert store.failures == []
    assert types(seen).count("error") == 1
    assert [event for event in log if event.run_id == accepted.run_id] == [e for e in seen if isinstance(e, Event)]
    assert [run.status for run in await store.runs(S, limit=5)] == [RunStatus.COMPLETED]
    assert autojump_clock.current_time() < 60


async def test_above_its_bound_of_uncommitted_bytes_a_run_stops_reading_its_provider(store: GatedStore) -> None:
    settings = config(stream=StreamConfig(window_bytes=1024, max_uncommitted_bytes=4096))
    with trio.fail_after(5):
        async with open_world(store, settings) as world:
            accepted = await world.agents.chat(chat("hi", "s"))
            call = await world.model.next_call()
            store.gate.close()
            for _ in range(100):
                call.say("x" * 100)
            await trio.testing.wait_all_tasks_blocked()
            assert 0 < call.unread < 100
            store.gate.open()
            call.end()
            items = await world.read_run("s", accepted.run_id, accepted.cursor)
    assert len(tokens(items)) == 100


async def test_a_store_without_an_answer_costs_an_epoch_and_no_order(
    store: GatedStore, autojump_clock: trio.testing.MockClock
) -> None:
    settings = Config(**{**dict(config()), "storage": StorageConfig(commit_timeout_s=1)})
    async with open_world(store, settings) as world:
        accepted = await world.agents.chat(chat("hi", "s"))
        call = await world.model.next_call()
        with world.bus.subscribe(S) as subscription:
            await subscription.begin(accepted.cursor)
            store.gate.close()
            call.say("seen, and lost")
            seen: list[Item] = []
            while "agent_token" not in types(seen):
                seen += await subscription.receive()
            await trio.sleep(1.5)  # the commit's deadline passes, on the mock clock
            store.gate.open()
            while "agent_error" not in types(seen):
                seen += await subscription.receive()
        log = await world.events("s")
        again = await world.agents.chat(chat("and on", "s"))
        (await world.model.next_call()).end()
    lost = next(item for item in seen if isinstance(item, Gap))
    assert lost.reason == "crash"
    assert (lost.from_seq, lost.to_seq) == (4, 4)
    assert [event.seq for event in log] == list(range(1, len(log) + 1))
    assert log[-1].epoch == again.cursor.epoch != accepted.cursor.epoch
    assert autojump_clock.current_time() < 60
