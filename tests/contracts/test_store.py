"""What every store promises (`bamboo/store/base.py`, `bamboo/bus/log_reader.py`), held against each implementation."""

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from bamboo.core.events import (
    AgentComplete,
    AgentError,
    AgentMessage,
    AgentReasoning,
    AgentRetry,
    AgentStopped,
    AgentToken,
    AgentToolComplete,
    AgentToolStart,
    ApprovalRequired,
    ApprovalResolved,
    Event,
    EventBody,
    RunQueued,
    RunStarted,
    SessionClosed,
    SessionCreated,
    UserMessage,
    event_bytes,
)
from bamboo.core.types import (
    Cursor,
    Epoch,
    EpochStart,
    ImagePart,
    MessageId,
    RunId,
    RunStats,
    RunStatus,
    SessionId,
    TextPart,
    ToolCall,
    ToolCallId,
    Usage,
    content_text,
    text_content,
)
from bamboo.store.base import Commit, DuplicateKey, IdempotencyKey, Session, Snapshot
from tests.support.store_stands import DAY_MS, STARTED, Author, Clock, MemoryStand, SqliteStand, Stand, all_events

ONE = SessionId("one")
TWO = SessionId("two")
COMPLETE = AgentComplete("stop", Usage(1, 2, 3), RunStats(1, 2, 3))
LIMIT = 1_000_000


@pytest.fixture(params=["memory", "sqlite"])
async def stand(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Stand]:
    opening = MemoryStand() if request.param == "memory" else SqliteStand(tmp_path / "bamboo.db")
    with trio.fail_after(30):
        async with opening as opened:
            yield opened


@pytest.fixture
def clock(stand: Stand) -> Clock:
    return stand.clock


def said(text: str, message_id: str, *, calls: tuple[ToolCall, ...] = ()) -> AgentMessage:
    return AgentMessage(MessageId(message_id), text_content(text), "openai", "gpt", tool_calls=calls)


def tool_result(message_id: str, call_id: str) -> AgentToolComplete:
    return AgentToolComplete(MessageId(message_id), ToolCallId(call_id), "t", ok=True, result="out", elapsed_ms=1)


# The log


async def test_every_kind_of_event_is_read_back_equal(stand: Stand, clock: Clock) -> None:
    call = ToolCall(ToolCallId("c1"), "shell", '{"cmd": not json')
    arguments = {"cmd": "ls", "deep": [1, 2.5, None, {"big": 2**80}], "lone": "\ud83d"}
    bodies: list[EventBody] = [
        RunQueued(3),
        STARTED,
        AgentRetry(1, "openai", "provider_error", 250),
        AgentReasoning("hm"),
        AgentToken("Hällo"),
        AgentToken(" 世界 \U0001f43c"),
        AgentToken(""),
        AgentToken("\ud83d"),
        AgentMessage(
            MessageId("m1"), (TextPart("Hällo"), ImagePart("data:x", "low")), "openai", "gpt", (call,), partial=True
        ),
        ApprovalRequired("a1", ToolCallId("c1"), "shell", arguments, 99),
        ApprovalResolved("a1", "approve"),
        AgentToolStart(ToolCallId("c1"), "shell", arguments),
        AgentToolComplete(
            MessageId("m2"), ToolCallId("c1"), "shell", ok=True, result="out", elapsed_ms=12, truncated=True
        ),
        AgentToolComplete(
            MessageId("m3"), ToolCallId("c2"), "shell", ok=False, result="", elapsed_ms=0, status="uncertain"
        ),
        AgentToken("bye"),
        AgentComplete("stop", None, RunStats(1, None, 3)),
    ]
    content = (TextPart("look"), ImagePart("https://x/y.png"))
    written: list[Event] = []
    async with stand.store.own(ONE) as log:
        author = Author(log, clock)
        created = author.events(None, SessionCreated("Title"))
        await log.commit(Commit(created, session=author.session()))
        acceptance = author.acceptance("r1", *bodies, content=content)
        for index, event in enumerate(acceptance.events):
            event.time_ms += index * 7
        await log.commit(acceptance)
        failed = author.acceptance("r2", AgentError("provider_error", "it failed", retryable=True))
        await log.commit(failed)
        stopped = author.acceptance("r3", AgentStopped("superseded"))
        await log.commit(stopped)
        closed = author.events(None, SessionClosed())
        await log.commit(Commit(closed))
        written += [*created, *acceptance.events, *failed.events, *stopped.events, *closed]

    assert await all_events(stand.store, ONE) == written
    await stand.restart(clean=True)
    assert await all_events(stand.store, ONE) == written


