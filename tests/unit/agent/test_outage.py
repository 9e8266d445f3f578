"""A store that refuses, or gives no answer: nothing that was accepted is lost, nobody waits for ever, and everything is
back by itself."""

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from bamboo.agent.registry import CLOSE_S
from bamboo.bus.subscription import Subscription
from bamboo.config import StorageConfig
from bamboo.core.events import AgentError, AgentStopped, Event, Gap, Item, Outage
from bamboo.core.types import Accepted, Cursor, JsonObject, RunStatus, SessionId, ToolResult
from bamboo.errors import BambooError, ErrorCode, StoreError
from tests.support.agents import World, chat, config, is_terminal, open_world, types
from tests.support.model import PlayedCall
from tests.support.stores import GatedStore
from tests.support.tools import FakeToolbox

S, T = SessionId("s"), SessionId("t")
TIMEOUT_S = 3.0
SETTINGS = config(storage=StorageConfig(commit_timeout_s=TIMEOUT_S))
FULL = StoreError("the disk is full")


def break_store(store: GatedStore) -> None:
    store.failures += [FULL] * 1000


def mend_store(store: GatedStore) -> None:
    store.failures.clear()


@pytest.fixture
def clock(autojump_clock: MockClock) -> MockClock:
    return autojump_clock


@asynccontextmanager
async def opened(store: GatedStore, clock: MockClock) -> AsyncIterator[World]:
    """In virtual time: a hang is found at once."""
    assert clock.autojump_threshold == 0
    with trio.fail_after(1000):
        async with open_world(store, SETTINGS) as world:
            yield world


@asynccontextmanager
async def failing_run(store: GatedStore, clock: MockClock) -> AsyncIterator[tuple[World, Accepted, PlayedCall]]:
    """A run whose session's writer fails: it has said one word, which is not durable."""
    async with opened(store, clock) as world:
        accepted = await world.agents.chat(chat("hi", "s"))
        call = await world.model.next_call()
        break_store(store)
        call.say("word")
        await trio.sleep(1)
        yield world, accepted, call


async def refusal_of(asking: Callable[[], Awaitable[object]]) -> tuple[BambooError, float]:
    """What a request is refused with, and after how long."""
    began = trio.current_time()
    with pytest.raises(BambooError) as refused:
        await asking()
    return refused.value, trio.current_time() - began


async def read_to_the_end(subscription: Subscription, seen: list[Item]) -> list[Item]:
    while not any(is_terminal(item) for item in seen):
        seen += await subscription.receive()
    return seen


async def ends_of(world: World, accepted: Accepted) -> list[Event]:
    log = await world.events(accepted.session_id)
    assert [event.seq for event in log] == list(range(1, len(log) + 1))
    return [event for event in log if event.run_id == accepted.run_id and is_terminal(event)]


def events(items: Sequence[Item]) -> list[Event]:
    return [item for item in items if isinstance(item, Event)]


# A store that refuses


async def test_a_run_stops_reading_its_provider_and_goes_on_when_the_store_is_back(
    store: GatedStore, clock: MockClock
) -> None:
    async with failing_run(store, clock) as (world, accepted, call):
        for _ in range(50):
            call.say("more")
        await trio.sleep(60)
        assert call.unread >= 49, "what it was about to read when the store failed, and no more"
        mend_store(store)
        call.end()
        items = await world.read_run("s", accepted.run_id, accepted.cursor)
        assert types(items).count("agent_token") == 51
        assert types(items)[-1] == "agent_complete"
        assert events(items) == (await world.events("s"))[1:]


async def test_readers_are_told_once_however_long_it_takes_and_lose_nothing(
    store: GatedStore, clock: MockClock
) -> None:
    async with failing_run(store, clock) as (world, accepted, call):
        with world.bus.subscribe(S) as subscription:
            await subscription.begin(accepted.cursor)
            call.say("more")
            await trio.sleep(600)
            mend_store(store)
            call.end()
            seen = await read_to_the_end(subscription, await subscription.receive())
        assert [item for item in seen if isinstance(item, Outage)] == [Outage(S, "the disk is full", 1.0)]
        assert events(seen) == (await world.events("s"))[1:]


