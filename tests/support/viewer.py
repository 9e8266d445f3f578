"""A client that shows a conversation: it reads a snapshot, then the log from its cursor on."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from bamboo.core.events import (
    AgentMessage,
    AgentReasoning,
    AgentToken,
    Event,
    RunStarted,
    Terminal,
    UserMessage,
)
from bamboo.core.history import Opening, message_of
from bamboo.core.types import Content, Message, MessageId, RunId, content_text
from bamboo.store.base import Snapshot
from tests.support.follower import Follower
from tests.support.invariants import history_of
from tests.support.mortal_store import Life, MortalStore


@dataclass(frozen=True, slots=True)
class Waiting:
    message_id: MessageId
    content: Content


class View:
    """What is on the screen: the messages, what is being said, and what waits."""

    def __init__(self, snapshot: Snapshot) -> None:
        self.messages = list(snapshot.messages)
        self.waiting = {run.run_id: Waiting(run.message_id, run.content) for run in snapshot.queue}
        self.running: RunId | None = None
        self.text = self.reasoning = ""
        if snapshot.live is not None:
            self.running = snapshot.live.run_id
            self.text, self.reasoning = snapshot.live.text, snapshot.live.reasoning

    def apply(self, event: Event) -> None:
        body, run_id = event.body, event.run_id
        if run_id is None:
            return
        if isinstance(body, UserMessage):
            assert run_id not in self.waiting, f"{event!r} is in the snapshot's queue"
            self.waiting[run_id] = Waiting(body.message_id, body.content)
        elif isinstance(body, RunStarted):
            self.running = run_id
        elif isinstance(body, AgentToken):
            assert run_id == self.running, f"{event!r} while {self.running} works"
            self.text += body.token
        elif isinstance(body, AgentReasoning):
            self.reasoning += body.token
        elif isinstance(body, AgentMessage):
            assert content_text(body.content) == self.text, f"{event!r} behind {self.text!r}"
            self.text = self.reasoning = ""
        elif isinstance(body, Terminal):
            self.waiting.pop(run_id, None)
            if run_id == self.running:
                self.running, self.text, self.reasoning = None, "", ""
        opening = None
        if isinstance(body, RunStarted):
            waiting = self.waiting.pop(run_id)
            opening = Opening(waiting.message_id, waiting.content, event.time_ms)
        message = message_of(event, opening)
        if message is not None:
            assert message.message_id not in {known.message_id for known in self.messages}, f"{event!r} is shown twice"
            self.messages.append(message)


class Viewer(Follower):
    """`taken` is its snapshot; what follows it is everything else, exactly once. `known` are runs that were accepted
    before it was asked for."""

    def __init__(self, mortal: MortalStore, taken: Snapshot, known: Sequence[RunId]) -> None:
        super().__init__(mortal, taken.session_id, after=taken.cursor)
        self._taken = taken
        self._known = known

    def check_all(self) -> None:
        super().check_all()
        life = self.life_of(self._taken.cursor.epoch)
        assert life is not None
        self._check_snapshot(life)
        if life.deleted or any(gap.reason != "crash" for gap in self.gaps):
            return  # such a reader looks again
        assert all(gap.cursor.seq >= self._taken.cursor.seq for gap in self.gaps), "a snapshot is of what is durable"
        view = View(self._taken)
        for event in self.kept:
            view.apply(event)
        assert [timeless(message) for message in view.messages] == [
            timeless(message) for message in history_of(life.events)
        ]
        assert not view.waiting
        assert view.running is None

    def _check_snapshot(self, life: Life) -> None:
        """It is what the log says up to its cursor."""
        log = life.events[: self._taken.cursor.seq]
        assert [timeless(message) for message in self._taken.messages] == [
            timeless(message) for message in history_of(log)
        ]
        started = {event.run_id for event in log if isinstance(event.body, RunStarted)}
        ended = {event.run_id for event in log if isinstance(event.body, Terminal)}
        asked = [event.run_id for event in log if isinstance(event.body, UserMessage)]
        assert [run.run_id for run in self._taken.queue] == [run for run in asked if run not in started | ended]
        assert all(run in asked for run in self._known if run in life.accepted), "one that was accepted is not in it"
        live = None if self._taken.live is None else self._taken.live.run_id
        assert live == next((run for run in asked if run in started - ended), None)


def timeless(message: Message) -> Message:
    """A user message has the time of its acceptance, which a client that saw it start does not know."""
    return replace(message, time_ms=0)
