"""Hostile WebSocket clients: whatever bytes, frames or messages they send, the gateway lives, a client beside them is
served throughout, nothing of them is left, and no mistake of ours is logged.
"""

import json
import ssl
from collections.abc import Awaitable, Callable, Sequence
from itertools import pairwise
from typing import Any, Final, Literal

import pytest
import structlog.testing
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st
from trio_websocket import ConnectionClosed

from bamboo.config import Config
from tests.support.gateway import GatewayWorld, gateway_config, open_gateway_world
from tests.support.hypothesis import examples
from tests.support.model import PlayedCall
from tests.support.tls import Authority
from tests.support.ws_client import RawClient, WsClient, client_frame, open_raw, open_upgraded, open_ws, upgrade_request

DEADLINE_S: Final = 30

BUGS: Final = {"connection_failed", "runner_failed", "run_failed"}
"""What is logged of our own mistakes."""

TOKEN: Final = "right-token"
CONFIG: Final = gateway_config(server={"auth_token": TOKEN, "max_failed_auth_per_minute": 10**6})

Ending = Literal["leaves", "resets", "ends"]
endings = st.sampled_from(["leaves", "resets", "ends"])


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("tls"))


def against_the_gateway(
    attack: Callable[[GatewayWorld], Awaitable[None]], config: Config = CONFIG, tls: ssl.SSLContext | None = None
) -> None:
    """Run `attack` beside a healthy client; then look what is left."""

    async def main() -> None:
        with trio.fail_after(DEADLINE_S):
            async with open_gateway_world(config, tls=tls) as world, world.connect(auth=TOKEN) as healthy:
                await healthy.chat("talk to me")
                run = await world.next_call()
                await healthy.until_type("run_started")
                tasks = tasks_in(world.nursery)
                over = trio.Event()
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(serve_until, over, healthy, run)
                    await attack(world)
                    await nobody_else(world)
                    over.set()
                run.end()
                assert (await healthy.until_terminal())[-1]["type"] == "agent_complete"
                await nothing_left(world, tasks)

    with structlog.testing.capture_logs() as logs:
        trio.run(main)
    assert [entry for entry in logs if entry["event"] in BUGS or entry["log_level"] == "error"] == []


async def serve_until(over: trio.Event, client: WsClient, run: PlayedCall) -> None:
    """The healthy client's run goes on, and its frames are answered."""
    while not over.is_set():
        run.say("word")
        assert (await client.receive())["token"] == "word"
        assert (await client.call({"type": "ping"}))["type"] == "pong"
        await trio.testing.wait_all_tasks_blocked(0.001)


def tasks_in(nursery: trio.Nursery) -> int:
    return sum(1 + sum(map(tasks_in, task.child_nurseries)) for task in nursery.child_tasks)


async def nobody_else(world: GatewayWorld) -> None:
    while world.gateway.connections > 1 or world.gateway.waiting:
        await trio.testing.wait_all_tasks_blocked(0.001)


async def nothing_left(world: GatewayWorld, tasks: int) -> None:
    """But for the healthy client."""
    while tasks_in(world.nursery) > tasks or world.world.bus.subscriptions > 1:
        await trio.testing.wait_all_tasks_blocked(0.001)
    assert world.gateway._taken == 1
    assert repr(world.addresses).startswith("<AddressLimits 0 with connections,")


async def say(client: RawClient, data: bytes, cuts: Sequence[int], ending: Ending) -> bytes:
    """Send `data` in pieces, then leave in one way or another. What came back, where the client stays to read it."""
    places = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    try:
        for start, end in pairwise(places):
            await client.send(data[start:end])
            await trio.testing.wait_all_tasks_blocked()
        if ending == "resets":
            client.reset()
        elif ending == "ends":
            await client.tcp.send_eof()
            return await client.rest()
    except trio.BrokenResourceError:
        pass  # the server has left already
    return b""


# Before and in the handshake

GOOD: Final = upgrade_request("ws://127.0.0.1:1/")
cuts = st.lists(st.integers(0, 2000), max_size=4)
pieces = st.binary(max_size=24) | st.sampled_from(
    [b"\r\n", b"\n", b"\0", b": ", b" ", b"\x80", b"\xff" * 4, b"HTTP/1.1"]
)
mutations = st.lists(st.tuples(st.integers(0, len(GOOD)), st.integers(0, 30), pieces), min_size=1, max_size=4)
names = st.sampled_from(
    ["Host", "Origin", "Authorization", "X-Forwarded-For", "Sec-WebSocket-Key", "Sec-WebSocket-Version",
     "Sec-WebSocket-Protocol", "Sec-WebSocket-Extensions", "Upgrade", "Connection", "Content-Length",
     "Transfer-Encoding", "Expect"]
)  # fmt: skip
values = st.text(st.characters(min_codepoint=32, max_codepoint=255), max_size=40) | st.sampled_from(
    ["", "chunked", "-1", "99999999999999999999", "100-continue", "permessage-deflate", "websocket, h2c", "x" * 9000,
     "Bearer ", "Bearer wrong", "xn--" + "a" * 70, "a" * 64 + ".example", "::1", "[::1", "1.2.3.4, " * 500]
)  # fmt: skip


