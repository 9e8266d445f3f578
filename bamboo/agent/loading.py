"""How a runner comes by its session from a store that may be late, or fail, just then."""

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace

import structlog
import trio

from bamboo.agent.recovery import CutShort, closing_of, cut_short
from bamboo.agent.requests import Request
from bamboo.agent.surroundings import Home, Surroundings
from bamboo.agent.writer import RETRY_S
from bamboo.core.events import Event, EventBody
from bamboo.core.types import RunId, RunStatus, SessionId
from bamboo.errors import ErrorCode, StoreError
from bamboo.store.base import Commit, Run, SessionLog

log = structlog.get_logger("bamboo.agent")


@dataclass(frozen=True, slots=True)
class Handover:
    """What a runner that died leaves to the next one.

    `tail` was published but is not known to be durable. `lost`: the store gave no answer, so readers may have seen
    events that are nowhere: the log goes on in a new epoch. `code` is what the runner died of. `decided` says how runs
    end whose end was decided before, but is not known to be durable: nothing that happened since changes it.
    """

    tail: Sequence[Event]
    lost: bool
    code: ErrorCode
    decided: Mapping[RunId, CutShort]

    @property
    def without_tail(self) -> "Handover":
        """The tail is given up: it was seen, and is nowhere."""
        return replace(self, tail=(), lost=True)


def end_of(run: Run, handover: Handover | None) -> CutShort | None:
    """How an unfinished run ends that nothing drives. None: it was not running, and its turn is still to come."""
    if handover is not None and run.run_id in handover.decided:
        return handover.decided[run.run_id]
    if run.status is RunStatus.QUEUED:
        return None
    return cut_short(ErrorCode.INTERRUPTED if handover is None else handover.code)


@dataclass(frozen=True, slots=True)
class Loaded:
    """A session that is owned. `closings` settle those of its unfinished runs that nothing drives any more; the turn of
    the others is still to come."""

    log: SessionLog
    closings: Mapping[RunId, Sequence[EventBody]]


@asynccontextmanager
async def open_session(
    session_id: SessionId,
    around: Surroundings,
    home: Home,
    inbox: trio.MemoryReceiveChannel[Request],
    handover: Handover | None,
    *,
    owed: bool,
) -> AsyncIterator[Loaded]:
    """Own the session, with what the runner before it had published made durable, for as long as the block lasts.

    Requests wait `storage.commit_timeout_s` for that; then, and while the store refuses, they get `store_unavailable`,
    each as it comes. A session that is `owed` an end of runs that an earlier process or runner left is tried again
    until the store is back, and its readers are told. Any other raises StoreError at once, and so does that one when
    the server leaves.
    """
    loading = _Loading(session_id, around, inbox, handover, owed=owed)
    refusals = 0
    async with AsyncExitStack() as owned:
        while True:
            try:
                loaded = await loading.attempt(owned)
                break
            except StoreError as error:
                await owned.aclose()
                if not owed or home.draining:
                    raise
                log.warning("session_late", session_id=session_id, error=error.message)
                around.bus.begin_outage(session_id, error)
                with trio.move_on_after(RETRY_S[min(refusals, len(RETRY_S) - 1)]) as pause:
                    await loading.refuse_all(error)
                if not pause.cancelled_caught:
                    raise
                refusals += 1
        yield loaded


class _Loading:
    def __init__(
        self,
        session_id: SessionId,
        around: Surroundings,
        inbox: trio.MemoryReceiveChannel[Request],
        handover: Handover | None,
        *,
        owed: bool,
    ) -> None:
        self._session_id = session_id
        self._around = around
        self._inbox = inbox
        self._handover = handover
        self._owed = owed

    async def attempt(self, owned: AsyncExitStack) -> Loaded:
        """Load once, however long that takes: a load that was handed over cannot be taken back, and a second one
        would only wait behind it. Raises StoreError, also when the server leaves and the store is late; `owned` has to
        be closed then too."""
        loaded: Loaded | None = None
        failure = StoreError("the store did not answer in time")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._refuse_late, failure, nursery.cancel_scope)
            try:
                loaded = await self._load(owned)
            except StoreError as error:
                failure = error
            nursery.cancel_scope.cancel()
        if loaded is None:
            raise failure
        return loaded

    async def refuse_all(self, error: StoreError) -> None:
        """Refuse what waits, and what still comes, until the inbox is closed."""
        async for request in self._inbox:
            request.reply.fail(error)

    async def _refuse_late(self, error: StoreError, attempt: trio.CancelScope) -> None:
        await trio.sleep(self._around.config.storage.commit_timeout_s)
        log.error("session_late", session_id=self._session_id, error=error.message)
        if self._owed:
            self._around.bus.begin_outage(self._session_id, error)
        await self.refuse_all(error)
        attempt.cancel()  # nobody is to come any more: the server leaves

    async def _load(self, owned: AsyncExitStack) -> Loaded:
        handover, around = self._handover, self._around
        new_epoch = handover is not None and handover.lost
        session_log = await owned.enter_async_context(around.store.own(self._session_id, new_epoch=new_epoch))
        if handover is not None and new_epoch:
            # The epoch is drawn, and what was published in the one before it is no part of the log.
            self._handover = handover = replace(handover, tail=(), lost=False)
        tail = () if handover is None else handover.tail
        events = [event for event in tail if event.epoch == session_log.epoch and event.seq > session_log.head]
        if events:
            await session_log.commit(Commit(events))
        closings: dict[RunId, Sequence[EventBody]] = {}
        for record in session_log.unfinished:
            end = end_of(record, handover)
            if end is not None:
                default_model = around.providers.default_model
                closings[record.run_id] = await closing_of(record, end, around.store, default_model)
        return Loaded(session_log, closings)
