"""SSE over real sockets: where a stream begins, how it ends, what it sends, and that leaving it leaves nothing."""

from collections.abc import Sequence

import pytest
import trio
import trio.testing

from bamboo.bus.log_reader import LogPage
from bamboo.config import StreamConfig
from bamboo.core.types import RunId, SessionId
from bamboo.errors import StoreError
from bamboo.store import wall_clock_ms
from bamboo.store.memory import MemoryStore
from tests.support.http_client import SseItem
from tests.support.web import WebWorld, open_web_world, web_config

HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-store, no-transform",
    "x-accel-buffering": "no",
}
RUN = ["user_message", "run_started", "agent_token", "agent_token", "agent_message", "agent_complete"]


def kinds(items: Sequence[SseItem]) -> list[str]:
    return [item.data["type"] for item in items]


async def read(web: WebWorld, target: str, **headers: str) -> list[SseItem]:
    """A stream to its proper end."""
    async with web.connect() as connection:
        reader = await connection.open_sse(
            "GET", target, headers={name.replace("_", "-"): value for name, value in headers.items()}
        )
        return await reader.rest()


# One run.


async def test_a_chat_can_be_answered_with_its_events_to_the_terminal_one() -> None:
    async with open_web_world() as web, web.connect() as connection:
        reader = await connection.open_sse("POST", "/api/v1/chat", json={"message": "hi", "session_id": "s1"})
        assert {name: reader.head.headers[name] for name in HEADERS} == HEADERS
        assert "content-encoding" not in reader.head.headers
        assert reader.head.headers["x-bamboo-session"] == "s1"
        assert reader.head.headers["x-bamboo-accepted-as"] == "started"
        assert (await reader.next_item()) == SseItem(retry=1000)
        call = await web.next_call()
        begun = await reader.until("run_started")
        call.say("one")
        assert (await reader.take(1))[0].data["token"] == "one"
        call.say("two")
        call.end()
        items = begun + await reader.rest()
        assert kinds(items) == [kind for kind in RUN if kind != "agent_token"][:2] + RUN[3:]
        assert {item.data["run_id"] for item in items} == {reader.head.headers["x-bamboo-run"]}
        for item in items:
            assert item.id == item.data["cursor"]
            assert item.data["cursor"].endswith(f".{item.data['seq']}")
        await web.nobody_subscribed()


async def test_a_duplicate_of_a_finished_chat_gets_the_same_events_again() -> None:
    async with open_web_world() as web, web.connect() as connection:
        chat = {"message": "hi", "client_message_id": "k"}
        reader = await connection.open_sse("POST", "/api/v1/chat", json=chat)
        call = await web.next_call()
        call.say("one", "two")
        call.end()
        first = await reader.rest()
        again = await connection.open_sse("POST", "/api/v1/chat", json=chat)
        assert again.head.headers["x-bamboo-accepted-as"] == "duplicate"
        assert again.head.headers["x-bamboo-run"] == reader.head.headers["x-bamboo-run"]
        assert await again.rest() == first


async def test_json_is_the_answer_unless_a_stream_is_asked_for() -> None:
    async with open_web_world() as web:
        for accept, is_stream in (
            ("*/*", False),
            ("text/*", False),
            ("application/json", False),
            ("application/json, text/event-stream;q=0.5", False),
            ("text/event-stream;q=0", False),
            ("nonsense", False),
            ("text/event-stream", True),
            ("Text/Event-Stream, */*;q=0.1", True),
            ("application/json;q=0.9, text/event-stream", True),
        ):
            async with web.connect() as connection:
                headers = {"Accept": accept}
                if is_stream:
                    await connection.open_sse("POST", "/api/v1/chat", headers=headers, json={"message": "x"})
                else:
                    answer = await connection.request("POST", "/api/v1/chat", headers=headers, json={"message": "x"})
                    assert (answer.status, answer.headers["content-type"]) == (201, "application/json"), accept