def mutated(data: bytes, changes: Sequence[tuple[int, int, bytes]]) -> bytes:
    for place, length, instead in changes:
        data = data[:place] + instead + data[place + length :]
    return data


def with_header(name: str, value: str) -> bytes:
    return GOOD[:-2] + f"{name}: {value}\r\n".encode("latin-1") + b"\r\n"


handshakes = st.one_of(
    st.binary(max_size=400),
    mutations.map(lambda changes: mutated(GOOD, changes)),
    st.builds(with_header, names, values),
    st.builds(lambda name, value: upgrade_request("ws://127.0.0.1:1/", **{name: value}), names, values.map(ascii)),
    st.builds(lambda head, tail: GOOD[:head] + tail, st.integers(0, len(GOOD)), st.binary(max_size=100)),
    st.sampled_from([b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 3000, b"\r\n" * 5000, GOOD * 20, b"PRI * HTTP/2.0\r\n\r\n"]),
)


@settings(max_examples=examples(40))
@given(st.lists(st.tuples(handshakes, cuts, endings), min_size=1, max_size=6))
def test_no_handshake_harms_anybody(visits: Sequence[tuple[bytes, Sequence[int], Ending]]) -> None:
    async def attack(world: GatewayWorld) -> None:
        for data, places, ending in visits:
            async with open_raw(world.url) as client:
                answer = await say(client, data, places, ending)
                assert answer == b"" or answer.startswith(b"HTTP/1.1 "), answer

    against_the_gateway(attack)


@settings(max_examples=examples(20))
@given(visits=st.lists(st.tuples(st.binary(max_size=300) | st.integers(0, 2000), endings), min_size=1, max_size=4))
def test_no_tls_handshake_harms_anybody(authority: Authority, visits: Sequence[tuple[bytes | int, Ending]]) -> None:
    """Bytes of any kind, or a real handshake with one byte changed."""
    config = gateway_config(server={"auth_token": TOKEN}, **authority.files)
    trust = authority.client_context()

    async def attack(world: GatewayWorld) -> None:
        for data, ending in visits:
            hello = client_hello(trust)
            if isinstance(data, int):
                place = data % len(hello)
                data = hello[:place] + bytes((hello[place] ^ 0xFF,)) + hello[place + 1 :]  # noqa: PLW2901 - made here
            async with open_raw(world.url.replace("wss:", "ws:")) as client:
                await say(client, data, (), ending)

    against_the_gateway(attack, config, trust)


def client_hello(context: ssl.SSLContext) -> bytes:
    outgoing = ssl.MemoryBIO()
    client = context.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname="127.0.0.1")
    with pytest.raises(ssl.SSLWantReadError):
        client.do_handshake()
    return outgoing.read()


# Frames


def frame(first: int, masked: bool, key: bytes, payload: bytes, length: str) -> bytes:  # noqa: FBT001 - a bit
    """RFC 6455 section 5.2, with whatever is wrong about it."""
    mask = 0x80 if masked else 0
    size = len(payload)
    if length == "as it should be" and size >= 126:
        length = "in 16 bits"
    lengths = {
        "as it should be": bytes((mask | min(size, 125),)),
        "in 16 bits": bytes((mask | 126,)) + size.to_bytes(2),
        "in 64 bits": bytes((mask | 127,)) + size.to_bytes(8),
        "too long": bytes((mask | 126,)) + (size + 1000).to_bytes(2),
        "endless": bytes((mask | 127,)) + (2**63 + size).to_bytes(8),
        "enormous": bytes((mask | 127,)) + (2**62).to_bytes(8),
        "missing": b"",
    }
    head = bytes((first,)) + lengths[length]
    return head + (key if masked else b"") + bytes(byte ^ key[n % 4] for n, byte in enumerate(payload))


payloads = st.binary(max_size=200) | st.sampled_from(
    [b"", b'{"type":"ping"}', b'{"type":"connect","auth":"right-token"}', b"\xff\xfe", b"\xc3", b"x" * 126, b"y" * 5000,
     b"\x03\xe8", b"\x03\xe8\xff", b"\x03", b"\x03\xed", b"\xff\xff", b"\x0f\xa0bye"]
)  # fmt: skip
opcodes = st.sampled_from([0, 0, 0, 1, 1, 2, 8, 9, 9, 10]) | st.integers(0, 15)
lengths = st.sampled_from(
    ["as it should be"] * 12 + ["in 16 bits", "in 64 bits", "too long", "endless", "enormous", "missing"]
)
wild_frames = st.builds(
    frame,
    st.builds(
        lambda opcode, final, reserved: opcode | final << 7 | reserved << 4,
        opcodes, st.booleans(), st.sampled_from([0] * 15 + [1, 2, 4, 7]),
    ),
    st.sampled_from([True] * 15 + [False]),
    st.binary(min_size=4, max_size=4),
    payloads,
    lengths,
)  # fmt: skip


