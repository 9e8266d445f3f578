"""The log, read back: every event equal, page by page, and only through its session."""

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
    SessionClosed,
    SessionCreated,
    event_bytes,
)
from bamboo.core.types import (
    ImagePart,
    MessageId,
    RunId,
    RunStats,
    SessionId,
    TextPart,
    ToolCall,
    ToolCallId,
)
from bamboo.store.base import Commit
from tests.support.store_stands import COMPLETE, STARTED, Author, Clock, Stand, all_events, said

ONE = SessionId("one")
TWO = SessionId("two")
LIMIT = 1_000_000


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