async def test_a_run_is_read_from_its_first_event_from_any_cursor_and_no_further_than_its_end() -> None:
    async with open_web_world() as web:
        accepted = await web.finished_run("one", "two", session_id="s1")
        await web.finished_run("other", session_id="s1")
        whole = await read(web, accepted["stream_url"])
        assert kinds(whole) == RUN
        for number, item in enumerate(whole[:-1]):
            assert item.id is not None
            assert await read(web, f"{accepted['stream_url']}&after={item.id}") == whole[number + 1 :]
            assert await read(web, accepted["stream_url"], Last_Event_ID=item.id) == whole[number + 1 :]
        assert await read(web, f"{accepted['stream_url']}&after={accepted['cursor']}") == whole


async def test_a_reader_that_has_seen_a_run_to_its_end_is_told_to_stop() -> None:
    async with open_web_world() as web:
        accepted = await web.finished_run("one", session_id="s1")
        other = await web.finished_run("two", session_id="s1")
        last = (await read(web, accepted["stream_url"]))[-1].id
        later = (await read(web, other["stream_url"]))[-1].id
        assert last is not None
        assert later is not None
        for cursor in (last, later):
            for target, headers in (
                (f"{accepted['stream_url']}&after={cursor}", {}),
                (accepted["stream_url"], {"Last-Event-ID": cursor}),
            ):
                answer = await web.ask("GET", target, headers=headers)
                assert (answer.status, answer.body) == (204, b"")
        await web.nobody_subscribed()


async def test_the_last_event_id_wins_over_the_query() -> None:
    async with open_web_world() as web:
        accepted = await web.finished_run("one", "two")
        whole = await read(web, accepted["stream_url"])
        first, third = whole[0].id, whole[2].id
        assert third is not None
        assert await read(web, f"{accepted['stream_url']}&after={first}", Last_Event_ID=third) == whole[3:]
        assert await read(web, f"{accepted['stream_url']}&after=nonsense", Last_Event_ID=third) == whole[3:]


async def test_readers_that_come_at_any_time_and_are_cut_anywhere_get_the_same_events() -> None:
    async with open_web_world() as web:
        accepted = await web.chat("hi", "s1")
        call = await web.next_call()
        seen: dict[int, list[SseItem]] = {}

        async def follow(reader_number: int) -> None:
            items: list[SseItem] = []
            while not items or items[-1].data["type"] != "agent_complete":
                async with web.connect() as connection:
                    after = f"&after={items[-1].id}" if items else ""
                    reader = await connection.open_sse("GET", accepted["stream_url"] + after)
                    for _ in range(reader_number + 1):  # then it leaves, in the middle of whatever there is
                        item = await reader.next_event()
                        if item is None:
                            break
                        items.append(item)
            seen[reader_number] = items

        async with trio.open_nursery() as nursery:
            for number in range(6):
                nursery.start_soon(follow, number)
            for number in range(20):
                call.say(f"{number} ", "and ")
                await trio.testing.wait_all_tasks_blocked(0.001)
            call.end()
        whole = await read(web, accepted["stream_url"])
        assert len(whole) == 44
        assert all(items == whole for items in seen.values())
        await web.nobody_subscribed()


# A whole session.


async def test_a_session_is_followed_from_now_through_its_runs_until_the_client_leaves() -> None:
    async with open_web_world() as web:
        await web.finished_run("old", session_id="s1")
        async with web.connect() as connection:
            reader = await connection.open_sse("GET", "/api/v1/stream/s1")
            assert (await reader.next_item()) == SseItem(retry=1000)
            for text in ("one", "two"):
                accepted = await web.finished_run(text, session_id="s1")
                items = await reader.until("agent_complete")
                assert items[0].data["type"] == "user_message"
                assert {item.data["run_id"] for item in items} == {accepted["run_id"]}
            assert web.world.bus.subscriptions
        await web.nobody_subscribed()


async def test_a_history_and_the_stream_from_its_cursor_are_everything_exactly_once() -> None:
    async with open_web_world() as web:
        await web.finished_run("old", session_id="s1")
        history = (await web.ask("GET", "/api/v1/history/s1")).json()
        async with web.connect() as connection:
            accepted = await web.finished_run("new", session_id="s1")
            reader = await connection.open_sse("GET", f"/api/v1/stream/s1?after={history['cursor']}")
            items = await reader.until("agent_complete")
        assert items[0].data["seq"] == history["seq"] + 1
        assert [item.data["seq"] for item in items] == list(range(history["seq"] + 1, items[-1].data["seq"] + 1))
        assert {item.data["run_id"] for item in items} == {accepted["run_id"]}