@settings(max_examples=examples(60))
@given(st.lists(st.tuples(st.booleans(), st.lists(wild_frames, max_size=30), cuts, endings), min_size=1, max_size=4))
def test_no_frames_harm_anybody(visits: Sequence[tuple[bool, Sequence[bytes], Sequence[int], Ending]]) -> None:
    async def attack(world: GatewayWorld) -> None:
        for connects, frames, places, ending in visits:
            async with open_upgraded(world.url) as client:
                if connects:
                    await client.send_frame({"type": "connect", "auth": TOKEN})
                await say(client, b"".join(frames), places, ending)

    against_the_gateway(attack)


# Messages

wild_text = st.text(max_size=20) | st.sampled_from(
    ["\0", "\ud800", "a" * 300, "../..", "é" * 200, "\u202e", "", "s", "t"]
)
wild_numbers = st.integers() | st.floats() | st.sampled_from([10**400, -1, 2**63, 2**64, 1e308, 0, 1])
wild = st.recursive(
    st.none() | st.booleans() | wild_numbers | wild_text,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(wild_text, inner, max_size=4),
    max_leaves=8,
)
sessions = st.sampled_from(["s", "t"])
FIELDS: Final[dict[str, st.SearchStrategy[Any]]] = {
    "ref": wild_text | wild_numbers | wild,
    "auth": st.sampled_from([TOKEN, "wrong"]) | wild,
    "session_id": sessions | wild,
    "after": st.sampled_from(["none.0", "none.99999999999999999", "x.-1", ".", "a.b.c"]) | wild,
    "protocol": st.sampled_from([1, 2, "1"]) | wild,
    "content": wild_text | st.lists(st.fixed_dictionaries({}, optional={"type": wild_text, "text": wild}), max_size=3)
    | wild,
    "run_id": wild_text | wild,
    "approval_id": wild_text | wild,
    "decision": st.sampled_from(["approve", "deny", "maybe"]) | wild,
    "before": wild_text | wild,
    "limit": st.sampled_from([0, 1, 500, 501]) | wild,
    "name": st.sampled_from(["ping", "status", "stop", "skills", "reboot"]) | wild,
    "args": st.fixed_dictionaries({}, optional={"session_id": sessions | wild, "run_id": wild}) | wild,
    "timestamp": wild,
    "model": wild_text | wild,
    "provider": st.sampled_from(["played", "nobody"]) | wild,
    "on_busy": st.sampled_from(["enqueue", "reject", "interrupt", "explode"]) | wild,
    "on_disconnect": st.just("continue") | st.fixed_dictionaries({"cancel_after_s": wild_numbers}) | wild,
    "system_prompt": wild_text | wild,
    "params": wild,
    "metadata": wild,
    "client_message_id": st.sampled_from(["m1", "m2"]) | wild,
}  # fmt: skip
kinds = st.sampled_from(
    ["connect", "chat", "chat", "subscribe", "unsubscribe", "stop", "approve", "history", "command", "ping", "error"]
)
messages = st.fixed_dictionaries({"type": kinds | wild}, optional=FIELDS)


@settings(max_examples=examples(60))
@given(st.lists(messages | wild, min_size=1, max_size=15), st.booleans())
def test_no_message_is_more_than_an_error(sent: Sequence[object], connects: bool) -> None:  # noqa: FBT001 - drawn
    async def attack(world: GatewayWorld) -> None:
        async with open_ws(world.url) as client:
            if connects:
                await client.call({"type": "connect", "auth": TOKEN, "session_id": "s"})
            try:
                for message in sent:
                    await client.send_raw(json.dumps(message))
                await client.send({"type": "ping", "ref": "the last"})
                await client.answer("the last")
            except ConnectionClosed:
                assert client.websocket.closed is not None
                assert client.websocket.closed.code == 4401  # a connect without the token, or with another
            for received in client.seen:
                assert received["type"] != "error" or received["code"] != "internal", (sent, received)

    against_the_gateway(attack)


# Leaving


@pytest.mark.parametrize("how", ["leaves", "resets"])
def test_who_leaves_at_any_point_leaves_nothing(how: Ending) -> None:
    said = GOOD + b"".join(
        client_frame(json.dumps(message).encode())
        for message in (
            {"type": "connect", "auth": TOKEN, "session_id": "s"},
            {"type": "chat", "content": "hi"},
            {"type": "subscribe", "session_id": "t"},
            {"type": "stop", "session_id": "s"},
        )
    )

    async def attack(world: GatewayWorld) -> None:
        for end in [*range(0, len(GOOD), 40), *range(len(GOOD), len(said), 12), len(said)]:
            async with open_raw(world.url) as client:
                await client.send(said[: min(end, len(GOOD))])
                if end >= len(GOOD):
                    assert (await client.head()).startswith(b"HTTP/1.1 101 ")
                    await say(client, said[len(GOOD) : end], (), how)
                elif how == "resets":
                    client.reset()

    against_the_gateway(attack)