async def test_times_of_deltas_are_kept_when_the_clock_is_set_back(stand: Stand, clock: Clock) -> None:
    async with stand.store.own(ONE) as log:
        author = Author(log, clock)
        await author.start("r")
        deltas = author.events("r", *(AgentToken(text) for text in "abcd"))
        for event, offset in zip(deltas, (0, 5, -90_000, 70_000_000_000), strict=True):
            event.time_ms += offset
        await log.commit(Commit(deltas))
    page = await stand.store.read(ONE, 2, max_bytes=LIMIT)
    assert page is not None
    assert page.events == deltas


async def test_session_that_is_not_stored_has_nothing(stand: Stand) -> None:
    store = stand.store
    async with store.own(ONE) as log:
        assert log.session is None
        assert (log.first_seq, log.head, tuple(log.unfinished)) == (1, 0, ())
    assert await store.extent(ONE) is None
    assert await store.read(ONE, 0, max_bytes=LIMIT) is None
    assert await store.session(ONE) is None
    assert await store.history(ONE, limit=10) is None
    assert tuple(await store.messages(ONE)) == ()
    assert tuple(await store.runs(ONE, limit=10)) == ()
    assert await store.run(RunId("r")) is None
    assert await store.sessions(limit=10) == ([], None)


async def test_page_holds_what_fits_and_at_least_one_event(stand: Stand, clock: Clock) -> None:
    async with stand.store.own(ONE) as log:
        author = Author(log, clock)
        await author.start("r")
        await author.write("r", *(AgentToken("x" * 100) for _ in range(50)))
        await author.write("r", said("x" * 5000, "m"))
        await author.write("r", COMPLETE)
    token_bytes = event_bytes(AgentToken("x" * 100))
    read = stand.store.read

    page = await read(ONE, 2, max_bytes=token_bytes * 10)
    assert page is not None
    assert [event.seq for event in page.events] == list(range(3, 13))
    assert (page.through, page.extent.head, page.extent.floor) == (12, 54, 0)

    page = await read(ONE, 30, max_bytes=token_bytes * 3)
    assert page is not None
    assert [event.seq for event in page.events] == [31, 32, 33]

    page = await read(ONE, 52, max_bytes=1)
    assert page is not None
    assert [event.seq for event in page.events] == [53]
    assert page.through == 53

    page = await read(ONE, 54, max_bytes=LIMIT)
    assert page is not None
    assert (list(page.events), page.through) == ([], 54)

    page = await read(ONE, 60, max_bytes=LIMIT)
    assert page is not None
    assert (list(page.events), page.through) == ([], 60)


async def test_reading_one_run_moves_past_the_others(stand: Stand, clock: Clock) -> None:
    async with stand.store.own(ONE) as log:
        author = Author(log, clock)
        await author.start("a")  # 1, 2
        await author.write("a", AgentToken("1"), AgentToken("2"))  # 3, 4
        await author.accept("b")  # 5
        await author.write("a", AgentToken("3"), COMPLETE)  # 6, 7
        await author.write("b", STARTED, AgentToken("4"))  # 8, 9
    read = stand.store.read

    page = await read(ONE, 0, max_bytes=LIMIT, run_id=RunId("b"))
    assert page is not None
    assert ([event.seq for event in page.events], page.through) == ([5, 8, 9], 9)

    page = await read(ONE, 3, max_bytes=LIMIT, run_id=RunId("a"))
    assert page is not None
    assert ([event.seq for event in page.events], page.through) == ([4, 6, 7], 9)

    page = await read(ONE, 0, max_bytes=1, run_id=RunId("b"))
    assert page is not None
    assert ([event.seq for event in page.events], page.through) == ([5], 5)

    page = await read(ONE, 7, max_bytes=LIMIT, run_id=RunId("a"))
    assert page is not None
    assert (list(page.events), page.through) == ([], 9)

    page = await read(ONE, 0, max_bytes=LIMIT, run_id=RunId("nobody"))
    assert page is not None
    assert (list(page.events), page.through) == ([], 9)


async def test_a_run_is_not_read_through_another_session(stand: Stand, clock: Clock) -> None:
    async with stand.store.own(ONE) as one, stand.store.own(TWO) as two:
        await Author(one, clock).start("r1")
        await Author(two, clock).start("r2")
    page = await stand.store.read(TWO, 0, max_bytes=LIMIT, run_id=RunId("r1"))
    assert page is not None
    assert list(page.events) == []


