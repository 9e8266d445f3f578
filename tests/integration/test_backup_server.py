"""A backup of a server that is at work, and a second server that starts from it: real processes, real clients."""

import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trio

from tests.support import http_client, ws_client
from tests.support.server import DEADLINE_S, ServerProcess, process_environment, server_process
from tests.support.upstream import Answer, Upstream, open_upstream

TOKENS = [f"t{number} " for number in range(8)]
WRITERS = 4

Event = dict[str, Any]


def variables(upstream: Upstream) -> dict[str, str]:
    return {"BAMBOO_LLM__PROVIDERS__OPENAI__BASE_URL": upstream.base_url, "OPENAI_API_KEY": "sk-test"}


async def post_chat(url: str, session_id: str, text: str, key: str) -> http_client.Answer:
    json = {"message": text, "session_id": session_id}
    return await http_client.ask(url, "POST", "/api/v1/chat", json=json, headers={"Idempotency-Key": key})


async def accepted_chat(url: str, session_id: str, text: str, key: str) -> Event:
    answer = await post_chat(url, session_id, text, key)
    assert answer.status == 201, answer
    return dict(answer.json())


async def run_events(url: str, accepted: Event) -> list[Event]:
    """A run's events, to its end."""
    async with http_client.connect(url) as connection:
        return [item.data for item in await (await connection.open_sse("GET", accepted["stream_url"])).rest()]


async def history(url: str, session_id: str) -> Event:
    answer = await http_client.ask(url, "GET", f"/api/v1/history/{session_id}")
    assert answer.status == 200, answer
    return dict(answer.json())


async def messages(url: str, session_id: str) -> list[Event]:
    return list((await history(url, session_id))["messages"])


def told(events: Sequence[Event]) -> list[Event]:
    """What events say, wherever they are read: the cursor is another one in a copy."""
    return [{name: value for name, value in event.items() if name != "cursor"} for event in events]


@dataclass
class Load:
    """Clients that chat without a pause. `accepted` are the answers, by their idempotency keys."""

    url: str
    accepted: dict[str, Event] = field(default_factory=dict)
    warm: trio.Event = field(default_factory=trio.Event)
    stopping: bool = False

    async def write(self, name: str) -> None:
        number = 0
        while not self.stopping:
            number += 1
            key = f"{name}-{number}"
            accepted = await accepted_chat(self.url, name, key, key)
            self.accepted[key] = accepted
            await run_events(self.url, accepted)
            if len(self.accepted) >= 3 * WRITERS:
                self.warm.set()


@asynccontextmanager
async def under_load(url: str) -> AsyncIterator[Load]:
    """The block begins once the clients have been through some chats."""
    load = Load(url)
    async with trio.open_nursery() as nursery:
        for number in range(WRITERS):
            nursery.start_soon(load.write, f"load{number}")
        await load.warm.wait()
        yield load
        load.stopping = True


async def back_up(directory: Path, target: Path) -> None:
    done = await trio.run_process(
        [sys.executable, "-m", "bamboo", "backup", str(target)],
        cwd=directory,
        env=process_environment(directory),
        capture_stdout=True,
        capture_stderr=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, b""), done


@dataclass(frozen=True)
class Before:
    """What the first server's clients knew when the backup was made."""

    done: Event
    done_cursor: str
    done_events: list[Event]
    done_messages: list[Event]
    live: Event
    live_cursor: str
    queued: Event
    loaded: dict[str, Event]


