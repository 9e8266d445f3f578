"""Server-sent events, both ways: the frames that we send, and a decoder for those that providers and servers send us.

Source: WHATWG HTML, section 9.2 "Server-sent events" (https://html.spec.whatwg.org/multipage/server-sent-events.html).
Sans-io: bytes in, events out.
"""

from typing import Final, NamedTuple

PREAMBLE: Final = b"retry: 1000\n"
"""Sent once, at the start: reconnect after 1,000 ms. Also makes proxies pass the head of an answer on that is still
silent. One line, not a block: behind an empty line some clients (httpx-sse 0.4) see an event without data.
"""

KEEP_ALIVE: Final = b": keep-alive\n"
"""A comment line: no event to anyone, but a sign of life for every timeout between us and the reader."""

_BOM: Final = b"\xef\xbb\xbf"
_LF: Final = 10
_MAX_RETRY_DIGITS: Final = 12  # of milliseconds: 31 years; more is no time to wait, and Python bounds int() anyway


def event(cursor: object, data: bytes) -> bytes:
    """One event with its place in the log. `data` is one line, as JSON always is; `str(cursor)` too."""
    return f"id: {cursor}\ndata: ".encode() + data + b"\n\n"


def frame(data: bytes) -> bytes:
    """One event that has no place in a log (an `error`): it leaves the reader's last event id as it is. `data` is one
    line.
    """
    return b"data: " + data + b"\n\n"


class ServerSentEvent(NamedTuple):
    """One dispatched event. A tuple, because one is made for every token of every provider.

    `id` is the last event id in force and `retry` the reconnection time in force (ms, None: never told): both hold from
    the event that sets them on, as the specification has it.
    """

    event: str
    data: str
    id: str
    retry: int | None


class SseTooLargeError(ValueError):
    """A line, or the data lines of one event, passed the bound. `events` are those that came whole before it in the
    same feed.
    """

    def __init__(self, max_event_bytes: int, events: list[ServerSentEvent]) -> None:
        super().__init__(f"a server-sent event is larger than {max_event_bytes} bytes")
        self.events = events


class SseDecoder:
    """Decodes one stream, fed in pieces of any size: no split changes what comes out, nor whether it is too large.

    Lines end in LF, CR or CRLF; a BOM at the start is dropped; what is no UTF-8 becomes U+FFFD; an event that the
    stream's end cuts is never seen. Memory is bounded by `max_event_bytes` besides what one feed brings.
    `last_event_id` and `retry_ms` are what a reader that comes back should use.
    """

    __slots__ = (
        "_after_cr",
        "_at_start",
        "_data",
        "_data_bytes",
        "_event",
        "_id",
        "_max_event_bytes",
        "_plain",
        "_unfinished",
        "_unfinished_bytes",
        "last_event_id",
        "retry_ms",
    )

    def __init__(self, *, max_event_bytes: int) -> None:
        self._max_event_bytes = max_event_bytes
        self._at_start = True  # a BOM may come
        self._after_cr = False  # the last piece ended in CR: an LF at the start of the next belongs to it
        self._unfinished: list[
            bytes
        ] = []  # pieces of the line that has no end yet; joined once, so a drip is no dearer
        self._unfinished_bytes = 0
        self._data: list[bytes] = []  # the values of this event's data lines
        self._data_bytes = 0  # of those lines
        self._event = ""
        self._id = ""
        self._plain = True  # between two events, nothing pending: a whole event that comes now can be taken as it is
        self.last_event_id = ""
        self.retry_ms: int | None = None

    def feed(self, data: bytes) -> list[ServerSentEvent]:
        """The events that these bytes complete, in order. Raises SseTooLargeError; after it the decoder is of no more
        use.
        """
        end = len(data) - 2
        if (  # one whole event of one data line, as nearly every provider sends them: a third cheaper
            self._plain
            and data[:6] == b"data: "
            and data.find(b"\n") == end
            and data[-1] == _LF
            and b"\r" not in data
            and end <= self._max_event_bytes
        ):
            self._at_start = False
            text = data[6:end].decode("utf-8", "replace")
            return [ServerSentEvent("message", text, self.last_event_id, self.retry_ms)]
        events: list[ServerSentEvent] = []
        for line in self._lines(data):
            if not line:
                self._dispatch(events)
            elif self._data_bytes + len(line) > self._max_event_bytes:
                raise SseTooLargeError(self._max_event_bytes, events)
            else:
                self._field(line)
        unfinished_bytes = self._unfinished_bytes - (len(_BOM) if self._at_start else 0)  # the first line may have one
        if self._data_bytes + unfinished_bytes > self._max_event_bytes:
            raise SseTooLargeError(self._max_event_bytes, events)
        self._plain = not (
            self._unfinished or self._data or self._event or self._after_cr or self._id != self.last_event_id
        )
        return events

    def _lines(self, data: bytes) -> list[bytes]:
        """The lines that are whole now, without their ends; what is left waits in `_unfinished`."""
        if self._after_cr and data:
            self._after_cr = False
            data = data.removeprefix(b"\n")
        if not data:
            return []
        lines = data.splitlines()  # of bytes: LF, CR and CRLF, nothing else
        self._after_cr = data.endswith(b"\r")
        rest = b"" if self._after_cr or data.endswith(b"\n") else lines.pop()
        if lines:
            if self._unfinished:
                lines[0] = b"".join(self._unfinished) + lines[0]
                self._unfinished.clear()
                self._unfinished_bytes = 0
            if self._at_start:
                self._at_start = False
                lines[0] = lines[0].removeprefix(_BOM)
        if rest:
            self._unfinished.append(rest)
            self._unfinished_bytes += len(rest)
        return lines

    def _field(self, line: bytes) -> None:
        name, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if name == b"data":
            self._data.append(value)
            self._data_bytes += len(line)
        elif name == b"event":
            self._event = value.decode("utf-8", "replace")
        elif name == b"id":
            if b"\0" not in value:
                self._id = value.decode("utf-8", "replace")
        elif name == b"retry" and value.isdigit() and len(value) <= _MAX_RETRY_DIGITS:
            self.retry_ms = int(value)

    def _dispatch(self, events: list[ServerSentEvent]) -> None:
        self.last_event_id = self._id
        if self._data:
            data = b"\n".join(self._data).decode("utf-8", "replace")
            events.append(ServerSentEvent(self._event or "message", data, self._id, self.retry_ms))
            self._data.clear()
            self._data_bytes = 0
        self._event = ""
