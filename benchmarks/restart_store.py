"""Makes the database that a start is measured on: `python -m benchmarks.restart_store PATH SESSIONS RUNNING QUEUED`.

Through the store's own API, as a server would: two finished runs in each session, and then one more that runs, or is
queued, in the first ones. Without any of those it stops cleanly; else it says `crash`, and waits to be killed.
"""

import sys
from pathlib import Path
from typing import Final

import trio

from bamboo.config import StorageConfig
from bamboo.core.events import (
    AgentComplete,
    AgentMessage,
    AgentToken,
    Event,
    EventBody,
    RunQueued,
    RunStarted,
    SessionCreated,
    UserMessage,
)
from bamboo.core.types import MessageId, RunId, RunStats, SessionId, text_content
from bamboo.store import wall_clock_ms
from bamboo.store.base import Commit, Run, Session, SessionLog, Store
from bamboo.store.sqlite import open_sqlite_store

RUNS: Final = 2
TOKENS: Final = 40
"""Of one answer: two hundred characters or so."""

AT_ONCE: Final = 200
"""Sessions that are written to at a time: they share transactions."""


def run_id(session: int, run: int) -> RunId:
    """The last run of the first sessions is number RUNS, counted from 0."""
    return RunId(f"run_{session}_{run}")


def _tokens(count: int) -> list[EventBody]:
    return [AgentToken(f" t{number}") for number in range(count)]


def _finished() -> list[EventBody]:
    text = text_content("".join(f" t{number}" for number in range(TOKENS)))
    return [
        RunStarted("bench", "bench-1-0", 0),
        *_tokens(TOKENS),
        AgentMessage(MessageId("msg_answer"), text, "bench", "bench-1-0"),
        AgentComplete("stop", None, RunStats(0, 300, 2_000)),
    ]


async def _accept(log: SessionLog, session: int, run: int, *bodies: EventBody) -> None:
    """Commit a run with what happened in it so far, and its session if it is the first one."""
    now_ms = wall_clock_ms()
    message_id, content = MessageId(f"msg_{session}_{run}"), text_content(f"message {run} of session {session}")
    accepted = Run(run_id(session, run), log.session_id, message_id, content, now_ms)
    created = Session(log.session_id, now_ms, now_ms, title=f"Session {session}") if log.head == 0 else None
    begun: list[EventBody] = [] if created is None else [SessionCreated(created.title)]
    events = [
        Event(
            log.session_id,
            log.epoch,
            log.head + 1 + index,
            now_ms,
            accepted.run_id if index >= len(begun) else None,
            body,
        )
        for index, body in enumerate([*begun, UserMessage(message_id, content), *bodies])
    ]
    await log.commit(Commit(events, session=created, accept=accepted))


async def fill(store: Store, sessions: int, running: int, queued: int) -> None:
    """`running` and `queued` are sessions too: the first ones."""
    limiter = trio.CapacityLimiter(AT_ONCE)

    async def one(session: int) -> None:
        async with limiter, store.own(SessionId(f"ses_{session}")) as log:
            for run in range(RUNS):
                await _accept(log, session, run, *_finished())
            if session < running:
                await _accept(log, session, RUNS, RunStarted("bench", "bench-1-0", 0), *_tokens(TOKENS // 2))
            elif session < running + queued:
                await _accept(log, session, RUNS, RunQueued(1))

    async with trio.open_nursery() as nursery:
        for session in range(sessions):
            nursery.start_soon(one, session)


async def make(path: Path, sessions: int, running: int, queued: int) -> None:
    async with open_sqlite_store(StorageConfig(path=path)) as store:
        await fill(store, sessions, running, queued)
        if running + queued:
            print("crash", flush=True)
            await trio.sleep_forever()
        await store.mark_clean()


if __name__ == "__main__":
    trio.run(make, Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
