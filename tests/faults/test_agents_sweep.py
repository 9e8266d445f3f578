"""Accept, run, stop and the whole process, cancelled at every step: what was accepted is never lost, never doubled."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from itertools import pairwise

import pytest
import trio
import trio.testing
from structlog.testing import capture_logs

from bamboo.config import AgentConfig
from bamboo.core.events import AgentToken, Event, Gap, Item, Outage
from bamboo.core.types import (
    Accepted,
    Cursor,
    FinishDelta,
    ModelCall,
    ProviderDelta,
    RunId,
    RunStatus,
    SessionId,
    TextDelta,
)
from bamboo.errors import BambooError, ClientError
from bamboo.store import wall_clock_ms
from bamboo.store.base import Run
from bamboo.store.memory import MemoryStore
from tests.support.agents import World, chat, config, is_terminal, open_world
from tests.support.model import PlayedModel
from tests.support.sweep import Check, Cut, sweep

S = SessionId("s")
SEEDS = range(12)


class _Answer:
    def __init__(self) -> None:
        self._reads: list[Sequence[ProviderDelta]] = [
            (TextDelta("one "),),
            (TextDelta("two "), TextDelta("three")),
            (FinishDelta("stop"),),
            (),
        ]

    async def receive(self) -> Sequence[ProviderDelta]:
        await trio.lowlevel.checkpoint()
        return self._reads.pop(0)


class Talker(PlayedModel):
    """Answers every call at once, in three reads."""

    @asynccontextmanager
    async def stream(self, call: ModelCall) -> AsyncIterator[_Answer]:  # type: ignore[override]  # noqa: ARG002
        await trio.lowlevel.checkpoint()
        yield _Answer()


async def all_ended(store: MemoryStore) -> None:
    while any(not run.status.finished for run in await store.runs(S, limit=100)):
        await trio.lowlevel.checkpoint()


async def check_log(store: MemoryStore, accepted: Sequence[Accepted]) -> None:
    """Gap-free, in order; every accepted run there with one terminal event and nothing after it; the history valid."""
    page = await store.read(S, 0, max_bytes=10_000_000)
    events = [] if page is None else list(page.events)
    assert [event.seq for event in events] == list(range(1, len(events) + 1))
    runs = [run.run_id for run in await store.runs(S, limit=100)]
    assert len(set(runs)) == len(runs)
    assert {one.run_id for one in accepted} <= set(runs)
    for run_id in runs:
        of_run = [event for event in events if event.run_id == run_id]
        assert of_run[0].body.type == "user_message"
        assert [is_terminal(event) for event in of_run].count(True) == 1
        assert is_terminal(of_run[-1])
    roles = [message.role for message in await store.messages(S)]
    assert all(role == "user" for role in roles[:1])
    assert ("assistant", "assistant") not in set(pairwise(roles))


async def read_on(world: World, after: Cursor, seen: list[Item]) -> None:
    with world.bus.subscribe(S) as subscription:
        await subscription.begin(after)
        while not any(is_terminal(item) for item in seen):
            seen += await subscription.receive()


def test_a_chat_that_is_cancelled_anywhere_and_sent_again_with_its_key_is_one_run() -> None:
    async def scenario(cut: Cut) -> None:
        store = MemoryStore(wall_clock_ms)
        async with open_world(store, model=Talker()) as world:
            with cut:
                await world.agents.chat(chat("hello", "s", idempotency_key="k"))
            again = await world.agents.chat(chat("hello", "s", idempotency_key="k"))
            await all_ended(store)
            assert len(await store.runs(S, limit=10)) == 1
        await check_log(store, [again])
        assert world.agents.active_runs == world.agents.queued_runs == world.bus.sessions == 0

    assert sweep(scenario, seeds=SEEDS).cancelled > 50


def test_a_stop_that_is_cancelled_anywhere_leaves_one_end_and_a_usable_session() -> None:
    async def scenario(cut: Cut) -> None:
        store = MemoryStore(wall_clock_ms)
        async with open_world(store, model=Talker()) as world:
            accepted = [await world.agents.chat(chat(text, "s")) for text in ("one", "two")]
            with cut:
                await world.agents.stop(S)
            accepted.append(await world.agents.chat(chat("three", "s")))
            await all_ended(store)
        await check_log(store, accepted)
        assert world.agents.active_runs == world.agents.queued_runs == world.bus.sessions == 0

    assert sweep(scenario, seeds=SEEDS).cancelled > 50


def test_a_server_that_is_cancelled_anywhere_loses_nothing_that_it_accepted() -> None:
    async def scenario(cut: Cut) -> Check:
        store = MemoryStore(wall_clock_ms)
        accepted: list[Accepted] = []
        seen: list[Item] = []
        with cut:
            async with open_world(store, model=Talker()) as world, trio.open_nursery() as nursery:
                accepted.append(await world.agents.chat(chat("one", "s")))
                nursery.start_soon(read_on, world, accepted[0].cursor, seen)
                accepted.append(await world.agents.chat(chat("two", "s")))
                accepted.append(await world.agents.chat(chat("three", "s", on_busy="interrupt")))
                await world.agents.stop(S, accepted[1].run_id)
        store.crash()
        resumed: list[Item] = []
        async with open_world(store, model=Talker()) as world:
            await all_ended(store)
            if accepted:
                places = [item.cursor for item in seen if not isinstance(item, Outage)]
                await read_on(world, places[-1] if places else accepted[0].cursor, resumed_or(seen, resumed))
        await check_log(store, accepted)
        return lambda: check_reader(seen, resumed)

    assert sweep(scenario, seeds=SEEDS).cancelled > 100


def resumed_or(seen: list[Item], resumed: list[Item]) -> list[Item]:
    """Where the reader goes on; one that has seen a run's end needs nothing more."""
    return seen if any(is_terminal(item) for item in seen) else resumed


