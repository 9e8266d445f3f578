"""Readers that stop reading while 50,000 tokens are produced: they get every event in the end, and nobody waits for
them.

The server is a process of its own, as it is shipped; its model is the script `long`, at full speed.
"""

from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest
import trio
import trio.testing

from benchmarks.machine import tree_rss_bytes
from tests.support.http_client import ask
from tests.support.readers import Reader, Seen, Way, open_reader
from tests.support.server import DEADLINE_S, ServerProcess, server_process
from tests.support.stalled import (
    STALLED_BUFFER_BYTES,
    bytes_in_kernel,
    open_stalled,
    open_stalled_crowd,
    read_on,
    wait_cut,
)

TOKENS: Final = 50_000
RUN_TYPES: Final = "user_message run_started agent_message agent_complete"

SLOW_WAYS: Final[tuple[Way, ...]] = ("after", "connect")

CROWD: Final = 50
KIB_PER_STALLED: Final = 256
"""What a reader that stalls while it is up to date may add to the server's resident memory, its connection included.
Measured: 40 to 80. The run's events are 9,000.
"""
KIB_PER_CATCHING_UP: Final = 1024
"""The same of one that stalls with a page from the store in its writer's hands. Measured: 290 to 380."""


@dataclass(frozen=True, slots=True)
class Talk:
    """A session that can be made to say much. `start` is the end of its log so far."""

    server: ServerProcess
    session_id: str
    start: str

    async def begin(self, tokens: int = TOKENS) -> dict[str, str]:
        """What was accepted."""
        chat = {"message": "go on", "session_id": self.session_id, "params": {"tokens": tokens}}
        answer = await ask(self.server.http_url, "POST", "/api/v1/chat", json=chat)
        assert answer.status == 201, answer
        return dict(answer.json())

    async def say(self) -> None:
        """Begin, and return when the run is over; of its events none is read. The next run tells: it waits for it."""
        await self.begin()
        after = await self.begin(tokens=1)
        assert after["accepted_as"] == "queued"
        async with open_reader(self.server, "after", self.session_id, None, run_id=after["run_id"]) as reader:
            await reader.until("run_started")

    def rss_bytes(self) -> int:
        """Resident memory of the server's process."""
        return tree_rss_bytes(self.server.process.pid)

    def reader(self, way: Way) -> AbstractAsyncContextManager[Reader]:
        return open_reader(self.server, way, self.session_id, self.start)

    def stalled(self, way: Way) -> AbstractAsyncContextManager[Reader]:
        return open_stalled(self.server, way, self.session_id, self.start)


@asynccontextmanager
async def open_talk(
    directory: Path, *, write_timeout_s: float = 60, window_bytes: int = 256 * 1024
) -> AsyncIterator[Talk]:
    variables = {
        "BAMBOO_LLM__PROVIDERS__OPENAI__KIND": "scripted",
        "BAMBOO_LLM__PROVIDERS__OPENAI__SCRIPT": "long",
        "BAMBOO_SERVER__WRITE_TIMEOUT_S": str(write_timeout_s),
        "BAMBOO_STREAM__WINDOW_BYTES": str(window_bytes),
    }
    await trio.Path(directory).mkdir(exist_ok=True)
    async with server_process(directory, **variables) as server:
        chat = {"message": "hello", "params": {"tokens": 1}}
        accepted = (await ask(server.http_url, "POST", "/api/v1/chat", json=chat)).json()
        async with open_reader(server, "after", accepted["session_id"], accepted["cursor"]) as reader:
            [*_, last] = await read_run(reader)
        yield Talk(server, accepted["session_id"], last.cursor)


async def read_run(reader: Reader, seen: list[Seen] | None = None, *, first: int | None = None) -> list[Seen]:
    """Read on to the next end of a run, or until there are `first` events. Returns `seen`."""
    seen = [] if seen is None else seen
    while first is None or len(seen) < first:
        some = await reader.some()
        assert some, f"{reader.ended} after {seen[-1:]}"
        seen += some
        if some[-1].data.startswith(b'{"type":"agent_complete"'):
            break
    return seen


def check_run(seen: Sequence[Seen], after: str, tokens: int = TOKENS) -> None:
    """Every event of the run that begins behind `after`, once, in order."""
    events = [item.fields for item in seen]
    first = int(after.rpartition(".")[2]) + 1
    assert [event["seq"] for event in events] == list(range(first, first + tokens + 4))
    texts = [event["token"] for event in events if event["type"] == "agent_token"]
    assert texts == [f"word{number} " for number in range(1, tokens + 1)]
    assert " ".join(event["type"] for event in events if event["type"] != "agent_token") == RUN_TYPES


