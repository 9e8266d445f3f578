"""What the clients of a server were told through all of its crashes, and whether it is so: accepted chats, cursors,
events byte for byte, histories.

A `Ledger` is fed with everything that comes over the wire. What can be judged at once is asserted at once; the rest by
`check_session`, with the log as it can be read from its start once all runs are over. Knows the wire only.
"""

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Final

import trio

from tests.support.readers import Seen

JsonObject = dict[str, Any]

TERMINAL: Final = frozenset({"agent_complete", "agent_error", "agent_stopped"})
DELTAS: Final = frozenset({"agent_token", "agent_reasoning"})

NOWHERE: Final = "nowhere.0"
"""A cursor of no log: a stream from it begins at the log's start, behind a gap that says so."""


def seq_of(cursor: str) -> int:
    return int(cursor.rpartition(".")[2])


def epoch_of(cursor: str) -> str:
    return cursor.rpartition(".")[0]


def tokens_of(message: str) -> list[str]:
    """What the model answers to this message: no two tokens of a test are the same."""
    count, padding = (45, " " * 480) if "long" in message else (24, "")
    return [f"<{message} {number}>{padding}" for number in range(count)]


@dataclass
class Chat:
    """A chat and what its client was told of it, oldest first; its message is its idempotency key."""

    message: str
    session_id: str | None
    """As the request has it; None asks for a new session."""
    transport: str = "http"
    answers: list[JsonObject] = field(default_factory=list)

    @property
    def accepted(self) -> JsonObject:
        assert self.answers, f"{self.message} was never answered"
        return self.answers[0]


class Place:
    """A reader's place in a session, or in one run of it, over all its connections; and all that it knows from there
    on. `cursor` None: it was never told one.
    """

    def __init__(self, ledger: "Ledger", session_id: str, *, cursor: str | None, run_id: str | None = None) -> None:
        self.session_id = session_id
        self.run_id = run_id
        self.cursor = cursor
        self.known: dict[int, bytes] = {}
        self.ended = False
        self.gaps = 0
        self._ledger = ledger
        self._start = 0 if cursor in (None, NOWHERE) else seq_of(cursor or "")
        self._crashes = ledger.crashes
        """As it knows them: it gets at most one gap for those that came since."""
        self._first = True
        ledger.places.append(self)

    def __repr__(self) -> str:
        return f"<{self.session_id}{f' {self.run_id}' if self.run_id else ''} at {self.cursor}>"

    @property
    def seq(self) -> int:
        return self._start if self.cursor is None else seq_of(self.cursor)

    def resume(self) -> str | None:
        """What to connect with."""
        self._first = True
        return self.cursor

    def take(self, item: Seen) -> None:
        event = item.fields
        assert event["session_id"] == self.session_id, f"{self!r} got {event}"
        assert not self.ended, f"{self!r} got {event} after its end"
        if event["type"] == "gap":
            self._take_gap(event)
        else:
            self._take_event(item, event)
        self._first = False
        self.cursor = item.cursor

    def _take_event(self, item: Seen, event: JsonObject) -> None:
        seq = event["seq"]
        assert event["cursor"] == item.cursor, event
        assert seq == seq_of(item.cursor), event
        if self.run_id is None:
            assert seq == self.seq + 1, f"{self!r} got {event} next"
        else:
            assert event["run_id"] == self.run_id, f"{self!r} got {event}"
            assert seq > self.seq, f"{self!r} got {event} next"
            self.ended = event["type"] in TERMINAL
        self.known[seq] = item.data
        self._ledger.saw(item, event)

    def _take_gap(self, gap: JsonObject) -> None:
        assert self._first, f"{self!r} got {gap} in the middle of a connection"
        if self.cursor == NOWHERE:
            assert (gap["reason"], gap["from_seq"], gap["to_seq"]) == ("epoch", None, None), gap
            return
        assert gap["reason"] == "crash", f"{self!r} got {gap}"
        assert self._ledger.crashes > self._crashes, f"{self!r} got {gap}, and nothing crashed since the last one"
        self._crashes = self._ledger.crashes
        gone = {seq: json.loads(data) for seq, data in self.known.items() if seq >= gap["from_seq"]}
        assert list(gone) == list(range(gap["from_seq"], gap["to_seq"] + 1)), f"{self!r} knew {list(gone)}, got {gap}"
        assert gone, f"{self!r} got {gap}"
        kinds = {event["type"] for event in gone.values()}
        assert kinds <= DELTAS, f"{self!r} lost what a client may count on: {kinds} in {gap}"
        assert seq_of(gap["cursor"]) == gap["from_seq"] - 1, gap
        for seq in gone:
            del self.known[seq]
        self.gaps += 1
        self._ledger.gaps += 1

    def check(self, log: Sequence[Seen]) -> None:
        """What it had, without what gaps took, and what it got is the log from where it began, byte for byte."""
        left = dict(self.known)
        for item in log:
            event = item.fields
            if event["seq"] > self._start and self.run_id in (None, event.get("run_id")):
                known = left.pop(event["seq"], b"nothing")
                assert known == item.data, f"{self!r} knows {known!r} where the log has {item.data!r}"
        assert not left, f"{self!r} knows what is not in the log: {left}"