async def test_same_run_of_deltas_may_be_longer_than_any_row(stand: Stand, clock: Clock) -> None:
    async with stand.store.own(ONE) as log:
        author = Author(log, clock)
        await author.start("r")
        deltas = author.events(
            "r",
            *(AgentToken("é" * (index % 40)) for index in range(3000)),
            AgentToken("y" * 20_000),
            *(AgentReasoning("z") for _ in range(70)),
            *(AgentToken("") for _ in range(5000)),
        )
        await log.commit(Commit(deltas))
    page = await stand.store.read(ONE, 2, max_bytes=100_000_000)
    assert page is not None
    assert page.events == deltas


# Ownership and epochs


async def test_second_owner_is_a_bug(stand: Stand) -> None:
    store = stand.store
    async with store.own(ONE), store.own(TWO):
        with pytest.raises(AssertionError):
            async with store.own(ONE):
                pass
    async with store.own(ONE):
        pass


async def test_log_takes_nothing_after_its_owner_has_left(stand: Stand, clock: Clock) -> None:
    async with stand.store.own(ONE) as log:
        author = Author(log, clock)
        await author.start("r")
    with pytest.raises(AssertionError):
        await author.write("r", AgentToken("late"))
    assert len(await all_events(stand.store, ONE)) == 2


async def test_epoch_is_drawn_on_entering_and_stored_with_the_first_commit(stand: Stand, clock: Clock) -> None:
    async with stand.store.own(ONE) as log, stand.store.own(TWO) as other:
        epoch = log.epoch
        assert epoch != other.epoch
        await Author(log, clock).start("r")
    extent = await stand.store.extent(ONE)
    assert extent is not None
    assert tuple(extent.epochs) == (EpochStart(epoch, 1),)
    Cursor.parse(f"{epoch}.1")


async def test_clean_restart_changes_no_epoch(stand: Stand, clock: Clock) -> None:
    async with stand.store.own(ONE) as log:
        first = log.epoch
        await Author(log, clock).start("r")
    for _ in range(2):
        await stand.restart(clean=True)
        async with stand.store.own(ONE) as log:
            assert (log.epoch, log.first_seq, log.head) == (first, 1, 2)


async def test_each_unclean_start_gives_an_owned_session_one_new_epoch(stand: Stand, clock: Clock) -> None:
    async with stand.store.own(ONE) as log, stand.store.own(TWO) as never_owned_again:
        first, untouched = log.epoch, never_owned_again.epoch
        await Author(log, clock).start("r")
        await Author(never_owned_again, clock).start("s")

    await stand.restart(clean=False)
    extent = await stand.store.extent(ONE)
    assert extent is not None
    assert [start.epoch for start in extent.epochs] == [first]
    async with stand.store.own(ONE) as log:
        second = log.epoch
        assert (log.first_seq, log.head) == (3, 2)
        extent = await stand.store.extent(ONE)  # stored before there is any event of it
        assert extent is not None
        assert tuple(extent.epochs) == (EpochStart(first, 1), EpochStart(second, 3))
    async with stand.store.own(ONE) as log:
        assert log.epoch == second

    await stand.restart(clean=False)
    async with stand.store.own(ONE) as log:
        third = log.epoch
        await Author(log, clock).write("r", AgentToken("x"))

    await stand.restart(clean=True)
    await stand.restart(clean=False)
    async with stand.store.own(ONE) as log:
        fourth = log.epoch
    extent = await stand.store.extent(ONE)
    assert extent is not None
    expected = (EpochStart(first, 1), EpochStart(second, 3), EpochStart(third, 3), EpochStart(fourth, 4))
    assert tuple(extent.epochs) == expected
    assert len({first, second, third, fourth}) == 4
    assert [event.epoch for event in await all_events(stand.store, ONE)] == [first, first, third]

    other = await stand.store.extent(TWO)
    assert other is not None
    assert tuple(other.epochs) == (EpochStart(untouched, 1),)


async def test_owner_that_asks_gets_a_new_epoch_without_a_crash(stand: Stand, clock: Clock) -> None:
    async with stand.store.own(ONE) as log:
        first = log.epoch
        await Author(log, clock).start("r")
    async with stand.store.own(ONE, new_epoch=True) as log:
        second = log.epoch
        assert (log.first_seq, log.head) == (3, 2)
    async with stand.store.own(ONE) as log:
        assert log.epoch == second
    extent = await stand.store.extent(ONE)
    assert extent is not None
    assert tuple(extent.epochs) == (EpochStart(first, 1), EpochStart(second, 3))


