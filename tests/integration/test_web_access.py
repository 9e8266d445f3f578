"""Who may use the HTTP server: the token, what an address may do before it has shown it, and what the log tells."""

import logging
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest
import trio
import trio.testing
from pydantic import SecretStr
from structlog.testing import capture_logs

from bamboo.config import ServerConfig
from bamboo.web.serving import MAX_REFUSING
from tests.support.http_client import Answer, Cut, HttpConnection, ask, connect, request_bytes
from tests.support.web import WebWorld, open_web_world, web_config
from tests.support.web_apps import open_app

TOKEN = "the-right-token-0123456789"
RIGHT = {"Authorization": f"Bearer {TOKEN}"}
WRONG = {"Authorization": "Bearer the-wrong-token-9876543210"}
SESSIONS = "/api/v1/sessions"


def config(**server: Any) -> ServerConfig:
    return ServerConfig(**{"port": 0, "auth_token": SecretStr(TOKEN), **server})


@asynccontextmanager
async def open_world(**server: Any) -> AsyncIterator[WebWorld]:
    async with open_web_world(web_config(config(**server))) as web:
        yield web


async def open_connection(stack: AsyncExitStack, web: WebWorld) -> HttpConnection:
    """A connection that the server has, and that has not shown the token."""
    connection = await stack.enter_async_context(web.connect())
    assert (await connection.request("GET", "/healthz")).status == 200
    return connection


async def until_answered(web: WebWorld) -> Answer:
    """The first answer on a new connection that is not refused for the number of connections."""
    while True:
        try:
            answer = await web.ask("GET", "/healthz")
        except (trio.BrokenResourceError, Cut):
            continue
        if answer.status != 503:
            return answer


# Connections that have not shown the token.


async def test_an_address_has_so_many_connections_without_the_token() -> None:
    async with open_world(max_unauthenticated_per_address=2) as web, AsyncExitStack() as stack:
        one, two = [await open_connection(stack, web) for _ in range(2)]
        async with web.connect() as three:
            answer = await three.request("GET", "/healthz")
            assert answer.status == 503
            assert answer.error["code"] == "overloaded"
            assert answer.error["retryable"]
            assert answer.headers["retry-after"] == "1"
            assert await three.wait_closed() == b""
        assert (await one.request("GET", SESSIONS, headers=RIGHT)).status == 200
        four = await open_connection(stack, web)
        for connection in (one, two, four):
            assert (await connection.request("GET", "/healthz")).status == 200


@pytest.mark.parametrize("headers", [{}, WRONG])
async def test_a_connection_that_shows_no_token_or_a_wrong_one_stays_counted(headers: dict[str, str]) -> None:
    async with open_world(max_unauthenticated_per_address=1) as web, AsyncExitStack() as stack:
        one = await open_connection(stack, web)
        assert (await one.request("GET", SESSIONS, headers=headers)).status == 401
        assert (await web.ask("GET", "/healthz")).status == 503


async def test_a_connection_that_is_gone_is_counted_no_longer() -> None:
    async with open_world(max_unauthenticated_per_address=1) as web:
        for shows in (False, True, False):
            async with AsyncExitStack() as stack:
                connection = await open_connection(stack, web)
                if shows:
                    for _ in range(2):
                        assert (await connection.request("GET", SESSIONS, headers=RIGHT)).status == 200
            assert (await until_answered(web)).status == 200
            await no_connections(web)
            async with AsyncExitStack() as stack:
                await open_connection(stack, web)
                assert (await web.ask("GET", "/healthz")).status == 503
            await no_connections(web)


async def no_connections(web: WebWorld) -> None:
    while web.web.server.connections:
        await trio.testing.wait_all_tasks_blocked(0.001)


async def test_where_no_token_is_needed_nothing_is_counted() -> None:
    async with open_world(auth_token=None, max_unauthenticated_per_address=1) as web, AsyncExitStack() as stack:
        for _ in range(4):
            await open_connection(stack, web)


