"""What a session's writer may do while readers follow it: one function for each kind of life.

The session is stored already, with `run_started` as its first event, except where a life says otherwise.
"""

from collections.abc import Awaitable, Callable
from typing import Final

import trio

from bamboo.core.types import RunId
from tests.support.bus_world import Writer, complete, started, token

Write = Callable[[Writer], Awaitable[None]]

OTHER_RUN: Final = RunId("other run")

OUTAGE_STEPS: Final = 8
"""Passes of the loop that an outage lasts: enough for every reader to look, also for one that reads the store."""


async def live(writer: Writer) -> None:
    """Deltas, a commit, the end: one session's ordinary life."""
    writer.publish(token("one"), token("two"))
    await trio.lowlevel.checkpoint()
    writer.publish(token("three"))
    await writer.commit(complete())
    await writer.may_leave.wait()
    await writer.evict()


async def often_durable(writer: Writer) -> None:
    """With a tiny window, everybody who does not hurry falls behind it again and again."""
    for text in ("one", "two"):
        writer.publish(token(text), token(text))
        await writer.flush()
    await writer.commit(complete())
    await writer.may_leave.wait()
    await writer.evict()


async def evicted(writer: Writer) -> None:
    """The window goes and comes back in mid-stream, once with nothing new in between."""
    writer.publish(token("one"))
    await writer.evict()
    await writer.open()
    await writer.evict()
    await trio.lowlevel.checkpoint()
    await writer.open()
    writer.publish(token("two"))
    await writer.commit(complete())
    await writer.evict()


async def gave_up(writer: Writer) -> None:
    """A writer loses what it has published; the next one goes on from the durable head, in a new epoch."""
    writer.publish(token("kept"))
    await writer.flush()
    writer.publish(token("lost"), token("lost, too"))
    await trio.lowlevel.checkpoint()
    writer.give_up()
    await writer.open(new_epoch=True)
    writer.publish(token("after"), token("wards"), token("and more"))
    await writer.commit(complete())
    await writer.evict()


async def deleted(writer: Writer) -> None:
    writer.publish(token("one"), token("two"))
    await writer.flush()
    writer.publish(token("three"))
    await writer.delete()


async def two_runs(writer: Writer) -> None:
    """Runs interleave, and the other one goes on behind this one's end."""
    writer.publish(token("one"))
    writer.publish(token("other"), run_id=OTHER_RUN)
    await writer.flush()
    writer.publish(token("two"))
    await writer.commit(complete())
    writer.publish(token("other"), run_id=OTHER_RUN)
    await writer.commit(complete(), run_id=OTHER_RUN)
    await writer.may_leave.wait()
    await writer.evict()


async def stored_late(writer: Writer) -> None:
    """The readers are there before the session, and its first writer leaves without having stored anything."""
    await writer.open()
    await writer.evict()
    await writer.open()
    await writer.commit(started())
    writer.publish(token("one"))
    await writer.commit(complete())
    await writer.evict()


async def failing(writer: Writer) -> None:
    """Two outages, deltas in the first one, and one that is over before anybody can look."""
    writer.publish(token("one"), token("two"))
    writer.begin_outage()
    await writer.logs.pause(OUTAGE_STEPS)
    writer.publish(token("three"))
    await writer.logs.pause(OUTAGE_STEPS)
    writer.end_outage()
    await writer.flush()
    writer.begin_outage()
    writer.end_outage()
    writer.publish(token("four"))
    await writer.logs.pause(2)
    writer.begin_outage()
    await writer.logs.pause(OUTAGE_STEPS)
    writer.end_outage()
    await writer.commit(complete())
    await writer.may_leave.wait()
    await writer.evict()


async def failing_to_read_too(writer: Writer) -> None:
    """With a tiny window: the store takes nothing, and gives nothing either; reading is well again before writing, and
    the other way round."""
    for first in ("reading", "writing"):
        writer.publish(token("one"), token("two"), token("three"))
        await writer.flush()
        writer.begin_outage()
        writer.logs.failing = True
        await writer.logs.pause(OUTAGE_STEPS)
        if first == "writing":
            writer.end_outage()
            await writer.logs.pause(OUTAGE_STEPS)
        writer.logs.failing = False
        await writer.logs.pause(OUTAGE_STEPS)
        writer.end_outage()
        await writer.logs.pause(OUTAGE_STEPS)
    await writer.commit(complete())
    await writer.may_leave.wait()
    await writer.evict()


async def gave_up_in_an_outage(writer: Writer) -> None:
    """The outage outlives the writer, and ends with the next one's coming."""
    writer.publish(token("kept"))
    await writer.flush()
    writer.publish(token("lost"))
    await trio.lowlevel.checkpoint()
    writer.begin_outage()
    writer.give_up()
    await writer.logs.pause(OUTAGE_STEPS)
    await writer.open(new_epoch=True)
    writer.publish(token("after"), token("wards"))
    await writer.commit(complete())
    await writer.evict()
