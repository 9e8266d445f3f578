"""One session's actor: the only writer of its log, history and queue. It lives while the session has work, and a little
longer.

Its inbox is a bounded memory channel of requests, each with a reply channel of its own; reading it never waits for a
run's end. Runs are tasks in the runner's nursery, one at a time; they belong to no connection.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import structlog
import trio

from bamboo.agent.acceptance import RETRY_AFTER_S, acceptance, draining, no_room_to_queue, not_writable, record_of
from bamboo.agent.execution import RunMaterials
from bamboo.agent.loading import Handover, Loaded, open_session
from bamboo.agent.requests import (
    ChatRequest,
    DeleteRequest,
    Request,
    StopRequest,
    UpdateRequest,
    duplicate_of,
    refuse_all,
)
from bamboo.agent.runs import LiveRun, SessionRuns
from bamboo.agent.surroundings import Home, Surroundings
from bamboo.agent.writer import Entry, LogWriter, WriterLostError
from bamboo.bus.topic import Window
from bamboo.core.events import SessionClosed
from bamboo.core.types import (
    Accepted,
    AcceptedAs,
    Chat,
    Cursor,
    RunId,
    RunStatus,
    SessionId,
    StopReceipt,
)
from bamboo.errors import BambooError, ClientError, ErrorCode, StoreError, run_not_found, session_not_found
from bamboo.llm.base import Provider
from bamboo.store.base import DuplicateKey, IdempotencyKey, Run, Session

log = structlog.get_logger("bamboo.agent")


class AgentRunner:
    """See the module. `run` is its life; the registry supervises it, and recovers the session if it raises."""

    def __init__(
        self,
        session_id: SessionId,
        around: Surroundings,
        home: Home,
        inbox: trio.MemoryReceiveChannel[Request],
        handover: Handover | None,
        *,
        owed: bool,
    ) -> None:
        """`owed`: the session has, or may have, runs that nothing drives. It is not given up."""
        self.session_id = session_id
        self._around = around
        self._home = home
        self._inbox = inbox
        self._session: Session | None = None
        self._deleted = False
        self._log = log.bind(session_id=session_id)
        self.handover = handover
        """What the runner before left; once this one has raised, what the next one needs."""
        self._owed = owed
        self.progressed = False
        """It has taken a request or settled a run: whatever it dies of now, the next one does not meet all of that."""
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

        Raises StoreError if the session cannot be loaded, WriterLostError, in a group, if the store goes without an
        answer. If cancelled, what was handed to the store is waited for and the rest is left to the next start.
        """
        around = self._around
        async with open_session(
            self.session_id, around, self._home, self._inbox, self.handover, owed=self._owed
        ) as loaded:
            stored = loaded.log
            self._session = stored.session
            window = around.bus.open_window(self.session_id, stored.epoch, stored.head, first_seq=stored.first_seq)
            self._writer = LogWriter(
                stored,
                window,
                now_ms=around.now_ms,
                commit_timeout_s=around.config.storage.commit_timeout_s,
                max_uncommitted_bytes=around.config.stream.max_uncommitted_bytes,
            )
            try:
                await self._live(window, loaded)
            finally:
                self._leave(window)

    def interrupt(self) -> None:
        """The server leaves: end the running run as interrupted. Queued ones stay for the next start."""
        if self._owning:
            self._runs.interrupt()

    async def _live(self, window: Window, loaded: Loaded) -> None:
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
                on_end=self._run_ended,
            )
            self._owning = True
            nursery.start_soon(self._writer.run)
            self._take_up(loaded)
            await self._serve()
            await self._runs.leave()
            self._writer.finish()

    def _take_up(self, loaded: Loaded) -> None:
        """What an earlier process, or an earlier runner, left: settle what nothing drives, queue the rest again."""
        for record in loaded.log.unfinished:
            if record.run_id in loaded.closings:
                self._runs.settle(record, loaded.closings[record.run_id])
            else:
                self._runs.enqueue(record)
        self._runs.request_slot()

    def _leave(self, window: Window) -> None:
        """The session is nobody's now; `handover` is for whoever has to go on with it."""
        died_of = ErrorCode.STORE_UNAVAILABLE if self._writer.lost else ErrorCode.INTERNAL
        decided = self._runs.decided(died_of=died_of)
        self.handover = Handover(self._writer.tail, self._writer.lost, died_of, decided)
        self._owning = False
        self._runs.close()
        if self._deleted:
            window.close_deleted()
        else:
            window.close()

    # The inbox.

    async def _serve(self) -> None:
        """Answer requests until the session is deleted, has been idle for long, or the inbox is closed."""
        while not self._deleted:
            if self._has_nothing_to_do:
                self._home.rest(self.session_id)
            request = None
            with trio.move_on_after(self._around.config.agent.idle_evict_s):
                try:
                    request = await self._inbox.receive()
                except trio.EndOfChannel:
                    return
            if request is not None:
                self.progressed = True
                await self._answer(request)
            if (request is None or self._session is None) and self._has_nothing_to_do:
                # One synchronous step from the look at the inbox to its end: no request can fall between.
                self._home.forget(self.session_id)
                return

    @property
    def _has_nothing_to_do(self) -> bool:
        """And is still in the map: it has not been told to leave."""
        inbox = self._inbox.statistics()
        asked = inbox.current_buffer_used or not inbox.open_send_channels
        return not asked and not self._runs.busy and self._writer.idle and not self._deleted

    def _run_ended(self) -> None:
        """Called from the run's task. While the inbox is waited for, nothing else is going on."""
        self.progressed = True
        if self._inbox.statistics().tasks_waiting_receive and self._has_nothing_to_do:
            self._home.rest(self.session_id)

    async def _answer(self, request: Request) -> None:
        answered_later = False
        try:
            if isinstance(request, ChatRequest):
                request.reply.answer(await self._accept(request.chat, request.key))
            elif isinstance(request, UpdateRequest):
                request.reply.answer(await self._update(request.changes))
            elif isinstance(request, DeleteRequest):
                await self._delete(request.unused_since_ms)
                request.reply.answer(None)
            else:
                await self._stop(request)
                answered_later = True
        except WriterLostError as error:
            if self._writer.lost:
                request.reply.fail(error)  # else a bug took the writer along
        except BambooError as error:
            request.reply.fail(error)
        finally:
            if not answered_later:
                request.reply.close(self._lost)

    @property
    def _lost(self) -> StoreError | None:
        """What is told to a request that this runner leaves unanswered, if that is because of the store."""
        return StoreError("the store did not answer in time") if self._writer.lost else None

    async def _accept(self, chat: Chat, key: IdempotencyKey | None) -> Accepted:
        """Commit the chat, and start its run or queue it. Raises BambooError: then nothing of it is kept."""
        around = self._around
        starts, refusal = self._admit(chat)
        if refusal is not None:
            holder = None if key is None else await around.store.key_holder(key.key, around.now_ms())
            if key is not None and holder is not None:
                return duplicate_of(holder, key)
            raise refusal
        record = record_of(chat, self.session_id, around)
        accepted = False
        try:
            materials = self._materials(record)
            entry = acceptance(
                record,
                key,
                new_session=self._session is None,
                starting=materials if starts else None,
                position=self._runs.queued + 1,
            )
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
            return False, not_writable()
        if self._runs.busy and chat.on_busy == "reject":
            return False, ClientError(ErrorCode.BUSY, "the session has a run already", session_id=self.session_id)
        if not self._runs.busy and around.slots.try_take():
            return True, None
        if self._runs.queued >= agent.max_queued_runs_per_session and chat.on_busy != "interrupt":
            message = f"the session has {self._runs.queued} queued runs (agent.max_queued_runs_per_session)"
            return False, ClientError(ErrorCode.OVERLOADED, message, retry_after_s=RETRY_AFTER_S)
        return False, no_room_to_queue(around, self._home)

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
            await self._wait_ended(runs)
            tools = sum(run.active.tools_stopped for run in runs if run.active is not None)
            elapsed_ms = round((trio.current_time() - since) * 1000)
            request.reply.answer(StopReceipt(tuple(stopped), tools, elapsed_ms, self._writer.cursor))
        except StoreError as error:
            request.reply.fail(error)
        finally:
            request.reply.close(self._lost)

    async def _wait_ended(self, runs: Sequence[LiveRun]) -> None:
        """Return when the runs are over and their end is committed. Raises StoreError if the store fails and that
        takes longer than `storage.commit_timeout_s`: what was decided about them stays, and is committed later."""
        for run in runs:
            while not run.ended.is_set():
                with trio.move_on_after(self._around.config.storage.commit_timeout_s):
                    await run.ended.wait()
                if self._writer.failing and not run.ended.is_set():
                    raise StoreError("the runs are stopped, but the store does not take their end yet")

    async def _delete(self, unused_since_ms: int | None) -> None:
        """Stop everything, erase the session, refuse what waits in the inbox. Raises StoreError: then the session
        stays, and its runs too if the store failed already."""
        if self._session is None:
            raise session_not_found(self.session_id)
        if self._writer.failing:
            raise not_writable()
        if unused_since_ms is not None:
            stored = await self._around.store.session(self.session_id)
            if self._runs.all or stored is None or stored.updated_ms >= unused_since_ms:
                raise ClientError(ErrorCode.BUSY, "the session is in use", session_id=self.session_id)
        runs = self._runs.all
        self._runs.end(runs, "deleted")
        await self._wait_ended(runs)
        await self._writer.submit(Entry([(None, SessionClosed())], delete=True, retried=False)).wait()
        self._deleted = True
        self._home.forget(self.session_id)
        refuse_all(self._inbox, session_not_found(self.session_id))
        self._log.info("session_deleted")

    # What a run is made of.

    def _candidates(self, record: Run) -> Sequence[tuple[Provider, str]]:
        """Who is asked, and for which model: what the chat named, else the session; only where neither named anything,
        the configuration's, with its fallbacks. Raises ClientError."""
        session = self._session
        provider, model = record.provider, record.model
        if session is not None:
            if model is None and provider in (None, session.provider):
                model = session.model
            if provider is None:
                provider = session.provider
        providers = self._around.providers
        return providers.in_turn() if provider is None and model is None else [providers.resolve(provider, model)]

    def _materials(self, record: Run) -> RunMaterials:
        config, session = self._around.config, self._session
        own_prompt = None if session is None else session.system_prompt
        own_params = {} if session is None else session.params or {}
        return RunMaterials(
            candidates=self._candidates(record),
            system_prompt=record.system_prompt or own_prompt or config.agent.system_prompt or None,
            params={**own_params, **(record.params or {})} or None,
            toolbox=self._around.toolbox(),
            config=config.agent,
            max_retries=config.llm.max_retries,
        )
