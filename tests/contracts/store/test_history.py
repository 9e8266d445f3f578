"""The history, and the snapshot of one moment."""

import trio

from bamboo.core.events import (
    AgentMessage,
    AgentReasoning,
    AgentStopped,
    AgentToken,
    Event,
    RunQueued,
    UserMessage,
)
from bamboo.core.types import (
    Cursor,
    MessageId,
    SessionId,
    ToolCall,
    ToolCallId,
    content_text,
)
from bamboo.store.base import Snapshot
from tests.support.store_stands import COMPLETE, STARTED, Author, Clock, Stand, all_events, said, tool_result

ONE = SessionId("one")
TWO = SessionId("two")


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
