"""Pages of other sites: what a browser lets them send and read, and what the server refuses them."""

from typing import Any

import pytest
from pydantic import SecretStr

from bamboo.config import ServerConfig
from tests.support.http_client import Answer, ask
from tests.support.web import open_web_world, web_config
from tests.support.web_apps import open_app

PAGE = "https://app.example"
OTHER = "https://evil.example"
TOKEN = "secret-token"
AUTHORIZATION = {"Authorization": f"Bearer {TOKEN}"}
CHAT = "/api/v1/chat"
PREFLIGHT = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}


def config(**server: Any) -> ServerConfig:
    return ServerConfig(**{"port": 0, "cors_origins": (PAGE, "http://127.0.0.1:3000"), **server})


def with_token() -> ServerConfig:
    return config(auth_token=SecretStr(TOKEN))


def cors_headers(answer: Answer) -> dict[str, str]:
    return {name: value for name, value in answer.headers.items() if name.startswith("access-control-")}


def assert_open_to(answer: Answer, origin: str) -> None:
    assert answer.headers["access-control-allow-origin"] == origin
    assert answer.headers["vary"] == "Origin"
    assert "access-control-allow-credentials" not in answer.headers


def assert_closed(answer: Answer) -> None:
    assert not cors_headers(answer)


# Unless it is set.


@pytest.mark.parametrize("origin", [PAGE, "null", "http://localhost:3000"])
async def test_unless_origins_are_configured_other_sites_get_nothing(origin: str) -> None:
    async with open_web_world() as web:
        for method in ("OPTIONS", "POST", "DELETE", "HEAD"):
            answer = await web.ask(method, CHAT, headers={**PREFLIGHT, "Origin": origin})
            assert answer.status == 403
            assert_closed(answer)
            assert "vary" not in answer.headers
        answer = await web.ask("GET", "/healthz", headers={"Origin": origin})
        assert answer.status == 200  # a page can ask; the browser does not let it read that
        assert_closed(answer)


# Preflights.


@pytest.mark.parametrize("method", ["POST", "GET", "DELETE", "PATCH"])
async def test_a_preflight_is_answered_before_the_token_is_asked_for(method: str) -> None:
    async with open_web_world(web_config(with_token())) as web, web.connect() as connection:
        for path in (CHAT, "/api/v1/sessions/s1", "/nothing"):
            asked = {**PREFLIGHT, "Access-Control-Request-Method": method, "Origin": PAGE}
            answer = await connection.request("OPTIONS", path, headers=asked)
            assert (answer.status, answer.body) == (204, b"")
            assert_open_to(answer, PAGE)
            assert answer.headers["access-control-allow-methods"] == "GET, POST, PATCH, DELETE"
            assert answer.headers["access-control-allow-headers"] == (
                "Authorization, Content-Type, Idempotency-Key, Last-Event-ID"
            )
            assert answer.headers["access-control-max-age"] == "600"
        assert (await connection.request("GET", "/healthz")).status == 200


@pytest.mark.parametrize(
    "origin",
    [
        OTHER,
        "null",
        "",
        "*",
        "https://app.example.evil.example",
        "https://app.example:8443",
        "http://app.example",
        "https://app.example/",
        "https://sub.app.example",
        "app.example",
    ],
)
async def test_a_preflight_of_any_other_site_is_refused(origin: str) -> None:
    async with open_web_world(web_config(with_token())) as web:
        answer = await web.ask("OPTIONS", CHAT, headers={**PREFLIGHT, "Origin": origin})
        assert (answer.status, answer.error["code"]) == (403, "forbidden")
        assert_closed(answer)
        assert answer.headers["vary"] == "Origin"


async def test_options_that_is_no_preflight_is_a_request_like_any_other() -> None:
    async with open_web_world(web_config(with_token())) as web:
        answer = await web.ask("OPTIONS", CHAT, headers={"Origin": PAGE})
        assert answer.status == 401
        assert_open_to(answer, PAGE)
        assert (await web.ask("OPTIONS", CHAT, headers={**PREFLIGHT, **AUTHORIZATION})).status == 405
        assert (await web.ask("POST", CHAT, headers={**PREFLIGHT, "Origin": PAGE})).status == 401


async def test_a_preflight_with_two_origins_is_of_nobody() -> None:
    async with open_web_world(web_config(with_token())) as web:
        for second in (PAGE, OTHER):
            headers = [*PREFLIGHT.items(), ("Origin", PAGE), ("Origin", second)]
            answer = await web.ask("OPTIONS", CHAT, headers=headers)
            assert answer.status in (401, 403)
            assert_closed(answer)


# Requests.


