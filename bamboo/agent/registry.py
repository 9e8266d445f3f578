"""The agents: one runner per live session, found or started in one synchronous step, supervised, recovered, drained."""

import hashlib
import secrets
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import structlog
import trio

from bamboo.agent.requests import ChatRequest, DeleteRequest, Request, StopRequest, UpdateRequest, duplicate_of
from bamboo.agent.runner import AgentRunner, Handover, draining, refuse_all
from bamboo.agent.slots import Slots
from bamboo.agent.surroundings import Surroundings
from bamboo.bus.event_bus import EventBus
from bamboo.config import Config
from bamboo.core.types import Accepted, Chat, RunId, SessionId, StopReceipt
from bamboo.errors import BambooError, ClientError, ErrorCode, StoreError
from bamboo.llm.base import Providers
from bamboo.store.base import IdempotencyKey, Session, Store
from bamboo.tools.toolbox import Toolbox
from bamboo.wire.encode import content_json, dumps

KEY_LIFETIME_MS: Final = 24 * 3600 * 1000
"""How long an idempotency key stands for its run."""

CLOSE_S: Final = 5.0
"""What runners have, after their runs ended, to make everything durable and leave."""

log = structlog.get_logger("bamboo.agent")


def new_session_id() -> SessionId:
    return SessionId(f"ses_{secrets.token_urlsafe(16)}")


def new_run_id() -> RunId:
    return RunId(f"run_{secrets.token_urlsafe(16)}")


@dataclass(slots=True)
class _Live:
    """A session with a runner. `ended` is set when the runner has let go of the session."""

    inbox: trio.MemorySendChannel[Request]
    ended: trio.Event = field(default_factory=trio.Event)
    runner: AgentRunner | None = None


class Agents:
    """What web and gateway ask. Every request is carried out once it is in a runner's inbox: a caller that is cancelled
    undoes nothing."""

    def __init__(self, around: Surroundings, nursery: trio.Nursery) -> None:
        self._around = around
        self._nursery = nursery
        self._live: dict[SessionId, _Live] = {}
        self._leaving: dict[SessionId, _Live] = {}
        self._handovers: dict[SessionId, Handover] = {}
        """Of sessions whose last runner died; one for each that could not be taken up again yet."""
        self.draining = False
        self.queued_runs = 0

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
        request = ChatRequest(chat, key)
        self._submit(chat.session_id or new_session_id(), request)
        return await request.reply.wait()

    async def stop(self, session_id: SessionId, run_id: RunId | None = None) -> StopReceipt:
        """End a run, or the running one and all queued ones. Returns when nothing of them is alive and their end is
        committed.

        Raises BambooError: `session_not_found`, `run_not_found`, `overloaded`, `store_unavailable`.
        """
        request = StopRequest(run_id)
        self._submit(session_id, request)
        return await request.reply.wait()

    async def update_session(self, session_id: SessionId, changes: Mapping[str, Any]) -> Session:
        """Replace the named settings; None unsets one. Raises BambooError: `session_not_found`, `invalid_request`, …"""
        request = UpdateRequest(changes)
        self._submit(session_id, request)
        return await request.reply.wait()

    async def delete(self, session_id: SessionId) -> None:
        """Stop everything of the session and erase it. Raises BambooError: `session_not_found`, `store_unavailable`,
        …"""
        request = DeleteRequest()
        self._submit(session_id, request)
        await request.reply.wait()

    async def take_up(self) -> None:
        """Start a runner for every session that an earlier process left with unfinished runs. Raises StoreError."""
        for session_id in await self._around.store.unfinished_sessions():
            self._inbox(session_id)

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

    def forget(self, session_id: SessionId) -> None:
        live = self._live.pop(session_id)
        live.inbox.close()
        self._leaving[session_id] = live

    def _submit(self, session_id: SessionId, request: Request) -> None:
        """Put a request into the session's inbox. Raises BambooError `overloaded` if that is full."""
        try:
            self._inbox(session_id).send_nowait(request)
        except trio.WouldBlock:
            request.reply.drop()
            message = "too many requests wait for this session (agent.inbox_size)"
            raise ClientError(ErrorCode.OVERLOADED, message, retry_after_s=1.0, session_id=session_id) from None
        except trio.ClosedResourceError:
            request.reply.drop()
            raise draining(self._around.config) from None

    def _inbox(self, session_id: SessionId) -> trio.MemorySendChannel[Request]:
        """Get or start, in one synchronous step: the inbox is in the map before anything is awaited."""
        live = self._live.get(session_id)
        if live is None:
            send, receive = trio.open_memory_channel[Request](self._around.config.agent.inbox_size)
            live = self._live[session_id] = _Live(send)
            self._nursery.start_soon(self._supervise, session_id, live, receive, self._leaving.get(session_id))
        return live.inbox

    async def _supervise(
        self, session_id: SessionId, live: _Live, inbox: trio.MemoryReceiveChannel[Request], before: _Live | None
    ) -> None:
        """A runner's whole life: after the one before it, and once more after a bug. One bad session stays one bad
        session."""
        try:
            if before is not None:
                await before.ended.wait()
            with inbox:
                refusal = await self._run(session_id, live, inbox)
                if refusal is not None and session_id in self._handovers and not isinstance(refusal, StoreError):
                    refusal = await self._run(session_id, live, inbox)
                if refusal is not None:
                    # It cannot be loaded, or it failed twice: whoever waits is told, and the next request tries again.
                    refuse_all(inbox, refusal)
        finally:
            live.inbox.close()
            live.ended.set()
            for sessions in (self._live, self._leaving):
                if sessions.get(session_id) is live:
                    del sessions[session_id]

    async def _run(
        self, session_id: SessionId, live: _Live, inbox: trio.MemoryReceiveChannel[Request]
    ) -> BambooError | None:
        """Run one runner to its end. Returns what its callers are told if that was not a proper one.

        What it leaves then, the next one is given, however much later that is.
        """
        runner = live.runner = AgentRunner(session_id, self._around, self, inbox, self._handovers.get(session_id))
        try:
            await runner.run()
        except StoreError as error:
            log.warning("session_not_loaded", session_id=session_id, error=error.message)
            refusal: BambooError = error
        except Exception:
            log.exception("runner_failed", session_id=session_id)
            refusal = BambooError(ErrorCode.INTERNAL, "the session failed; the server's log says why")
        else:
            self._handovers.pop(session_id, None)
            return None
        if runner.handover is not None:
            self._handovers[session_id] = runner.handover
        return refusal

    def _key(self, chat: Chat) -> IdempotencyKey | None:
        if chat.idempotency_key is None:
            return None
        session_id = None if chat.session_was_made else chat.session_id
        named = [content_json(chat.content), session_id, chat.model, chat.provider]
        expires_ms = self._around.now_ms() + KEY_LIFETIME_MS
        return IdempotencyKey(chat.idempotency_key, hashlib.sha256(dumps(named)).digest(), expires_ms)


@asynccontextmanager
async def open_agents(
    config: Config,
    *,
    store: Store,
    bus: EventBus,
    providers: Providers,
    toolbox: Callable[[], Toolbox],
    now_ms: Callable[[], int],
) -> AsyncIterator[Agents]:
    """The agents, with the runs that an earlier process left taken up.

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
        await agents.take_up()
        yield agents
        await agents.close()
