"""`agent.max_live_sessions`: at the bound the session that has been idle longest makes room, and nobody else."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import pytest
import trio
import trio.testing
from structlog.testing import capture_logs

from bamboo.agent.requests import ChatRequest
from bamboo.config import AgentConfig
from bamboo.core.types import Accepted, RunStatus, SessionId
from bamboo.errors import BambooError, ClientError, ErrorCode, StoreError
from bamboo.store import wall_clock_ms
from bamboo.store.memory import MemoryStore
from tests.support.agents import World, chat, config, is_terminal, open_world, types
from tests.support.stores import GatedStore
from tests.support.sweep import Cut, run_once, sweep, usual_seeds

S = SessionId("s")


@asynccontextmanager
async def open_small(store: MemoryStore, *, bound: int = 3, **agent: int) -> AsyncIterator[World]:
    """Room for `bound` sessions; nobody leaves for having been idle."""
    small = {"max_live_sessions": bound, "idle_evict_s": 100_000, **agent}
    settings = config(AgentConfig.model_validate(small))
    async with open_world(store, settings) as world:
        yield world


async def talk(world: World, session_id: str) -> Accepted:
    """A whole run; the session is idle behind it."""
    accepted = await world.agents.chat(chat("hi", session_id))
    (await world.model.next_call()).end()
    await world.read_run(session_id, accepted.run_id, accepted.cursor)
    await trio.testing.wait_all_tasks_blocked()
    return accepted


def in_memory(world: World) -> list[str]:
    return list(world.agents._live)


async def refusal_of(world: World, session_id: str) -> BambooError:
    with pytest.raises(BambooError) as refusal:
        await world.agents.chat(chat("no", session_id))
    return refusal.value


async def test_the_one_that_has_been_idle_longest_leaves_for_a_new_one(store: GatedStore) -> None:
    with trio.fail_after(5):
        async with open_small(store) as world:
            for session_id in "abc":
                await talk(world, session_id)
            await world.agents.update_session(SessionId("a"), {"title": "used again"})
            await talk(world, "d")
            assert in_memory(world) == ["a", "c", "d"]
            await talk(world, "e")
            assert in_memory(world) == ["a", "d", "e"]
            assert world.agents.sessions == world.bus.sessions == 3


async def test_it_leaves_at_once_and_comes_back_as_it_was(store: GatedStore) -> None:
    with trio.fail_after(5):
        async with open_small(store, bound=1) as world:
            first = await talk(world, "a")
            with world.bus.subscribe(SessionId("a")) as reader:
                await reader.begin(None)
                await talk(world, "b")
                assert in_memory(world) == ["b"]
                again = await talk(world, "a")
                assert in_memory(world) == ["a"]
                seen = [*(reader.take_nowait() or ())]
    assert again.cursor.epoch == first.cursor.epoch
    assert types(seen)[0] == "user_message"
    assert "gap" not in types(seen)


async def test_sessions_with_a_run_stay_and_if_no_other_is_there_the_chat_is_refused(store: GatedStore) -> None:
    """Running, queued, and being accepted: none of them is idle."""
    with trio.fail_after(5):
        async with open_small(store, max_active_runs=1) as world, trio.open_nursery() as nursery:
            await world.agents.chat(chat("runs", "a"))
            await world.agents.chat(chat("waits for a slot", "b"))
            store.gate.close()
            nursery.start_soon(world.agents.chat, chat("is not committed yet", "c"))
            await store.gate.arrived()
            refusal = await refusal_of(world, "d")
            assert (refusal.code, refusal.retryable) == (ErrorCode.OVERLOADED, True)
            assert refusal.retry_after_s
            assert in_memory(world) == ["a", "b", "c"]
            store.gate.open()
    assert await store.session(SessionId("d")) is None


async def test_a_session_whose_run_has_just_ended_makes_room(store: GatedStore) -> None:
    with trio.fail_after(5):
        async with open_small(store, bound=1) as world:
            accepted = await world.agents.chat(chat("hi", "a"))
            assert (await refusal_of(world, "b")).code is ErrorCode.OVERLOADED
            (await world.model.next_call()).end()
            await world.read_run("a", accepted.run_id, accepted.cursor)
            await trio.testing.wait_all_tasks_blocked()
            assert (await world.agents.chat(chat("hi", "b"))).accepted_as == "started"


async def test_a_session_whose_queued_run_was_stopped_makes_room(store: GatedStore) -> None:
    with trio.fail_after(5):
        async with open_small(store, bound=2, max_active_runs=1) as world:
            await world.agents.chat(chat("runs", "a"))
            await world.agents.chat(chat("waits", "b"))
            await world.agents.stop(SessionId("b"))
            await trio.testing.wait_all_tasks_blocked()
            assert (await world.agents.chat(chat("waits", "c"))).accepted_as == "queued"
            assert in_memory(world) == ["a", "c"]


async def test_a_session_that_was_loaded_to_settle_its_runs_makes_room_behind_that(store: GatedStore) -> None:
    with trio.fail_after(5):
        with trio.CancelScope() as process:
            async with open_small(store) as world:
                await world.agents.chat(chat("hi", "a"))
                process.cancel()
                await trio.lowlevel.checkpoint()
        store.crash()
        async with open_small(store, bound=1) as world:
            await trio.testing.wait_all_tasks_blocked()
            assert (await world.agents.chat(chat("hi", "b"))).accepted_as == "started"
            assert in_memory(world) == ["b"]


async def test_what_an_earlier_process_accepted_is_taken_up_above_the_bound(store: GatedStore) -> None:
    with trio.fail_after(5):
        async with open_small(store, bound=5, max_active_runs=1) as world:
            for session_id in "abcde":
                await world.agents.chat(chat("hi", session_id))
        async with open_small(store, bound=2) as world:
            for _ in range(4):
                (await world.model.next_call()).end()
            await trio.testing.wait_all_tasks_blocked()
            await talk(world, "f")
            assert world.agents.sessions == 2
    for session_id in "abcde":
        [run] = await store.runs(SessionId(session_id), limit=5)
        assert run.status.finished


async def test_nobody_is_pushed_out_by_requests_for_what_is_not_there(store: GatedStore) -> None:
    codes = []
    with trio.fail_after(5):
        async with open_small(store) as world:
            for session_id in "abc":
                await talk(world, session_id)
            for _ in range(50):
                for asking in (world.agents.stop, world.agents.delete):
                    with pytest.raises(BambooError) as refusal:
                        await asking(SessionId("nobody"))
                    codes.append(refusal.value.code)
                with pytest.raises(BambooError) as refusal:
                    await world.agents.update_session(SessionId("nobody"), {"title": "x"})
                codes.append(refusal.value.code)
            assert in_memory(world) == ["a", "b", "c"]
            assert store.loads == 3
    assert set(codes) == {ErrorCode.SESSION_NOT_FOUND}


async def test_nobody_is_pushed_out_by_a_chat_for_which_there_is_no_room_in_the_queue(store: GatedStore) -> None:
    with trio.fail_after(5):
        async with open_small(store, max_active_runs=1, max_queued_runs=1) as world:
            await talk(world, "idle")
            await world.agents.chat(chat("runs", "a"))
            await world.agents.chat(chat("waits", "b"))
            assert "max_queued_runs" in (await refusal_of(world, "c")).message
            assert in_memory(world) == ["idle", "a", "b"]


async def test_a_chat_that_the_store_refuses_leaves_no_session_in_memory(store: GatedStore) -> None:
    with trio.fail_after(5):
        async with open_small(store) as world:
            for number in range(20):
                store.failures.append(StoreError("disk full"))
                assert (await refusal_of(world, f"s{number}")).code is ErrorCode.STORE_UNAVAILABLE
            await trio.testing.wait_all_tasks_blocked()
            assert world.agents.sessions == world.bus.sessions == 0


async def test_a_session_that_cannot_be_recovered_yet_is_not_pushed_out(
    store: GatedStore, autojump_clock: trio.testing.MockClock
) -> None:
    """It is owed its run's end; what its readers saw is only in memory."""
    async with open_small(store, bound=1) as world:
        accepted = await world.agents.chat(chat("hi", "a"))
        call = await world.model.next_call()
        call.say("seen")
        store.loading_failures += [StoreError("disk failing")] * 5
        call.fail(RuntimeError("a bug"))
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert (await refusal_of(world, "b")).code is ErrorCode.OVERLOADED
        items = await world.read_run("a", accepted.run_id, accepted.cursor)
        await trio.testing.wait_all_tasks_blocked()
        assert types(items)[-2:] == ["agent_message", "agent_error"]
        assert (await world.agents.chat(chat("hi", "b"))).accepted_as == "started"
    assert autojump_clock.current_time() < 60


