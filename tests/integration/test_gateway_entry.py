"""The gateway over real sockets: who may come in."""

from typing import Any

import pytest
import trio
import trio.testing

from tests.support.gateway import gateway_config, open_gateway_world
from tests.support.ws_client import connect, handshake, open_raw, open_ws, upgrade_request

DEADLINE_S = 10


async def test_a_token_is_checked_before_the_upgrade_or_in_connect() -> None:
    config = gateway_config(server={"auth_token": "secret-token"})
    with trio.fail_after(DEADLINE_S):
        async with open_gateway_world(config) as world:
            for wrong in ("Bearer wrong", "Basic secret-token", "Bearer", "", "secret-token"):
                answer = await handshake(world.url, Authorization=wrong)
                assert (answer.status, answer.error_code) == (401, "unauthorized"), wrong
            async with connect(world.url, headers={"Authorization": "Bearer secret-token"}) as client:
                assert (await client.call({"type": "ping"}))["type"] == "pong"
            async with world.connect(auth="secret-token") as client:
                assert (await client.call({"type": "ping"}))["type"] == "pong"


@pytest.mark.parametrize("fields", [{}, {"auth": "wrong"}, {"auth": ""}, {"auth": "secret-tokén"}])
async def test_a_connect_without_the_token_is_told_and_closed_with_4401(fields: dict[str, str]) -> None:
    config = gateway_config(auth_token="secret-token", server={"auth_token": "of the http server".replace(" ", "-")})
    with trio.fail_after(DEADLINE_S):
        async with open_gateway_world(config) as world, open_ws(world.url) as client:
            await client.send({"type": "connect", "ref": "c", **fields})
            error = await client.receive()
            assert (error["type"], error["code"], error["ref"]) == ("error", "unauthorized", "c")
            assert await client.close_code() == 4401


@pytest.mark.parametrize("host", ["evil.example", "evil.example:18790", "127.0.0.1.evil.example", "10.0.0.1", ""])
async def test_a_foreign_host_is_refused_before_the_upgrade(host: str) -> None:
    with trio.fail_after(DEADLINE_S):
        async with open_gateway_world() as world:
            answer = await handshake(world.url, Host=host)
            assert (answer.status, answer.error_code) == (403, "forbidden")


@pytest.mark.parametrize("host", ["127.0.0.1", "LOCALHOST:99", "[::1]:5", "bamboo.example", "Bamboo.Example:443"])
async def test_a_known_host_comes_in(host: str) -> None:
    with trio.fail_after(DEADLINE_S):
        config = gateway_config(server={"allowed_hosts": ("bamboo.example",)})
        async with open_gateway_world(config) as world:
            assert (await handshake(world.url, Host=host)).status == 101


async def test_a_browser_comes_in_from_known_origins_only() -> None:
    config = gateway_config(allowed_origins=("https://bamboo.example",))
    with trio.fail_after(DEADLINE_S):
        async with open_gateway_world(config) as world:
            for origin in ("http://127.0.0.1:8081", "http://localhost:8081", "https://bamboo.example"):
                async with connect(world.url, headers={"Origin": origin}):
                    pass
            for origin in ("https://evil.example", "http://127.0.0.1:9999", "null", "", "https://bamboo.example.evil"):
                assert (await handshake(world.url, Origin=origin)).status == 403, origin


async def test_over_the_cap_the_upgrade_is_refused_until_somebody_leaves() -> None:
    with trio.fail_after(DEADLINE_S):
        async with open_gateway_world(gateway_config(max_connections=2)) as world, world.connect() as staying:
            async with world.connect():
                assert world.gateway.connections == 2
                answer = await handshake(world.url)
                assert (answer.status, answer.error_code) == (503, "overloaded")
                assert answer.headers["retry-after"] == "5"
            while world.gateway.connections == 2:
                await staying.call({"type": "ping"})
            async with world.connect() as third:
                assert (await third.call({"type": "ping"}))["type"] == "pong"


async def test_over_the_cap_it_is_told_before_anything_was_asked() -> None:
    with trio.fail_after(DEADLINE_S):
        async with open_gateway_world(gateway_config(max_connections=1)) as world, world.connect():
            async with open_raw(world.url) as client:
                answer = await client.handshake_answer()
            assert (answer.status, answer.error_code, answer.headers["retry-after"]) == (503, "overloaded", "5")


