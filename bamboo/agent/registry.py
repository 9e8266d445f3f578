"""The agents: one runner per live session, found or started in one synchronous step, supervised, recovered, drained."""

import hashlib
import secrets
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import structlog
import trio

from bamboo.agent.acceptance import RETRY_AFTER_S, draining, no_room_to_queue
from bamboo.agent.loading import Handover
from bamboo.agent.requests import (
    ChatRequest,
    DeleteRequest,
    Request,
    StopRequest,
    UpdateRequest,
    duplicate_of,
    refuse_all,
)
from bamboo.agent.runner import AgentRunner
from bamboo.agent.slots import Slots
from bamboo.agent.surroundings import Surroundings
from bamboo.agent.writer import WriterLostError
from bamboo.bus.event_bus import EventBus
from bamboo.config import Config
from bamboo.core.types import Accepted, Chat, RunId, SessionId, StopReceipt
from bamboo.errors import BambooError, ClientError, ErrorCode, StoreError, run_not_found, session_not_found
from bamboo.llm.base import Providers
from bamboo.store.base import IdempotencyKey, Session, Store
from bamboo.tools.toolbox import Toolbox
from bamboo.wire.encode import content_json, dumps

KEY_LIFETIME_MS: Final = 24 * 3600 * 1000
"""How long an idempotency key stands for its run."""

CLOSE_S: Final = 5.0
"""What runners have, after their runs ended, to make everything durable and leave."""

