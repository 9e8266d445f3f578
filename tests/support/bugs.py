"""What the server takes for a bug of its own: it contains it, logs it with a traceback, and goes on. A test that looks
only at the outside would not see it."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import structlog
from structlog.typing import EventDict, WrappedLogger


class InjectedBug(Exception):  # noqa: N818 - it reads as what it is
    """A bug that the test itself put in."""


class RunnersStuck(Exception):  # noqa: N818
    """Told when the server could not close in time."""


@contextmanager
def bugs_told(*expected: type[Exception]) -> Iterator[list[BaseException]]:
    """The exceptions that are logged while this is open, taken out of their groups, but for those that are
    `expected`."""
    told: list[BaseException] = []

    def note(_logger: WrappedLogger, _method: str, line: EventDict) -> EventDict:
        if line.get("exc_info"):
            told.extend(error for error in leaves(sys.exc_info()[1]) if not isinstance(error, expected))
        if line["event"] == "runners_stuck" and RunnersStuck not in expected:
            told.append(RunnersStuck())
        raise structlog.DropEvent

    processors = structlog.get_config()["processors"]
    before = list(processors)
    processors[:] = [note]  # in place, as structlog.testing does it: bound loggers may have the list already
    structlog.configure(processors=processors)
    try:
        yield told
    finally:
        processors[:] = before
        structlog.configure(processors=processors)


def leaves(error: BaseException | None) -> Iterator[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from leaves(inner)
    elif error is not None:
        yield error