async def test_owner_begins_with_settings_and_unfinished_runs_in_order(stand: Stand, clock: Clock) -> None:
    async with stand.store.own(ONE) as log:
        author = Author(log, clock)
        await author.start("done")
        await author.write("done", COMPLETE)
        for run_id in ("z", "m", "a"):
            await author.accept(run_id)
        await author.write("z", STARTED)
        await log.commit(Commit(session=author.session(title="Hello")))
    await stand.restart(clean=False)
    async with stand.store.own(ONE) as log:
        assert log.session == await stand.store.session(ONE)
        assert log.session is not None
        assert log.session.title == "Hello"
        assert [(run.run_id, run.status) for run in log.unfinished] == [
            ("z", RunStatus.RUNNING),
            ("m", RunStatus.QUEUED),
            ("a", RunStatus.QUEUED),
        ]
        await Author(log, clock).write("m", AgentStopped("user"))
    async with stand.store.own(ONE) as log:
        assert [run.run_id for run in log.unfinished] == ["z", "a"]


async def test_mark_of_a_clean_stop_is_refused_while_a_session_is_owned(stand: Stand) -> None:
    async with stand.store.own(ONE):
        with pytest.raises(AssertionError):
            await stand.store.mark_clean()
    await stand.store.mark_clean()
    with pytest.raises(AssertionError):
        async with stand.store.own(ONE):
            pass


# What a commit refuses


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


# Runs


async def test_run_is_the_projection_of_its_events(stand: Stand, clock: Clock) -> None:
    store = stand.store
    async with store.own(ONE) as log:
        author = Author(log, clock)
        await log.commit(Commit(author.events(None, SessionCreated()), session=author.session()))
        commit = author.acceptance("r", RunQueued(1))
        assert commit.accept is not None
        asked = replace(
            commit.accept,
            provider="p",
            model="m",
            system_prompt="s",
            params={"temperature": 0.5},
            metadata={"who": "me"},
            client_message_id="c",
            cancel_after_s=1.5,
        )
        # What the store projects is not taken from the caller.
        pretended = replace(asked, status=RunStatus.COMPLETED, last_seq=99, error_code="x", started_ms=5)
        await log.commit(replace(commit, accept=pretended))
        expected = replace(asked, first_cursor=Cursor(log.epoch, 1))
        assert await store.run(RunId("r")) == expected

        clock.now_ms += 10
        await author.write("r", RunStarted("p1", "m1", 7))
        expected = replace(
            expected, status=RunStatus.RUNNING, started_ms=clock.now_ms, used_provider="p1", used_model="m1"
        )
        assert await store.run(RunId("r")) == expected

        clock.now_ms += 10
        await author.write("r", AgentToken("x"), AgentMessage(MessageId("m1"), text_content("x"), "p2", "m2"))
        expected = replace(expected, used_provider="p2", used_model="m2")
        assert await store.run(RunId("r")) == expected

        clock.now_ms += 10
        await author.write("r", COMPLETE)
        expected = replace(
            expected,
            status=RunStatus.COMPLETED,
            last_seq=7,
            finished_ms=clock.now_ms,
            finish_reason="stop",
            usage=COMPLETE.usage,
            stats=COMPLETE.stats,
        )
        assert await store.run(RunId("r")) == expected


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (COMPLETE, RunStatus.COMPLETED),
        (AgentError("provider_error", "no", retryable=True), RunStatus.FAILED),
        (AgentError("interrupted", "gone", retryable=True), RunStatus.INTERRUPTED),
        (AgentStopped("user"), RunStatus.STOPPED),
    ],
)
async def test_terminal_event_decides_the_status(
    stand: Stand, clock: Clock, body: EventBody, status: RunStatus
) -> None:
    async with stand.store.own(ONE) as log:
        author = Author(log, clock)
        await author.start("r")
        assert await stand.store.unfinished_sessions() == [ONE]
        await author.write("r", body)
    assert await stand.store.unfinished_sessions() == []
    run = await stand.store.run(RunId("r"))
    assert run is not None
    assert (run.status, run.last_seq) == (status, 3)
    assert (run.error_code is None) is not isinstance(body, AgentError)
    assert (run.stop_reason == "user") is isinstance(body, AgentStopped)


async def test_run_waits_for_approval_until_it_goes_on(stand: Stand, clock: Clock) -> None:
    async def status() -> RunStatus:
        run = await stand.store.run(RunId("r"))
        assert run is not None
        return run.status

    async with stand.store.own(ONE) as log:
        author = Author(log, clock)
        await author.start("r")
        for approval in ("a1", "a2"):
            await author.write("r", ApprovalRequired(approval, ToolCallId("c"), "t", {}, 0))
            assert await status() is RunStatus.AWAITING_APPROVAL
        for approval in ("a1", "a2"):
            await author.write("r", ApprovalResolved(approval, "approve"))
            assert await status() is RunStatus.AWAITING_APPROVAL
        await author.write("r", AgentToolStart(ToolCallId("c"), "t", {}))
        assert await status() is RunStatus.RUNNING
        await author.write("r", ApprovalRequired("a3", ToolCallId("c"), "t", {}, 0))
        assert await stand.store.unfinished_sessions() == [ONE]
        await author.write("r", AgentToken("x"), AgentToken("y"))
        assert await status() is RunStatus.RUNNING


