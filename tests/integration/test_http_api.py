"""The HTTP API over real sockets: every call, every refusal in its order, and nothing kept of what was refused."""

import json
from typing import Any

import pytest
import trio
from pydantic import SecretStr

from bamboo.config import AgentConfig, ServerConfig
from bamboo.core.types import SessionId
from bamboo.errors import StoreError
from bamboo.store import wall_clock_ms
from bamboo.store.memory import MemoryStore
from tests.support.http_client import request_bytes
from tests.support.stores import GatedStore
from tests.support.web import WebWorld, open_web_world, web_config

JSON = {"Content-Type": "application/json"}
CALLS = (
    ("POST", "/api/v1/chat"),
    ("GET", "/api/v1/stream/s1"),
    ("GET", "/api/v1/history/s1"),
    ("POST", "/api/v1/stop/s1"),
    ("GET", "/api/v1/sessions"),
    ("GET", "/api/v1/sessions/s1"),
    ("PATCH", "/api/v1/sessions/s1"),
    ("DELETE", "/api/v1/sessions/s1"),
    ("GET", "/api/v1/sessions/s1/runs"),
    ("GET", "/api/v1/runs/r1"),
    ("POST", "/api/v1/runs/r1/cancel"),
    ("GET", "/api/v1/models"),
    ("GET", "/api/v1/limits"),
)


async def nothing_stored(web: WebWorld) -> bool:
    sessions, _ = await web.world.store.sessions(limit=10)
    return not sessions and not web.world.model.calls


# Chat.


async def test_a_chat_is_accepted_and_says_where_its_run_can_be_followed() -> None:
    async with open_web_world() as web:
        answer = await web.ask("POST", "/api/v1/chat", json={"message": "hi", "session_id": "s1", "title": "ignored"})
        assert answer.status == 201
        accepted = answer.json()
        assert set(accepted) == {
            "session_id",
            "run_id",
            "message_id",
            "status",
            "accepted_as",
            "cursor",
            "stream_url",
        }
        assert (accepted["session_id"], accepted["status"], accepted["accepted_as"]) == ("s1", "running", "started")
        assert accepted["stream_url"] == f"/api/v1/stream/s1?run_id={accepted['run_id']}"
        queued = await web.chat("and more", "s1")
        assert (queued["accepted_as"], queued["status"]) == ("queued", "queued")


async def test_a_repeated_key_gets_the_same_run_and_other_content_a_conflict() -> None:
    async with open_web_world() as web:
        key = {"Idempotency-Key": "k1"}
        first = await web.ask("POST", "/api/v1/chat", headers=key, json={"message": "hi"})
        again = await web.ask("POST", "/api/v1/chat", headers=key, json={"message": "hi"})
        by_id = await web.ask("POST", "/api/v1/chat", json={"message": "hi", "client_message_id": "k1"})
        other = await web.ask("POST", "/api/v1/chat", headers=key, json={"message": "ho"})
        assert (first.status, again.status, by_id.status) == (201, 200, 200)
        assert again.json() == by_id.json()
        assert again.json()["accepted_as"] == "duplicate"
        assert again.json()["run_id"] == first.json()["run_id"]
        assert (other.status, other.error["code"]) == (409, "idempotency_conflict")
        for key_text in ("", "x" * 257):
            headers = {"Idempotency-Key": key_text}
            refused = await web.ask("POST", "/api/v1/chat", headers=headers, json={"message": "x"})
            assert (refused.status, refused.error["code"]) == (400, "invalid_request")
            assert "Idempotency-Key" in refused.error["message"]


async def test_a_busy_session_and_a_full_queue_are_told_apart() -> None:
    config = web_config(agent=AgentConfig(max_queued_runs_per_session=1))
    async with open_web_world(config) as web:
        await web.chat("one", "s1")
        busy = await web.ask("POST", "/api/v1/chat", json={"message": "x", "session_id": "s1", "on_busy": "reject"})
        assert (busy.status, busy.error["code"]) == (409, "busy")
        await web.chat("two", "s1")
        full = await web.ask("POST", "/api/v1/chat", json={"message": "three", "session_id": "s1"})
        assert (full.status, full.error["code"], full.error["retryable"]) == (429, "overloaded", True)
        assert int(full.headers["retry-after"]) >= 1


