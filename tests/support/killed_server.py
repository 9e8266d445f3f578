"""The server as it is shipped, on database connections that tell of every commit and can end the process at one.

`python -m tests.support.killed_server` is `python -m bamboo`, but that standard output gets a JSON line for each commit
that wrote something: {"done": ["accept", "user_message", …]}. With `KILLED_AT=accept:2:before` (or `:after`) the
process says {"at": […]} right before (or after) the second commit that has an `accept` in it, waits for a byte on
standard input, and kills itself with SIGKILL; `any:7:before` is the seventh commit of all. While the one thread that
writes waits, the event loop goes on: whoever is told something before it is durable, is told it now.
"""

import json
import os
import re
import signal
import sqlite3
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import lru_cache, partial
from typing import Any, Final

from bamboo.cli import main
from bamboo.store.codec import KINDS

VARIABLE: Final = "KILLED_AT"

_STATEMENTS: Final = (
    (re.compile(r"CREATE TABLE"), "schema"),
    (re.compile(r"UPDATE meta SET generation"), "start"),
    (re.compile(r"UPDATE meta SET clean = 1"), "clean"),
    (re.compile(r"INSERT INTO sessions"), "session"),
    (re.compile(r"INSERT INTO runs"), "accept"),
    (re.compile(r"INSERT INTO keys"), "key"),
    (re.compile(r"INSERT INTO epochs\s+SELECT"), "epoch"),
    (re.compile(r"INSERT INTO events"), "event"),
    (re.compile(r"INSERT|UPDATE|DELETE|CREATE"), "other"),
)
"""What a commit is named after; an event is named after its type, and see `_special`."""

_EVENTS: Final = {number: body.type for body, number in KINDS.items()}


@lru_cache(maxsize=256)
def _name(sql: str) -> str | None:
    """None for a statement that writes nothing."""
    return next((name for pattern, name in _STATEMENTS if pattern.match(sql.lstrip())), None)


def _special(operation: Sequence[str]) -> Iterator[str]:
    """What else one session's part of a commit is."""
    if {*operation} == {"agent_token", "other"}:
        yield "deltas"
    if "run_started" in operation and "accept" not in operation:
        yield "queued_start"


class TellingConnection(sqlite3.Connection):
    """Only the one connection that writes commits anything, in one thread at a time."""

    _wrote: Sequence[str] = ()
    _before_operation: Sequence[str] = ()
    _commits: Final[Counter[str]] = Counter()

    def execute(self, sql: str, parameters: Any = (), /) -> sqlite3.Cursor:
        if sql == "COMMIT" and self._wrote:
            return self._commit()
        self._note(sql, parameters)
        return super().execute(sql, parameters)

    def _note(self, sql: str, parameters: Any) -> None:
        if sql.startswith("BEGIN"):
            self._wrote = ()
        elif sql.startswith("SAVEPOINT"):
            self._before_operation = self._wrote
        elif sql.startswith("ROLLBACK TO"):
            self._wrote = self._before_operation
        elif sql.startswith("RELEASE"):
            self._wrote = (*self._wrote, *_special(self._wrote[len(self._before_operation) :]))
        elif (name := _name(sql)) is not None:
            self._wrote = (*self._wrote, _EVENTS[parameters[2]] if name == "event" else name)

    def _commit(self) -> sqlite3.Cursor:
        names = list(dict.fromkeys(self._wrote))
        self._commits.update(["any", *names])
        if self._is_due("before", names):
            end(names)
        cursor = super().execute("COMMIT")
        tell({"done": names})
        if self._is_due("after", names):
            end(names)
        return cursor

    def _is_due(self, when: str, names: Sequence[str]) -> bool:
        wanted, number, wanted_when = os.environ.get(VARIABLE, "none:0:never").split(":")
        return when == wanted_when and wanted in ("any", *names) and self._commits[wanted] == int(number)


def tell(fields: dict[str, Sequence[str]]) -> None:
    os.write(1, json.dumps(fields).encode() + b"\n")


def end(names: Sequence[str]) -> None:
    """End this process as soon as it is told to, or nobody is there who could."""
    tell({"at": names})
    os.read(0, 1)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    sqlite3.connect = partial(sqlite3.connect, factory=TellingConnection)  # type: ignore[assignment]
    main()