async def test_readers_that_stop_get_every_event_when_they_read_on_and_nobody_waits_for_them(tmp_path: Path) -> None:
    """Two stop before the first event and start when the run is over; two stop in its middle and start in its middle.
    Then all of them follow the next run as if nothing had been."""
    with trio.fail_after(DEADLINE_S):
        async with (
            open_talk(tmp_path) as talk,
            talk.stalled("after") as slow_sse,
            talk.stalled("connect") as slow_ws,
            talk.stalled("last_event_id") as pausing_sse,
            talk.stalled("subscribe") as pausing_ws,
            talk.reader("after") as fast_sse,
            talk.reader("connect") as fast_ws,
        ):
            pausing, slow, fast = (pausing_sse, pausing_ws), (slow_sse, slow_ws), (fast_sse, fast_ws)
            seen: dict[Reader, list[Seen]] = {reader: [] for reader in (*pausing, *slow, *fast)}
            await talk.begin()
            for reader in pausing:
                await read_run(reader, seen[reader], first=100)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(read_run, fast_sse, seen[fast_sse])
                await read_run(fast_ws, seen[fast_ws], first=TOKENS // 2)
                for reader in pausing:
                    read_on(reader)
                for reader in (fast_ws, *pausing):
                    nursery.start_soon(read_run, reader, seen[reader])
            # The run is over, and the fast readers have all of it. The slow ones have not read a byte, and hardly any
            # of it is on its way to them.
            whole = seen[fast_sse]
            check_run(whole, talk.start)
            size = sum(len(item.data) for item in whole)
            assert max(bytes_in_kernel(slow)) < size / 10
            for reader in slow:
                read_on(reader)
                await read_run(reader, seen[reader])
            assert all(seen[reader] == whole for reader in seen)

            await talk.begin(tokens=10)
            after = [await read_run(reader) for reader in seen]
            check_run(after[0], whole[-1].cursor, tokens=10)
            assert all(run == after[0] for run in after)


async def test_readers_that_fall_out_of_a_tiny_window_all_the_time_get_every_event(tmp_path: Path) -> None:
    """It holds a few events, fewer than are not durable yet: everybody goes back and forth between it and the store."""
    with trio.fail_after(DEADLINE_S):
        async with (
            open_talk(tmp_path, window_bytes=1024) as talk,
            talk.reader("after") as sse,
            talk.reader("connect") as ws,
            trio.open_nursery() as nursery,
        ):
            await talk.begin(tokens=10_000)
            over_ws: list[Seen] = []
            nursery.start_soon(read_run, ws, over_ws)
            over_sse = await read_run(sse)
            check_run(over_sse, talk.start, tokens=10_000)
    assert over_ws == over_sse


@pytest.mark.parametrize("way", SLOW_WAYS)
async def test_a_reader_that_is_cut_at_its_write_deadline_resumes_and_gets_the_rest_exactly(
    tmp_path: Path, way: Way
) -> None:
    with trio.fail_after(DEADLINE_S):
        async with open_talk(tmp_path, write_timeout_s=0.5) as talk:
            async with talk.stalled(way) as slow:
                await talk.begin()
                await wait_cut(slow)
                seen = await slow.rest()
                assert slow.ended == "cut"
            assert len(seen) < TOKENS / 10
            after = seen[-1].cursor if seen else talk.start
            async with open_reader(talk.server, way, talk.session_id, after) as reader:
                seen += await read_run(reader)
            check_run(seen, talk.start)


async def test_stalled_readers_cost_next_to_no_memory(tmp_path: Path) -> None:
    """What the server's process has at the end of the same run with a crowd of them, beside what it has without; then
    with a crowd that comes when all is said, and stalls on the store's first page."""
    with trio.fail_after(DEADLINE_S):
        async with open_talk(tmp_path / "a") as talk:
            await talk.say()
            alone = talk.rss_bytes()
            async with open_stalled_crowd(talk.server, CROWD, talk.session_id, talk.start) as crowd:
                while min(bytes_in_kernel(crowd)) < STALLED_BUFFER_BYTES:  # then each was given a page
                    await trio.testing.wait_all_tasks_blocked(0.01)
                behind = talk.rss_bytes()
        async with (
            open_talk(tmp_path / "b") as talk,
            open_stalled_crowd(talk.server, CROWD, talk.session_id, talk.start) as crowd,
        ):
            await talk.say()
            stalled = talk.rss_bytes()
            assert max(bytes_in_kernel(crowd)) < TOKENS
    costs = [(now - alone) / CROWD / 1024 for now in (stalled, behind)]
    assert costs[0] <= KIB_PER_STALLED, f"a stalled reader costs {costs[0]:.0f} KiB"
    assert costs[1] <= KIB_PER_CATCHING_UP, f"one that stalled while it was catching up costs {costs[1]:.0f} KiB"