async def test_a_client_that_leaves_while_its_chat_is_committed_loses_nothing() -> None:
    store = GatedStore(wall_clock_ms)
    async with open_web_world(store=store) as web:
        store.gate.close()
        async with web.connect() as connection:
            body = b'{"message": "hi", "session_id": "s1"}'
            await connection.send(request_bytes("POST", "/api/v1/chat", headers=JSON, body=body))
            await store.gate.arrived()
        store.gate.open()
        await web.next_call()
        assert (await web.ask("GET", "/api/v1/sessions/s1")).status == 200


# Refusals.

BAD_CHATS: tuple[tuple[bytes, str], ...] = (
    (b"", "JSON"),
    (b"{", "JSON"),
    (b"null", "object"),
    (b"[]", "object"),
    (b'"text"', "object"),
    (b"{}", "message"),
    (b'{"message": 5}', "message"),
    (b'{"message": ""}', "message"),
    (b'{"message": []}', "message"),
    (b'{"message": null}', "message"),
    (b'{"message": {"text": "x"}}', "message"),
    (b'{"message": [{"type": "text"}]}', "message"),
    (b'{"message": [{"type": "sound", "url": "x"}]}', "message"),
    (b'{"message": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}', "message"),
    (b'{"message": "x", "session_id": ""}', "session_id"),
    (b'{"message": "x", "session_id": "a b"}', "session_id"),
    (b'{"message": "x", "session_id": "../../etc"}', "session_id"),
    (b'{"message": "x", "session_id": "a\\n"}', "session_id"),
    (b'{"message": "x", "session_id": 7}', "session_id"),
    (b'{"message": "x", "session_id": "' + b"a" * 129 + b'"}', "session_id"),
    (b'{"message": "x", "on_busy": "perhaps"}', "on_busy"),
    (b'{"message": "x", "on_disconnect": {"cancel_after_s": -1}}', "on_disconnect"),
    (b'{"message": "x", "on_disconnect": {"cancel_after_s": "1"}}', "on_disconnect"),
    (b'{"message": "x", "provider": "nobody"}', "provider"),
    (b'{"message": "x", "params": []}', "params"),
    (b'{"message": "x", "metadata": "m"}', "metadata"),
    (b'{"message": "\xff\xfe"}', "JSON"),
    (b'{"message": "\\ud800"}', "JSON"),
    (b'{"message": NaN}', "JSON"),
    (b'{"message": "x"} {}', "JSON"),
    (b"[" * 100_000, "JSON"),
)


@pytest.mark.parametrize(("body", "named"), BAD_CHATS, ids=range(len(BAD_CHATS)))
async def test_a_chat_that_is_wrong_is_refused_and_leaves_nothing(body: bytes, named: str) -> None:
    async with open_web_world() as web:
        for accept in ("*/*", "text/event-stream"):
            answer = await web.ask("POST", "/api/v1/chat", headers={**JSON, "Accept": accept}, body=body)
            assert (answer.status, answer.error["code"]) == (400, "invalid_request"), answer
            assert named in answer.error["message"]
            assert not answer.error["retryable"]
        assert await nothing_stored(web)


async def test_an_error_does_not_echo_what_it_was_given() -> None:
    async with open_web_world() as web:
        body = {"message": "x", "on_busy": "a secret", "model": ["secret"]}
        answer = await web.ask("POST", "/api/v1/chat", json=body)
        assert answer.status == 400
        assert b"secret" not in answer.body


@pytest.mark.parametrize(("method", "target"), CALLS)
async def test_every_call_takes_its_own_methods_only(method: str, target: str) -> None:
    async with open_web_world() as web:
        for other in ("PUT", "OPTIONS", "TRACE", "FOO"):
            answer = await web.ask(other, target)
            assert (answer.status, answer.error["code"]) == (405, "method_not_allowed")
            assert method in answer.headers["allow"].split(", ")