async def test_runs_are_listed_newest_first(stand: Stand, clock: Clock) -> None:
    async with stand.store.own(ONE) as log, stand.store.own(TWO) as other:
        for run_id in ("c", "a", "b"):
            await Author(log, clock).accept(run_id)
        await Author(other, clock).accept("elsewhere")
    assert [run.run_id for run in await stand.store.runs(ONE, limit=10)] == ["b", "a", "c"]
    assert [run.run_id for run in await stand.store.runs(ONE, limit=2)] == ["b", "a"]


# Sessions


async def test_settings_are_replaced_and_the_time_of_creation_stays(stand: Stand, clock: Clock) -> None:
    store, created_ms = stand.store, clock.now_ms
    async with store.own(ONE) as log:
        await log.commit(Commit(session=Session(ONE, created_ms, created_ms)))
        assert await store.session(ONE) == Session(ONE, created_ms, created_ms)
        clock.now_ms += 50
        full = Session(ONE, 0, 0, "T", "p", "m", "s", {"a": [1]}, {"b": {"c": None}})
        await log.commit(Commit(session=full))
        assert await store.session(ONE) == replace(full, created_ms=created_ms, updated_ms=clock.now_ms)
        clock.now_ms += 50
        await log.commit(replace(Author(log, clock).acceptance("r"), session=None))
        assert await store.session(ONE) == replace(full, created_ms=created_ms, updated_ms=clock.now_ms)


async def test_sessions_are_paged_from_the_newest_commit_down(stand: Stand, clock: Clock) -> None:
    store = stand.store
    for name in ("a", "b", "c", "d", "e"):
        clock.now_ms += 1 if name != "d" else 0  # c and d at one moment
        async with store.own(SessionId(name)) as log:
            await log.commit(Commit(session=Author(log, clock).session()))
    clock.now_ms += 1
    async with store.own(SessionId("b")) as log:
        await Author(log, clock).start("r")

    seen: list[str] = []
    token: str | None = None
    pages = 0
    while True:
        page, token = await store.sessions(limit=2, before=token)
        seen += [session.session_id for session in page]
        pages += 1
        if token is None:
            break
    assert (seen, pages) == (["b", "e", "d", "c", "a"], 3)
    assert (await store.sessions(limit=5))[1] is None
    for nonsense in ("", "x", "12-", "-1-2", "zz-1"):
        with pytest.raises(ValueError, match="token"):
            await store.sessions(limit=2, before=nonsense)


async def test_sessions_are_found_by_a_part_of_the_title_whatever_its_case(stand: Stand, clock: Clock) -> None:
    titles = {"a": "Große Pläne", "b": "50% of_all", "c": None, "d": "plan"}
    for name, title in titles.items():
        async with stand.store.own(SessionId(name)) as log:
            await log.commit(Commit(session=Author(log, clock).session(title=title)))

    async def find(query: str) -> list[str]:
        page, _ = await stand.store.sessions(limit=10, query=query)
        return sorted(session.session_id for session in page)

    assert await find("PLÄN") == ["a"]
    assert await find("GROSSE") == ["a"]
    assert await find("pl") == ["a", "d"]
    assert await find("%") == ["b"]
    assert await find("f_a") == ["b"]
    assert await find("") == ["a", "b", "c", "d"]
    assert await find("nothing") == []


# History


async def test_user_message_takes_its_place_when_its_run_starts(stand: Stand, clock: Clock) -> None:
    store = stand.store
    async with store.own(ONE) as log:
        author = Author(log, clock)
        await author.start("a")
        accepted_ms = clock.now_ms
        await author.accept("b")
        clock.now_ms += 10
        call = ToolCall(ToolCallId("c1"), "t", "{}")
        await author.write("a", AgentToken("he"), said("he", "m1", calls=(call,)))
        await author.write("a", tool_result("m2", "c1"))
        await author.write("a", said("ho", "m3"), COMPLETE)
        assert [message.message_id for message in await store.messages(ONE)] == ["a-user", "m1", "m2", "m3"]
        await author.write("b", STARTED)
    messages = await store.messages(ONE)
    assert [(message.message_id, message.role, message.run_id) for message in messages] == [
        ("a-user", "user", "a"),
        ("m1", "assistant", "a"),
        ("m2", "tool", "a"),
        ("m3", "assistant", "a"),
        ("b-user", "user", "b"),
    ]
    assert messages[1].tool_calls == (call,)
    assert (messages[2].tool_call_id, content_text(messages[2].content)) == ("c1", "out")
    assert messages[4].time_ms == accepted_ms