async def test_a_chat_is_refused_at_once_in_the_failing_session_and_in_any_other(
    store: GatedStore, clock: MockClock
) -> None:
    async with failing_run(store, clock) as (world, _, call):
        for session_id in ("s", "t"):
            refused = chat("no", session_id)
            error, after_s = await refusal_of(lambda: world.agents.chat(refused))  # noqa: B023 - asked at once
            assert (error.code, error.retryable, error.retry_after_s) == (ErrorCode.STORE_UNAVAILABLE, True, 1.0)
            assert after_s == 0
        assert world.agents.active_runs == 1
        mend_store(store)
        await trio.sleep(2)
        assert (await world.agents.chat(chat("again", "s"))).accepted_as == "queued"
        call.end()


async def test_a_refused_chat_of_an_idle_session_is_no_outage_to_its_readers(
    store: GatedStore, clock: MockClock
) -> None:
    async with opened(store, clock) as world:
        accepted = await world.agents.chat(chat("hi", "s"))
        (await world.model.next_call()).end()
        await world.read_run("s", accepted.run_id, accepted.cursor)
        with world.bus.subscribe(S) as subscription:
            await subscription.begin(None)
            store.failures.append(FULL)
            assert (await refusal_of(lambda: world.agents.chat(chat("no", "s"))))[0] is FULL
            assert subscription.take_nowait() == []
        assert (await world.agents.chat(chat("yes", "s"))).accepted_as == "started"


@pytest.mark.parametrize("run_id", [True, False])
async def test_a_stop_takes_effect_is_answered_in_time_and_committed_when_the_store_is_back(
    store: GatedStore, clock: MockClock, *, run_id: bool
) -> None:
    async with failing_run(store, clock) as (world, accepted, call):
        queued = accepted.run_id if run_id else None
        error, after_s = await refusal_of(lambda: world.agents.stop(S, queued))
        assert (error.code, after_s) == (ErrorCode.STORE_UNAVAILABLE, TIMEOUT_S)
        assert call.closed.is_set(), "nothing of the run is alive"
        mend_store(store)
        receipt = await world.agents.stop(S)
        assert receipt.stopped == ()
        [end] = await ends_of(world, accepted)
        assert isinstance(end.body, AgentStopped)


async def test_a_stop_that_meets_a_short_outage_gets_its_receipt(store: GatedStore, clock: MockClock) -> None:
    async with failing_run(store, clock) as (world, accepted, _), trio.open_nursery() as nursery:

        async def mend_soon() -> None:
            await trio.sleep(TIMEOUT_S / 2)
            mend_store(store)

        nursery.start_soon(mend_soon)
        assert (await world.agents.stop(S)).stopped == (accepted.run_id,)


async def test_a_stop_that_takes_long_while_the_store_works_gets_its_receipt(
    store: GatedStore, clock: MockClock
) -> None:
    async def slow_to_die(_: JsonObject) -> ToolResult:
        try:
            await trio.sleep_forever()
        finally:
            with trio.CancelScope(shield=True):
                await trio.sleep(3 * TIMEOUT_S)
        raise AssertionError

    toolbox = FakeToolbox(slow=slow_to_die)
    assert clock.autojump_threshold == 0
    async with open_world(store, SETTINGS, toolbox=lambda: toolbox) as world:
        accepted = await world.agents.chat(chat("hi", "s"))
        call = await world.model.next_call()
        call.ask("slow")
        call.end()
        await toolbox.called.wait()
        began = trio.current_time()
        assert (await world.agents.stop(S)).stopped == (accepted.run_id,)
        assert trio.current_time() - began == 3 * TIMEOUT_S