async def test_what_is_not_there_is_told_in_the_envelope() -> None:
    targets = (
        "/",
        "/nothing",
        "/api/v1",
        "/api/v1/chat/",
        "/api//v1/chat",
        "/api/v1/stream/",
        "/api/v1/stream/a/b",
        "/api/v1/stream/a%2Fb",
        "/static/x",
        "/%00",
        "/%ff%fe",
        "*",
        "?x",
        "http://127.0.0.1/healthz",
        "nothing",
    )
    async with open_web_world() as web:
        for target in targets:
            for method in ("GET", "POST", "OPTIONS"):
                answer = await web.ask(method, target)
                assert (answer.status, answer.error["code"]) == (404, "not_found"), (method, target)
        async with web.connect() as connection:
            answer = await connection.request("HEAD", "/nothing")
            assert (answer.status, answer.body) == (404, b"")
            answer = await connection.request("CONNECT", "example.com:443")
            assert answer.status == 404


@pytest.mark.parametrize("session_id", ["a b", "a%20b", "%00", "%ff", "a" * 129, "é", "a%0Ab", "~", "%2e%2e%20"])
async def test_an_odd_session_id_is_refused_on_every_call(session_id: str) -> None:
    async with open_web_world() as web:
        for method, target in CALLS:
            if "s1" not in target or " " in session_id or not session_id.isascii():
                continue
            body = b'{"title": "t"}' if method == "PATCH" else b""
            answer = await web.ask(method, target.replace("s1", session_id), headers=JSON, body=body)
            assert (answer.status, answer.error["code"]) == (400, "invalid_request"), (method, target)
        assert await nothing_stored(web)


async def test_an_unknown_session_or_run_is_told_on_every_call() -> None:
    async with open_web_world() as web:
        for method, target in CALLS:
            if "s1" not in target and "r1" not in target:
                continue
            body = b'{"title": "t"}' if method == "PATCH" else b""
            answer = await web.ask(method, target, headers=JSON, body=body)
            code = "session_not_found" if "s1" in target else "run_not_found"
            assert (answer.status, answer.error["code"]) == (404, code), (method, target, answer)
        odd = await web.ask("GET", "/api/v1/runs/%20")
        assert (odd.status, odd.error["code"]) == (404, "run_not_found")
        assert await nothing_stored(web)


@pytest.mark.parametrize("content_type", [None, "text/plain", "application/x-www-form-urlencoded", "text/json", "x"])
async def test_a_body_that_is_not_said_to_be_json_is_refused(content_type: str | None) -> None:
    headers = {} if content_type is None else {"Content-Type": content_type}
    async with open_web_world() as web:
        for method, target in (("POST", "/api/v1/chat"), ("PATCH", "/api/v1/sessions/s1"), ("POST", "/api/v1/stop/s1")):
            answer = await web.ask(method, target, headers=headers, body=b'{"message": "x"}')
            assert (answer.status, answer.error["code"]) == (415, "unsupported_media_type")
        assert await nothing_stored(web)
        accepted = await web.ask(
            "POST",
            "/api/v1/chat",
            headers={"Content-Type": "Application/JSON; charset=utf-8"},
            body=b'{"message": "x"}',
        )
        assert accepted.status == 201


async def test_a_body_that_is_too_large_is_refused_whether_it_says_its_size_or_not() -> None:
    config = web_config(ServerConfig(port=0, max_body_bytes=1024))
    async with open_web_world(config) as web:
        body = json.dumps({"message": "x" * 2000}).encode()
        sized = await web.ask("POST", "/api/v1/chat", headers=JSON, body=body)
        assert (sized.status, sized.error["code"]) == (413, "too_large")
        chunks = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in (body[:700], body[700:])) + b"0\r\n\r\n"
        chunked = await web.ask("POST", "/api/v1/chat", headers={**JSON, "Transfer-Encoding": "chunked"}, body=chunks)
        assert (chunked.status, chunked.error["code"]) == (413, "too_large")
        assert await nothing_stored(web)
        exact = json.dumps({"message": "x" * (1024 - len('{"message": ""}'))}).encode()
        assert len(exact) == 1024
        assert (await web.ask("POST", "/api/v1/chat", headers=JSON, body=exact)).status == 201


