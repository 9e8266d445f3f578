"""The runs of one session: which one works, which wait, and everything that can end one before it ends by itself."""

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final

import structlog
import trio

from bamboo.agent.execution import ActiveRun, RunMaterials, execute
from bamboo.agent.recovery import CutShort, cut_short
from bamboo.agent.surroundings import Home, Surroundings
from bamboo.agent.writer import Entry, LogWriter
from bamboo.bus.topic import Window
from bamboo.core.events import (
    AgentComplete,
    AgentError,
    AgentStopped,
    EventBody,
    Terminal,
    terminal_status,
)
from bamboo.core.types import RunId, SessionId, StopReason
from bamboo.errors import ClientError, ErrorCode
from bamboo.store.base import Run

log = structlog.get_logger("bamboo.agent")

FOLLOW_S: Final = 1.0
"""What a client has at least, once its chat is accepted, to follow the session: also one that is to leave at no
notice."""


class LiveRun:
    """An accepted run that has no terminal event yet. `active` is set while it has a slot."""

    __slots__ = ("active", "attendance", "end", "ended", "patience", "record")

    def __init__(self, record: Run) -> None:
        self.record = record
        self.active: ActiveRun | None = None
        self.end: CutShort | None = None
        """Its terminal event, once that is decided and handed over, of a run that has no slot."""
        self.ended = trio.Event()
        """Its terminal event is committed and published, and nothing of it is alive."""
        self.patience = trio.CancelScope()
        """Around the task that ends the run when it has waited too long for a slot."""
        self.attendance = trio.CancelScope()
        """Around the task that ends the run when nobody follows its session any more."""

    def __repr__(self) -> str:
        return f"<LiveRun {self.record.run_id} {self.active or 'queued'}>"

    def leave_watches(self) -> None:
        self.patience.cancel()
        self.attendance.cancel()

    def finish(self) -> None:
        self.leave_watches()
        self.ended.set()