async def test_deleting_a_session_ends_its_streams_with_a_last_word() -> None:
    async with open_web_world() as web, web.connect() as connection, web.connect() as other:
        accepted = await web.chat("hi", "s1")
        await web.next_call()
        reader = await connection.open_sse("GET", f"/api/v1/stream/s1?after={accepted['cursor']}")
        by_run = await other.open_sse("GET", accepted["stream_url"])
        await reader.until("run_started")
        await web.ask("DELETE", "/api/v1/sessions/s1")
        assert kinds(await reader.rest())[-2:] == ["agent_stopped", "session_closed"]
        assert kinds(await by_run.rest())[-1] == "agent_stopped"
        assert (await web.ask("GET", "/api/v1/stream/s1")).error["code"] == "session_not_found"


# Places that there are not.


@pytest.mark.parametrize(
    "cursor",
    [
        "x",
        "1",
        ".",
        "e.",
        ".1",
        "e.-1",
        "e.1.1",
        "e.01",
        "e.+1",
        "e.99999999999999999999",
        "é.1",
        "e 1",
        "a" * 33 + ".1",
    ],
)
async def test_what_is_no_cursor_is_refused(cursor: str) -> None:
    async with open_web_world() as web:
        accepted = await web.finished_run("one", session_id="s1")
        encoded = "".join(f"%{byte:02x}" for byte in cursor.encode())
        for target in ("/api/v1/stream/s1?x=1", accepted["stream_url"]):
            by_query = await web.ask("GET", f"{target}&after={encoded}")
            by_header = await web.ask("GET", target, headers={"Last-Event-ID": cursor})
            for answer in (by_query, by_header):
                assert (answer.status, answer.error["code"]) == (400, "invalid_cursor")
        await web.nobody_subscribed()


async def test_a_cursor_from_nowhere_gets_a_gap_that_says_why_and_where_the_stream_goes_on() -> None:
    async with open_web_world() as web:
        accepted = await web.finished_run("one", session_id="s1")
        whole = await read(web, accepted["stream_url"])
        foreign = await read(web, f"{accepted['stream_url']}&after=elsewhere.7")
        assert foreign[0].data["type"] == "gap"
        assert foreign[0].data["reason"] == "epoch"
        assert foreign[0].data["from_seq"] is None
        assert foreign[0].id == foreign[0].data["cursor"]
        assert foreign[1:] == whole
        epoch = accepted["cursor"].split(".")[0]
        async with web.connect() as connection:
            reader = await connection.open_sse("GET", f"/api/v1/stream/s1?after={epoch}.999999999999999999")
            (gap,) = await reader.take(1)
            head = whole[-1].data["seq"]
            assert (gap.data["reason"], gap.data["from_seq"], gap.data["to_seq"]) == (
                "crash",
                head + 1,
                999999999999999999,
            )
            assert gap.id == f"{epoch}.{head}"


async def test_an_unknown_session_or_run_has_no_stream() -> None:
    async with open_web_world() as web:
        accepted = await web.finished_run("one", session_id="s1")
        await web.finished_run("one", session_id="s2")
        for target, code in (
            ("/api/v1/stream/s3", "session_not_found"),
            ("/api/v1/stream/s3?after=e.1", "session_not_found"),
            ("/api/v1/stream/s3?run_id=r", "session_not_found"),
            (f"/api/v1/stream/s3?run_id={accepted['run_id']}", "session_not_found"),
            ("/api/v1/stream/s1?run_id=r", "run_not_found"),
            ("/api/v1/stream/s1?run_id=", "run_not_found"),
            (f"/api/v1/stream/s2?run_id={accepted['run_id']}", "run_not_found"),
        ):
            answer = await web.ask("GET", target, headers={"Accept": "text/event-stream"})
            assert (answer.status, answer.error["code"]) == (404, code), target
        await web.nobody_subscribed()


