"""Hostile HTTP clients: whatever they send, they get an answer of ours or a closed connection, and nobody else feels
it."""

import json
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final

import h11
import pytest
import structlog.testing
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from bamboo.config import ServerConfig
from tests.support import http_client
from tests.support.http_client import request_bytes
from tests.support.hypothesis import examples
from tests.support.web import WebWorld, open_web_world, web_config

BUGS: Final = {"handler_failed", "request_failed", "connection_failed", "runner_failed"}
"""What the server logs of its own mistakes."""

CHAT: Final = "/api/v1/chat"

wild_text = st.text(max_size=20) | st.sampled_from(["\0", "\ud800", "a" * 300, "../..", "ses_x", "é" * 200, "\u202e"])
wild_numbers = st.integers() | st.floats() | st.sampled_from([10**400, -1, 2**63, 1e308])
wild = st.recursive(
    st.none() | st.booleans() | wild_numbers | wild_text,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(wild_text, inner, max_size=4),
    max_leaves=12,
)
good_parts = st.lists(
    st.sampled_from(
        [
            {"type": "text", "text": "hello"},
            {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}},
            {"type": "text"},
            {"type": "video"},
        ]
    ),
    max_size=3,
)
chat_fields = st.fixed_dictionaries(
    {"message": wild_text | good_parts | wild},
    optional={
        "session_id": wild_text | wild,
        "model": wild_text | wild,
        "provider": wild_text | wild,
        "on_busy": st.sampled_from(["enqueue", "reject", "interrupt", "explode"]) | wild,
        "on_disconnect": st.just("continue") | st.fixed_dictionaries({"cancel_after_s": wild_numbers}) | wild,
        "system_prompt": wild_text | wild,
        "params": wild,
        "client_message_id": wild_text | wild,
        "metadata": wild,
    },
)
bodies = st.one_of(
    st.tuples(st.sampled_from([("POST", CHAT)]), chat_fields),
    st.tuples(
        st.sampled_from(
            [
                ("POST", CHAT),
                ("POST", "/api/v1/stop/s"),
                ("PATCH", "/api/v1/sessions/s"),
                ("POST", "/api/v1/runs/run_x/cancel"),
            ]
        ),
        wild,
    ),
)


def as_json(value: object) -> bytes:
    """What a client may write that knows no rules: lone surrogates, NaN and numbers of any length included."""
    return json.dumps(value).encode("utf-8", "surrogatepass")


def against_a_server(attack: Callable[[WebWorld], Awaitable[None]], server: ServerConfig | None = None) -> None:
    """Run `attack`; the server then lives, holds nothing of it, and has logged no mistake of its own."""

    async def main() -> None:
        async with open_web_world(web_config(server)) as world:
            await attack(world)
            async with world.connect() as connection:
                assert (await connection.request("GET", "/healthz")).status == 200
            await nobody_connected(world)
            await world.nobody_subscribed()

    with structlog.testing.capture_logs() as lines:
        trio.run(main)
    assert not [line for line in lines if line["event"] in BUGS]


async def nobody_connected(world: WebWorld) -> None:
    while world.web.server.connections:
        await trio.testing.wait_all_tasks_blocked(0.001)


@settings(max_examples=examples(100))
@given(st.lists(bodies, min_size=1, max_size=12))
def test_no_body_is_more_than_a_refusal(asked: Sequence[tuple[tuple[str, str], Any]]) -> None:
    async def attack(world: WebWorld) -> None:
        async with world.connect() as connection:
            for (method, target), value in asked:
                headers = {"Content-Type": "application/json"}
                answer = await connection.request(method, target, headers=headers, body=as_json(value))
                assert answer.status in (200, 201, 400, 404, 409, 413, 429), (method, target, value, answer)
                if answer.status >= 400:
                    assert answer.error["code"] != "internal"

    against_a_server(attack)


GOOD: Final = request_bytes("POST", CHAT, headers={"Content-Type": "application/json"}, body=b'{"message": "hello"}')
mutations = st.tuples(
    st.integers(0, len(GOOD)), st.integers(0, 12), st.binary(max_size=24) | st.sampled_from([b"\r\n", b"\0", b": "])
)
requests = st.one_of(
    st.binary(max_size=400),
    st.lists(mutations, min_size=1, max_size=4).map(lambda changes: mutated(GOOD, changes)),
    st.builds(
        lambda method, target, names: request_bytes(method, target, headers=names),
        st.sampled_from(["GET", "POST", "PUT", "DELETE", "OPTIONS", "HEAD", "CONNECT", "TRACE", "PRI", "G3T"]),
        st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=40).map(lambda text: "/" + text)
        | st.sampled_from(["*", "http://evil.example/api/v1/chat", "//", "/%00", "/api/v1/history/%F0%9F", "/../etc"]),
        st.lists(
            st.tuples(
                st.sampled_from(
                    ["Accept", "Last-Event-ID", "Transfer-Encoding", "Content-Length", "Expect", "Upgrade"]
                ),
                st.sampled_from(["chunked", "-1", "0", "1e9", "text/event-stream", "x" * 500, "100-continue", "h2c"]),
            ),
            max_size=4,
        ),
    ),
)