async def test_a_trusted_proxy_has_as_many_connections_as_it_likes() -> None:
    async with (
        open_world(max_unauthenticated_per_address=1, trusted_proxies=("127.0.0.0/8",)) as web,
        AsyncExitStack() as stack,
    ):
        for _ in range(4):
            await open_connection(stack, web)


@pytest.mark.usefixtures("mock_clock")  # however slow this machine is, nobody is refused for longer than he may be
async def test_so_many_are_told_why_and_further_ones_are_closed_without_a_word() -> None:
    async with open_world(max_unauthenticated_per_address=1) as web, AsyncExitStack() as stack:
        await open_connection(stack, web)
        for _ in range(MAX_REFUSING):
            told = await stack.enter_async_context(web.connect())
            assert (await told.read_answer()).status == 503
        async with web.connect() as untold:
            assert await untold.wait_closed() == b""


# Wrong tokens.


async def test_an_address_with_too_many_wrong_tokens_is_refused_whatever_it_shows() -> None:
    async with open_world(max_failed_auth_per_minute=3) as web, web.connect() as inside:
        assert (await inside.request("GET", SESSIONS, headers=RIGHT)).status == 200
        for _ in range(3):
            answer = await web.ask("GET", SESSIONS, headers=WRONG)
            assert (answer.status, answer.error["code"]) == (401, "unauthorized")
            assert answer.headers["www-authenticate"] == "Bearer"
        for headers in (WRONG, RIGHT, {}):
            answer = await web.ask("GET", SESSIONS, headers=headers)
            assert (answer.status, answer.error["code"]) == (429, "overloaded")
            assert 1 <= int(answer.headers["retry-after"]) <= 60
            assert 0 < answer.error["retry_after_ms"] <= 60_000
        assert (await web.ask("GET", "/healthz")).status == 200
        assert (await inside.request("GET", SESSIONS, headers=RIGHT)).status == 200
        assert (await inside.request("GET", SESSIONS, headers=WRONG)).status == 401


async def test_the_refusal_says_when_it_ends(mock_clock: trio.testing.MockClock) -> None:
    async with open_world(max_failed_auth_per_minute=1) as web, web.connect() as connection:
        assert (await connection.request("GET", SESSIONS, headers=WRONG)).status == 401
        mock_clock.jump(10)
        answer = await connection.request("GET", SESSIONS, headers=RIGHT)
        assert (answer.status, answer.headers["retry-after"]) == (429, "50")


async def test_asking_without_a_token_is_no_attempt() -> None:
    async with open_world(max_failed_auth_per_minute=1) as web:
        for _ in range(5):
            assert (await web.ask("GET", SESSIONS)).status == 401
        assert (await web.ask("GET", SESSIONS, headers=RIGHT)).status == 200


async def test_a_right_token_beside_a_wrong_one_is_wrong() -> None:
    async with open_world() as web:
        for pair in ((RIGHT, WRONG), (WRONG, RIGHT)):
            headers = [(name, value) for each in pair for name, value in each.items()]
            assert (await web.ask("GET", SESSIONS, headers=headers)).status == 401


async def test_behind_a_trusted_proxy_each_client_has_its_own_attempts() -> None:
    """All of them over one connection, as proxies do it: what one has shown says nothing of the next."""
    async with (
        open_world(max_failed_auth_per_minute=1, trusted_proxies=("127.0.0.1",)) as web,
        web.connect() as connection,
    ):

        async def status(forwarded_for: str, headers: dict[str, str]) -> int:
            headers = {**headers, "X-Forwarded-For": forwarded_for}
            return (await connection.request("GET", SESSIONS, headers=headers)).status

        assert await status("203.0.113.1", RIGHT) == 200
        assert await status("203.0.113.2", WRONG) == 401
        assert await status("203.0.113.2", RIGHT) == 429
        assert await status("198.51.100.1, 203.0.113.2", WRONG) == 429
        assert await status("203.0.113.1", RIGHT) == 200
        assert await status("203.0.113.2, 203.0.113.1", RIGHT) == 200