async def test_an_idle_session_whose_runner_dies_is_not_taken_for_idle(store: GatedStore) -> None:
    with trio.fail_after(5):
        async with open_small(store, bound=1) as world:
            await talk(world, "a")
            runner = world.agents._live[SessionId("a")].runner
            assert runner is not None

            async def bug() -> None:
                await trio.lowlevel.checkpoint()
                raise RuntimeError("a bug")

            store.loading_gate.close()
            runner._nursery.start_soon(bug)
            await store.loading_gate.arrived()
            assert (await refusal_of(world, "b")).code is ErrorCode.OVERLOADED
            store.loading_gate.open()
            await trio.testing.wait_all_tasks_blocked()
            assert (await world.agents.chat(chat("hi", "b"))).accepted_as == "started"


def test_being_pushed_out_that_meets_a_chat_at_any_step_loses_neither() -> None:
    """Session `s` is idle and is asked something at every step of its making room for another."""

    async def scenario(cut: Cut) -> None:
        store = MemoryStore(wall_clock_ms)
        async with open_small(store, bound=1) as world, trio.open_nursery() as nursery:
            nursery.start_soon(answer_all, world)
            first = await world.agents.chat(chat("one", "s"))
            await world.read_run("s", first.run_id, first.cursor)
            while not world.agents._idle:
                await trio.lowlevel.checkpoint()
            with cut:
                await world.agents.chat(chat("push", "other"))
                while any(not run.status.finished for run in await store.runs(SessionId("other"), limit=1)):
                    await trio.lowlevel.checkpoint()
            second = await insist(world, "s")
            items = await world.read_run("s", second.run_id, second.cursor)
            assert is_terminal(items[-1])
            nursery.cancel_scope.cancel()
        assert world.agents.sessions == world.bus.sessions == world.agents.active_runs == 0
        assert [run.status for run in await store.runs(S, limit=5)] == [RunStatus.COMPLETED] * 2

    assert sweep(scenario, seeds=usual_seeds(4), every=2).cancelled > 50


