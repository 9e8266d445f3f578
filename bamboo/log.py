"""The server's own log: events with fields, one line each; for a person on a terminal, as JSON otherwise.

`structlog.get_logger("bamboo.part").info("what_happened", key=value)`. Ids (`connection_id`, `session_id`, `run_id`)
are bound with `structlog.contextvars` by whoever owns the task. No line has a secret or a conversation in it: that is
everybody's duty where they log, and `mask` is the net under it.
"""

import contextlib
import json
import logging
import re
import sys
from collections.abc import Mapping
from typing import Any, Final, TextIO

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

from bamboo.config import LogConfig

_SECRET: Final = re.compile(r"(.*_)?(token|auth|authorization|api_key|password|secret|cookie)")
"""Fields whose value is a secret wherever they stand. `token` is a delta's text, too: hidden either way."""

_CONVERSATION: Final = frozenset(
    {"content", "delta", "messages", "text", "prompt", "system_prompt", "reasoning", "arguments"}
)
"""Fields that hold what people and models say to each other; the log gets their size."""

_PLAIN: Final = re.compile(r"[^\s\"'=\\\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]+")
"""A value that a person can tell from its neighbours without quotes."""

_CONTROL: Final = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""What a traceback may not send to a terminal."""

_COLOURS: Final = {"debug": "2", "info": "32", "warning": "33", "error": "31", "critical": "1;31"}
"""SGR parameters (ECMA-48) of a level's name."""


def configure(config: LogConfig, *, stream: TextIO | None = None) -> None:
    """Set up structlog and the standard library's logging for the whole process. `stream` None is standard error.

    Other libraries' records are written from WARNING up, in the same form. May be called again. A stream that can no
    longer be written to (a closed pipe, a full disk) loses lines and stops nothing.
    """
    target = sys.stderr if stream is None else stream
    terminal = target.isatty()
    human = config.format == "human" or (config.format == "auto" and terminal)
    level = logging.getLevelNamesMapping()[config.level.upper()]
    render: Processor = _HumanLine(coloured=terminal) if human else _json_line
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            _add_name,
            mask,
            structlog.processors.format_exc_info,
            render,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=lambda *names: _StreamLogger(target, *names),
        cache_logger_on_first_use=False,
    )
    root = logging.getLogger()
    for handler in root.handlers[:]:
        if isinstance(handler, _Forwarder):
            root.removeHandler(handler)
    root.addHandler(_Forwarder())
    root.setLevel(max(level, logging.WARNING))


class _StreamLogger:
    """Writes lines. structlog calls the method that is named like the event's level."""

    def __init__(self, stream: TextIO, name: str | None = None) -> None:
        self._stream = stream
        self.name = name

    def write(self, line: str) -> None:
        # One write per line, so that lines of several threads do not mix. What the stream refuses is lost.
        with contextlib.suppress(OSError):
            self._stream.write(line + "\n")
            self._stream.flush()

    debug = info = warning = error = critical = write


class _Forwarder(logging.Handler):
    """Hands the standard library's records to structlog, with the ids of the context that they come from."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = record.getMessage()
        except (TypeError, ValueError):  # arguments that do not fit the message: some library's slip, no reason to stop
            self.handleError(record)
            return
        steps = (logging.CRITICAL, logging.ERROR, logging.WARNING, logging.INFO)
        level = next((step for step in steps if record.levelno >= step), logging.DEBUG)
        structlog.get_logger(record.name).log(level, text, exc_info=record.exc_info)


def _add_name(logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    if logger.name is not None:
        event["logger"] = logger.name
    return event


def mask(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """Hide what the log must not have, by the names of fields, in mappings inside as well."""
    return {name: _masked(name, value) for name, value in event.items()}


def _masked(name: str, value: Any) -> Any:
    if value is None:
        return None
    plain = name.lower().replace("-", "_")
    if _SECRET.fullmatch(plain):
        return "***"
    if plain in _CONVERSATION:
        return f"<{len(value)} long>" if hasattr(value, "__len__") else "***"
    if isinstance(value, Mapping):
        return {key: _masked(str(key), inner) for key, inner in value.items()}
    return value


def _json_line(_logger: WrappedLogger, _method: str, event: EventDict) -> str:
    ordered = {"time": event.pop("timestamp"), "level": event.pop("level"), "event": event.pop("event"), **event}
    return json.dumps(ordered, default=repr, skipkeys=True)


class _HumanLine:
    """Time of day, level, event, fields; a traceback below. Nothing from outside can break the line or colour it."""

    def __init__(self, *, coloured: bool) -> None:
        self._coloured = coloured

    def __call__(self, _logger: WrappedLogger, _method: str, event: EventDict) -> str:
        time, level, text = event.pop("timestamp"), event.pop("level"), event.pop("event")
        exception, name = event.pop("exception", None), event.pop("logger", None)
        label = f"{level:<8}"
        if self._coloured:
            label = f"\x1b[{_COLOURS[level]}m{label}\x1b[0m"
        words = [time[11:23], label, _one_line(str(text)), *(f"{key}={_value(value)}" for key, value in event.items())]
        if name is not None:
            words.append(f"({name})")
        line = " ".join(words)
        return line if exception is None else f"{line}\n{_CONTROL.sub('?', exception)}"


def _one_line(text: str) -> str:
    return text if text.isprintable() else json.dumps(text, ensure_ascii=True)


def _value(value: object) -> str:
    text = value if isinstance(value, str) else repr(value)
    if isinstance(value, str) and _PLAIN.fullmatch(text) is None:
        return json.dumps(text, ensure_ascii=not text.isprintable())
    return _one_line(text)