class Ledger:
    """All that was told. `crashes` and `clean` are what the commits of the server's start and stop say: whether the
    next start is one after a crash."""

    def __init__(self) -> None:
        self.chats: dict[str, Chat] = {}
        self.places: list[Place] = []
        self.snapshots: list[JsonObject] = []
        self.epochs: dict[str, dict[int, str]] = {}
        """By session: the epoch in which chats were accepted after so many crashes."""
        self.asked: list[tuple[str, list[tuple[str, str]]]] = []
        """Every call of the model: the message, and all messages that it was sent."""
        self.crashes = 0
        self.clean = True
        self.stops = 0
        self.gaps = 0
        self.events = 0
        """Seen by all readers together in this life of the server."""
        self.texts: set[str] = set()
        self.terminals: dict[str, JsonObject] = {}
        self._raw: dict[tuple[str, str], bytes] = {}
        self._turn = trio.Event()

    # What happens.

    @property
    def sessions(self) -> list[str]:
        """Those that a client knows of."""
        return list(dict.fromkeys(chat.accepted["session_id"] for chat in self.chats.values() if chat.answers))

    def answered(self, chat: Chat, answer: JsonObject, status: int | None = None) -> None:
        """An answer that says accepted: 200 or 201, or the frame. Its first one may be a duplicate: an accept whose
        answer was lost."""
        duplicate = answer["accepted_as"] == "duplicate"
        assert status in (None, 200, 200 if duplicate else 201), (status, answer)
        if chat.answers:
            assert duplicate, f"{chat.message} was accepted as {chat.accepted}, and again as {answer}"
            for name in ("session_id", "run_id", "message_id", "cursor"):
                for earlier in chat.answers:
                    assert earlier.get(name, answer.get(name)) == answer.get(name, earlier.get(name)), (earlier, answer)
        assert chat.session_id in (None, answer["session_id"]), answer
        if not duplicate and "cursor" in answer:
            self._note_epoch(answer["session_id"], epoch_of(answer["cursor"]))
        chat.answers.append(answer)
        self._turned()

    def _note_epoch(self, session_id: str, epoch: str) -> None:
        epochs = self.epochs.setdefault(session_id, {})
        for crashes, other in epochs.items():
            same = crashes == self.crashes
            assert (other == epoch) is same, (
                f"{session_id} has epoch {epoch} after {self.crashes} crashes, after {crashes} it had {other}"
            )
        epochs[self.crashes] = epoch

    def committed(self, names: Sequence[str]) -> None:
        """The server committed something with these in it."""
        if "start" in names:
            self.crashes += not self.clean
            self.clean = False
        self.clean = self.clean or "clean" in names

    def saw(self, item: Seen, event: JsonObject) -> None:
        """A reader got an event. Whoever gets the event of a cursor gets the same bytes: live or later, over
        whatever."""
        before = self._raw.setdefault((event["session_id"], item.cursor), item.data)
        assert before == item.data, f"one reader got {before!r}, another {item.data!r}"
        self.events += 1
        if event["type"] == "agent_token":
            self.texts.add(event["token"])
        elif event["type"] in TERMINAL:
            self.terminals[event["run_id"]] = event
        self._turned()

    async def wait(self, true: Callable[[], bool]) -> None:
        """Return when something that happened made it true."""
        while not true():
            await self._turn.wait()

    async def wait_events(self, count: int) -> None:
        """Return when all readers together have seen so many events in this life of the server."""
        await self.wait(lambda: self.events >= count)

    def _turned(self) -> None:
        self._turn.set()
        self._turn = trio.Event()

    # What must be so, when all is over.

    def check_session(self, session_id: str, log: Sequence[Seen], runs: Sequence[JsonObject]) -> None:
        """`log` is all of it, from the start; `runs` are the session's as the server tells them, oldest first."""
        events = [item.fields for item in log]
        assert [event["seq"] for event in events] == list(range(1, len(events) + 1)), f"{session_id} has a hole"
        assert [event["seq"] for event in events if event["type"] == "session_created"] == [1], session_id
        self._check_epochs(session_id, events)
        chats = {
            chat.accepted["run_id"]: chat for chat in self.chats.values() if chat.accepted["session_id"] == session_id
        }
        by_run = {run_id: [event for event in events if event.get("run_id") == run_id] for run_id in chats}
        assert {event["run_id"] for event in events[1:]} == set(chats), f"{session_id} has runs that nobody asked for"
        assert [run["run_id"] for run in runs] == _order(events, "user_message"), session_id
        for run in runs:
            self._check_run(chats[run["run_id"]], run, by_run[run["run_id"]])
        started = _order(events, "run_started")
        assert started == [run_id for run_id in _order(events, "user_message") if run_id in started], (
            f"{session_id}: runs start in the order of their acceptance"
        )
        for place in self.places:
            if place.session_id == session_id:
                place.check(log)
        for snapshot in self.snapshots:
            if snapshot["session_id"] == session_id:
                check_snapshot(snapshot, events)

    def _check_epochs(self, session_id: str, events: Sequence[JsonObject]) -> None:
        lives = [epoch for epoch, _ in groupby(epoch_of(event["cursor"]) for event in events)]
        assert len(set(lives)) == len(lives) <= self.crashes + 1, f"{session_id}: epochs {lives}"
        known = self.epochs.get(session_id, {})
        of_accepts = [known[crashes] for crashes in sorted(known)]
        assert of_accepts == [epoch for epoch in lives if epoch in of_accepts], (lives, known)

    def _check_run(self, chat: Chat, run: JsonObject, events: Sequence[JsonObject]) -> None:
        kinds = [event["type"] for event in events]
        said = "".join(event["token"] for event in events if event["type"] == "agent_token")
        text = "".join(tokens_of(chat.message))
        asked = sum(message == chat.message for message, _ in self.asked)
        where = f"{chat.message}: {kinds}"
        assert kinds[0] == "user_message", where
        assert events[0]["content"] == chat.message, where
        assert events[0]["message_id"] == run["message_id"] == chat.accepted.get("message_id", run["message_id"]), where
        assert [kind for kind in kinds if kind in TERMINAL] == [kinds[-1]], f"{where}: one terminal event, the last"
        assert kinds.count("run_started") == 1, where
        frame = [kind for kind in kinds if kind not in DELTAS]
        assert frame.count("agent_message") == bool(said), where
        if said:
            assert kinds[-2] == "agent_message", where
            assert events[-2]["content"] == said, f"{where}: the message is what was streamed"
        started = next(event for event in events if event["type"] == "run_started")
        outlived = epoch_of(started["cursor"]) != epoch_of(events[-1]["cursor"])
        if kinds[-1] == "agent_complete":
            assert not outlived, f"{where}: a run that was running when the server died completed"
            assert (said, run["status"], asked) == (text, "completed", 1), where
            assert "partial" not in events[-2], where
            return
        assert kinds[-1] == "agent_error", where
        assert (events[-1]["code"], events[-1]["retryable"], run["status"]) == ("interrupted", True, "interrupted"), (
            where
        )
        assert outlived or self.stops, f"{where}: interrupted, and the server neither died nor was stopped"
        assert text.startswith(said), where
        assert not said or events[-2]["partial"] is True, where
        assert asked <= 1, f"{where}: the model was asked {asked} times"

    def check_asked(self, events: Mapping[str, Sequence[JsonObject]]) -> None:
        """The model was sent the history as the log has it where the run starts."""
        runs = {chat.message: chat.accepted for chat in self.chats.values()}
        twice = [message for message, count in Counter(message for message, _ in self.asked).items() if count > 1]
        assert not twice, f"runs that were executed twice: {twice}"
        for message, sent in self.asked:
            accepted = runs[message]
            log = events[accepted["session_id"]]
            started = next(e for e in log if e["type"] == "run_started" and e["run_id"] == accepted["run_id"])
            told = [(entry["role"], entry["content"]) for entry in fold(log[: started["seq"]])["messages"]]
            assert sent == told, f"the model was sent {sent} for {message}, the log says {told}"