async def test_checks_come_in_their_order() -> None:
    """Each request has every fault from one check on; taking the first away shows the next."""
    token = {"Authorization": "Bearer secret"}
    config = web_config(ServerConfig(port=0, auth_token=SecretStr("secret"), max_body_bytes=1024))
    large = b"{" * 2000
    steps: tuple[tuple[str, str, dict[str, str], bytes, int], ...] = (
        ("PUT", "/nothing", {"Host": "evil.example", "Origin": "http://evil.example"}, large, 403),
        ("PUT", "/nothing", {"Origin": "http://evil.example"}, large, 403),
        ("PUT", "/nothing", {}, large, 401),
        ("PUT", "/nothing", token, large, 404),
        ("PUT", "/api/v1/chat", token, large, 405),
        ("POST", "/api/v1/chat", token, large, 415),
        ("POST", "/api/v1/chat", {**token, **JSON}, large, 413),
        ("POST", "/api/v1/chat", {**token, **JSON}, b"{", 400),
        ("POST", "/api/v1/chat", {**token, **JSON}, b'{"message": "x"}', 201),
    )
    async with open_web_world(config) as web:
        for method, target, headers, body, status in steps:
            answer = await web.ask(method, target, headers=headers, body=body)
            assert answer.status == status, (method, target, headers, answer)
            assert status == 201 or set(answer.json()) == {"error"}


# Who may come in.

KNOWN_HOSTS = (
    "127.0.0.1",
    "127.0.0.1:8081",
    "127.9.9.9",
    "localhost",
    "LocalHost:1",
    "localhost.",
    "[::1]",
    "[::1]:8081",
    "bamboo.example",
    "Bamboo.Example:443",
)
UNKNOWN_HOSTS = (
    "evil.example",
    "bamboo.example.evil.example",
    "localhost.evil.example",
    "127.0.0.1.evil.example",
    "192.168.0.1",
    "0.0.0.0",  # noqa: S104 - only a name here
    "[::1",
    "[::1]x",
    "::1",
    "",
    "user@localhost",
    "xn--a..b",
)


@pytest.mark.parametrize("host", KNOWN_HOSTS)
async def test_on_loopback_a_known_host_is_answered(host: str) -> None:
    async with open_web_world(web_config(ServerConfig(port=0, allowed_hosts=("bamboo.example",)))) as web:
        for method in ("GET", "HEAD"):
            assert (await web.ask(method, "/api/v1/models", headers={"Host": host})).status == 200


@pytest.mark.parametrize("host", UNKNOWN_HOSTS)
async def test_on_loopback_any_other_host_is_refused(host: str) -> None:
    async with open_web_world(web_config(ServerConfig(port=0, allowed_hosts=("bamboo.example",)))) as web:
        for method in ("GET", "POST", "OPTIONS"):
            answer = await web.ask(method, "/healthz", headers={"Host": host})
            assert (answer.status, answer.error["code"]) == (403, "forbidden")
        assert (await web.ask("HEAD", "/healthz", headers={"Host": host})).status == 403


async def test_a_client_of_http_1_0_needs_no_host() -> None:
    async with open_web_world() as web, web.connect() as connection:
        await connection.send(b"GET /healthz HTTP/1.0\r\n\r\n")
        assert (await connection.read_answer()).status == 200


async def test_on_other_binds_any_host_is_answered_however_strange() -> None:
    everywhere = "0.0.0.0"  # noqa: S104 - that is the point
    config = web_config(ServerConfig(host=everywhere, port=0, auth_token=SecretStr("secret")))
    async with open_web_world(config) as web, web.connect() as connection:
        for host in ("bamboo.example", "a..b", "ÿ", "", "[", "x" * 300):
            answer = await connection.request(
                "GET", "/api/v1/models", headers={"Host": host, "Authorization": "Bearer secret"}
            )
            assert answer.status == 200, host