RECOVER_S: Final = (0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
"""Pauses between attempts to recover a session that a bug keeps from being recovered; the last one repeats. A request
for the session ends the pause."""

log = structlog.get_logger("bamboo.agent")


def new_session_id() -> SessionId:
    return SessionId(f"ses_{secrets.token_urlsafe(16)}")


def new_run_id() -> RunId:
    return RunId(f"run_{secrets.token_urlsafe(16)}")


@dataclass(slots=True)
class _Live:
    """A session with a runner. `ended` is set when the runner has let go of the session, `asked` with each request.
    `unsettled`: it has, or may have, runs that nothing drives."""

    inbox: trio.MemorySendChannel[Request]
    unsettled: bool
    runner: AgentRunner | None = None
    ended: trio.Event = field(default_factory=trio.Event)
    asked: trio.Event = field(default_factory=trio.Event)

    async def wait_asked(self, patience_s: float) -> None:
        """Return with the next request, or when the inbox is closed, but after `patience_s` at the latest."""
        self.asked = trio.Event()
        with trio.move_on_after(patience_s):
            await self.asked.wait()


class Agents:
    """What web and gateway ask. Every request is carried out once it is in a runner's inbox: a caller that is cancelled
    undoes nothing.

    Sessions in memory are bounded by `agent.max_live_sessions`. `_idle` are those of `_live` that have nothing to do,
    the one that has been idle longest first: it makes room for another. `_leaving` are those that were told to leave,
    until they have: they have nothing to wait for any more, so there are only ever a few of them. Beyond the bound go,
    at a start, the sessions that an earlier process left with unfinished runs: these were accepted, so they are taken
    up.
    """

    def __init__(self, around: Surroundings, nursery: trio.Nursery) -> None:
        self._around = around
        self._nursery = nursery
        self._live: dict[SessionId, _Live] = {}
        self._idle: dict[SessionId, None] = {}
        self._leaving: dict[SessionId, _Live] = {}
        self.draining = False
        self.queued_runs = 0
        self.settled = True
        """All that was published, as far as sessions have left memory, is durable: what a clean stop promises."""

    def __repr__(self) -> str:
        return f"<Agents {len(self._live)} sessions, {self.active_runs} runs active, {self.queued_runs} queued>"

    @property
    def active_runs(self) -> int:
        return self._around.slots.taken

    @property
    def sessions(self) -> int:
        """Sessions that are in memory."""
        return len(self._live) + len(self._leaving)

    async def chat(self, chat: Chat) -> Accepted:
        """Accept a chat: when this returns it is committed, and its run goes its way whatever becomes of the caller.

        Raises BambooError: `invalid_request`, `busy`, `overloaded`, `idempotency_conflict`, `draining`,
        `store_unavailable`; then nothing is kept of it.
        """
        key = self._key(chat)
        if key is not None:
            holder = await self._around.store.key_holder(key.key, self._around.now_ms())
            if holder is not None:
                return duplicate_of(holder, key)
        if self.draining:
            raise draining(self._around.config)
        if chat.provider is not None:
            self._around.providers.resolve(chat.provider, chat.model)
        session_id = chat.session_id or new_session_id()
        if session_id not in self._live and not self._around.slots.free:
            full = no_room_to_queue(self._around, self)
            if full is not None:  # its runner would say the same, but only once another session had made room for it
                raise full
        request = ChatRequest(chat, key)
        self._submit(session_id, request)
        return await request.reply.wait()

    async def stop(self, session_id: SessionId, run_id: RunId | None = None) -> StopReceipt:
        """End a run, or the running one and all queued ones. Returns when nothing of them is alive and their end is
        committed.

        Raises BambooError: `session_not_found`, `run_not_found`, `overloaded`, `store_unavailable`.
        """
        await self._check_exists(session_id, run_id)
        request = StopRequest(run_id)
        self._submit(session_id, request)
        return await request.reply.wait()

    async def update_session(self, session_id: SessionId, changes: Mapping[str, Any]) -> Session:
        """Replace the named settings; None unsets one. Raises BambooError: `session_not_found`, `invalid_request`, …"""
        await self._check_exists(session_id)
        request = UpdateRequest(changes)
        self._submit(session_id, request)
        return await request.reply.wait()

    async def delete(self, session_id: SessionId, *, unused_since_ms: int | None = None) -> None:
        """Stop everything of the session and erase it. Raises BambooError: `session_not_found`, `store_unavailable`,
        …; with `unused_since_ms` also `busy`, for a session with a newer commit or an unfinished run."""
        await self._check_exists(session_id)
        request = DeleteRequest(unused_since_ms)
        self._submit(session_id, request)
        await request.reply.wait()

    async def take_up(self) -> None:
        """Start a runner for every session that an earlier process left with unfinished runs. Raises StoreError."""
        for session_id in await self._around.store.unfinished_sessions():
            self._start(session_id, unsettled=True)

    async def drain(self, grace_s: float) -> None:
        """Refuse new chats, start no queued run, wait for the active ones, and interrupt those that are left after
        `grace_s`.

        Returns when no run is active and what ended them is committed, or, if the store does not take that, after
        `CLOSE_S` more. Safe to call again, and to cancel.
        """
        self.draining = True
        self._around.slots.freeze()
        log.info("draining", active_runs=self.active_runs, queued_runs=self.queued_runs, grace_s=grace_s)
        with trio.move_on_after(grace_s):
            await self._around.slots.wait_idle()
        self._interrupt()
        with trio.move_on_after(CLOSE_S):
            await self._around.slots.wait_idle()

    async def close(self) -> None:
        """Let every runner make its session durable and leave. Bounded: what does not leave in time is cancelled by its
        nursery."""
        self.draining = True
        self._around.slots.freeze()
        self._interrupt()
        for live in self._live.values():
            live.inbox.close()
            live.asked.set()
        with trio.move_on_after(CLOSE_S) as patience:
            for live in [*self._live.values(), *self._leaving.values()]:
                await live.ended.wait()
        if patience.cancelled_caught:
            log.error("runners_stuck", sessions=self.sessions)
            self._nursery.cancel_scope.cancel()

    # Runners.

    def _interrupt(self) -> None:
        for live in self._live.values():
            if live.runner is not None:
                live.runner.interrupt()

    def rest(self, session_id: SessionId) -> None:
        self._idle.setdefault(session_id)

    def forget(self, session_id: SessionId) -> None:
        self._idle.pop(session_id, None)
        live = self._live.pop(session_id)
        live.inbox.close()
        self._leaving[session_id] = live

    async def _check_exists(self, session_id: SessionId, run_id: RunId | None = None) -> None:
        """Raises ClientError, `run_not_found` if a run was named, else `session_not_found`: nobody gets a runner, and
        pushes another session out, by asking for what is not there."""
        if session_id not in self._live and await self._around.store.session(session_id) is None:
            raise session_not_found(session_id) if run_id is None else run_not_found(run_id)

    def _submit(self, session_id: SessionId, request: Request) -> None:
        """Put a request into the session's inbox. Raises BambooError `overloaded` if that is full, or if there is no
        room for the session."""
        try:
            live = self._live.get(session_id) or self._start_within_bound(session_id)
            self._idle.pop(session_id, None)
            live.inbox.send_nowait(request)
            live.asked.set()
        except trio.WouldBlock:
            request.reply.drop()
            message = "too many requests wait for this session (agent.inbox_size)"
            raise ClientError(ErrorCode.OVERLOADED, message, retry_after_s=1.0, session_id=session_id) from None
        except trio.ClosedResourceError:
            request.reply.drop()
            raise draining(self._around.config) from None
        except ClientError:
            request.reply.drop()
            raise

    def _start_within_bound(self, session_id: SessionId) -> _Live:
        """Start a runner; at the bound, the session that has been idle longest leaves for it. Raises ClientError
        `overloaded` if none is idle."""
        bound = self._around.config.agent.max_live_sessions
        while len(self._live) >= bound:
            longest = next(iter(self._idle), None)
            if longest is None:
                message = f"the server has {len(self._live)} sessions at work (agent.max_live_sessions)"
                raise ClientError(ErrorCode.OVERLOADED, message, retry_after_s=RETRY_AFTER_S, session_id=session_id)
            self.forget(longest)
        return self._start(session_id, unsettled=False)

    def _start(self, session_id: SessionId, *, unsettled: bool) -> _Live:
        """In one synchronous step: the inbox is in the map before anything is awaited."""
        send, receive = trio.open_memory_channel[Request](self._around.config.agent.inbox_size)
        live = self._live[session_id] = _Live(send, unsettled)
        self._nursery.start_soon(self._supervise, session_id, live, receive, self._leaving.get(session_id))
        return live

    async def _supervise(
        self, session_id: SessionId, live: _Live, inbox: trio.MemoryReceiveChannel[Request], before: _Live | None
    ) -> None:
        """A session's whole time in memory, after the one before it. One bad session stays one bad session."""
        try:
            if before is not None:
                await before.ended.wait()
            await self._keep(session_id, live, inbox)
        finally:
            live.inbox.close()
            refuse_all(inbox, draining(self._around.config))
            inbox.close()
            left = None if live.runner is None else live.runner.handover
            if left is not None and (left.tail or left.lost):
                self.settled = False
            live.ended.set()
            for sessions in (self._live, self._leaving):
                if sessions.get(session_id) is live:
                    del sessions[session_id]

    async def _keep(self, session_id: SessionId, live: _Live, inbox: trio.MemoryReceiveChannel[Request]) -> None:
        """Runner after runner, until one leaves in order, or the session cannot be loaded and nothing is owed to it.

        After a runner that died the next one comes at once, and whoever waits is answered by that. But one that has
        got nowhere is not followed by another right away: whoever waits is told, and the next request tries again. A
        session with runs that nothing drives is tried again also without: they wait for their end, and so may readers.
        """
        handover: Handover | None = None
        pauses = 0
        while True:
            runner = AgentRunner(session_id, self._around, self, inbox, handover, owed=live.unsettled)
            live.runner = runner
            refusal = await self._run(runner)
            if refusal is None:
                return
            self._idle.pop(session_id, None)  # there is something to do now
            lost = isinstance(refusal, WriterLostError)
            if lost or not runner.progressed:
                refuse_all(inbox, refusal)  # they have waited long enough, or nobody is there to answer
            handover = runner.handover
            live.unsettled = live.unsettled or handover is not None
            if lost or runner.progressed:
                pauses = 0
                continue
            if not live.unsettled or not inbox.statistics().open_send_channels:
                return
            if handover is not None and not isinstance(refusal, StoreError):
                handover = handover.without_tail  # for all that is known it is the tail that cannot be taken up
            await live.wait_asked(RECOVER_S[min(pauses, len(RECOVER_S) - 1)])
            pauses += 1

    async def _run(self, runner: AgentRunner) -> BambooError | None:
        """Run one runner to its end. Returns what its callers are told if that was not a proper one."""
        refusal: BambooError | None = None
        try:
            await runner.run()
        except* StoreError as errors:  # by `*`: what goes wrong while it is cancelled ends no more than this session
            refusal = _first(errors)
            event = "session_lost" if isinstance(refusal, WriterLostError) else "session_not_loaded"
            log.warning(event, session_id=runner.session_id, error=refusal.message)
        except* Exception:
            log.exception("runner_failed", session_id=runner.session_id)
            refusal = BambooError(ErrorCode.INTERNAL, "the session failed; the server's log says why")
        return refusal

    def _key(self, chat: Chat) -> IdempotencyKey | None:
        if chat.idempotency_key is None:
            return None
        session_id = None if chat.session_was_made else chat.session_id
        named = [content_json(chat.content), session_id, chat.model, chat.provider]
        expires_ms = self._around.now_ms() + KEY_LIFETIME_MS
        return IdempotencyKey(chat.idempotency_key, hashlib.sha256(dumps(named)).digest(), expires_ms)


def _first(errors: ExceptionGroup[StoreError]) -> StoreError:
    error: StoreError | ExceptionGroup[StoreError] = errors
    while isinstance(error, ExceptionGroup):
        error = error.exceptions[0]
    return error


@asynccontextmanager
async def open_agents(
    config: Config,
    *,
    store: Store,
    bus: EventBus,
    providers: Providers,
    toolbox: Callable[[], Toolbox],
    now_ms: Callable[[], int],
    draining: bool = False,
) -> AsyncIterator[Agents]:
    """The agents, with the runs that an earlier process left taken up; not if the server is `draining` already: then
    they stay for the next start, and nothing is accepted.

    Owns the nursery in which every run lives. Leaving the block interrupts what still runs, makes everything durable
    and waits for it, bounded. Raises StoreError on entering.
    """
    around = Surroundings(
        config=config,
        store=store,
        bus=bus,
        providers=providers,
        toolbox=toolbox,
        slots=Slots(config.agent.max_active_runs),
        now_ms=now_ms,
        new_run_id=new_run_id,
    )
    async with trio.open_nursery() as nursery:
        agents = Agents(around, nursery)
        if draining:
            await agents.drain(0)
        else:
            await agents.take_up()
        yield agents
        await agents.close()