async def test_snapshot_pages_backwards_through_the_messages(stand: Stand, clock: Clock) -> None:
    async with stand.store.own(ONE) as log, stand.store.own(TWO) as other:
        author = Author(log, clock)
        await author.start("r")
        for index in range(6):
            await author.write("r", said(str(index), f"m{index}"))
        await Author(other, clock).start("s")

    async def page(limit: int, before: str | None = None) -> tuple[list[str], bool]:
        snapshot = await stand.store.history(ONE, limit=limit, before=None if before is None else MessageId(before))
        assert snapshot is not None
        return [message.message_id for message in snapshot.messages], snapshot.more

    assert await page(3) == (["m3", "m4", "m5"], True)
    assert await page(3, "m3") == (["m0", "m1", "m2"], True)
    assert await page(3, "m0") == (["r-user"], False)
    assert await page(7) == (["r-user", "m0", "m1", "m2", "m3", "m4", "m5"], False)
    assert await page(3, "r-user") == ([], False)
    assert await page(3, "s-user") == ([], False)
    assert await page(3, "nobody") == ([], False)


async def test_snapshot_shows_the_text_of_the_running_step_only(stand: Stand, clock: Clock) -> None:
    async def live() -> tuple[str, str, str] | None:
        snapshot = await stand.store.history(ONE, limit=10)
        assert snapshot is not None
        assert snapshot.cursor.seq == log.head
        return None if snapshot.live is None else (snapshot.live.run_id, snapshot.live.text, snapshot.live.reasoning)

    async with stand.store.own(ONE) as log:
        author = Author(log, clock)
        await author.accept("a")
        assert await live() is None
        await author.write("a", STARTED)
        assert await live() == ("a", "", "")
        await author.write("a", AgentReasoning("hm"), AgentToken("he"))
        await author.accept("b")
        await author.write("a", AgentToken("llo"))
        assert await live() == ("a", "hello", "hm")
        await author.write("a", said("hello", "m1", calls=(ToolCall(ToolCallId("c"), "t", "{}"),)))
        assert await live() == ("a", "", "")
        await author.write("a", tool_result("m2", "c"))
        await author.write("a", AgentToken("again"))
        assert await live() == ("a", "again", "")
        await author.write("a", said("again", "m3"), COMPLETE)
        assert await live() is None


async def test_snapshot_counts_the_queue(stand: Stand, clock: Clock) -> None:
    async with stand.store.own(ONE) as log:
        author = Author(log, clock)
        await author.start("a")
        for run_id in ("z", "b", "y"):
            await author.accept(run_id, RunQueued(1))
        await author.write("b", AgentStopped("user"))
    snapshot = await stand.store.history(ONE, limit=10)
    assert snapshot is not None
    assert [(queued.run_id, queued.message_id, queued.position) for queued in snapshot.queue] == [
        ("z", "z-user", 1),
        ("y", "y-user", 2),
    ]
    assert content_text(snapshot.queue[0].content) == "hello"


async def test_snapshot_names_the_epoch_of_its_head(stand: Stand, clock: Clock) -> None:
    async with stand.store.own(ONE) as log:
        await Author(log, clock).start("r")
        first = log.epoch
    await stand.restart(clean=False)
    async with stand.store.own(ONE) as log:
        snapshot = await stand.store.history(ONE, limit=10)
        assert snapshot is not None
        assert snapshot.cursor == Cursor(first, 2)
        await Author(log, clock).write("r", AgentToken("x"))
        snapshot = await stand.store.history(ONE, limit=10)
        assert snapshot is not None
        assert snapshot.cursor == Cursor(log.epoch, 3)


def check_snapshot(snapshot: Snapshot, log: list[Event]) -> None:
    """Hold a snapshot against the whole log: it is what the log says up to the cursor, no message missing or double."""
    before = [event for event in log if event.seq <= snapshot.cursor.seq]
    shown = [message.message_id for message in snapshot.messages if message.role == "user"]
    shown += [queued.message_id for queued in snapshot.queue]
    assert len(shown) == len(set(shown))
    accepted = [event.body.message_id for event in before if isinstance(event.body, UserMessage)]
    assert sorted(shown) == sorted(accepted)
    text = ""
    for event in before:
        if isinstance(event.body, AgentToken):
            text += event.body.token
        elif isinstance(event.body, AgentMessage):
            text = ""
    assert (snapshot.live.text if snapshot.live is not None else "") == text