def mutated(request: bytes, changes: Sequence[tuple[int, int, bytes]]) -> bytes:
    for place, removed, inserted in changes:
        request = request[:place] + inserted + request[place + removed :]
    return request


@settings(max_examples=examples(100))
@given(st.lists(requests, min_size=1, max_size=8), st.integers(1, 64))
def test_no_bytes_are_more_than_a_refusal(sent: Sequence[bytes], step: int) -> None:
    async def attack(world: WebWorld) -> None:
        for data in sent:
            async with world.connect() as connection:
                try:
                    await connection.send(data, step=step)
                    await connection.stream.send_eof()
                    rest = await connection.wait_closed()
                except trio.BrokenResourceError:
                    continue  # closed on us while we were still sending
                assert statuses(rest) <= {
                    200,
                    201,
                    204,
                    400,
                    401,
                    403,
                    404,
                    405,
                    408,
                    409,
                    413,
                    415,
                    429,
                    431,
                    501,
                    505,
                }

    against_a_server(attack)


def statuses(data: bytes) -> set[int]:
    """The status of every answer in `data`, which is answers and nothing else; the last may be cut, since its client
    had ended the connection."""
    found: set[int] = set()
    while data:
        assert data.startswith(b"HTTP/1."), data[:80]
        client = h11.Connection(h11.CLIENT)
        client.send(h11.Request(method="GET", target="/", headers=[("Host", "unused")]))
        client.send(h11.EndOfMessage())
        client.receive_data(data)
        while not isinstance(event := client.next_event(), h11.EndOfMessage):
            if event is h11.NEED_DATA:
                return found
            if isinstance(event, h11.Response):
                found.add(event.status_code)
        data = client.trailing_data[0]
    return found


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 1_000_000,
        b'{"message":' * 100_000,
        b'{"message": "x", "params": ' + b'{"a":' * 50_000 + b"1" + b"}" * 50_001,
        b'{"message": ' + b"9" * 1_000_000 + b"}",
        b'{"message": "' + b"\\u0000" * 100_000 + b'"}',
        b'{"message": "hello"' + b', "message": "hello"' * 50_000 + b"}",
        b'{"message": [' + b'{"type": "text", "text": "x"},' * 30_000 + b'{"type": "text", "text": "x"}]}',
    ],
    ids=["[", "{", "params", "digits", "NUL", "duplicates", "parts"],
)
async def test_a_body_that_is_deep_or_huge_is_judged_quickly_and_alone(body: bytes) -> None:
    async with open_web_world() as world, world.connect() as connection:
        headers = {"Content-Type": "application/json"}
        answer = await connection.request("POST", CHAT, headers=headers, body=body)
        assert answer.status in (201, 400), answer
        assert (await world.ask("GET", "/healthz")).status == 200


async def test_2000_clients_at_once_are_each_served_or_told_to_come_back() -> None:
    cap, clients = 500, 2000
    settings = web_config(ServerConfig(port=0, max_connections=cap))
    told: list[int] = []
    everyone_was_told = trio.Event()

    async def come(world: WebWorld) -> None:
        async with world.connect() as connection:
            told.append(await answer_of(connection))
            if len(told) == clients:
                everyone_was_told.set()
            await everyone_was_told.wait()  # who has a place keeps it

    async with open_web_world(settings) as world:
        async with trio.open_nursery() as nursery:
            for _ in range(clients):
                nursery.start_soon(come, world)
        await nobody_connected(world)
        assert (await world.ask("GET", "/healthz")).status == 200
    assert told.count(200) == cap
    assert told.count(503) > 0


async def answer_of(connection: http_client.HttpConnection) -> int:
    """0: more are refused just then than are told so."""
    try:
        answer = await connection.request("GET", "/healthz")
    except (http_client.Cut, trio.BrokenResourceError):
        return 0
    if answer.status == 503:
        assert answer.headers["retry-after"] == "1"
        assert answer.error["code"] == "overloaded"
    return answer.status