async def test_a_delete_is_refused_with_nothing_done(store: GatedStore, clock: MockClock) -> None:
    async with failing_run(store, clock) as (world, accepted, call):
        error, after_s = await refusal_of(lambda: world.agents.delete(S))
        assert (error.code, after_s) == (ErrorCode.STORE_UNAVAILABLE, 0)
        mend_store(store)
        call.end()
        await world.read_run("s", accepted.run_id, accepted.cursor)
        await world.agents.delete(S)
        assert await store.session(S) is None


async def test_a_delete_that_the_store_fails_in_the_middle_is_answered_in_time(
    store: GatedStore, clock: MockClock
) -> None:
    async with opened(store, clock) as world:
        accepted = await world.agents.chat(chat("hi", "s"))
        await world.model.next_call()
        break_store(store)
        error, after_s = await refusal_of(lambda: world.agents.delete(S))
        assert (error.code, after_s) == (ErrorCode.STORE_UNAVAILABLE, TIMEOUT_S)
        mend_store(store)
        await world.read_run("s", accepted.run_id, accepted.cursor)
        assert len(await ends_of(world, accepted)) == 1
        await world.agents.delete(S)


async def test_a_change_of_settings_is_refused_at_the_next_attempt(store: GatedStore, clock: MockClock) -> None:
    async with failing_run(store, clock) as (world, _, _):
        error, after_s = await refusal_of(lambda: world.agents.update_session(S, {"title": "new"}))
        assert error.code is ErrorCode.STORE_UNAVAILABLE
        assert after_s <= 1
        mend_store(store)
        await trio.sleep(2)
        assert (await world.agents.update_session(S, {"title": "new"})).title == "new"


# A store that gives no answer


@asynccontextmanager
async def hanging_run(
    store: GatedStore, clock: MockClock
) -> AsyncIterator[tuple[World, Accepted, list[Item], Subscription]]:
    """A run whose word was seen and is not durable, in a store that answers neither commits nor owners."""
    async with opened(store, clock) as world:
        accepted = await world.agents.chat(chat("hi", "s"))
        call = await world.model.next_call()
        with world.bus.subscribe(S) as subscription:
            await subscription.begin(accepted.cursor)
            store.gate.close()
            store.loading_gate.close()
            call.say("seen, and lost")
            seen: list[Item] = []
            while "agent_token" not in types(seen):
                seen += await subscription.receive()
            await store.gate.arrived()
            yield world, accepted, seen, subscription
            store.gate.open()
            store.loading_gate.open()


async def test_without_an_answer_a_run_ends_as_soon_as_there_is_one_and_its_readers_know_what_they_lost(
    store: GatedStore, clock: MockClock
) -> None:
    async with hanging_run(store, clock) as (world, accepted, seen, subscription):
        await trio.sleep(600)
        store.gate.open()
        store.loading_gate.open()
        await read_to_the_end(subscription, seen)
        [end] = await ends_of(world, accepted)
        assert isinstance(end.body, AgentError)
        assert (end.body.code, end.body.retryable) == ("store_unavailable", True)
        assert types(seen) == ["user_message", "run_started", "agent_token", "error", "gap", "agent_error"]
        gap = seen[4]
        assert isinstance(gap, Gap)
        assert (gap.reason, gap.from_seq, gap.to_seq, gap.cursor.seq) == ("crash", 4, 4, 3)
        assert end.epoch == gap.cursor.epoch != accepted.cursor.epoch
        assert store.loads == 2, "one load waits for the store, however long; more would only wait behind it"
        again = await world.agents.chat(chat("and on", "s"))
        assert again.cursor.epoch == end.epoch


