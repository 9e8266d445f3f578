"""What one client address may do before it has shown the token: so many connections, so many wrong tokens."""

from typing import Any

import pytest
import structlog.testing
import trio
import trio.testing

from bamboo.config import Config
from tests.support.gateway import GatewayWorld, gateway_config, open_gateway_world
from tests.support.ws_client import handshake, open_raw, open_upgraded, open_ws, upgrade_request

DEADLINE_S = 10

TOKEN = "right-token"
RIGHT: dict[str, Any] = {"Authorization": f"Bearer {TOKEN}"}
WRONG: dict[str, Any] = {"Authorization": "Bearer wrong"}
NOBODY = "<AddressLimits 0 with connections, 0 with wrong tokens>"


def limited(connections: int = 256, failures: int = 30, **server: Any) -> Config:
    return gateway_config(
        server={
            "auth_token": TOKEN,
            "max_unauthenticated_per_address": connections,
            "max_failed_auth_per_minute": failures,
            **server,
        }
    )


async def nobody_left(world: GatewayWorld) -> None:
    while repr(world.addresses) != NOBODY:
        await trio.testing.wait_all_tasks_blocked(0.001)


# Connections


async def test_connections_over_the_limit_are_told_503_at_accept_until_others_are_in_or_gone() -> None:
    with trio.fail_after(DEADLINE_S):
        async with open_gateway_world(limited(connections=2)) as world, world.connect(auth=TOKEN) as inside:
            async with open_raw(world.url), open_ws(world.url) as waiting:
                async with open_raw(world.url) as third:  # it has sent nothing, so no handshake was looked at
                    answer = await third.handshake_answer()
                assert (answer.status, answer.error_code) == (503, "overloaded")
                assert answer.headers["retry-after"] == "5"
                assert int(answer.headers["content-length"]) == len(answer.body)
                assert (await inside.call({"type": "ping"}))["type"] == "pong"
                await waiting.call({"type": "connect", "auth": TOKEN})
                async with world.connect(auth=TOKEN) as fourth:
                    assert (await fourth.call({"type": "ping"}))["type"] == "pong"
            await nobody_left(world)


async def test_who_shows_the_token_in_the_handshake_counts_no_more() -> None:
    with trio.fail_after(DEADLINE_S):
        async with open_gateway_world(limited(connections=1)) as world:
            async with (
                open_ws(world.url, headers=RIGHT) as one,
                open_ws(world.url, headers=RIGHT) as two,
                open_ws(world.url, headers=RIGHT) as three,
            ):
                for client in (one, two, three):
                    assert (await client.call({"type": "connect"}))["type"] == "connected"
                assert repr(world.addresses) == NOBODY
            await world.until_idle()


@pytest.mark.parametrize("way", ["silent", "half a handshake", "refused", "upgraded", "wrong connect", "reset"])
async def test_a_connection_that_is_gone_counts_no_more(way: str) -> None:
    with trio.fail_after(DEADLINE_S):
        async with open_gateway_world(limited(connections=1)) as world:
            for _ in range(5):
                async with open_raw(world.url) as client:
                    match way:
                        case "half a handshake":
                            await client.send(upgrade_request(world.url)[:40])
                        case "refused":
                            await client.send(upgrade_request(world.url, Origin="https://evil.example"))
                            assert (await client.handshake_answer()).status == 403
                        case "upgraded" | "wrong connect" | "reset":
                            await client.send(upgrade_request(world.url))
                            assert (await client.head()).startswith(b"HTTP/1.1 101 ")
                            if way == "wrong connect":
                                await client.send_frame({"type": "connect"})
                                assert await client.close_code() == 4401
                            if way == "reset":
                                client.reset()
                while repr(world.addresses) != NOBODY:
                    await trio.testing.wait_all_tasks_blocked(0.001)
            async with world.connect(auth=TOKEN) as client_of_world:
                assert (await client_of_world.call({"type": "ping"}))["type"] == "pong"
            await world.until_idle()
            assert world.gateway.waiting == 0


