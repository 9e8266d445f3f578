"""The runs of one session: which one works, which wait, and everything that can end one before it ends by itself."""

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final

import structlog
import trio

from bamboo.agent.execution import ActiveRun, RunMaterials, execute
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

    __slots__ = ("active", "attendance", "ended", "patience", "record")

    def __init__(self, record: Run) -> None:
        self.record = record
        self.active: ActiveRun | None = None
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
    """The runs of one session that have no terminal event yet: at most one has a slot, the rest are queued in order.

    Owned by the session's runner; its tasks live in the runner's nursery. `materials` says what a queued run is made of
    at the moment it starts, and may raise ClientError.
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
    ) -> None:
        self.current: LiveRun | None = None
        self._queue: deque[LiveRun] = deque()
        self._leaving = False
        self._around = around
        self._home = home
        self._writer = writer
        self._window = window
        self._nursery = nursery
        self._materials = materials
        self._log = log.bind(session_id=session_id)

    def __repr__(self) -> str:
        return f"<SessionRuns {self.current or 'no run'} +{len(self._queue)} queued>"

    @property
    def all(self) -> list[LiveRun]:
        """The one that runs, then the queue in its order."""
        return [*([] if self.current is None else [self.current]), *self._queue]

    @property
    def busy(self) -> bool:
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

    def start(self, record: Run, materials: RunMaterials) -> None:
        """A run that is accepted, has its slot, and whose `run_started` is committed."""
        run = LiveRun(record)
        self._watch(run)
        self._start(run, materials, committed=True)

    def interrupt(self) -> None:
        """The server leaves: end the running run as interrupted. Queued ones stay for the next start."""
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
        if self.current is not None:
            self._around.slots.release()
        self._home.queued_runs -= len(self._queue)

    def _watch(self, run: LiveRun) -> None:
        """From acceptance on, and again from a start: a run that asked for it is stopped when nobody is left."""
        if run.record.cancel_after_s is not None:
            self._nursery.start_soon(self._stop_when_abandoned, run, run.record.cancel_after_s)

    def request_slot(self) -> None:
        if self._queue and self.current is None and not self._leaving:
            self._around.slots.request(self)

    def slot_granted(self) -> None:
        """A slot for the first queued run. Called from whatever session's task released it: it must not fail."""
        dying = self._nursery.cancel_scope.cancel_called  # then it may be closed already: nothing can start in it
        if not self._queue or self.current is not None or self._leaving or dying:
            self._around.slots.release()
            return
        run = self._queue.popleft()
        self._home.queued_runs -= 1
        run.patience.cancel()
        try:
            materials = self._materials(run.record)
        except ClientError as error:
            # Its provider is no longer configured: only a run of an earlier process can be in that place.
            self.current = run
            self._nursery.start_soon(self._end_unstartable, run, error)
        else:
            self._start(run, materials, committed=False)

    def _start(self, run: LiveRun, materials: RunMaterials, *, committed: bool) -> None:
        self.current = run
        run.active = ActiveRun(run.record, materials)
        self._nursery.start_soon(self._run, run, run.active, committed)

    async def _run(self, run: LiveRun, active: ActiveRun, committed: bool) -> None:  # noqa: FBT001 - a task's argument
        settings = active.machine.settings
        run_id = settings.run_id
        if not committed:
            await self._writer.submit(Entry([(run_id, active.started)])).wait()
        terminal = await execute(active, self._around.store, self._writer, self._around.now_ms)
        self._log.info(
            "run_ended", run_id=run_id, provider=settings.provider, model=settings.model, **outcome(terminal)
        )
        self._ended(run)

    async def _end_unstartable(self, run: LiveRun, error: ClientError) -> None:
        await self.end_with(run.record.run_id, [AgentError(error.code, error.message, error.retryable)])
        self._ended(run)

    def _ended(self, run: LiveRun) -> None:
        """The current run is over: its slot goes to whoever waits longest, perhaps to this session's next run."""
        self.current = None
        run.finish()
        self.request_slot()
        self._around.slots.release()

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
                self._end_queued(run, AgentStopped(reason))
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

    def _end_queued(self, run: LiveRun, terminal: Terminal) -> None:
        """Hand over the terminal event of a run that was taken out of the queue."""
        entry = self._writer.submit(Entry([(run.record.run_id, terminal)]))
        self._nursery.start_soon(self._finish_queued, run, entry, terminal)

    async def _finish_queued(self, run: LiveRun, entry: Entry, terminal: Terminal) -> None:
        await entry.wait()
        run.finish()
        self._log.info("run_ended", run_id=run.record.run_id, **outcome(terminal))

    async def end_with(self, run_id: RunId, closing: Sequence[EventBody]) -> None:
        """Commit the end of a run that nothing drives."""
        await self._writer.submit(Entry([(run_id, body) for body in closing])).wait()

    async def _end_when_overdue(self, run: LiveRun) -> None:
        """The queue-wait deadline; counted from acceptance, also over a restart."""
        limit_s = self._around.config.agent.queue_timeout_s
        waited_s = (self._around.now_ms() - run.record.accepted_ms) / 1000
        with run.patience:
            await trio.sleep(max(0.0, limit_s - waited_s))
        if not run.patience.cancelled_caught and self._dequeue(run):
            message = f"the run waited longer than {limit_s:g} s for its turn"
            self._end_queued(run, AgentError(ErrorCode.QUEUE_TIMEOUT, message, retryable=False))

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