async def test_server_that_starts_from_a_backup_of_one_at_work_has_everything(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for directory in (first, second):
        directory.mkdir()
    with trio.fail_after(2 * DEADLINE_S):
        async with open_upstream() as upstream, server_process(first, **variables(upstream)) as server:
            upstream.default = Answer(tokens=["hi", " there"])
            before = await _work_and_back_up(server, upstream, first, second / "bamboo.db")
            async with server_process(second, **variables(upstream)) as restored:
                await _check_cursors(restored, before)
                await _check_runs(restored, before)
                await _check_keys(restored, before)


async def _work_and_back_up(server: ServerProcess, upstream: Upstream, directory: Path, target: Path) -> Before:
    """A finished session, one in the middle of a run with another run queued, and others that are being written; the
    backup is made, and the run goes on afterwards as if nothing were."""
    url = server.http_url
    done = await accepted_chat(url, "done", "hello", "key-done")
    done_events = await run_events(url, done)
    reply = upstream.answer(Answer(tokens=TOKENS, gated=True))
    live = await accepted_chat(url, "live", "count", "key-live")
    await reply.wait_requested()
    queued = await accepted_chat(url, "live", "and again", "key-queued")
    assert queued["accepted_as"] == "queued"
    async with http_client.connect(url) as connection:
        stream = await connection.open_sse("GET", live["stream_url"])
        reply.release(5)
        seen = await stream.take(7)  # the message, the start, five tokens
        while (await history(url, "live"))["live"]["text"] != "".join(TOKENS[:5]):
            pass  # until they are durable
        async with under_load(url) as load:
            loaded = dict(load.accepted)
            await back_up(directory, target)
        reply.release_all()
        rest = await stream.rest()
    assert rest[-1].data["type"] == "agent_complete"
    last = seen[-1].id
    assert last is not None
    return Before(done, done_events[-1]["cursor"], done_events, await messages(url, "done"), live, last, queued, loaded)


async def read_over_sse(server: ServerProcess, session_id: str, after: str, *, until_run: str) -> list[Event]:
    async with http_client.connect(server.http_url) as connection:
        stream = await connection.open_sse("GET", f"/api/v1/stream/{session_id}?after={after}")
        items: list[http_client.SseItem] = []
        while not items or not is_end(items[-1].data, until_run):
            items += await stream.take(1)
            assert items[-1].id == items[-1].data["cursor"]
        return [item.data for item in items]


async def read_over_ws(server: ServerProcess, session_id: str, after: str, *, until_run: str) -> list[Event]:
    async with ws_client.connect(server.gateway_url, session_id=session_id, after=after) as ws:
        return await ws.until(lambda frame: is_end(frame, until_run))


def is_end(event: Event, run_id: str) -> bool:
    return event["type"] in ws_client.TERMINAL and event["run_id"] == run_id


async def _check_cursors(server: ServerProcess, before: Before) -> None:
    """Every cursor of the first server is a gap, and everything follows it, over either transport."""
    for session_id, cursor, last_run in (
        ("done", before.done_cursor, before.done["run_id"]),
        ("live", before.live_cursor, before.queued["run_id"]),
    ):
        over_sse = await read_over_sse(server, session_id, cursor, until_run=last_run)
        over_ws = await read_over_ws(server, session_id, cursor, until_run=last_run)
        assert over_sse == over_ws
        gap, *events = over_sse
        assert (gap["type"], gap["reason"], gap["from_seq"], gap["to_seq"]) == ("gap", "epoch", None, None)
        assert [event["seq"] for event in events] == list(range(1, len(events) + 1))
        old_epoch = cursor.partition(".")[0]
        assert old_epoch not in {event["cursor"].partition(".")[0] for event in over_sse}
        # From the gap's cursor on there is nothing new to be told.
        assert await read_over_sse(server, session_id, gap["cursor"], until_run=last_run) == events
        if session_id == "done":
            assert told(events[1:]) == told(before.done_events)  # `session_created` is of no run


async def _check_runs(server: ServerProcess, before: Before) -> None:
    """What ran is settled with the text that the copy has of it; what was queued has been answered."""
    url = server.http_url
    events = await run_events(url, before.live)
    assert events[-1]["type"] == "agent_error"
    assert events[-1]["code"] == "interrupted"
    text = "".join(event["token"] for event in events if event["type"] == "agent_token")
    assert text == "".join(TOKENS[:5])
    assert [event["type"] for event in await run_events(url, before.queued)][-1] == "agent_complete"
    assert await messages(url, "done") == before.done_messages
    said = [message["content"] for message in await messages(url, "live")]
    assert said == ["count", "".join(TOKENS[:5]), "and again", "hi there"]


async def _check_keys(server: ServerProcess, before: Before) -> None:
    """The same chat again is the same run, at a place that is one of this server's."""
    url = server.http_url
    chats = {"key-done": before.done, "key-live": before.live, "key-queued": before.queued, **before.loaded}
    texts = {"key-done": "hello", "key-live": "count", "key-queued": "and again"}
    for key, accepted in chats.items():
        session_id = accepted["session_id"]
        answer = await post_chat(url, session_id, texts.get(key, key), key)
        assert answer.status == 200, (key, answer)
        again = answer.json()
        assert (again["accepted_as"], again["run_id"]) == ("duplicate", accepted["run_id"])
        events = await run_events(url, again)
        assert events[0]["type"] == "user_message"
        assert (await read_over_sse(server, session_id, again["cursor"], until_run=accepted["run_id"]))[0] == events[0]