def _order(events: Sequence[JsonObject], kind: str) -> list[str]:
    return [event["run_id"] for event in events if event["type"] == kind]


def fold(events: Sequence[JsonObject]) -> JsonObject:
    """A history as its events make it: what a client could do by itself."""
    messages: list[JsonObject] = []
    queue: dict[str, JsonObject] = {}
    live: JsonObject | None = None
    for event in events:
        run_id, kind = event.get("run_id", ""), event["type"]
        if kind == "user_message":
            queue[run_id] = {"run_id": run_id, "message_id": event["message_id"], "content": event["content"]}
        elif kind == "run_started":
            messages.append({"role": "user", **queue.pop(run_id)})
            live = {"run_id": run_id, "status": "running", "text": ""}
        elif kind == "agent_token" and live is not None:
            live["text"] += event["token"]
        elif kind == "agent_message" and live is not None:
            names = ("run_id", "message_id", "content", "partial", "time")
            messages.append({"role": "assistant", **{name: event[name] for name in names if name in event}})
            live["text"] = ""
        elif kind in TERMINAL:
            queue.pop(run_id, None)
            live = None
    positions = [{**entry, "position": position} for position, entry in enumerate(queue.values(), start=1)]
    return {"messages": messages, "queue": positions, "live": live}


def check_snapshot(snapshot: JsonObject, log: Sequence[JsonObject]) -> None:
    """A history that was told at any time is what the log, which knows nothing that was lost, says up to its seq."""
    seq = snapshot["seq"]
    assert seq == seq_of(snapshot["cursor"]) <= len(log), f"{snapshot['cursor']} was the durable head, now {len(log)}"
    assert log[seq - 1]["cursor"] == snapshot["cursor"], (snapshot["cursor"], log[seq - 1])
    folded = fold(log[:seq])
    for name in ("queue", "live"):
        assert snapshot[name] == folded[name], f"{name} at {snapshot['cursor']}: {snapshot[name]} != {folded[name]}"
    told = [dict(message) for message in snapshot["messages"]]
    for message in told:
        if message["role"] == "user":
            del message["time"]  # when it was accepted, not when it was committed
    assert told == folded["messages"], f"at {snapshot['cursor']}: {told} != {folded['messages']}"
