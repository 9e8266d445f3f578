"""What the two clients share: what a chat must deliver, when its tokens came, and the run of one load.

A client connects all its chats, prints `connected`, waits for a line on its standard input, sends every chat at once,
checks every event, and prints what it saw as one JSON object. It ends with status 1 and a reason if anything was
lost, doubled or out of order. All its waits have deadlines: it ends by itself.
"""

import argparse
import asyncio
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final, Protocol

import orjson
import uvloop

from benchmarks.load import Load, token_text

CONNECT_S: Final = 30.0
CLOSE_S: Final = 5.0
CONNECTING: Final = 32
"""Connections that are being made at once: less than any listener's backlog."""


class DeliveryError(Exception):
    """The server did not deliver what it had to."""


class ChatRecord:
    """One chat's stream as it came. Times are seconds of a monotonic clock."""

    __slots__ = ("complete", "events", "gaps_s", "last_s", "sent_s", "seq", "tokens", "ttft_s", "wanted")

    def __init__(self, wanted: int) -> None:
        self.wanted = wanted
        self.tokens = 0
        self.events = 0
        self.seq: int | None = None
        self.sent_s = 0.0
        self.ttft_s = 0.0
        self.last_s = 0.0
        self.gaps_s: list[float] = []
        self.complete = False

    def feed(self, event: bytes, now_s: float) -> None:
        """Take the JSON of an event of the run. Raises DeliveryError if it is not the one that must come now."""
        fields: dict[str, Any] = orjson.loads(event)
        kind, seq = fields.get("type"), fields.get("seq")
        if kind is None or seq is None:
            raise DeliveryError(f"not an event: {event.decode()}")
        if self.complete:
            raise DeliveryError(f"{kind} after the terminal event")
        if self.seq is not None and seq != self.seq + 1:
            raise DeliveryError(f"{kind} has seq {seq} after {self.seq}")
        self.seq = seq
        self.events += 1
        if kind == "agent_token":
            self._token(fields["token"], now_s)
        elif kind == "agent_complete":
            if self.tokens != self.wanted:
                raise DeliveryError(f"complete after {self.tokens} of {self.wanted} tokens")
            self.complete = True
        elif kind in ("agent_error", "agent_stopped"):
            raise DeliveryError(f"the run did not complete: {event.decode()}")

    def _token(self, token: str, now_s: float) -> None:
        if token != token_text(self.tokens):
            raise DeliveryError(f"token {token!r} came as number {self.tokens}")
        if self.tokens:
            self.gaps_s.append(now_s - self.last_s)
        else:
            self.ttft_s = now_s - self.sent_s
        self.last_s = now_s
        self.tokens += 1


class ChatConnection(Protocol):
    """One chat's connection. Each method is called once, in this order."""

    record: ChatRecord

    async def connect(self) -> None:
        """Connect, up to where the chat can be sent."""

    def send_chat(self) -> None:
        """Send the chat; the record's clock starts."""

    async def wait_delivered(self) -> None:
        """Return when the stream has ended as it should. Raises DeliveryError, or OSError from the connection."""

    async def close(self) -> None:
        """Leave as a client does that behaves."""


def percentile(ordered: Sequence[float], share: float) -> float:
    """The value below which `share` (0 to 1) of the ordered values lie (nearest rank); 0 of none."""
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


def _spread_ms(values_s: Sequence[float]) -> dict[str, float]:
    ordered = sorted(values_s)
    return {
        "p50": round(percentile(ordered, 0.5) * 1000, 3),
        "p99": round(percentile(ordered, 0.99) * 1000, 3),
        "max": round(percentile(ordered, 1) * 1000, 3),
    }


def summarize(records: Sequence[ChatRecord], wall_s: float) -> dict[str, Any]:
    """What a load's client prints: counts, wall-clock time, and how long a reader waited for tokens."""
    return {
        "chats": len(records),
        "tokens": sum(record.tokens for record in records),
        "events": sum(record.events for record in records),
        "wall_s": round(wall_s, 3),
        "ttft_ms": _spread_ms([record.ttft_s for record in records]),
        "gap_ms": _spread_ms([gap_s for record in records for gap_s in record.gaps_s]),
    }


async def _bounded(work: Sequence[Callable[[], Awaitable[None]]], at_once: int) -> None:
    limit = asyncio.Semaphore(at_once)

    async def do(one: Callable[[], Awaitable[None]]) -> None:
        async with limit:
            await one()

    async with asyncio.TaskGroup() as group:
        for one in work:
            group.create_task(do(one))


async def run_load(load: Load, connections: Sequence[ChatConnection]) -> dict[str, Any]:
    """Run one load to its end. Raises DeliveryError, OSError or TimeoutError, in an exception group."""
    everyone = len(connections)
    async with asyncio.timeout(CONNECT_S):
        await _bounded([connection.connect for connection in connections], CONNECTING)
    print("connected", flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    start_s = time.monotonic()
    for connection in connections:
        connection.send_chat()
    async with asyncio.timeout(load.deadline_s):
        await _bounded([connection.wait_delivered for connection in connections], everyone)
    wall_s = time.monotonic() - start_s
    async with asyncio.timeout(CLOSE_S):
        await _bounded([connection.close for connection in connections], everyone)
    return summarize([connection.record for connection in connections], wall_s)


def main(connection: Callable[[str, int, Load], ChatConnection]) -> None:
    """The command line of a client. `connection` makes one for (host, port, load)."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--chats", type=int, required=True)
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--delay-s", type=float, required=True)
    arguments = parser.parse_args()
    load = Load("load", arguments.chats, arguments.tokens, arguments.delay_s)

    async def run() -> dict[str, Any]:
        return await run_load(load, [connection("127.0.0.1", arguments.port, load) for _ in range(load.chats)])

    try:
        seen = uvloop.run(run())
    except (ExceptionGroup, TimeoutError) as error:
        reasons = error.exceptions[:3] if isinstance(error, ExceptionGroup) else [error]
        raise SystemExit("; ".join(f"{type(reason).__name__}: {reason}" for reason in reasons)) from error
    print(orjson.dumps(seen).decode(), flush=True)
