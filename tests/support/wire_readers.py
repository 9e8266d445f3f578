"""What a client of each transport would be sent, without sockets: the production SSE body and the production outbox,
asked as their connections ask them."""

import json
from collections.abc import Awaitable, Callable
from typing import Any, Final

import trio

from bamboo.bus.event_bus import EventBus
from bamboo.core.types import Cursor, SessionId
from bamboo.gateway.outbox import Outbox
from bamboo.web.stream import EventStream

Frame = dict[str, Any]

TERMINAL: Final = ("agent_complete", "agent_error", "agent_stopped")


class Told:
    """Everything that one reader was sent, in order, and what it believes the log to be."""

    def __init__(self) -> None:
        self.frames: list[Frame] = []
        self.kept: dict[int, Frame] = {}
        self._turn = trio.Event()

    @property
    def outages(self) -> list[Frame]:
        return [frame for frame in self.frames if frame["type"] == "error"]

    @property
    def gaps(self) -> list[Frame]:
        return [frame for frame in self.frames if frame["type"] == "gap"]

    @property
    def ended(self) -> bool:
        return any(frame["type"] in TERMINAL for frame in self.frames)

    async def wait(self, *types: str) -> None:
        """Return when a frame of one of these types has come."""
        await trio.lowlevel.checkpoint()
        while not any(frame["type"] in types for frame in self.frames):
            await self._turn.wait()

    def take(self, frame: Frame) -> None:
        self.frames.append(frame)
        self._turn.set()
        self._turn = trio.Event()
        if frame["type"] == "gap":
            self.kept = {seq: kept for seq, kept in self.kept.items() if seq < frame["from_seq"]}
        elif frame["type"] == "error":
            assert not {"seq", "cursor"} & set(frame), frame
        else:
            assert frame["seq"] not in self.kept, f"{frame} came twice"
            assert not self.kept or frame["seq"] == max(self.kept) + 1, f"{frame} behind {max(self.kept)}"
            self.kept[frame["seq"]] = frame


ReadToTheEnd = Callable[[EventBus, SessionId, Cursor, Told], Awaitable[None]]


async def read_sse(bus: EventBus, session_id: SessionId, after: Cursor, told: Told) -> None:
    """To the run's terminal event."""
    with bus.subscribe(session_id) as subscription:
        await subscription.begin(after)
        stream = EventStream(subscription, keep_alive_s=15)
        while not told.ended:
            for block in (await anext(stream)).decode().split("\n\n"):
                fields = dict(line.split(": ", 1) for line in block.splitlines() if line and not line.startswith(":"))
                if "data" in fields:
                    frame = json.loads(fields["data"])
                    assert fields.get("id") == frame.get("cursor"), block
                    told.take(frame)


async def read_ws(bus: EventBus, session_id: SessionId, after: Cursor, told: Told) -> None:
    """To the run's terminal event."""
    outbox = Outbox()
    try:
        subscription = bus.subscribe(session_id, doorbell=outbox.doorbell)
        await subscription.begin(after)
        outbox.follow(subscription)
        while not told.ended:
            with trio.move_on_at(outbox.retry_at):
                await outbox.doorbell.wait()
            for payload in outbox.gather(trio.current_time()):
                told.take(json.loads(payload))
            outbox.gathered()
            if outbox.lagging:
                await outbox.fetch()
                outbox.doorbell.ring()
    finally:
        outbox.close()


READERS: Final[dict[str, ReadToTheEnd]] = {"sse": read_sse, "ws": read_ws}
