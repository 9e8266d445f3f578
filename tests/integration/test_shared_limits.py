"""What an address may do without the token is counted over both listeners together."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import trio
from pydantic import SecretStr

from bamboo.server import Server
from tests.support.http_client import Answer, ask, connect
from tests.support.server import DEADLINE_S, running, server_config

RIGHT = {"Authorization": "Bearer right"}
WRONG = {"Authorization": "Bearer wrong"}
UPGRADE = {
    "Connection": "Upgrade",
    "Upgrade": "websocket",
    "Sec-WebSocket-Version": "13",
    "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
}


@asynccontextmanager
async def open_both(directory: Path, **server: Any) -> AsyncIterator[Server]:
    settings = server_config(directory, server={"auth_token": SecretStr("right"), **server})
    with trio.fail_after(DEADLINE_S):
        async with running(settings) as both:
            yield both


async def handshake(server: Server, headers: dict[str, str]) -> Answer:
    assert server.gateway_url is not None
    return await ask(server.gateway_url.replace("ws://", "http://"), "GET", "/", headers={**UPGRADE, **headers})


async def sessions(server: Server, headers: dict[str, str]) -> Answer:
    return await ask(server.http_url, "GET", "/api/v1/sessions", headers=headers)


async def test_wrong_tokens_of_one_listener_lock_the_address_out_of_the_other(tmp_path: Path) -> None:
    async with open_both(tmp_path, max_failed_auth_per_minute=2) as server:
        assert (await sessions(server, WRONG)).status == 401
        assert (await handshake(server, WRONG)).status == 401
        for answer in (await sessions(server, RIGHT), await handshake(server, RIGHT)):
            assert (answer.status, answer.error["code"]) == (429, "overloaded")


async def test_connections_of_one_listener_take_places_of_the_other(tmp_path: Path) -> None:
    async with (
        open_both(tmp_path, max_unauthenticated_per_address=1) as server,
        connect(server.http_url) as connection,
    ):
        assert (await connection.request("GET", "/healthz")).status == 200
        answer = await handshake(server, {})
        assert (answer.status, answer.error["code"]) == (503, "overloaded")