@pytest.mark.parametrize(
    ("origin", "host"),
    [
        ("http://127.0.0.1:8081", "127.0.0.1:8081"),
        ("http://localhost:8081", "localhost:8081"),
        ("https://localhost", "localhost"),
        ("https://localhost", "localhost:443"),
        ("http://[::1]:8081", "[::1]:8081"),
    ],
)
async def test_a_page_of_the_server_itself_may_do_everything(origin: str, host: str) -> None:
    async with open_web_world() as web:
        headers = {"Origin": origin, "Host": host}
        assert (await web.ask("POST", "/api/v1/chat", headers=headers, json={"message": "x"})).status == 201


@pytest.mark.parametrize(
    ("origin", "host"),
    [
        ("http://localhost:3000", "localhost:8081"),
        ("http://localhost:8081", "127.0.0.1:8081"),
        ("http://evil.example", "127.0.0.1:8081"),
        ("http://127.0.0.1:8081.evil.example", "127.0.0.1:8081"),
        ("null", "127.0.0.1:8081"),
        ("", "127.0.0.1:8081"),
        ("http://", "127.0.0.1:8081"),
        ("file://", "127.0.0.1:8081"),
        ("127.0.0.1:8081", "127.0.0.1:8081"),
    ],
)
async def test_a_page_of_another_origin_changes_nothing(origin: str, host: str) -> None:
    async with open_web_world() as web:
        headers = {"Origin": origin, "Host": host}
        assert (await web.ask("GET", "/api/v1/models", headers=headers)).status == 200
        for method, target in (
            ("POST", "/api/v1/chat"),
            ("DELETE", "/api/v1/sessions/s1"),
            ("POST", "/api/v1/stop/s1"),
            ("OPTIONS", "/"),
        ):
            answer = await web.ask(method, target, headers=headers, json={"message": "x"})
            assert (answer.status, answer.error["code"]) == (403, "forbidden")
        assert await nothing_stored(web)


@pytest.mark.parametrize(
    ("authorization", "status"),
    [
        ("Bearer geheim", 200),
        ("bearer geheim", 200),
        ("Bearer  geheim", 200),
        (None, 401),
        ("", 401),
        ("Bearer", 401),
        ("Bearer ", 401),
        ("Bearer geheim-ä", 401),
        ("Bearer gehei", 401),
        ("Bearer geheim x", 401),
        ("Basic geheim", 401),
        ("geheim", 401),
    ],
)
async def test_with_a_token_everything_but_health_needs_it(authorization: str | None, status: int) -> None:
    config = web_config(ServerConfig(port=0, auth_token=SecretStr("geheim")))
    headers = {} if authorization is None else {"Authorization": authorization}
    async with open_web_world(config) as web:
        for target in ("/api/v1/models", "/api/v1/limits"):
            answer = await web.ask("GET", target, headers=headers)
            assert answer.status == status
            if status == 401:
                assert answer.error["code"] == "unauthorized"
                assert answer.headers["www-authenticate"] == "Bearer"
        for target in ("/nothing", "/"):
            assert (await web.ask("GET", target, headers=headers)).status == (404 if status == 200 else 401)
        for target in ("/healthz", "/health", "/readyz"):
            assert (await web.ask("GET", target, headers=headers)).status == 200


# Stop and cancel.


async def test_stop_ends_the_run_and_the_queue_and_says_which() -> None:
    async with open_web_world() as web:
        one = await web.chat("one", "s1")
        call = await web.next_call()
        two = await web.chat("two", "s1")
        receipt = (await web.ask("POST", "/api/v1/stop/s1")).json()
        assert set(receipt) == {"stopped", "tools_stopped", "elapsed_ms"}
        assert receipt["stopped"] == [one["run_id"], two["run_id"]]
        assert call.closed.is_set()
        again = (await web.ask("POST", "/api/v1/stop/s1", json={})).json()
        assert again["stopped"] == []
        unknown = await web.ask("POST", "/api/v1/stop/s1", json={"run_id": "run_x"})
        assert (unknown.status, unknown.error["code"]) == (404, "run_not_found")