async def test_a_page_of_a_configured_origin_may_use_the_api_and_read_every_answer() -> None:
    async with open_web_world(web_config(with_token())) as web, web.connect() as connection:
        headers = {**AUTHORIZATION, "Origin": PAGE}
        for method, path, json, status in (
            ("POST", CHAT, {"message": "hi", "session_id": "s1"}, 201),
            ("POST", CHAT, {}, 400),
            ("GET", "/api/v1/sessions/s1", None, 200),
            ("PATCH", "/api/v1/sessions/s1", {"title": "t"}, 200),
            ("GET", "/nothing", None, 404),
            ("PUT", CHAT, None, 405),
            ("GET", "/healthz", None, 200),
            ("DELETE", "/api/v1/sessions/s1", None, 204),
        ):
            answer = await connection.request(method, path, headers=headers, json=json)
            assert answer.status == status, (method, path, answer)
            assert_open_to(answer, PAGE)
            assert answer.headers["access-control-expose-headers"] == "Retry-After"
        answer = await web.ask("POST", CHAT, headers={"Origin": PAGE}, json={"message": "hi"})
        assert (answer.status, answer.error["code"]) == (401, "unauthorized")
        assert_open_to(answer, PAGE)


async def test_the_second_origin_is_as_good_as_the_first_and_the_answer_is_for_it_alone() -> None:
    async with open_web_world(web_config(config())) as web:
        answer = await web.ask("POST", CHAT, headers={"Origin": "http://127.0.0.1:3000"}, json={"message": "hi"})
        assert answer.status == 201
        assert_open_to(answer, "http://127.0.0.1:3000")


async def test_a_page_may_read_a_stream_and_what_its_headers_say() -> None:
    async with open_web_world(web_config(config())) as web, web.connect() as connection:
        reader = await connection.open_sse("POST", CHAT, headers={"Origin": PAGE}, json={"message": "hi"})
        headers = reader.head.headers
        assert headers["access-control-allow-origin"] == PAGE
        assert headers["vary"] == "Origin"
        exposed = headers["access-control-expose-headers"].split(", ")
        assert {name.lower() for name in exposed} == {
            "x-bamboo-session",
            "x-bamboo-run",
            "x-bamboo-accepted-as",
            "retry-after",
        }
        (await web.next_call()).end()
        assert (await reader.rest())[-1].data["type"] == "agent_complete"


async def test_a_page_may_read_that_something_of_ours_is_broken() -> None:
    async def broken() -> Any:
        raise ValueError("a bug")

    async with open_app(config(), broken=broken) as (web, _, _):
        answer = await ask(web.url, "GET", "/test/broken", headers={"Origin": PAGE})
        assert answer.status == 500
        assert_open_to(answer, PAGE)


async def test_an_answer_to_nobodys_page_says_that_it_depends_on_who_asks() -> None:
    """Else a cache would give it to the page of a configured origin, which could not read it."""
    async with open_web_world(web_config(config())) as web:
        for headers in ({}, {"Origin": OTHER}, {"Origin": "null"}):
            answer = await web.ask("GET", "/healthz", headers=headers)
            assert answer.status == 200
            assert_closed(answer)
            assert answer.headers["vary"] == "Origin"


# Attacks.


@pytest.mark.parametrize("origin", [OTHER, "null", "http://127.0.0.1:9", "http://localhost", "file://"])
async def test_a_post_of_another_site_changes_nothing(origin: str) -> None:
    """As a form sends it, or `fetch` with no-cors: without a preflight."""
    for server in (ServerConfig(port=0), config()):
        async with open_web_world(web_config(server)) as web:
            for content_type in ("text/plain", "application/x-www-form-urlencoded", "application/json"):
                headers = {"Origin": origin, "Content-Type": content_type}
                answer = await web.ask("POST", CHAT, headers=headers, body=b'{"message": "hi"}')
                assert (answer.status, answer.error["code"]) == (403, "forbidden")
                assert_closed(answer)
            assert (await web.ask("GET", "/api/v1/sessions")).json()["sessions"] == []


async def test_a_name_that_was_made_to_point_here_reaches_nothing() -> None:
    """DNS rebinding: for the browser evil.example is now 127.0.0.1, and its page of the same origin."""
    async with open_web_world(web_config(config())) as web:
        host = f"evil.example:{web.web.port}"
        for origin in (f"http://{host}", PAGE, None):
            headers = {"Host": host, **PREFLIGHT} | ({} if origin is None else {"Origin": origin})
            for method in ("GET", "POST", "OPTIONS"):
                answer = await web.ask(method, "/api/v1/sessions", headers=headers)
                assert (answer.status, answer.error["code"]) == (403, "forbidden")
                assert "Host" in answer.error["message"]