async def test_whoever_waits_for_a_store_without_an_answer_is_refused_in_time(
    store: GatedStore, clock: MockClock
) -> None:
    """The first request waits for the commit that hangs, the second behind it in the inbox; later ones for the load."""
    async with hanging_run(store, clock) as (world, _, _, _):
        await trio.sleep(TIMEOUT_S / 2)  # the commit will be given up before any of them has waited so long
        asked: list[tuple[ErrorCode, float]] = []

        async def ask(asking: Callable[[], Awaitable[object]]) -> None:
            error, after_s = await refusal_of(asking)
            asked.append((error.code, after_s))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask, lambda: world.agents.stop(S))
            await trio.testing.wait_all_tasks_blocked()  # its receipt is being waited for; the others come behind it
            nursery.start_soon(ask, lambda: world.agents.chat(chat("one", "s")))
            nursery.start_soon(ask, lambda: world.agents.chat(chat("two", "s")))
            nursery.start_soon(ask, lambda: world.agents.chat(chat("of another", "t")))
        await ask(lambda: world.agents.chat(chat("to the one that loads", "s")))
        for _ in range(3):
            await ask(lambda: world.agents.chat(chat("late", "s")))
        assert {code for code, _ in asked} == {ErrorCode.STORE_UNAVAILABLE}
        assert max(after_s for _, after_s in asked) <= TIMEOUT_S
        assert [after_s for _, after_s in asked[-3:]] == [0, 0, 0]
        assert world.agents.active_runs == 0


async def test_a_commit_without_an_answer_that_was_done_is_no_loss(store: GatedStore, clock: MockClock) -> None:
    """The chat was refused for want of an answer; it was stored all the same, and its key finds it."""
    async with opened(store, clock) as world:
        store.answers = False
        error, after_s = await refusal_of(lambda: world.agents.chat(chat("hi", "s", idempotency_key="k")))
        assert (error.code, after_s) == (ErrorCode.STORE_UNAVAILABLE, TIMEOUT_S)
        store.answers = True
        again = await world.agents.chat(chat("hi", "s", idempotency_key="k"))
        assert again.accepted_as == "duplicate"
        await world.read_run("s", again.run_id, again.cursor)
        [end] = await ends_of(world, again)
        assert isinstance(end.body, AgentError)
        assert end.body.code == "store_unavailable"
        assert len(world.model.calls) == 0


# A session that cannot be loaded


async def test_a_session_that_was_lost_is_tried_again_by_itself_until_the_store_is_back(
    store: GatedStore, clock: MockClock
) -> None:
    async with hanging_run(store, clock) as (world, accepted, seen, subscription):
        store.loading_failures += [FULL] * 5
        store.loading_gate.open()
        await trio.sleep(TIMEOUT_S + 0.5)
        error, after_s = await refusal_of(lambda: world.agents.chat(chat("no", "s")))
        assert (error.code, after_s) == (ErrorCode.STORE_UNAVAILABLE, 0)
        with world.bus.subscribe(S) as late:
            assert [Outage] == [type(item) for item in late.take_nowait() or ()]
        store.gate.open()
        await read_to_the_end(subscription, seen)
        assert types(seen).count("error") == 1
        assert store.loads == 1 + 5 + 1
        assert len(await ends_of(world, accepted)) == 1


async def test_what_a_start_has_to_settle_is_settled_when_the_store_is_back_though_nobody_asks(
    store: GatedStore, clock: MockClock
) -> None:
    async with opened(store, clock) as world:
        accepted = await world.agents.chat(chat("hi", "s"))
        await world.model.next_call()
        break_store(store)
    store.crash()
    mend_store(store)
    store.loading_failures += [FULL] * 3
    store.failures += [FULL] * 3
    async with opened(store, clock) as world:
        with world.bus.subscribe(S) as subscription:
            await subscription.begin(accepted.cursor)
            seen = await read_to_the_end(subscription, [])
        [end] = await ends_of(world, accepted)
    assert isinstance(end.body, AgentError)
    assert end.body.code == "interrupted"
    assert types(seen).count("error") == 2, (
        "loads that fail are one outage; then the session was there, and commits fail"
    )


