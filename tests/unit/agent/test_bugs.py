"""A runner that dies of a bug, wherever that strikes, is followed by another at once: whoever waits is answered,
readers miss nothing, every run has one end, the queue goes on."""

from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress

import pytest
import trio
import trio.testing

from bamboo.config import AgentConfig
from bamboo.core.events import AgentError, AgentStopped, Event, Gap, Item, Terminal
from bamboo.core.types import (
    Accepted,
    RunId,
    RunStatus,
    SessionId,
    StopReceipt,
    content_text,
)
from bamboo.errors import BambooError, ErrorCode
from bamboo.store import wall_clock_ms
from tests.support.agents import World, chat, config, open_world, types
from tests.support.bugs import InjectedBug
from tests.support.fragile import FragileStore, FragileToolbox
from tests.support.stores import GatedStore

S = SessionId("s")
UNKNOWN = RunId("run_that_nobody_knows")


@pytest.fixture
def store() -> FragileStore:
    return FragileStore(wall_clock_ms)


class Callers:
    """Requests that are under way together, and what came of each."""

    def __init__(self, world: World, nursery: trio.Nursery) -> None:
        self._world = world
        self._nursery = nursery
        self.told: dict[str, str] = {}

    def chat(self, text: str) -> None:
        self._ask(text, lambda: self._world.agents.chat(chat(text, "s")))

    def stop(self, name: str, run_id: RunId | None = None) -> None:
        self._ask(name, lambda: self._world.agents.stop(S, run_id))

    def delete(self, name: str) -> None:
        self._ask(name, lambda: self._world.agents.delete(S))

    def _ask(self, name: str, asking: Callable[[], Awaitable[Accepted | StopReceipt | None]]) -> None:
        async def ask() -> None:
            try:
                answer = await asking()
            except BambooError as error:
                self.told[name] = error.code
            else:
                self.told[name] = answer.accepted_as if isinstance(answer, Accepted) else "done"

        self._nursery.start_soon(ask)


def ends(log: Sequence[Event]) -> dict[str, str]:
    """Of every run, by its text: how it ended. Fails if one has not exactly one end."""
    texts = {event.run_id: content_text(event.body.content) for event in log if event.body.type == "user_message"}  # type: ignore[union-attr]  # it is one
    told: dict[str, str] = {}
    for event in log:
        if isinstance(event.body, Terminal):
            text = texts[event.run_id]
            assert text not in told, f"{text} ends twice"
            told[text] = event.body.code if isinstance(event.body, AgentError) else event.body.type
    assert set(told) == set(texts.values()), "a run has no end"
    return told


async def answer_all(world: World) -> None:
    while True:
        call = await world.model.next_call()
        with suppress(trio.ClosedResourceError):  # its run is dead already
            call.end()


async def all_ended(store: GatedStore) -> None:
    while any(not run.status.finished for run in await store.runs(S, limit=100)):
        await trio.lowlevel.checkpoint()


async def check_nothing_held(world: World) -> None:
    await trio.testing.wait_all_tasks_blocked()
    assert world.agents.active_runs == world.agents.queued_runs == 0


async def test_a_bug_at_accept_is_told_to_its_caller_and_the_next_ones_are_answered(store: FragileStore) -> None:
    toolbox = FragileToolbox()
    with trio.fail_after(5):
        async with open_world(store, toolbox=toolbox) as world:
            async with trio.open_nursery() as nursery:
                callers = Callers(world, nursery)
                toolbox.bad = 1
                store.loading_gate.close()
                callers.chat("one")
                await store.loading_gate.arrived()
                callers.chat("two")
                await trio.testing.wait_all_tasks_blocked()
                callers.stop("three", UNKNOWN)
                await trio.testing.wait_all_tasks_blocked()
                store.loading_gate.open()
            assert callers.told == {"one": "internal", "two": "started", "three": "run_not_found"}
            (await world.model.next_call()).end()
            await all_ended(store)
            await check_nothing_held(world)
            assert ends(await world.events("s")) == {"two": "agent_complete"}


async def test_a_bug_in_the_commit_of_an_accept_is_not_taken_for_the_stores_failure(store: FragileStore) -> None:
    with trio.fail_after(5):
        async with open_world(store) as world:
            store.failures.append(InjectedBug())
            with pytest.raises(BambooError) as refusal:
                await world.agents.chat(chat("one", "s"))
            assert refusal.value.code is ErrorCode.INTERNAL
            await check_nothing_held(world)
            assert (await world.agents.chat(chat("two", "s"))).accepted_as == "started"