async def test_one_run_can_be_cancelled_while_it_is_queued() -> None:
    async with open_web_world() as web:
        await web.chat("one", "s1")
        two = await web.chat("two", "s1")
        by_run = await web.ask("POST", f"/api/v1/runs/{two['run_id']}/cancel")
        assert by_run.json()["stopped"] == [two["run_id"]]
        assert (await web.ask("GET", f"/api/v1/runs/{two['run_id']}")).json()["status"] == "stopped"
        three = await web.chat("three", "s1")
        by_session = await web.ask("POST", "/api/v1/stop/s1", json={"run_id": three["run_id"]})
        assert by_session.json()["stopped"] == [three["run_id"]]
        bad = await web.ask("POST", f"/api/v1/runs/{three['run_id']}/cancel", headers=JSON, body=b"{")
        assert (bad.status, bad.error["code"]) == (400, "invalid_request")


# What is kept.


async def test_history_is_a_snapshot_with_what_runs_and_what_waits() -> None:
    async with open_web_world() as web:
        await web.finished_run("hello", " you", session_id="s1")
        running = await web.chat("more", "s1")
        call = await web.next_call()
        queued = await web.chat("later", "s1")
        call.say("so", " far")
        async with web.connect() as connection:
            reader = await connection.open_sse("GET", running["stream_url"])
            while (await reader.take(1))[0].data.get("token") != " far":
                pass
        history: dict[str, Any] = {}
        while history.get("live") is None or history["live"]["text"] != "so far":
            history = (await web.ask("GET", "/api/v1/history/s1")).json()
        assert set(history) == {
            "session_id",
            "messages",
            "more",
            "cursor",
            "seq",
            "live",
            "queue",
            "approvals",
        }
        said = [(message["role"], message["content"]) for message in history["messages"]]
        assert said == [("user", "hello"), ("assistant", "hello you"), ("user", "more")]
        assert set(history["messages"][0]) == {"message_id", "run_id", "role", "content", "time"}
        assert history["live"] == {"run_id": running["run_id"], "status": "running", "text": "so far"}
        assert history["queue"] == [
            {"run_id": queued["run_id"], "message_id": queued["message_id"], "content": "later", "position": 1}
        ]
        assert history["approvals"] == []
        assert history["cursor"].endswith(f".{history['seq']}")


async def test_history_is_paged_backwards() -> None:
    async with open_web_world() as web:
        for number in range(3):
            await web.finished_run(f"answer {number}", session_id="s1")
        newest = (await web.ask("GET", "/api/v1/history/s1?limit=2")).json()
        assert newest["more"]
        assert newest["live"] is None
        first = newest["messages"][0]["message_id"]
        older = (await web.ask("GET", f"/api/v1/history/s1?limit=500&before={first}")).json()
        assert set(older) == {"messages", "more"}
        assert not older["more"]
        contents = [message["content"] for message in older["messages"] + newest["messages"]]
        assert contents == ["hello", "answer 0", "hello", "answer 1", "hello", "answer 2"]
        assert (await web.ask("GET", "/api/v1/history/s1?before=nothing")).json()["messages"] == []


@pytest.mark.parametrize("limit", ["0", "-1", "501", "1.5", "x", "", "١", "9" * 30, "+1", " 1"])
async def test_an_absurd_limit_is_refused(limit: str) -> None:
    async with open_web_world() as web:
        await web.finished_run("x", session_id="s1")
        for target in ("/api/v1/history/s1", "/api/v1/sessions", "/api/v1/sessions/s1/runs"):
            encoded = "".join(f"%{byte:02x}" for byte in limit.encode())
            answer = await web.ask("GET", f"{target}?limit={encoded}")
            assert (answer.status, answer.error["code"]) == (400, "invalid_request")
            assert "limit" in answer.error["message"]