async def test_without_a_token_no_connection_counts() -> None:
    config = gateway_config(server={"max_unauthenticated_per_address": 1, "max_failed_auth_per_minute": 1})
    with trio.fail_after(DEADLINE_S):
        async with open_gateway_world(config) as world, open_upgraded(world.url), open_upgraded(world.url):
            for _ in range(3):
                assert (await handshake(world.url, **WRONG)).status == 101
            assert repr(world.addresses) == NOBODY


async def test_a_proxys_connections_count_for_the_clients_behind_it() -> None:
    config = limited(connections=1, trusted_proxies=("127.0.0.0/8",))
    with trio.fail_after(DEADLINE_S):
        async with open_gateway_world(config) as world, open_raw(world.url), open_raw(world.url):
            async with open_ws(world.url, headers={"X-Forwarded-For": "192.0.2.1"}):
                answer = await handshake(world.url, X_Forwarded_For="9.9.9.9, 192.0.2.1")
                assert (answer.status, answer.error_code) == (503, "overloaded")
                assert answer.headers["retry-after"] == "5"
                assert (await handshake(world.url, X_Forwarded_For="192.0.2.2")).status == 101
            await nobody_left(world)


# Wrong tokens


async def test_after_too_many_wrong_tokens_an_address_is_refused_with_429_before_the_upgrade() -> None:
    with trio.fail_after(DEADLINE_S):
        async with open_gateway_world(limited(failures=3)) as world, world.connect(auth=TOKEN) as inside:
            for _ in range(3):
                assert (await handshake(world.url, **WRONG)).status == 401
            for headers in (WRONG, RIGHT, {}):
                answer = await handshake(world.url, **headers)
                assert (answer.status, answer.error_code) == (429, "overloaded")
                assert 0 < int(answer.headers["retry-after"]) <= 60
            await inside.chat("still here")
            await world.finish_run("yes")
            assert (await inside.until_terminal())[-1]["type"] == "agent_complete"


async def test_wrong_tokens_in_connect_count_too_and_then_it_is_told_when_to_come_back() -> None:
    with trio.fail_after(DEADLINE_S):
        async with open_gateway_world(limited(failures=3)) as world, open_ws(world.url) as late:
            for _ in range(3):
                async with open_ws(world.url) as client:
                    await client.send({"type": "connect", "auth": "wrong"})
                    assert (await client.receive())["code"] == "unauthorized"
                    assert await client.close_code() == 4401
            await late.send({"type": "connect", "auth": TOKEN, "ref": "c"})
            error = await late.receive()
            assert (error["type"], error["code"], error["ref"]) == ("error", "overloaded", "c")
            assert error["retryable"]
            assert 0 < error["retry_after_ms"] <= 60_000
            assert await late.close_code() == 1013
            assert (await handshake(world.url, **RIGHT)).status == 429


async def test_wrong_tokens_through_a_proxy_are_those_of_the_client() -> None:
    config = limited(failures=2, trusted_proxies=("127.0.0.1",))
    with trio.fail_after(DEADLINE_S):
        async with open_gateway_world(config) as world:
            for _ in range(2):
                assert (await handshake(world.url, X_Forwarded_For="192.0.2.1", **WRONG)).status == 401
            assert (await handshake(world.url, X_Forwarded_For="192.0.2.1", **RIGHT)).status == 429
            assert (await handshake(world.url, X_Forwarded_For="192.0.2.2", **RIGHT)).status == 101
            assert (await handshake(world.url, **RIGHT)).status == 101


async def test_the_address_is_logged_and_the_token_is_not() -> None:
    with trio.fail_after(DEADLINE_S):
        async with open_gateway_world(limited(failures=1)) as world:
            with structlog.testing.capture_logs() as logs:
                assert (await handshake(world.url, Authorization="Bearer a-secret-of-somebody")).status == 401
                assert (await handshake(world.url, **RIGHT)).status == 429
            told = [entry for entry in logs if entry["event"] == "too_many_wrong_tokens"]
            assert [entry["address"] for entry in told] == ["127.0.0.1"]
            assert "a-secret-of-somebody" not in repr(logs)