async def test_a_bug_at_accept_costs_the_run_that_goes_on_and_not_the_queue(store: FragileStore) -> None:
    toolbox = FragileToolbox()
    with trio.fail_after(5):
        async with open_world(store, toolbox=toolbox) as world, trio.open_nursery() as nursery:
            await world.agents.chat(chat("runs", "s"))
            call = await world.model.next_call()
            await world.agents.chat(chat("waits", "s"))
            toolbox.bad = 1
            with pytest.raises(BambooError) as refusal:
                await world.agents.chat(chat("bad", "s"))
            assert refusal.value.code is ErrorCode.INTERNAL
            await call.closed.wait()
            nursery.start_soon(answer_all, world)
            await all_ended(store)
            assert ends(await world.events("s")) == {"runs": "internal", "waits": "agent_complete"}
            await check_nothing_held(world)
            nursery.cancel_scope.cancel()


async def test_a_run_that_cannot_start_for_a_bug_ends_and_neither_its_queue_nor_another_session_does(
    store: FragileStore,
) -> None:
    """The slot comes from another session's run, whose task must not meet this one's bug."""
    toolbox = FragileToolbox()
    with trio.fail_after(5):
        async with (
            open_world(store, config(AgentConfig(max_active_runs=1)), toolbox=toolbox) as world,
            trio.open_nursery() as nursery,
        ):
            other = await world.agents.chat(chat("holds the slot", "other"))
            for text in ("bad", "good"):
                await world.agents.chat(chat(text, "s"))
            toolbox.bad = 1
            nursery.start_soon(answer_all, world)
            items = await world.read_run("other", other.run_id, other.cursor)
            assert types(items)[-1] == "agent_complete"
            await all_ended(store)
            assert ends(await world.events("s")) == {"bad": "internal", "good": "agent_complete"}
            await check_nothing_held(world)
            nursery.cancel_scope.cancel()


async def test_a_bug_in_a_stop_leaves_no_caller_without_an_answer(store: FragileStore) -> None:
    with trio.fail_after(5):
        async with open_world(store) as world, trio.open_nursery() as nursery:
            await world.agents.chat(chat("runs", "s"))
            await world.agents.chat(chat("waits", "s"))
            store.bad_lookups = 1
            async with trio.open_nursery() as asking:
                callers = Callers(world, asking)
                callers.stop("bad", UNKNOWN)
                await trio.testing.wait_all_tasks_blocked()
                callers.chat("later")
            assert callers.told == {"bad": "internal", "later": "queued"}
            nursery.start_soon(answer_all, world)
            await all_ended(store)
            told = ends(await world.events("s"))
            await check_nothing_held(world)
            nursery.cancel_scope.cancel()
    assert told == {"runs": "internal", "waits": "agent_complete", "later": "agent_complete"}


async def test_a_run_that_was_stopped_stays_stopped_when_a_bug_comes_before_that_is_committed(
    store: FragileStore,
) -> None:
    """Decided is decided: of the running one and of a queued one, which must not start after all."""
    with trio.fail_after(5):
        async with open_world(store) as world:
            await world.agents.chat(chat("runs", "s"))
            await world.agents.chat(chat("waits", "s"))
            await world.model.next_call()
            async with trio.open_nursery() as asking:
                callers = Callers(world, asking)
                store.failures.append(InjectedBug())
                callers.stop("all")
            await all_ended(store)
            assert callers.told == {"all": "internal"}
            log = await world.events("s")
            assert ends(log) == {"runs": "agent_stopped", "waits": "agent_stopped"}
            assert {event.body.reason for event in log if isinstance(event.body, AgentStopped)} == {"user"}
            assert len(world.model.calls) == 1
            await check_nothing_held(world)


async def test_a_bug_in_a_delete_leaves_a_session_that_can_be_deleted(store: FragileStore) -> None:
    with trio.fail_after(5):
        async with open_world(store) as world:
            await world.agents.chat(chat("runs", "s"))
            await world.agents.chat(chat("waits", "s"))
            await world.model.next_call()
            async with trio.open_nursery() as asking:
                callers = Callers(world, asking)
                store.gate.close()
                callers.delete("bad")
                await store.gate.arrived()
                callers.delete("good")
                await trio.testing.wait_all_tasks_blocked()
                store.failures.append(InjectedBug())
                store.gate.open()
            assert callers.told == {"bad": "internal", "good": "done"}
            assert await store.session(S) is None
            await check_nothing_held(world)
            assert (await world.agents.chat(chat("anew", "s"))).cursor.seq == 1


