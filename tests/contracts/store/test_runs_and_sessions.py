"""Runs and sessions: projections of what was committed."""

from dataclasses import replace

import pytest

from bamboo.core.events import (
    AgentError,
    AgentMessage,
    AgentStopped,
    AgentToken,
    AgentToolStart,
    ApprovalRequired,
    ApprovalResolved,
    EventBody,
    RunQueued,
    RunStarted,
    SessionCreated,
)
from bamboo.core.types import (
    Cursor,
    MessageId,
    RunId,
    RunStatus,
    SessionId,
    ToolCallId,
    text_content,
)
from bamboo.store.base import Commit, Session
from tests.support.store_stands import COMPLETE, Author, Clock, Stand

ONE = SessionId("one")
TWO = SessionId("two")


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
