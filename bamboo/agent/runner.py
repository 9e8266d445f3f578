"""One session's actor: the only writer of its log, history and queue. It lives while the session has work, and a little
longer.

Its inbox is a bounded memory channel of requests, each with a reply channel of its own; reading it never waits for a
run's end. Runs are tasks in the runner's nursery, one at a time; they belong to no connection.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import structlog
import trio

from bamboo.agent.execution import RunMaterials, new_message_id
from bamboo.agent.recovery import closing_of
from bamboo.agent.requests import ChatRequest, DeleteRequest, Request, StopRequest, UpdateRequest, duplicate_of
from bamboo.agent.runs import LiveRun, SessionRuns
from bamboo.agent.surroundings import Home, Surroundings
from bamboo.agent.writer import Entry, LogWriter, WriterLostError
from bamboo.bus.topic import Window
from bamboo.config import Config
from bamboo.core.events import Event, EventBody, RunQueued, SessionClosed, SessionCreated, UserMessage
from bamboo.core.types import (
    Accepted,
    AcceptedAs,
    Chat,
    Cursor,
    RunId,
    RunStatus,
    SessionId,
    StopReceipt,
    content_text,
)
from bamboo.errors import BambooError, ClientError, ErrorCode, StoreError, run_not_found, session_not_found
from bamboo.llm.base import Provider
from bamboo.store.base import Commit, DuplicateKey, IdempotencyKey, Run, Session, SessionLog

log = structlog.get_logger("bamboo.agent")

TITLE_CHARACTERS: Final = 80
"""A session's first title is the beginning of its first message."""

RETRY_AFTER_S: Final = 2.0
"""When a chat that was refused for a full queue may be tried again: about a short run's length."""


@dataclass(frozen=True, slots=True)
class Handover:
    """What a runner that died leaves to the next one.

    `tail` was published but is not known to be durable. `lost`: the store gave no answer, so readers may have seen
    events that are nowhere: the log goes on in a new epoch.
    """

    tail: Sequence[Event]
    lost: bool