async def test_snapshot_is_one_moment_while_the_session_is_written(stand: Stand, clock: Clock) -> None:
    snapshots: list[Snapshot] = []
    done = trio.Event()

    async def write() -> None:
        async with stand.store.own(ONE) as log:
            author = Author(log, clock)
            await author.accept("r0")
            for index in range(25):
                run_id = f"r{index}"
                await author.write(run_id, STARTED, AgentToken("a"), AgentToken("b"))
                await author.accept(f"r{index + 1}")
                await author.write(run_id, AgentToken("c"))
                await author.write(run_id, said("abc", f"m{index}"), COMPLETE)
        done.set()

    async def look() -> None:
        while not done.is_set():
            snapshot = await stand.store.history(ONE, limit=1000)
            if snapshot is not None:
                snapshots.append(snapshot)
            else:
                await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(write)
        for _ in range(3):
            nursery.start_soon(look)
    log = list(await all_events(stand.store, ONE))
    assert snapshots
    for snapshot in snapshots:
        check_snapshot(snapshot, log)


# Deleting


async def test_deleted_session_leaves_nothing_and_its_id_begins_anew(stand: Stand, clock: Clock) -> None:
    store = stand.store
    async with store.own(TWO) as other:
        await Author(other, clock).accept("kept", STARTED, key="kept")
    async with store.own(ONE) as log:
        author = Author(log, clock)
        first = log.epoch
        await author.accept("r", STARTED, AgentToken("x"), said("x", "m"), key="k")
        closing = [*author.events("r", AgentStopped("deleted")), *author.events(None, SessionClosed())]
        closing[1].seq += 1
        await log.commit(Commit(closing, delete=True))
        with pytest.raises(AssertionError):
            await log.commit(Commit(session=author.session()))

    assert await store.extent(ONE) is None
    assert await store.read(ONE, 0, max_bytes=LIMIT) is None
    assert await store.session(ONE) is None
    assert await store.history(ONE, limit=10) is None
    assert tuple(await store.messages(ONE)) == ()
    assert tuple(await store.runs(ONE, limit=10)) == ()
    assert await store.run(RunId("r")) is None
    assert await store.key_holder("k", clock.now_ms) is None
    assert await store.unfinished_sessions() == [TWO]
    assert [session.session_id for session in (await store.sessions(limit=9))[0]] == [TWO]

    async with store.own(ONE) as log:
        assert (log.session, log.first_seq, log.head) == (None, 1, 0)
        assert log.epoch != first
        await Author(log, clock).accept("r", key="k")
    assert [event.seq for event in await all_events(store, ONE)] == [1]
    assert len(await all_events(store, TWO)) == 2
    assert await store.key_holder("kept", clock.now_ms) is not None


async def test_delete_that_is_refused_deletes_nothing(stand: Stand, clock: Clock) -> None:
    async with stand.store.own(ONE) as log:
        author = Author(log, clock)
        with pytest.raises(AssertionError):
            await log.commit(Commit(delete=True))
        await author.start("r")
        with pytest.raises(AssertionError):
            await log.commit(Commit(author.events("nobody", SessionClosed()), delete=True))
        assert len(await all_events(stand.store, ONE)) == 2
        await author.write("r", COMPLETE)


# Retention


async def test_trim_removes_the_old_front_of_the_log_in_small_steps(stand: Stand, clock: Clock) -> None:
    store = stand.store
    async with store.own(ONE) as log:
        author = Author(log, clock)
        await author.start("old")
        await author.write("old", said("x", "m"), COMPLETE)
        clock.now_ms += 1000
        border_ms = clock.now_ms
        await author.start("new")
        await author.write("new", COMPLETE)
    assert await store.trim(before_ms=border_ms - 1000, limit=10) == 0

    assert await store.trim(before_ms=border_ms, limit=3) == 3
    page = await store.read(ONE, 0, max_bytes=LIMIT)
    assert page is not None
    assert (page.extent.floor, page.extent.head) == (3, 7)
    assert [event.seq for event in page.events] == [4, 5, 6, 7]

    assert await store.trim(before_ms=border_ms, limit=3) == 1
    assert await store.trim(before_ms=border_ms, limit=3) == 0
    assert [event.seq for event in await all_events(store, ONE)] == [5, 6, 7]

    clock.now_ms += 1000
    assert await store.trim(before_ms=clock.now_ms, limit=10) == 3
    page = await store.read(ONE, 0, max_bytes=LIMIT)
    assert page is not None
    assert (page.extent.floor, page.extent.head, list(page.events), page.through) == (7, 7, [], 7)
    assert [message.message_id for message in await store.messages(ONE)] == ["old-user", "m", "new-user"]
    run = await store.run(RunId("old"))
    assert run is not None

    async with store.own(ONE) as log:
        assert log.head == 7
        await Author(log, clock).start("newest")
    assert [event.seq for event in await all_events(store, ONE)] == [8, 9]
    assert await store.trim(before_ms=clock.now_ms, limit=10) == 0