async def test_sessions_are_listed_newest_first_and_paged() -> None:
    async with open_web_world() as web:
        for name in ("a", "b", "c"):
            await web.finished_run("x", session_id=name)
        page = (await web.ask("GET", "/api/v1/sessions?limit=2")).json()
        rest = (await web.ask("GET", f"/api/v1/sessions?limit=2&before={page['next']}")).json()
        names = [session["session_id"] for session in page["sessions"] + rest["sessions"]]
        assert names == ["c", "b", "a"]
        assert rest["next"] is None
        bad = await web.ask("GET", "/api/v1/sessions?before=nonsense")
        assert (bad.status, bad.error["code"]) == (400, "invalid_request")
        await web.ask("PATCH", "/api/v1/sessions/b", json={"title": "Bamboo grows"})
        found = (await web.ask("GET", "/api/v1/sessions?q=bamboo")).json()
        assert [session["session_id"] for session in found["sessions"]] == ["b"]


async def test_a_session_is_read_changed_and_deleted() -> None:
    async with open_web_world() as web:
        await web.finished_run("x", session_id="s1")
        session = (await web.ask("GET", "/api/v1/sessions/s1")).json()
        assert session["session_id"] == "s1"
        assert (session["provider"], session["model"], session["metadata"]) == (None, None, None)
        changed = await web.ask("PATCH", "/api/v1/sessions/s1", json={"title": "T", "params": {"temperature": 1}})
        assert changed.status == 200
        changed = await web.ask("PATCH", "/api/v1/sessions/s1", json={"title": None, "model": "m"})
        fields = changed.json()
        assert (fields["title"], fields["model"], fields["params"]) == (None, "m", {"temperature": 1})
        bodies: tuple[dict[str, Any], ...] = ({}, {"title": 5}, {"params": []}, {"unknown": 1})
        for body in bodies:
            answer = await web.ask("PATCH", "/api/v1/sessions/s1", json=body)
            assert (answer.status, answer.error["code"]) == (400, "invalid_request")
        again = (await web.ask("GET", "/api/v1/sessions/s1")).json()
        assert {**again, "updated_at": None} == {**fields, "updated_at": None}
        deleted = await web.ask("DELETE", "/api/v1/sessions/s1")
        assert (deleted.status, deleted.body) == (204, b"")
        assert (await web.ask("GET", "/api/v1/history/s1")).error["code"] == "session_not_found"
        assert (await web.ask("DELETE", "/api/v1/sessions/s1")).error["code"] == "session_not_found"


async def test_runs_tell_what_became_of_them() -> None:
    async with open_web_world() as web:
        first = await web.finished_run("x", session_id="s1")
        second = await web.chat("hello", "s1", model="other")
        (await web.next_call()).fail(ValueError("a bug in a test's model"))
        async with web.connect() as connection:
            await (await connection.open_sse("GET", second["stream_url"])).rest()
        runs = (await web.ask("GET", "/api/v1/sessions/s1/runs")).json()["runs"]
        assert [run["run_id"] for run in runs] == [second["run_id"], first["run_id"]]
        assert (await web.ask("GET", f"/api/v1/runs/{first['run_id']}")).json() == runs[1]
        assert runs[1]["status"] == "completed"
        assert runs[1]["finish_reason"] == "stop"
        assert (runs[1]["provider"], runs[1]["model"]) == ("played", "played-1")
        assert set(runs[1]["stats"]) == {"queue_ms", "ttft_ms", "elapsed_ms"}
        assert runs[1]["error"] is None
        assert runs[1]["cursor"] == first["cursor"]
        assert runs[0]["status"] == "failed"
        assert runs[0]["error"]["code"] == "internal"
        one = (await web.ask("GET", "/api/v1/sessions/s1/runs?limit=1")).json()["runs"]
        assert [run["run_id"] for run in one] == [second["run_id"]]


# The server itself.