def test_a_chat_that_meets_the_end_of_a_run_at_any_step_does_not_make_its_session_leave() -> None:
    """Another session waits to push it out. A session that has left with a run could not even be stopped."""

    async def scenario(cut: Cut) -> None:
        store = MemoryStore(wall_clock_ms)
        asked = ChatRequest(chat("two", "s"), None)
        refusals: list[ClientError] = []

        async def push(world: World) -> None:
            while True:
                with suppress(ClientError):
                    await world.agents.chat(chat("push", "other"))
                    return
                await trio.lowlevel.checkpoint()

        async with open_small(store, bound=1) as world, trio.open_nursery() as nursery:
            await world.agents.chat(chat("one", "s"))
            call = await world.model.next_call()
            nursery.start_soon(push, world)

            def ask() -> None:
                try:
                    world.agents._submit(S, asked)
                except ClientError as error:
                    refusals.append(error)

            cut.at_once = ask
            with cut:
                call.end()
                await trio.sleep(1)  # virtual
            if not cut.reached:
                ask()
            if not refusals:
                accepted = await asked.reply.wait()
                receipt = await world.agents.stop(S)
                assert receipt.stopped == (accepted.run_id,)
            nursery.cancel_scope.cancel()

    assert sweep(scenario, seeds=usual_seeds(4), every=2).cancelled > 50


def test_being_pushed_out_in_the_moment_in_which_it_would_have_left_anyway_is_no_bug() -> None:
    orders = set()

    async def scenario(cut: Cut) -> None:
        store = MemoryStore(wall_clock_ms)
        settings = config(AgentConfig(max_live_sessions=1, idle_evict_s=2))
        with cut:
            async with open_world(store, settings) as world:
                await talk(world, "s")
                await trio.sleep_until(2)
                orders.add(tuple(world.agents._live))
                await world.agents.chat(chat("hi", "other"))
                await trio.sleep(1)
                assert world.agents.sessions == 1
                with pytest.raises(BambooError):
                    await world.agents.chat(chat("hi", "s"))

    with capture_logs() as logs:
        for seed in range(30):
            run_once(scenario, seed, None)
    assert orders == {("s",), ()}, "only one of the two orders was tried"
    assert [line for line in logs if line["event"] == "runner_failed"] == []


async def answer_all(world: World) -> None:
    while True:
        (await world.model.next_call()).end()


async def insist(world: World, session_id: str) -> Accepted:
    while True:
        try:
            return await world.agents.chat(chat("two", session_id))
        except BambooError as error:
            if error.code is not ErrorCode.OVERLOADED:
                raise
            await trio.lowlevel.checkpoint()