async def test_trim_stops_before_the_oldest_unfinished_run(stand: Stand, clock: Clock) -> None:
    store = stand.store
    async with store.own(ONE) as log, store.own(TWO) as other:
        author = Author(log, clock)
        await author.start("done")  # 1, 2
        await author.accept("waiting")  # 3
        await author.write("done", AgentToken("x"), COMPLETE)  # 4, 5
        await Author(other, clock).start("r")
        clock.now_ms += 1000
        assert await store.trim(before_ms=clock.now_ms, limit=100) == 2
        assert [event.seq for event in await all_events(store, ONE)] == [3, 4, 5]
        assert len(await all_events(store, TWO)) == 2
        assert await store.trim(before_ms=clock.now_ms, limit=100) == 0
        await author.write("waiting", AgentStopped("user"))
        assert await store.trim(before_ms=clock.now_ms, limit=100) == 3
        page = await store.read(ONE, 0, max_bytes=LIMIT)
        assert page is not None
        assert page.extent.floor == 5


async def test_trim_removes_expired_keys(stand: Stand, clock: Clock) -> None:
    async with stand.store.own(ONE) as log:
        author = Author(log, clock)
        for index in range(3):
            await author.accept(f"r{index}", key=f"k{index}")
        clock.now_ms += 10
        await author.accept("later", key="later")
    expired_ms = clock.now_ms - 10 + DAY_MS
    clock.now_ms = expired_ms
    assert await stand.store.trim(before_ms=0, limit=2) == 2
    assert await stand.store.trim(before_ms=0, limit=2) == 1
    assert await stand.store.trim(before_ms=0, limit=2) == 0
    assert await stand.store.key_holder("later", clock.now_ms) is not None


# Many at once, and cancellation


async def test_many_owners_write_at_once_and_each_log_is_whole(stand: Stand, clock: Clock) -> None:
    async def write(name: str) -> None:
        async with stand.store.own(SessionId(name)) as log:
            author = Author(log, clock)
            await author.accept(f"{name}-r", key=name)
            await author.write(f"{name}-r", STARTED)
            for index in range(5):
                await author.write(f"{name}-r", AgentToken(f"{index}"), AgentToken(name))
            with pytest.raises(DuplicateKey):
                await log.commit(author.acceptance(f"{name}-again", key=name))
            await author.write(f"{name}-r", COMPLETE)

    async with trio.open_nursery() as nursery:
        for index in range(40):
            nursery.start_soon(write, f"s{index}")
    for index in range(40):
        events = await all_events(stand.store, SessionId(f"s{index}"))
        assert [event.seq for event in events] == list(range(1, 14))
        tokens = "".join(event.body.token for event in events if isinstance(event.body, AgentToken))
        assert tokens == "".join(f"{step}s{index}" for step in range(5))


async def test_cancelled_commit_leaves_the_store_usable_and_the_log_whole(stand: Stand, clock: Clock) -> None:
    for attempt in range(10):
        async with stand.store.own(ONE) as log:
            author = Author(log, clock)
            if log.session is None:
                await author.start("r")
            head = log.head
            with trio.CancelScope() as scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(author.write, "r", AgentToken(f"a{attempt}"), AgentToken("b"))
                    if attempt % 2:
                        await trio.lowlevel.checkpoint()
                    scope.cancel()
        async with stand.store.own(ONE) as log:
            # All of it or nothing, and what is loaded is behind it.
            assert log.head in (head, head + 2)
            await Author(log, clock).write("r", AgentToken("c"))
            assert log.head in (head + 1, head + 3)
    events = await all_events(stand.store, ONE)
    assert [event.seq for event in events] == list(range(1, len(events) + 1))
    assert sum(1 for event in events if event.body == AgentToken("c")) == 10


async def test_cancelled_owner_is_owner_no_more(stand: Stand) -> None:
    with trio.CancelScope() as scope:
        scope.cancel()
        async with stand.store.own(ONE):
            pass
    async with stand.store.own(ONE):
        pass


async def test_cancelled_read_has_no_effect(stand: Stand, clock: Clock) -> None:
    async with stand.store.own(ONE) as log:
        await Author(log, clock).start("r")
    for _ in range(10):
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(stand.store.messages, ONE)
                await trio.lowlevel.checkpoint()
                scope.cancel()
    assert len(await stand.store.messages(ONE)) == 1


async def test_store_that_can_write_is_healthy(stand: Stand) -> None:
    assert await stand.store.healthy()