async def test_a_run_whose_log_was_trimmed_is_a_gap_and_the_end() -> None:
    store = MemoryStore(wall_clock_ms)
    async with open_web_world(store=store) as web:
        accepted = await web.finished_run("one", session_id="s1")
        whole = await read(web, accepted["stream_url"])
        await web.world.agents.close()  # its window goes with the runner
        while await store.trim(before_ms=wall_clock_ms() + 1000, limit=100):
            pass
        items = await read(web, accepted["stream_url"])
        assert kinds(items) == ["gap"]
        assert items[0].data["reason"] == "retention"
        assert items[0].data["to_seq"] == whole[-1].data["seq"]


# Silence, outages, leaving.


async def test_a_silent_stream_says_that_it_is_alive() -> None:
    async with open_web_world(web_config(stream=StreamConfig(keep_alive_s=0.02))) as web, web.connect() as connection:
        reader = await connection.open_sse("POST", "/api/v1/chat", json={"message": "hi"})
        call = await web.next_call()
        await reader.until("run_started")
        for _ in range(3):
            item = await reader.next_item()
            assert item is not None
            assert item.comment is not None
            assert item.id is None
        call.say("still here")
        assert (await reader.take(1))[0].data["token"] == "still here"


class FailingStore(MemoryStore):
    """A store whose log cannot be read while `failing` is set."""

    failing = False

    async def read(
        self, session_id: SessionId, after_seq: int, *, max_bytes: int, run_id: RunId | None = None
    ) -> LogPage | None:
        if self.failing:
            raise StoreError("the disk is gone")
        return await super().read(session_id, after_seq, max_bytes=max_bytes, run_id=run_id)


async def test_a_store_that_fails_is_told_once_and_the_stream_goes_on_when_it_is_back() -> None:
    store = FailingStore(wall_clock_ms)
    async with open_web_world(web_config(stream=StreamConfig(window_bytes=1024)), store=store) as web:
        accepted = await web.finished_run(*("x" * 500 for _ in range(10)), session_id="s1")
        whole = await read(web, accepted["stream_url"])
        store.failing = True
        async with web.connect() as connection:
            reader = await connection.open_sse("GET", accepted["stream_url"])
            assert await reader.next_item() == SseItem(retry=1000)
            item = await reader.next_item()
            assert item is not None
            assert item.id is None
            assert item.data == {
                "type": "error",
                "code": "store_unavailable",
                "message": "the disk is gone",
                "retryable": True,
                "retry_after_ms": 1000,
                "session_id": "s1",
            }
            store.failing = False
            assert await reader.rest() == whole


async def test_a_server_whose_store_fails_still_ends_its_streams_when_it_closes() -> None:
    store = FailingStore(wall_clock_ms)
    async with open_web_world(web_config(stream=StreamConfig(window_bytes=1024)), store=store) as web:
        accepted = await web.finished_run(*("x" * 500 for _ in range(10)), session_id="s1")
        store.failing = True
        async with web.connect() as connection:
            reader = await connection.open_sse("GET", accepted["stream_url"])
            assert kinds(await reader.take(1)) == ["error"]
            web.nursery.start_soon(web.web.server.close)
            assert await reader.next_event() is None


async def test_clients_that_leave_at_any_moment_leave_nothing_in_the_bus() -> None:
    async with open_web_world() as web:
        await web.chat("hi", "s1")
        call = await web.next_call()
        for moment in range(4):
            for target in ("/api/v1/stream/s1", "/api/v1/stream/s1?after=e.1"):
                async with web.connect() as connection:
                    await connection.send(f"GET {target} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
                    if moment >= 1:
                        await connection.stream.receive_some(1)
                    if moment >= 2:
                        call.say("word")
                    if moment >= 3:
                        await connection.stream.receive_some(65536)
        await web.nobody_subscribed()
        assert web.world.bus.sessions == 1


async def test_two_streams_and_their_requests_can_share_nothing_but_the_log() -> None:
    """One reader that stops reading costs the other nothing."""
    async with open_web_world() as web, web.connect() as stalled, web.connect() as healthy:
        accepted = await web.chat("hi", "s1")
        call = await web.next_call()
        await stalled.open_sse("GET", accepted["stream_url"])
        reader = await healthy.open_sse("GET", accepted["stream_url"])
        text = "x" * 10_000
        for _ in range(500):
            call.say(text)
        call.end()
        items = await reader.rest()
        assert kinds(items)[-1] == "agent_complete"
        assert sum(item.data.get("token") == text for item in items) == 500