class AgentRunner:
    """See the module. `run` is its life; the registry supervises it, and recovers the session if it raises."""

    def __init__(
        self,
        session_id: SessionId,
        around: Surroundings,
        home: Home,
        inbox: trio.MemoryReceiveChannel[Request],
        handover: Handover | None,
    ) -> None:
        self.session_id = session_id
        self._around = around
        self._home = home
        self._inbox = inbox
        self._session: Session | None = None
        self._deleted = False
        self._log = log.bind(session_id=session_id)
        self.handover = handover
        """What the runner before left; once this one has raised, what the next one needs."""
        self._owning = False
        # Set while it is True:
        self._nursery: trio.Nursery
        self._writer: LogWriter
        self._runs: SessionRuns

    def __repr__(self) -> str:
        return f"<AgentRunner {self.session_id} {self._runs if self._owning else 'loading'}>"

    async def run(self) -> None:
        """Own the session until it was idle for `agent.idle_evict_s`, is deleted, or the inbox is closed and the run
        over.

        Raises StoreError if the session cannot be loaded. If cancelled, what was handed to the store is waited for and
        the rest is left to the next start.
        """
        around, handover = self._around, self.handover
        async with around.store.own(self.session_id, new_epoch=handover is not None and handover.lost) as session_log:
            self._session = session_log.session
            head = await self._commit_tail(session_log)
            window = around.bus.open_window(self.session_id, session_log.epoch, head, first_seq=session_log.first_seq)
            self._writer = LogWriter(
                session_log,
                window,
                now_ms=around.now_ms,
                commit_timeout_s=around.config.storage.commit_timeout_s,
                max_uncommitted_bytes=around.config.stream.max_uncommitted_bytes,
            )
            try:
                await self._live(window, session_log.unfinished)
            finally:
                self._owning = False
                self._runs.close()
                self.handover = Handover(self._writer.tail, self._writer.lost)
                if self._deleted:
                    window.close_deleted()
                else:
                    window.close()

    def interrupt(self) -> None:
        """The server leaves: end the running run as interrupted. Queued ones stay for the next start."""
        if self._owning:
            self._runs.interrupt()

    async def _commit_tail(self, session_log: SessionLog) -> int:
        """Make durable what the runner before had published. Returns the head."""
        tail = [] if self.handover is None else self.handover.tail
        events = [event for event in tail if event.epoch == session_log.epoch and event.seq > session_log.head]
        if not events:
            return session_log.head
        await session_log.commit(Commit(events))
        return events[-1].seq

    async def _live(self, window: Window, unfinished: Sequence[Run]) -> None:
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            self._runs = SessionRuns(
                self.session_id,
                self._around,
                self._home,
                writer=self._writer,
                window=window,
                nursery=nursery,
                materials=self._materials,
            )
            self._owning = True
            nursery.start_soon(self._writer.run)
            await self._take_up(unfinished)
            await self._serve()
            await self._runs.leave()
            self._writer.finish()

    async def _take_up(self, unfinished: Sequence[Run]) -> None:
        """What an earlier process, or an earlier runner, left: settle what was running, queue the rest again."""
        code = ErrorCode.INTERRUPTED if self.handover is None else ErrorCode.INTERNAL
        for record in unfinished:
            if record.status is RunStatus.QUEUED:
                self._runs.enqueue(record)
                continue
            closing = await closing_of(record, self._around.store, code)
            await self._runs.end_with(record.run_id, closing)
            self._log.warning("run_settled", run_id=record.run_id, code=code)
        self._runs.request_slot()

    # The inbox.

    async def _serve(self) -> None:
        """Answer requests until the session is deleted, has been idle for long, or the inbox is closed."""
        while not self._deleted:
            request = None
            with trio.move_on_after(self._around.config.agent.idle_evict_s):
                try:
                    request = await self._inbox.receive()
                except trio.EndOfChannel:
                    return
            if request is not None:
                await self._answer(request)
            if (request is None or self._session is None) and self._has_nothing_to_do:
                # One synchronous step from the look at the inbox to its end: no request can fall between.
                self._home.forget(self.session_id)
                return

    @property
    def _has_nothing_to_do(self) -> bool:
        waiting = self._inbox.statistics().current_buffer_used
        return not waiting and not self._runs.busy and self._writer.idle and not self._deleted

    async def _answer(self, request: Request) -> None:
        answered_later = False
        try:
            if isinstance(request, ChatRequest):
                request.reply.answer(await self._accept(request.chat, request.key))
            elif isinstance(request, UpdateRequest):
                request.reply.answer(await self._update(request.changes))
            elif isinstance(request, DeleteRequest):
                await self._delete()
                request.reply.answer(None)
            else:
                await self._stop(request)
                answered_later = True
        except WriterLostError as error:
            request.reply.fail(StoreError(str(error)))
        except BambooError as error:
            request.reply.fail(error)
        finally:
            if not answered_later:
                request.reply.close()

    async def _accept(self, chat: Chat, key: IdempotencyKey | None) -> Accepted:
        """Commit the chat, and start its run or queue it. Raises BambooError: then nothing of it is kept."""
        around = self._around
        starts, refusal = self._admit(chat)
        if refusal is not None:
            holder = None if key is None else await around.store.key_holder(key.key, around.now_ms())
            if key is not None and holder is not None:
                return duplicate_of(holder, key)
            raise refusal
        record = self._record(chat)
        accepted = False
        try:
            materials = self._materials(record)
            entry = self._acceptance(record, key, materials if starts else None)
            first = await self._writer.submit(entry).wait()
            accepted = True
        except DuplicateKey as duplicate:
            assert key is not None
            return duplicate_of(duplicate.holder, key)
        finally:
            if starts and not accepted:
                around.slots.release()
        if entry.session is not None:
            self._session = entry.session
            first = Cursor(first.epoch, first.seq + 1)  # `session_created` is before the run's first event
        if starts:
            self._runs.start(record, materials)
        else:
            others = self._runs.all
            self._runs.enqueue(record)
            if chat.on_busy == "interrupt":
                self._runs.end(others, "superseded")
            self._runs.request_slot()
        accepted_as: AcceptedAs = "started" if starts else "queued"
        status = RunStatus.RUNNING if starts else RunStatus.QUEUED
        self._log.info("run_accepted", run_id=record.run_id, accepted_as=accepted_as)
        return Accepted(self.session_id, record.run_id, record.message_id, status, accepted_as, first)

    def _admit(self, chat: Chat) -> tuple[bool, BambooError | None]:
        """Whether the chat's run starts at once (its slot is taken then) or is queued, or why it can be neither."""
        around, agent = self._around, self._around.config.agent
        if self._home.draining:
            return False, draining(around.config)
        if self._writer.failing:
            return False, StoreError("the store does not take writes just now")
        if self._runs.busy and chat.on_busy == "reject":
            return False, ClientError(ErrorCode.BUSY, "the session has a run already", session_id=self.session_id)
        if not self._runs.busy and around.slots.try_take():
            return True, None
        if self._runs.queued >= agent.max_queued_runs_per_session and chat.on_busy != "interrupt":
            message = f"the session has {self._runs.queued} queued runs (agent.max_queued_runs_per_session)"
            return False, ClientError(ErrorCode.OVERLOADED, message, retry_after_s=RETRY_AFTER_S)
        if self._home.queued_runs >= agent.max_queued_runs:
            message = f"the server has {self._home.queued_runs} queued runs (agent.max_queued_runs)"
            return False, ClientError(ErrorCode.OVERLOADED, message, retry_after_s=RETRY_AFTER_S)
        return False, None

    def _record(self, chat: Chat) -> Run:
        return Run(
            run_id=self._around.new_run_id(),
            session_id=self.session_id,
            message_id=new_message_id(),
            content=chat.content,
            accepted_ms=self._around.now_ms(),
            provider=chat.provider,
            model=chat.model,
            system_prompt=chat.system_prompt,
            params=chat.params,
            metadata=chat.metadata,
            client_message_id=chat.client_message_id,
            cancel_after_s=chat.cancel_after_s,
        )

    def _acceptance(self, record: Run, key: IdempotencyKey | None, starting: RunMaterials | None) -> Entry:
        """The one transaction that accepts a chat: session if it is new, message, run, key, and the start if there is
        a slot."""
        run_id = record.run_id
        bodies: list[tuple[RunId | None, EventBody]] = []
        session = None
        if self._session is None:
            title = " ".join(content_text(record.content)[: 4 * TITLE_CHARACTERS].split())[:TITLE_CHARACTERS] or None
            session = Session(self.session_id, record.accepted_ms, record.accepted_ms, title=title)
            bodies.append((None, SessionCreated(title)))
        bodies.append((run_id, UserMessage(record.message_id, record.content, record.client_message_id)))
        if starting is None:
            bodies.append((run_id, RunQueued(self._runs.queued + 1)))
        else:
            bodies.append((run_id, starting.started))
        return Entry(bodies, session=session, accept=record, key=key, retried=False)

    async def _update(self, changes: Mapping[str, Any]) -> Session:
        if self._session is None:
            raise session_not_found(self.session_id)
        session = replace(self._session, **changes, updated_ms=self._around.now_ms())
        self._around.providers.resolve(session.provider, session.model)
        await self._writer.submit(Entry((), session=session, retried=False)).wait()
        self._session = session
        return session

    async def _stop(self, request: StopRequest) -> None:
        """End the named run, or all; the receipt follows when it is gone, and the inbox goes on meanwhile."""
        runs = self._runs.all
        if request.run_id is not None:
            runs = [run for run in runs if run.record.run_id == request.run_id]
            if not runs:
                record = await self._around.store.run(request.run_id)
                if record is None or record.session_id != self.session_id:
                    raise run_not_found(request.run_id)
        elif self._session is None:
            raise session_not_found(self.session_id)
        stopped = self._runs.end(runs, "user")
        self._nursery.start_soon(self._give_receipt, request, runs, stopped, trio.current_time())

    async def _give_receipt(
        self, request: StopRequest, runs: Sequence[LiveRun], stopped: Sequence[RunId], since: float
    ) -> None:
        try:
            for run in runs:
                await run.ended.wait()
            tools = sum(run.active.tools_stopped for run in runs if run.active is not None)
            elapsed_ms = round((trio.current_time() - since) * 1000)
            request.reply.answer(StopReceipt(tuple(stopped), tools, elapsed_ms, self._writer.cursor))
        finally:
            request.reply.close()

    async def _delete(self) -> None:
        """Stop everything, erase the session, refuse what waits in the inbox. Raises StoreError: then the session
        stays."""
        if self._session is None:
            raise session_not_found(self.session_id)
        runs = self._runs.all
        self._runs.end(runs, "deleted")
        for run in runs:
            await run.ended.wait()
        await self._writer.submit(Entry([(None, SessionClosed())], delete=True, retried=False)).wait()
        self._deleted = True
        self._home.forget(self.session_id)
        refuse_all(self._inbox, session_not_found(self.session_id))
        self._log.info("session_deleted")

    # What a run is made of.

    def _resolve(self, record: Run) -> tuple[Provider, str]:
        """The provider and the model: what the chat named, else the session, else the configuration. Raises
        ClientError."""
        session = self._session
        provider, model = record.provider, record.model
        if session is not None:
            if model is None and provider in (None, session.provider):
                model = session.model
            if provider is None:
                provider = session.provider
        return self._around.providers.resolve(provider, model)

    def _materials(self, record: Run) -> RunMaterials:
        config, session = self._around.config, self._session
        provider, model = self._resolve(record)
        own_prompt = None if session is None else session.system_prompt
        own_params = {} if session is None else session.params or {}
        return RunMaterials(
            provider=provider,
            model=model,
            system_prompt=record.system_prompt or own_prompt or config.agent.system_prompt or None,
            params={**own_params, **(record.params or {})} or None,
            toolbox=self._around.toolbox(),
            config=config.agent,
            max_retries=config.llm.max_retries,
        )


def draining(config: Config) -> ClientError:
    return ClientError(ErrorCode.DRAINING, "the server is shutting down", retry_after_s=max(1.0, config.server.drain_s))


def refuse_all(inbox: trio.MemoryReceiveChannel[Request], error: BambooError) -> None:
    """Answer every request that waits in a closed inbox: who closes an inbox leaves nobody hanging."""
    while True:
        try:
            request = inbox.receive_nowait()
        except (trio.WouldBlock, trio.EndOfChannel):
            return
        request.reply.fail(error)
