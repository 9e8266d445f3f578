"""A client's frames are checked strictly, nothing of them is echoed but `ref`; a server's are plain RFC 6455."""

from typing import Any

import orjson
import pytest
from wsproto.frame_protocol import FrameProtocol, Opcode

from bamboo.core.types import Accepted, Cursor, Epoch, MessageId, RunId, RunStatus, SessionId, StopReceipt
from bamboo.errors import ClientError, ErrorCode, StoreError
from bamboo.wire import frames
from bamboo.wire.encode import CloseCode
from bamboo.wire.frames import FrameError, parse_arguments, parse_frame


def parse(frame: dict[str, Any]) -> frames.Frame:
    return parse_frame(orjson.dumps(frame).decode())


@pytest.mark.parametrize(
    ("frame", "expected"),
    [
        ({"type": "connect"}, frames.ConnectFrame()),
        (
            {"type": "connect", "session_id": "s", "after": "e.1", "protocol": 1},
            frames.ConnectFrame(session_id="s", after="e.1"),
        ),
        ({"type": "chat", "content": "hi", "ref": "r"}, frames.ChatFrame(content="hi", ref="r")),
        ({"type": "subscribe", "session_id": "s"}, frames.SubscribeFrame(session_id="s")),
        ({"type": "unsubscribe", "session_id": "s", "ref": 3}, frames.UnsubscribeFrame(session_id="s", ref=3)),
        ({"type": "stop", "session_id": "s", "run_id": "r"}, frames.StopFrame(session_id="s", run_id="r")),
        (
            {"type": "approve", "approval_id": "a", "decision": "deny"},
            frames.ApproveFrame(approval_id="a", decision="deny"),
        ),
        ({"type": "history", "session_id": "s", "limit": 5}, frames.HistoryFrame(session_id="s", limit=5)),
        ({"type": "command", "name": "status", "later": 1}, frames.CommandFrame(name="status")),
        ({"type": "ping", "timestamp": 1.5}, frames.PingFrame(timestamp=1.5)),
    ],
)
def test_a_frame_is_what_its_type_says(frame: dict[str, Any], expected: frames.Frame) -> None:
    assert parse(frame) == expected


def test_a_chat_has_the_options_that_it_has_over_http() -> None:
    frame = parse(
        {
            "type": "chat",
            "content": [{"type": "text", "text": "hi"}],
            "on_busy": "reject",
            "on_disconnect": {"cancel_after_s": 5.0},
            "client_message_id": "m",
        }
    )
    assert isinstance(frame, frames.ChatFrame)
    chat = frame.chat(frame.content)
    assert (chat.on_busy, chat.cancel_after_s, chat.idempotency_key) == ("reject", 5.0, "m")


@pytest.mark.parametrize(
    ("frame", "field"),
    [
        ({"type": "subscribe"}, "session_id"),
        ({"type": "subscribe", "session_id": 5}, "session_id"),
        ({"type": "subscribe", "session_id": "a\n"}, "session_id"),
        ({"type": "connect", "protocol": 2}, "protocol"),
        ({"type": "approve", "approval_id": "a", "decision": "maybe"}, "decision"),
        ({"type": "history", "session_id": "s", "limit": 0}, "limit"),
        ({"type": "ping", "timestamp": {}}, "timestamp"),
        ({"type": "nonsense"}, "type"),
        ({"type": 5}, "type"),
        ({}, "type"),
    ],
)
def test_what_is_wrong_is_named_and_the_ref_kept(frame: dict[str, Any], field: str) -> None:
    with pytest.raises(FrameError) as caught:
        parse({**frame, "ref": "mine"})
    assert caught.value.code == ErrorCode.INVALID_MESSAGE
    assert caught.value.message.startswith(field)
    assert caught.value.ref == "mine"


@pytest.mark.parametrize("ref", [{}, [], True, 1.5, "x" * 257, 2**60])
def test_a_ref_that_cannot_be_echoed_is_wrong_itself(ref: object) -> None:
    with pytest.raises(FrameError) as caught:
        parse({"type": "ping", "ref": ref})
    assert caught.value.message.startswith("ref")
    assert caught.value.ref is None


@pytest.mark.parametrize(
    "message", [b'{"type": "ping"}', "", "{", "[]", "1", '"a"', "[" * 100_000, '{"type": "\\ud800"}']
)
def test_what_is_no_json_object_in_text_is_no_frame(message: str | bytes) -> None:
    with pytest.raises(FrameError) as caught:
        parse_frame(message)
    assert caught.value.ref is None


def test_no_error_echoes_what_it_was_given() -> None:
    for frame in (
        {"type": "secret"},
        {"type": "connect", "auth": ["secret"]},
        {"type": "subscribe", "session_id": "secret secret"},
    ):
        with pytest.raises(FrameError) as caught:
            parse(frame)
        assert "secret" not in caught.value.message