async def test_readers_of_a_session_that_a_start_cannot_load_in_time_are_told(
    store: GatedStore, clock: MockClock
) -> None:
    async with opened(store, clock) as world:
        accepted = await world.agents.chat(chat("hi", "s"))
        await world.model.next_call()
        break_store(store)
    store.crash()
    mend_store(store)
    store.loading_gate.close()
    began = clock.current_time()
    async with opened(store, clock) as world:
        with world.bus.subscribe(S) as subscription:
            await subscription.begin(accepted.cursor)
            seen: list[Item] = []
            while "error" not in types(seen):
                seen += await subscription.receive()
            assert clock.current_time() - began == TIMEOUT_S
            assert "agent_error" not in types(seen)
            store.loading_gate.open()
            await read_to_the_end(subscription, seen)
        assert types(seen).count("error") == 1
        assert len(await ends_of(world, accepted)) == 1


async def test_a_session_that_cannot_be_loaded_in_time_does_not_hold_up_a_server_that_leaves(
    store: GatedStore, clock: MockClock
) -> None:
    async with opened(store, clock) as world:
        store.loading_gate.close()
        error, after_s = await refusal_of(lambda: world.agents.chat(chat("hi", "s")))
        assert (error.code, after_s) == (ErrorCode.STORE_UNAVAILABLE, TIMEOUT_S)
        began = clock.current_time()
    assert clock.current_time() == began
    store.loading_gate.open()


async def test_a_start_whose_commits_fail_answers_chats_all_the_same(store: GatedStore, clock: MockClock) -> None:
    """Settling what the last process left waits for the store; the inbox does not wait for that."""
    async with opened(store, clock) as world:
        await world.agents.chat(chat("hi", "s"))
        await world.model.next_call()
        break_store(store)
    store.crash()
    async with opened(store, clock) as world:
        await trio.sleep(1)
        error, after_s = await refusal_of(lambda: world.agents.chat(chat("no", "s")))
        assert (error.code, after_s) == (ErrorCode.STORE_UNAVAILABLE, 0)
        mend_store(store)
        await trio.sleep(2)
        assert (await world.agents.chat(chat("yes", "s"))).accepted_as == "started"
        assert [run.status for run in await store.runs(S, limit=5)] == [RunStatus.RUNNING, RunStatus.INTERRUPTED]


# Leaving


@pytest.mark.parametrize("fault", ["refuses", "hangs"])
async def test_a_drain_in_an_outage_ends_in_time_and_the_next_start_settles_the_run(
    store: GatedStore, fault: str, clock: MockClock
) -> None:
    async with opened(store, clock) as world:
        accepted = await world.agents.chat(chat("hi", "s"))
        call = await world.model.next_call()
        with world.bus.subscribe(S) as subscription:
            await subscription.begin(accepted.cursor)
            if fault == "refuses":
                break_store(store)
            else:
                store.gate.close()
                store.loading_gate.close()
            call.say("seen, and lost")
            seen: list[Item] = []
            while "agent_token" not in types(seen):
                seen += await subscription.receive()
            began = clock.current_time()
            await world.agents.drain(2)
            assert clock.current_time() - began <= 2 + CLOSE_S
    assert clock.current_time() - began <= 2 + 2 * CLOSE_S + TIMEOUT_S
    assert not world.agents.settled, "the stop must not be marked as clean: a reader has seen what is nowhere"
    mend_store(store)
    store.gate.open()
    store.loading_gate.open()
    store.crash()
    async with opened(store, clock) as world:
        with world.bus.subscribe(S) as subscription:
            await subscription.begin(Cursor(accepted.cursor.epoch, accepted.cursor.seq + 3))
            rest = await read_to_the_end(subscription, [])
        [end] = await ends_of(world, accepted)
    assert types(rest) == ["gap", "agent_error"]
    assert isinstance(end.body, AgentError)
    assert end.body.code == "interrupted"
    assert world.agents.settled


async def test_a_stop_of_the_server_after_an_outage_is_a_clean_one(store: GatedStore, clock: MockClock) -> None:
    async with failing_run(store, clock) as (world, _, _):
        mend_store(store)
    assert world.agents.settled