async def test_readers_at_any_place_miss_nothing_and_get_nothing_twice(store: FragileStore) -> None:
    """One that is awake, one that has read nothing yet, one that came in the middle, one of the run alone."""
    with trio.fail_after(5):
        async with open_world(store) as world:
            first = await world.agents.chat(chat("one", "s"))
            call = await world.model.next_call()
            with (
                world.bus.subscribe(S) as awake,
                world.bus.subscribe(S) as lagging,
                world.bus.subscribe(S, run_id=first.run_id) as of_run,
            ):
                for reader in (awake, lagging, of_run):
                    await reader.begin(first.cursor)
                seen: list[Item] = []
                call.say("shown")
                while "agent_token" not in types(seen):
                    seen += await awake.receive()
                with world.bus.subscribe(S) as late:
                    await late.begin(None)
                    call.fail(InjectedBug())
                    middle: list[Item] = []
                    while "agent_error" not in types(middle):
                        middle += await late.receive()
                while "agent_error" not in types(seen):
                    seen += await awake.receive()
                caught_up: list[Item] = []
                while "agent_error" not in types(caught_up):
                    caught_up += await lagging.receive()
                alone: list[Item] = []
                while batch := await of_run.receive():
                    alone += batch
            log = await world.events("s")
    assert types(seen) == ["user_message", "run_started", "agent_token", "agent_message", "agent_error"]
    assert log[1:] == seen == caught_up == alone
    assert middle == seen[3:]
    assert len({event.epoch for event in log}) == 1


async def test_a_bug_in_the_recovery_is_told_and_the_session_is_tried_again_though_nobody_asks(
    store: FragileStore, autojump_clock: trio.testing.MockClock
) -> None:
    with trio.fail_after(1000):
        async with open_world(store) as world:
            accepted = await world.agents.chat(chat("runs", "s"))
            await world.agents.chat(chat("waits", "s"))
            call = await world.model.next_call()
            with world.bus.subscribe(S) as reader:
                await reader.begin(accepted.cursor)
                seen: list[Item] = []
                call.say("shown")
                while "agent_token" not in types(seen):
                    seen += await reader.receive()
                store.bad_reads = 4
                async with trio.open_nursery() as asking:
                    callers = Callers(world, asking)
                    store.loading_gate.close()
                    call.fail(InjectedBug())
                    await store.loading_gate.arrived()
                    callers.chat("asks meanwhile")
                    await trio.testing.wait_all_tasks_blocked(0.01)
                    store.loading_gate.open()
                assert callers.told == {"asks meanwhile": "internal"}
                while "agent_error" not in types(seen):
                    seen += await reader.receive()
            (await world.model.next_call()).end()
            await all_ended(store)
            log = await world.events("s")
    assert ends(log) == {"runs": "internal", "waits": "agent_complete"}
    assert types(seen)[-2:] == ["agent_message", "agent_error"]
    assert "gap" not in types(seen)
    assert autojump_clock.current_time() < 60


async def test_a_request_ends_the_pause_before_the_next_attempt(
    store: FragileStore, autojump_clock: trio.testing.MockClock
) -> None:
    with trio.fail_after(1000):
        async with open_world(store) as world:
            await world.agents.chat(chat("runs", "s"))
            store.bad_reads = 7
            (await world.model.next_call()).fail(InjectedBug())
            await trio.sleep(20)  # by now the pauses are long
            assert store.bad_reads == 1
            began = autojump_clock.current_time()
            codes: list[str] = []
            for _ in range(2):
                try:
                    codes.append((await world.agents.chat(chat("asks", "s"))).accepted_as)
                except BambooError as error:
                    codes.append(error.code)
            assert codes == ["internal", "started"]
            assert autojump_clock.current_time() == began
            (await world.model.next_call()).end()
            await all_ended(store)
            assert ends(await world.events("s")) == {"runs": "internal", "asks": "agent_complete"}


async def test_what_was_shown_and_can_never_be_stored_is_given_up_and_named_in_a_gap(
    store: FragileStore, autojump_clock: trio.testing.MockClock
) -> None:
    with trio.fail_after(1000):
        async with open_world(store) as world:
            accepted = await world.agents.chat(chat("runs", "s"))
            call = await world.model.next_call()
            with world.bus.subscribe(S) as reader:
                await reader.begin(accepted.cursor)
                seen: list[Item] = []
                call.say("shown")
                while "agent_token" not in types(seen):
                    seen += await reader.receive()
                call.fail(InjectedBug())
                store.failures.append(InjectedBug())
                while "agent_error" not in types(seen):
                    seen += await reader.receive()
            log = await world.events("s")
    gap = next(item for item in seen if isinstance(item, Gap))
    assert (gap.from_seq, gap.to_seq, gap.reason) == (4, 4, "crash")
    assert "agent_token" not in types(log)
    assert log[-1].epoch != accepted.cursor.epoch
    assert ends(log) == {"runs": "internal"}
    assert autojump_clock.current_time() < 60


async def test_one_bug_after_another_ends_one_run_after_another_and_then_it_is_over(store: FragileStore) -> None:
    texts = [str(number) for number in range(5)]
    with trio.fail_after(5):
        async with open_world(store) as world:
            for text in texts:
                await world.agents.chat(chat(text, "s"))
            for _ in texts:
                (await world.model.next_call()).fail(InjectedBug())
            await all_ended(store)
            assert ends(await world.events("s")) == dict.fromkeys(texts, "internal")
            assert [run.status for run in await store.runs(S, limit=10)] == [RunStatus.FAILED] * 5
            await check_nothing_held(world)