async def test_pages_that_may_use_the_http_api_may_not_connect_unless_the_gateway_says_so() -> None:
    server = {"cors_origins": ("https://cors.example", "https://both.example")}
    with trio.fail_after(DEADLINE_S):
        async with open_gateway_world(
            gateway_config(server=server, allowed_origins=("https://both.example",))
        ) as world:
            assert (await handshake(world.url, Origin="https://cors.example")).status == 403
            assert (await handshake(world.url, Origin="https://both.example")).status == 101


@pytest.mark.parametrize(
    "origin",
    [
        "http://127.0.0.1",
        "https://127.0.0.1:8081",
        "http://127.0.0.1:80810",
        "http://127.0.0.1:8081.evil.example",
        "http://127.0.0.1:8081@evil.example",
        "http://evil.example/http://127.0.0.1:8081",
        "http://127.0.0.1:8081 https://evil.example",
        "http://127.0.0.1:8081, https://evil.example",
        "file://",
        "chrome-extension://abcdef",
        "*",
    ],
)
async def test_an_origin_is_known_as_a_whole_or_not_at_all(origin: str) -> None:
    with trio.fail_after(DEADLINE_S):
        async with open_gateway_world() as world:
            assert (await handshake(world.url, Origin=origin)).status == 403


async def test_a_page_whose_name_was_rebound_to_us_is_refused_whatever_it_says() -> None:
    with trio.fail_after(DEADLINE_S):
        async with open_gateway_world() as world:
            rebound = f"evil.example:{world.gateway.port}"
            for origin in (f"http://{rebound}", "http://127.0.0.1:8081", "null"):
                assert (await handshake(world.url, Host=rebound, Origin=origin)).status == 403
            assert (await handshake(world.url, Origin=f"http://{rebound}")).status == 403
            assert (await handshake(world.url, Origin=f"http://127.0.0.1:{world.gateway.port}")).status == 403


@pytest.mark.parametrize(
    ("found", "instead"),
    [
        (b"Host: ", b"Host: evil.example\r\nHost: "),
        (b"\r\n\r\n", b"\r\nHost: evil.example\r\n\r\n"),
        (b"Host: ", b"Host : evil.example\r\nHost: "),
        (b"Host: ", b"X-Host: "),
        (b"\r\n\r\n", b"\r\nOrigin: http://localhost:8081\r\nOrigin: https://evil.example\r\n\r\n"),
        (b"\r\n\r\n", b"\r\nOrigin: http://localhost:8081\r\n https://evil.example\r\n\r\n"),
        (b"\r\n\r\n", b"\r\norigin:https://evil.example\r\n\r\n"),
        (b"Host: ", b"Host: evil.example\r\n "),
    ],
)
async def test_headers_that_say_two_things_do_not_come_in(found: bytes, instead: bytes) -> None:
    with trio.fail_after(DEADLINE_S):
        async with open_gateway_world() as world, open_raw(world.url) as client:
            await client.send(upgrade_request(world.url).replace(found, instead, 1))
            assert (await client.handshake_answer()).status in (400, 403)


async def test_the_host_is_that_of_the_header_whatever_the_request_line_says() -> None:
    with trio.fail_after(DEADLINE_S):
        async with open_gateway_world() as world:
            for target, host, status in (
                (b"http://127.0.0.1/", b"evil.example", 403),
                (b"http://evil.example/", b"127.0.0.1", 101),
            ):
                async with open_raw(world.url) as client:
                    request = upgrade_request(world.url, Host=host.decode()).replace(b"GET / ", b"GET " + target + b" ")
                    await client.send(request)
                    assert (await client.handshake_answer()).status == status


async def test_on_an_address_that_others_reach_any_host_comes_in_with_the_token_and_no_foreign_page() -> None:
    config = gateway_config(server={"auth_token": "right-token"})
    config = config.model_copy(update={"gateway": config.gateway.model_copy(update={"bind": "0.0.0.0:0"})})
    with trio.fail_after(DEADLINE_S):
        async with open_gateway_world(config) as world:
            right: dict[str, Any] = {"Authorization": "Bearer right-token"}
            assert (await handshake(world.url, Host="bamboo.lan", **right)).status == 101
            assert (await handshake(world.url, Host="bamboo.lan", Origin="http://bamboo.lan", **right)).status == 403
            assert (await handshake(world.url, Host="bamboo.lan", Authorization="Bearer no")).status == 401