async def test_models_and_limits_say_what_can_be_asked_for() -> None:
    async with open_web_world(web_config(ServerConfig(port=0, max_body_bytes=4096))) as web:
        assert (await web.ask("GET", "/api/v1/models")).json() == {
            "default_provider": "played",
            "providers": [{"name": "played", "kind": "scripted", "default_model": "played-1", "demo": False}],
        }
        limits = (await web.ask("GET", "/api/v1/limits")).json()
        assert limits["gateway_url"] == "ws://127.0.0.1:18790/"
        assert limits["limits"]["server.max_body_bytes"] == 4096
        assert limits["limits"]["agent.max_queued_runs_per_session"] == 20
        assert limits["limits"]["gateway.max_message_bytes"] == 1048576
        assert limits["limits"]["stream.keep_alive_s"] == 15
        assert not {"server.auth_token", "server.port", "gateway.bind"} & set(limits["limits"])


class FailingStore(MemoryStore):
    """A store that works until `failing` is set."""

    failing = False
    probes = 0

    async def healthy(self) -> bool:
        self.probes += 1
        return not self.failing

    async def session(self, session_id: SessionId) -> Any:
        if self.failing:
            raise StoreError("the disk is full")
        return await super().session(session_id)


async def test_readiness_is_about_starting_draining_and_the_store() -> None:
    starting = [True]
    store = FailingStore(wall_clock_ms)
    async with open_web_world(store=store, ready=lambda: not starting[0]) as web:
        for target in ("/healthz", "/health"):
            assert (await web.ask("GET", target)).json() == {"status": "ok"}
        answer = await web.ask("GET", "/readyz")
        assert (answer.status, answer.error["code"]) == (503, "starting")
        starting[0] = False
        assert (await web.ask("GET", "/readyz")).json() == {"status": "ready"}
        store.failing = True
        while (answer := await web.ask("GET", "/readyz")).status == 200:
            pass  # it may be a second old
        assert (answer.status, answer.error["code"], answer.headers["retry-after"]) == (503, "store_unavailable", "1")
        answer = await web.ask("GET", "/api/v1/sessions/s1")
        assert (answer.status, answer.error["code"], answer.error["retryable"]) == (503, "store_unavailable", True)
        store.failing = False
        await web.world.agents.drain(0)
        answer = await web.ask("GET", "/readyz")
        assert (answer.status, answer.error["code"]) == (503, "draining")
        refused = await web.ask("POST", "/api/v1/chat", json={"message": "x"})
        assert (refused.status, refused.error["code"]) == (503, "draining")
        assert "retry-after" in refused.headers
        assert (await web.ask("GET", "/healthz")).status == 200


async def test_a_flood_of_questions_for_readiness_costs_the_store_a_probe_a_second() -> None:
    store = FailingStore(wall_clock_ms)
    async with open_web_world(store=store) as web:
        began = trio.current_time()

        async def ask() -> None:
            async with web.connect() as connection:
                for _ in range(10):
                    assert (await connection.request("GET", "/readyz")).status == 200

        async with trio.open_nursery() as nursery:
            for _ in range(10):
                nursery.start_soon(ask)
        assert 1 <= store.probes <= 1 + trio.current_time() - began


async def test_head_says_what_get_would() -> None:
    async with open_web_world() as web:
        accepted = await web.finished_run("x", session_id="s1")
        async with web.connect() as connection:
            for target in ("/healthz", "/api/v1/models", "/api/v1/history/s1"):
                got, head = await connection.request("GET", target), await connection.request("HEAD", target)
                assert (head.status, head.body) == (200, b"")
                assert head.headers["content-length"] == got.headers["content-length"]
            for target in (accepted["stream_url"], "/api/v1/stream/s1"):
                head = await connection.request("HEAD", target)
                assert (head.status, head.headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
            assert (await connection.request("HEAD", "/api/v1/stream/s2")).status == 404
        await web.nobody_subscribed()


async def test_many_clients_are_answered_at_once() -> None:
    async with open_web_world() as web, trio.open_nursery() as nursery:

        async def one(number: int) -> None:
            async with web.connect() as connection:
                for _ in range(3):
                    answer = await connection.request("POST", "/api/v1/chat", json={"message": str(number)})
                    assert answer.status == 201
                    assert (await connection.request("GET", "/nothing")).status == 404

        for number in range(20):
            nursery.start_soon(one, number)