async def test_who_is_no_trusted_proxy_cannot_be_somebody_else() -> None:
    async with open_world(max_failed_auth_per_minute=2) as web:
        statuses = [
            (await web.ask("GET", SESSIONS, headers={**WRONG, "X-Forwarded-For": f"203.0.113.{number}"})).status
            for number in range(4)
        ]
        assert statuses == [401, 401, 429, 429]


# What the log says.


async def test_a_wrong_token_is_logged_with_the_address_and_without_the_token() -> None:
    with capture_logs() as logs:
        async with open_world(max_failed_auth_per_minute=2, trusted_proxies=("127.0.0.1",)) as web:
            for _ in range(3):
                await web.ask("GET", SESSIONS, headers={**WRONG, "X-Forwarded-For": "203.0.113.9"})
    told = [(entry["event"], entry["address"]) for entry in logs if entry["log_level"] == "warning"]
    assert told == [
        ("wrong_token", "203.0.113.9"),
        ("wrong_token", "203.0.113.9"),
        ("too_many_wrong_tokens", "203.0.113.9"),
    ]
    assert "wrong-token" not in repr(logs)


@pytest.mark.parametrize("name", ["token", "auth_token", "access_token", "authorization", "auth", "key", "api_key"])
async def test_a_token_in_the_url_is_not_accepted(name: str) -> None:
    async with open_world() as web:
        for value in (TOKEN, f"Bearer%20{TOKEN}"):
            assert (await web.ask("GET", f"{SESSIONS}?{name}={value}")).status == 401


async def test_nothing_of_a_query_a_header_or_a_body_is_ever_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    secret = "hush-0123456789"

    async def broken() -> Any:
        raise ValueError("a bug of ours")

    body = f'{{"message": "{secret}"}}'.encode()
    headers = {
        **RIGHT,
        "X-Secret": secret,
        "Cookie": secret,
        "Idempotency-Key": secret,
        "Last-Event-ID": secret,
        "Content-Type": "application/json",
    }
    with capture_logs() as logs:
        async with open_app(config(), broken=broken) as (web, _, _), AsyncExitStack() as stack:
            for method, path, sent in (
                ("GET", "/healthz", RIGHT),
                ("GET", "/nothing", headers),
                ("GET", "/test/broken", headers),
                ("POST", "/test/broken", headers),
                ("DELETE", "/test/broken", headers),
                ("GET", SESSIONS, headers),
                ("GET", SESSIONS, {}),
                ("GET", SESSIONS, {"Authorization": secret}),
                ("GET", SESSIONS, {"Authorization": f"Bearer {secret}"}),
                ("GET", "/api/v1/stream/s1", headers),
                ("POST", "/api/v1/chat", headers),
                ("POST", "/api/v1/chat", {**headers, "Origin": f"http://{secret}"}),
                ("POST", "/api/v1/chat", {**headers, "Host": secret}),
            ):
                target = f"{path}?token={secret}&q={secret}"
                await ask(web.url, method, target, headers=sent, body=b"" if method == "GET" else body)
            for raw in (
                request_bytes("GET", f"http://user:{secret}@127.0.0.1/?token={secret}", headers=RIGHT),
                request_bytes("GET", secret, headers=RIGHT),
                request_bytes("GET", "/", version="9.9", headers={"X-Secret": secret}),
                f"{secret}\r\n\r\n".encode(),
                f"GET / HTTP/1.1\r\n{secret}\r\n\r\n".encode(),
            ):
                connection = await stack.enter_async_context(connect(web.url))
                await connection.send(raw)
                await connection.read_answer()
    assert len([entry for entry in logs if entry["event"] == "request"]) >= 15
    assert any(entry["event"] == "handler_failed" for entry in logs)
    for text in (repr(logs), caplog.text):
        assert secret not in text
        assert TOKEN not in text