def check_reader(seen: list[Item], resumed: list[Item]) -> None:
    """What it had and what it then got are one sequence, but for what a gap names."""
    expected = None
    for item in [*seen, *resumed]:
        assert not isinstance(item, Outage), "the store never fails here"
        if isinstance(item, Gap):
            assert item.reason == "crash"
            assert item.to_seq is not None
            lost = [event for event in seen if isinstance(event, Event) and event.seq > item.cursor.seq]
            assert all(isinstance(event.body, AgentToken) for event in lost), "more than deltas died with the process"
            expected = item.cursor.seq + 1
            continue
        assert expected is None or item.seq == expected, f"{item.seq} where {expected} was due"
        expected = item.seq + 1


def test_an_eviction_that_meets_a_chat_at_any_step_loses_neither() -> None:
    """A refused first request leaves at once; the chat comes at every step of that leaving."""

    async def scenario(cut: Cut) -> None:
        store = MemoryStore(wall_clock_ms)
        async with open_world(store, model=Talker()) as world:
            with cut, suppress(ClientError):  # there is no such session
                await world.agents.update_session(S, {"title": "nobody"})
            accepted = await world.agents.chat(chat("hello", "s"))
            await all_ended(store)
        await check_log(store, [accepted])

    assert sweep(scenario, seeds=SEEDS).cancelled > 10


class BrokenOnce(MemoryStore):
    """A bug of ours, once: looking for a run raises what no store may."""

    broken = True

    async def run(self, run_id: RunId) -> Run | None:
        if self.broken:
            self.broken = False
            await trio.lowlevel.checkpoint()
            raise RuntimeError("a bug")
        return await super().run(run_id)


@pytest.mark.parametrize("death_first", [True, False])
def test_a_slot_that_is_granted_to_a_runner_at_any_step_of_its_death_is_not_lost(*, death_first: bool) -> None:
    """Session `s` waits for the one slot and dies of a bug; the slot comes free before, while and after it does."""

    async def scenario(cut: Cut) -> None:
        store = BrokenOnce(wall_clock_ms)
        model = PlayedModel()
        async with open_world(store, config(AgentConfig(max_active_runs=1)), model=model) as world:
            holder = await world.agents.chat(chat("holds the slot", "other"))
            waiting = await world.agents.chat(chat("waits for it", "s"))
            call = await model.next_call()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(answer_all, model)
                if death_first:
                    nursery.start_soon(kill, world)
                else:
                    call.end()
                with cut:
                    await trio.testing.wait_all_tasks_blocked()
                if death_first:
                    call.end()
                else:
                    await kill(world)
                await world.read_run("other", holder.run_id, holder.cursor)
                await world.read_run("s", waiting.run_id, waiting.cursor)
                nursery.cancel_scope.cancel()
            assert world.agents.queued_runs == 0
        assert world.agents.active_runs == 0
        await check_log(store, [waiting])

    with capture_logs() as logs:
        assert sweep(scenario, seeds=range(60)).cancelled > 500
    assert {line["session_id"] for line in logs if line["event"] == "runner_failed"} == {"s"}, "it took another along"


async def kill(world: World) -> None:
    with suppress(BambooError):
        await world.agents.stop(S, RunId("run_that_nobody_knows"))


async def answer_all(model: PlayedModel) -> None:
    while True:
        call = await model.next_call()
        with suppress(trio.ClosedResourceError):  # its run is dead already
            call.end()


async def test_the_check_of_a_log_sees_a_run_that_has_no_end() -> None:
    store = MemoryStore(wall_clock_ms)
    with trio.fail_after(5):
        async with open_world(store) as world:
            accepted = await world.agents.chat(chat("hello", "s"))
            [run] = await store.runs(S, limit=1)
            assert run.status is RunStatus.RUNNING
            try:
                await check_log(store, [accepted])
            except AssertionError:
                return
    raise AssertionError("a run without a terminal event passed the check")