class SessionRuns:
    """The runs of one session that have no terminal event yet: at most one has a slot, the rest are queued in order, or
    wait for nothing but the commit of their end.

    Owned by the session's runner; its tasks live in the runner's nursery. `materials` says what a queued run is made of
    at the moment it starts, and may raise ClientError. `on_end` is called behind each run's end.
    """

    def __init__(
        self,
        session_id: SessionId,
        around: Surroundings,
        home: Home,
        *,
        writer: LogWriter,
        window: Window,
        nursery: trio.Nursery,
        materials: Callable[[Run], RunMaterials],
        on_end: Callable[[], None],
    ) -> None:
        self.current: LiveRun | None = None
        self._queue: deque[LiveRun] = deque()
        self._ending: dict[RunId, LiveRun] = {}
        self._granted = False  # a slot is here that no run has yet
        self._leaving = False
        self._interrupted = False
        self._around = around
        self._home = home
        self._writer = writer
        self._window = window
        self._nursery = nursery
        self._materials = materials
        self._on_end = on_end
        self._log = log.bind(session_id=session_id)

    def __repr__(self) -> str:
        return f"<SessionRuns {self.current or 'no run'} +{len(self._queue)} queued>"

    @property
    def all(self) -> list[LiveRun]:
        """Those that are ending, the one that runs, then the queue in its order."""
        return [*self._ending.values(), *([] if self.current is None else [self.current]), *self._queue]

    @property
    def busy(self) -> bool:
        """A run works, or waits for its turn. Those that are ending keep nobody waiting."""
        return self.current is not None or bool(self._queue)

    @property
    def queued(self) -> int:
        return len(self._queue)

    def enqueue(self, record: Run) -> LiveRun:
        """A run that is accepted and has no slot; `request_slot` asks for one."""
        run = LiveRun(record)
        self._queue.append(run)
        self._home.queued_runs += 1
        self._nursery.start_soon(self._end_when_overdue, run)
        self._watch(run)
        return run

    def settle(self, record: Run, closing: Sequence[EventBody]) -> None:
        """A run that was accepted before this runner came, and that nothing drives: commit its end."""
        *before, end = closing
        assert isinstance(end, CutShort)
        self._log.warning("run_settled", run_id=record.run_id, **outcome(end))
        self._end_without_slot(LiveRun(record), end, before)

    def start(self, record: Run, materials: RunMaterials) -> None:
        """A run that is accepted, has its slot, and whose `run_started` is committed."""
        run = LiveRun(record)
        self._watch(run)
        self._start(run, materials, committed=True)

    def interrupt(self) -> None:
        """The server leaves: end the running run as interrupted, and any that is just being accepted. Queued ones stay
        for the next start."""
        self._interrupted = True
        if self.current is not None and self.current.active is not None:
            message = "the server was stopped before the run was done; its partial answer is kept"
            self.current.active.fail(ErrorCode.INTERRUPTED, message, retryable=True)

    async def leave(self) -> None:
        """Start no further run, let the one that runs end, and let go of the queued ones: they stay in the store."""
        self._leaving = True
        self._around.slots.withdraw(self)
        for run in self._queue:
            run.leave_watches()
        if self.current is not None:
            await self.current.ended.wait()

    def close(self) -> None:
        """Give back what is held in common, whatever ended the runner."""
        self._leaving = True
        self._around.slots.withdraw(self)
        for held in (self.current is not None, self._granted):
            if held:
                self._around.slots.release()
        self._home.queued_runs -= len(self._queue)

    def decided(self, *, died_of: ErrorCode) -> dict[RunId, CutShort]:
        """How runs end that this runner leaves unfinished: those that were stopped or have failed already, whose end is
        not committed.

        And the run that had the slot when a bug came: not even if it is still queued, for the store, is it tried again,
        or it could end one runner after the other.
        """
        ends = {run_id: run.end for run_id, run in self._ending.items() if run.end is not None}
        if self.current is not None:
            active = self.current.active
            terminal = active.machine.terminal if active is not None and active.machine.sealed else None
            if isinstance(terminal, CutShort):
                ends[self.current.record.run_id] = terminal
            elif died_of is ErrorCode.INTERNAL:
                ends[self.current.record.run_id] = cut_short(died_of)
        return ends

    def _watch(self, run: LiveRun) -> None:
        """From acceptance on, and again from a start: a run that asked for it is stopped when nobody is left."""
        if run.record.cancel_after_s is not None:
            self._nursery.start_soon(self._stop_when_abandoned, run, run.record.cancel_after_s)

    def request_slot(self) -> None:
        if self._queue and self.current is None and not self._granted and not self._leaving:
            self._around.slots.request(self)

    def slot_granted(self) -> None:
        """A slot for the first queued run. Called from whatever session's task released it: it must not fail, so what
        is made of the slot is this session's own task."""
        dying = self._nursery.cancel_scope.cancel_called  # then it may be closed already: nothing can start in it
        if not self._queue or self.current is not None or self._granted or self._leaving or dying:
            self._around.slots.release()
            return
        self._granted = True
        self._nursery.start_soon(self._use_slot)

    async def _use_slot(self) -> None:
        await trio.lowlevel.checkpoint()
        run = None if self._leaving or self.current is not None else self._next()
        self._granted = False
        if run is None:
            self._give_slot_on()
            return
        self.current = run
        try:
            materials = self._materials(run.record)
        except ClientError as error:
            # Its provider is no longer configured: only a run of an earlier process can be in that place.
            self.current = None
            self._end_without_slot(run, AgentError(error.code, error.message, error.retryable))
            self._give_slot_on()
        else:
            self._start(run, materials, committed=False)

    def _give_slot_on(self) -> None:
        """To whoever waits longest, perhaps this session's next run."""
        self.request_slot()
        self._around.slots.release()

    def _next(self) -> LiveRun | None:
        """Take the first run out of the queue that has not waited too long: behind a restart, whose time counts, none
        was there to end it."""
        while self._queue:
            run = self._queue[0]
            self._dequeue(run)
            if self._patience_s(run) > 0:
                run.patience.cancel()
                return run
            self._end_overdue(run)
        return None

    def _start(self, run: LiveRun, materials: RunMaterials, *, committed: bool) -> None:
        self.current = run
        run.active = ActiveRun(run.record, materials)
        self._nursery.start_soon(self._run, run, run.active, committed)
        if self._interrupted:
            self.interrupt()

    async def _run(self, run: LiveRun, active: ActiveRun, committed: bool) -> None:  # noqa: FBT001 - a task's argument
        run_id, machine = active.run_id, active.machine
        if not committed:
            await self._writer.submit(Entry([(run_id, active.started)])).wait()
        terminal = await execute(active, self._around.store, self._writer, self._around.now_ms)
        asked = machine.candidate
        self._log.info("run_ended", run_id=run_id, provider=asked.provider, model=asked.model, **outcome(terminal))
        self._ended(run)

    def _ended(self, run: LiveRun) -> None:
        """The current run is over."""
        self.current = None
        run.finish()
        self._give_slot_on()
        self._on_end()

    def end(self, runs: Sequence[LiveRun], reason: StopReason) -> list[RunId]:
        """End these runs, synchronously decided. Returns those that this ended; one that was sealed before is not among
        them."""
        ended: list[RunId] = []
        for run in runs:
            if run.active is not None:
                if run.active.stop(reason):
                    ended.append(run.record.run_id)
            elif self._dequeue(run):
                ended.append(run.record.run_id)
                self._end_without_slot(run, AgentStopped(reason))
        return ended

    def _dequeue(self, run: LiveRun) -> bool:
        """Take a run out of the queue: whoever does writes its terminal event."""
        if run not in self._queue:
            return False
        self._queue.remove(run)
        self._home.queued_runs -= 1
        if not self._queue:
            self._around.slots.withdraw(self)
        return True

    def _end_without_slot(self, run: LiveRun, end: CutShort, before: Sequence[EventBody] = ()) -> None:
        """Hand over the end of a run that is in no queue any more and has no slot."""
        run_id = run.record.run_id
        run.leave_watches()
        run.end = end
        self._ending[run_id] = run
        entry = self._writer.submit(Entry([(run_id, body) for body in (*before, end)]))
        self._nursery.start_soon(self._finish, run, entry, end)

    async def _finish(self, run: LiveRun, entry: Entry, end: CutShort) -> None:
        await entry.wait()
        del self._ending[run.record.run_id]
        run.finish()
        self._log.info("run_ended", run_id=run.record.run_id, **outcome(end))
        self._on_end()

    async def _end_when_overdue(self, run: LiveRun) -> None:
        """The queue-wait deadline; counted from acceptance, also over a restart."""
        with run.patience:
            await trio.sleep(max(0.0, self._patience_s(run)))
        if not run.patience.cancelled_caught and self._dequeue(run):
            self._end_overdue(run)

    def _patience_s(self, run: LiveRun) -> float:
        """How long it may wait for its turn yet."""
        waited_s = (self._around.now_ms() - run.record.accepted_ms) / 1000
        return self._around.config.agent.queue_timeout_s - waited_s

    def _end_overdue(self, run: LiveRun) -> None:
        message = f"the run waited longer than {self._around.config.agent.queue_timeout_s:g} s for its turn"
        self._end_without_slot(run, AgentError(ErrorCode.QUEUE_TIMEOUT, message, retryable=False))

    async def _stop_when_abandoned(self, run: LiveRun, after_s: float) -> None:
        """`on_disconnect: cancel_after_s`: the time runs whenever nobody is subscribed to the session."""
        patience_s = max(after_s, FOLLOW_S)
        with run.attendance:
            while True:
                await self._window.wait_attendance(attended=False)
                with trio.move_on_after(patience_s):
                    await self._window.wait_attendance(attended=True)
                    patience_s = after_s
                    continue
                break
        if not run.attendance.cancelled_caught:
            self.end([run], "abandoned")


def outcome(terminal: Terminal) -> dict[str, Any]:
    """A terminal event's facts for the log: no text of the conversation."""
    fields: dict[str, Any] = {"status": terminal_status(terminal)}
    if isinstance(terminal, AgentComplete):
        fields |= {"finish_reason": terminal.finish_reason, "elapsed_ms": terminal.stats.elapsed_ms}
        fields |= {"ttft_ms": terminal.stats.ttft_ms, "queue_ms": terminal.stats.queue_ms}
    elif isinstance(terminal, AgentError):
        fields["code"] = terminal.code
    else:
        fields["reason"] = terminal.reason
    return fields
