"""What a commit refuses, and that nothing of it is done then."""

import pytest
import trio

from bamboo.core.events import (
    AgentToken,
    Event,
    EventBody,
    SessionCreated,
)
from bamboo.core.types import (
    Epoch,
    RunId,
    RunStatus,
    SessionId,
)
from bamboo.store.base import Commit, DuplicateKey, IdempotencyKey, Session
from tests.support.store_stands import COMPLETE, DAY_MS, STARTED, Author, Clock, Stand, all_events

ONE = SessionId("one")
TWO = SessionId("two")


async def test_commit_that_breaks_a_rule_of_the_log_is_a_bug_and_does_nothing(stand: Stand, clock: Clock) -> None:
    async with stand.store.own(ONE) as log, stand.store.own(TWO) as other:
        author = Author(log, clock)
        with pytest.raises(AssertionError):  # not created
            await author.write(None, SessionCreated())
        await author.start("ended")
        await author.write("ended", COMPLETE)
        await author.start("r")
        await Author(other, clock).start("elsewhere")
        before = await all_events(stand.store, ONE)
        head = log.head

        def event(seq: int, run_id: str, body: EventBody, *, epoch: str | None = None, session: str = "one") -> Event:
            return Event(SessionId(session), Epoch(epoch or log.epoch), seq, clock.now_ms, RunId(run_id), body)

        twice = author.acceptance("ended")
        assert twice.accept is not None
        token = AgentToken("x")
        refused = [
            Commit([event(head + 2, "r", token)]),
            Commit([event(head, "r", token)]),
            Commit([event(head + 1, "r", token), event(head + 3, "r", token)]),
            Commit([event(head + 1, "r", token, epoch="other")]),
            Commit([event(head + 1, "r", token, session="two")]),
            Commit([event(head + 1, "nobody", token)]),
            Commit([event(head + 1, "elsewhere", token)]),
            Commit([event(head + 1, "r", token), event(head + 2, "ended", COMPLETE)]),
            Commit([event(head + 1, "ended", token)]),
            Commit([event(head + 1, "r", COMPLETE), event(head + 2, "r", COMPLETE)]),
            Commit([event(head + 1, "r", COMPLETE), event(head + 2, "r", token)]),
            Commit([event(head + 1, "r", token), event(head + 2, "r", COMPLETE), event(head + 3, "r", token)]),
            Commit([event(head + 1, "r", STARTED)]),
            Commit(accept=author.acceptance("new").accept),
            Commit(key=IdempotencyKey("k", b"", 0)),
            Commit(session=Session(TWO, 0, 0)),
            twice,
        ]
        for commit in refused:
            with pytest.raises(AssertionError):
                await log.commit(commit)
        assert log.head == head
        assert await all_events(stand.store, ONE) == before
        await author.write("r", token, COMPLETE)  # and the log goes on


async def test_duplicate_key_undoes_the_whole_commit(stand: Stand, clock: Clock) -> None:
    store = stand.store
    async with store.own(ONE) as log, store.own(TWO) as other:
        await Author(log, clock).accept("first", key="k")
        author = Author(other, clock)
        clock.now_ms += DAY_MS - 1
        commit = author.acceptance("second", STARTED, key="k", fingerprint=b"other")
        with pytest.raises(DuplicateKey) as refused:
            await other.commit(commit)
        assert refused.value.holder.fingerprint == b"content"
        assert refused.value.holder.run == await store.run(RunId("first"))
        assert await store.extent(TWO) is None
        assert await store.run(RunId("second")) is None
        assert [session.session_id for session in (await store.sessions(limit=9))[0]] == [ONE]
        assert await store.unfinished_sessions() == [ONE]

        # Its seqs are free again, also where there was something before.
        await author.accept("third")
        with pytest.raises(DuplicateKey):
            await other.commit(author.acceptance("fourth", key="k"))
        assert other.head == 1
        await author.accept("fifth")
        assert [event.run_id for event in await all_events(store, TWO)] == ["third", "fifth"]


async def test_duplicate_key_tells_the_holder_as_it_is_now(stand: Stand, clock: Clock) -> None:
    async with stand.store.own(ONE) as log:
        author = Author(log, clock)
        await author.accept("first", STARTED, COMPLETE, key="k")
        with pytest.raises(DuplicateKey) as refused:
            await log.commit(author.acceptance("second", key="k"))
        assert refused.value.holder.run.status is RunStatus.COMPLETED
        found = await stand.store.key_holder("k", clock.now_ms)
        assert found == refused.value.holder


async def test_expired_key_is_used_anew(stand: Stand, clock: Clock) -> None:
    store = stand.store
    async with store.own(ONE) as log:
        author = Author(log, clock)
        await author.accept("first", key="k")
        assert await store.key_holder("k", clock.now_ms + DAY_MS) is None
        assert await store.key_holder("other", clock.now_ms) is None
        clock.now_ms += DAY_MS
        await author.accept("second", key="k")
        holder = await store.key_holder("k", clock.now_ms)
        assert holder is not None
        assert holder.run.run_id == "second"


async def test_one_of_several_attempts_with_one_key_wins(stand: Stand, clock: Clock) -> None:
    outcomes: list[str] = []

    async def attempt(name: str) -> None:
        async with stand.store.own(SessionId(name)) as log:
            try:
                await Author(log, clock).accept(f"run-{name}", key="k")
                outcomes.append(f"run-{name}")
            except DuplicateKey as refused:
                outcomes.append(f"lost to {refused.holder.run.run_id}")

    async with trio.open_nursery() as nursery:
        for index in range(20):
            nursery.start_soon(attempt, f"s{index}")
    (winner,) = [outcome for outcome in outcomes if outcome.startswith("run-")]
    assert sorted(outcomes) == sorted([winner] + [f"lost to {winner}"] * 19)
    sessions, _ = await stand.store.sessions(limit=100)
    assert len(sessions) == 1