def test_a_token_is_in_no_repr() -> None:
    assert "hush" not in repr(parse({"type": "connect", "auth": "hush"}))


def test_the_arguments_of_the_command_stop() -> None:
    assert parse_arguments(frames.CommandFrame(name="stop")).session_id is None
    assert parse_arguments(frames.CommandFrame(name="stop", args={"session_id": "s"})).session_id == "s"
    with pytest.raises(FrameError) as caught:
        parse_arguments(frames.CommandFrame(name="stop", args={"run_id": 5}, ref="r"))
    assert caught.value.ref == "r"


def test_what_the_server_says() -> None:
    session, cursor = SessionId("s"), Cursor(Epoch("e"), 7)
    receipt = StopReceipt((RunId("r1"), RunId("r2")), 3, 12, cursor)
    accepted = Accepted(session, RunId("r"), MessageId("m"), RunStatus.RUNNING, "started", cursor)
    connected = frames.connected_frame(
        connection_id="c", session_id=session, cursor=None, heartbeat_interval_s=30, limits={"a": 1}, ref="x"
    )
    said = [
        (
            connected,
            {
                "type": "connected",
                "connection_id": "c",
                "session_id": "s",
                "cursor": None,
                "protocol": 1,
                "heartbeat_interval_s": 30,
                "limits": {"a": 1},
                "ref": "x",
            },
        ),
        (
            frames.accepted_frame(accepted, 5),
            {
                "type": "accepted",
                "session_id": "s",
                "run_id": "r",
                "message_id": "m",
                "status": "running",
                "accepted_as": "started",
                "cursor": "e.7",
                "ref": 5,
            },
        ),
        (frames.subscribed_frame(session, cursor, None), {"type": "subscribed", "session_id": "s", "cursor": "e.7"}),
        (frames.unsubscribed_frame(session, ""), {"type": "unsubscribed", "session_id": "s", "ref": ""}),
        (
            frames.stopped_frame(session, receipt, 0),
            {
                "type": "stopped",
                "session_id": "s",
                "stopped": ["r1", "r2"],
                "tools_stopped": 3,
                "elapsed_ms": 12,
                "ref": 0,
            },
        ),
        (
            frames.stop_result_frame(session, receipt, None),
            {
                "type": "command_result",
                "name": "stop",
                "result": {"session_id": "s", "stopped": ["r1", "r2"], "tools_stopped": 3, "elapsed_ms": 12},
            },
        ),
        (frames.pong_frame(5, None), {"type": "pong", "timestamp": 5}),
        (frames.draining_frame(2.5), {"type": "draining", "grace_s": 2.5}),
        (
            frames.error_frame(ClientError(ErrorCode.BUSY, "no"), "r"),
            {"type": "error", "code": "busy", "message": "no", "retryable": False, "ref": "r"},
        ),
        (
            frames.error_frame(StoreError("full")),
            {
                "type": "error",
                "code": "store_unavailable",
                "message": "full",
                "retryable": True,
                "retry_after_ms": 1000,
            },
        ),
    ]
    for frame, expected in said:
        assert orjson.loads(frame) == expected


@pytest.mark.parametrize("length", [0, 1, 125, 126, 127, 65535, 65536, 300_000])
def test_messages_are_what_any_client_reads(length: int) -> None:
    payloads = [b"x" * length, b"{}", "é".encode() * 70]

    client = FrameProtocol(client=True, extensions=[])
    client.receive_bytes(frames.text_messages(payloads))
    read: list[bytes] = []
    text = ""
    for frame in client.received_frames():
        assert frame.opcode is Opcode.TEXT
        assert isinstance(frame.payload, str)
        text += frame.payload
        if frame.message_finished:
            read.append(text.encode())
            text = ""

    assert read == payloads


def test_a_close_frame_is_one_and_a_message_is_none() -> None:
    client = FrameProtocol(client=True, extensions=[])
    client.receive_bytes(frames.close_message(1007))
    (frame,) = client.received_frames()
    assert (frame.opcode, frame.payload) == (Opcode.CLOSE, (1007, ""))
    assert frames.is_close_message(frames.close_message(1001))
    assert not frames.is_close_message(frames.text_messages([b"{}"]))
    assert not frames.is_close_message(b"HTTP/1.1 101 ")
    assert not frames.is_close_message(b"")


def test_every_close_code_has_its_words() -> None:
    codes = {value for name, value in vars(CloseCode).items() if name.isupper()}
    assert set(frames.CLOSE_REASONS) == codes
    assert all(len(reason.encode()) <= 123 for reason in frames.CLOSE_REASONS.values())
