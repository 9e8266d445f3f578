"""What a connection's frames ask for, and the answers to them. One frame at a time, in order."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, Protocol

import trio

from bamboo.agent.registry import new_session_id
from bamboo.bus.event_bus import EventBus
from bamboo.core.types import Accepted, Chat, Cursor, MessageId, RunId, SessionId, StopReceipt
from bamboo.errors import BambooError, ClientError, ErrorCode, session_not_found
from bamboo.gateway.admission import Visitor
from bamboo.gateway.outbox import Outbox
from bamboo.store.base import Store
from bamboo.store.records import page_fields, snapshot_fields
from bamboo.wire import frames
from bamboo.wire.frames import (
    ApproveFrame,
    ChatFrame,
    CommandFrame,
    ConnectFrame,
    Frame,
    HistoryFrame,
    PingFrame,
    Ref,
    StopFrame,
    SubscribeFrame,
    UnsubscribeFrame,
)
from bamboo.wire.schemas import parse_cursor, parse_run_id

MAX_STOPS: Final = 8
"""Stops of one connection that may be under way, each in a task of its own; with more, its frames are not read."""


class Agents(Protocol):
    """What the gateway needs of `bamboo.agent.registry.Agents`. Cancelling a call undoes nothing that was accepted."""

    @property
    def draining(self) -> bool: ...

    @property
    def active_runs(self) -> int: ...

    @property
    def queued_runs(self) -> int: ...

    async def chat(self, chat: Chat) -> Accepted: ...

    async def stop(self, session_id: SessionId, run_id: RunId | None = None) -> StopReceipt: ...


@dataclass(frozen=True, slots=True)
class Services:
    """What every connection works with."""

    agents: Agents
    bus: EventBus
    store: Store
    max_subscriptions: int
    heartbeat_interval_s: float
    limits: Mapping[str, int | float]


_StopAnswer = Callable[[SessionId, StopReceipt, Ref | None], bytes]


class Requests:
    """The requests of one connection.

    What they do outlives them: cancelling `handle` (the client left) ends the waiting for an answer, never a run that
    was accepted or a stop that was handed over.
    """

    def __init__(self, connection_id: str, services: Services, outbox: Outbox, visitor: Visitor) -> None:
        self._connection_id = connection_id
        self._services = services
        self._outbox = outbox
        self._visitor: Visitor | None = visitor
        self._stops: dict[SessionId, trio.Event] = {}
        self.session_id: SessionId | None = None
        """The connection's own session; None before `connect`."""
        self._session_was_made = False
        """`connect` named none: another connection of the same client has another."""

    @property
    def admitted(self) -> bool:
        """A `connect` has shown the token, or needed none."""
        return self._visitor is None

    async def handle(self, frame: Frame, nursery: trio.Nursery) -> None:
        """Do what the frame asks for and put its answer out; a stop goes on in a task of `nursery`, and is answered
        from there.

        Raises BambooError where the answer is an error. `unauthorized`, and `overloaded` while the connection is not
        `admitted`, end it.
        """
        if isinstance(frame, ConnectFrame):
            await self._connect(frame)
            return
        if self.session_id is None:
            raise ClientError(ErrorCode.NOT_CONNECTED, "the first frame is connect")
        match frame:
            case ChatFrame():
                await self._chat(frame, self.session_id)
            case SubscribeFrame():
                await self._subscribe(frame)
            case UnsubscribeFrame():
                self._outbox.unfollow(SessionId(frame.session_id))
                self._outbox.put(frames.unsubscribed_frame(SessionId(frame.session_id), frame.ref))
            case StopFrame():
                session_id = SessionId(frame.session_id)
                await self._begin_stop(session_id, frame.run_id, frame.ref, frames.stopped_frame, nursery)
            case HistoryFrame():
                await self._history(frame)
            case CommandFrame():
                await self._command(frame, self.session_id, nursery)
            case PingFrame():
                self._outbox.put(frames.pong_frame(frame.timestamp, frame.ref))
            case ApproveFrame():
                raise ClientError(ErrorCode.APPROVAL_NOT_FOUND, "there is no such approval")
            case _:
                raise AssertionError(f"a frame that nobody answers: {type(frame).__name__}")

    async def _connect(self, frame: ConnectFrame) -> None:
        if self.session_id is not None:
            raise ClientError(ErrorCode.INVALID_MESSAGE, "this connection is connected already")
        if self._visitor is not None:
            token = None if frame.auth is None else frame.auth.get_secret_value()
            self._visitor.show(token, trio.current_time())
            self._visitor = None

        def answer(session_id: SessionId, cursor: Cursor | None) -> bytes:
            return frames.connected_frame(
                connection_id=self._connection_id,
                session_id=session_id,
                cursor=cursor,
                heartbeat_interval_s=self._services.heartbeat_interval_s,
                limits=self._services.limits,
                ref=frame.ref,
            )

        after = None if frame.after is None else parse_cursor(frame.after)
        if frame.session_id is None:
            session_id = new_session_id()
            self._session_was_made = True
            self._outbox.put(answer(session_id, None))
        else:
            session_id = SessionId(frame.session_id)
            if not await self._follow(session_id, after, lambda cursor: answer(session_id, cursor)):
                self._outbox.put(answer(session_id, None))
        self.session_id = session_id

    async def _subscribe(self, frame: SubscribeFrame) -> None:
        session_id = SessionId(frame.session_id)
        after = None if frame.after is None else parse_cursor(frame.after)
        if self._outbox.follows(session_id):
            raise ClientError(
                ErrorCode.ALREADY_SUBSCRIBED, "this connection follows the session already", session_id=session_id
            )
        self._check_room(session_id)
        if not await self._follow(
            session_id, after, lambda cursor: frames.subscribed_frame(session_id, cursor, frame.ref)
        ):
            raise session_not_found(session_id)

    async def _follow(self, session_id: SessionId, after: Cursor | None, answer: Callable[[Cursor], bytes]) -> bool:
        """Subscribe, put the answer out, then follow. False, with nothing done, for a session that is not stored."""
        subscription = self._services.bus.subscribe(session_id, doorbell=self._outbox.doorbell)
        followed = False
        try:
            cursor = await subscription.begin(after)
            if cursor is not None:
                self._outbox.put(answer(cursor))
                self._outbox.follow(subscription)
                followed = True
        finally:
            if not followed:
                subscription.close()
        return followed

    def _check_room(self, session_id: SessionId) -> None:
        if self._outbox.following >= self._services.max_subscriptions:
            raise ClientError(
                ErrorCode.OVERLOADED,
                "this connection follows as many sessions as it may: unsubscribe from one first",
                session_id=session_id,
            )

    async def _chat(self, frame: ChatFrame, own_session_id: SessionId) -> None:
        asked = frame.chat(frame.content)
        made = asked.session_id is None and self._session_was_made
        session_id = own_session_id if asked.session_id is None else asked.session_id
        await self._stop_done(session_id)
        if not self._outbox.follows(session_id):
            self._check_room(session_id)
        self._outbox.hold(session_id)
        try:
            accepted = await self._services.agents.chat(replace(asked, session_id=session_id, session_was_made=made))
            self._outbox.put(frames.accepted_frame(accepted, frame.ref))
            if not self._outbox.follows(accepted.session_id):
                subscription = self._services.bus.subscribe(accepted.session_id, doorbell=self._outbox.doorbell)
                subscription.begin_at(accepted.cursor.seq)
                self._outbox.follow(subscription)
        finally:
            self._outbox.release()

    async def _begin_stop(
        self, session_id: SessionId, run_id: str | None, ref: Ref | None, answer: _StopAnswer, nursery: trio.Nursery
    ) -> None:
        """Start a stop. What follows for the same session waits for its end, so that frames keep their order; the rest
        goes on.
        """
        run = None if run_id is None else parse_run_id(run_id)
        await self._stop_done(session_id)
        while len(self._stops) >= MAX_STOPS:
            await next(iter(self._stops.values())).wait()
        self._stops[session_id] = trio.Event()
        nursery.start_soon(self._stop, session_id, run, ref, answer)

    async def _stop_done(self, session_id: SessionId) -> None:
        while session_id in self._stops:
            await self._stops[session_id].wait()

    async def _stop(self, session_id: SessionId, run_id: RunId | None, ref: Ref | None, answer: _StopAnswer) -> None:
        try:
            receipt = await self._services.agents.stop(session_id, run_id)
        except BambooError as error:
            self._outbox.put(frames.error_frame(error, ref))
        else:
            self._outbox.put_after(session_id, receipt.cursor.seq, answer(session_id, receipt, ref))
        finally:
            self._stops.pop(session_id).set()

    async def _history(self, frame: HistoryFrame) -> None:
        session_id = SessionId(frame.session_id)
        before = None if frame.before is None else MessageId(frame.before)
        snapshot = await self._services.store.history(session_id, limit=frame.limit, before=before)
        if snapshot is None:
            raise session_not_found(session_id)
        page = {"session_id": session_id, **page_fields(snapshot)}
        fields = snapshot_fields(snapshot) if before is None else page
        self._outbox.put(frames.history_frame(fields, frame.ref))

    async def _command(self, frame: CommandFrame, own_session_id: SessionId, nursery: trio.Nursery) -> None:
        match frame.name:
            case "ping":
                self._outbox.put(frames.pong_frame(None, frame.ref))
            case "status":
                self._outbox.put(frames.command_result_frame("status", self._status(own_session_id), frame.ref))
            case "skills":
                # A server without skills: what `GET /api/v1/skills` says of it.
                nothing: Mapping[str, Any] = {"revision": 0, "skills": [], "errors": []}
                self._outbox.put(frames.command_result_frame("skills", nothing, frame.ref))
            case "stop":
                arguments = frames.parse_arguments(frame)
                session_id = own_session_id if arguments.session_id is None else SessionId(arguments.session_id)
                await self._begin_stop(session_id, arguments.run_id, frame.ref, frames.stop_result_frame, nursery)
            case _:
                raise ClientError(ErrorCode.UNKNOWN_COMMAND, "the commands are ping, status, stop and skills")

    def _status(self, own_session_id: SessionId) -> Mapping[str, Any]:
        agents = self._services.agents
        return {
            "connection_id": self._connection_id,
            "session_id": own_session_id,
            "subscriptions": self._outbox.following,
            "draining": agents.draining,
            "active_runs": agents.active_runs,
            "queued_runs": agents.queued_runs,
        }
