"""What the log looks like, and what never gets into it."""

import io
import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import structlog
import trio

from bamboo.config import LogConfig
from bamboo.log import configure


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class BrokenPipe(io.StringIO):
    def write(self, _text: str) -> int:
        raise BrokenPipeError


@pytest.fixture(autouse=True)
def _logging_as_it_was() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()
    root.handlers[:] = handlers
    root.setLevel(level)


def json_lines(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def json_log(level: Any = "info") -> io.StringIO:
    stream = io.StringIO()
    configure(LogConfig(level=level, format="json"), stream=stream)
    return stream


def human_log() -> io.StringIO:
    stream = io.StringIO()
    configure(LogConfig(format="human"), stream=stream)
    return stream


def test_an_event_is_one_json_line_with_time_level_and_fields() -> None:
    stream = json_log()

    structlog.get_logger("bamboo.test").info("run_ended", elapsed_ms=12, model="m\nn")

    [line] = json_lines(stream)
    assert line.pop("time").endswith("Z")
    assert line == {"level": "info", "event": "run_ended", "logger": "bamboo.test", "elapsed_ms": 12, "model": "m\nn"}


def test_the_ids_of_the_context_are_on_every_line_of_its_task_and_on_no_other() -> None:
    stream = json_log()

    async def session(session_id: str) -> None:
        with structlog.contextvars.bound_contextvars(session_id=session_id):
            for _ in range(3):
                structlog.get_logger().info("step", said=session_id)
                await trio.lowlevel.checkpoint()

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(session, "a")
            nursery.start_soon(session, "b")
        structlog.get_logger().info("end")

    trio.run(main)

    lines = json_lines(stream)
    assert len(lines) == 7
    assert all(line["session_id"] == line["said"] for line in lines[:-1])
    assert "session_id" not in lines[-1]


def test_the_form_follows_the_stream_unless_it_is_set() -> None:
    for form, stream, is_json in (
        ("auto", io.StringIO(), True),
        ("auto", Terminal(), False),
        ("json", Terminal(), True),
        ("human", io.StringIO(), False),
    ):
        configure(LogConfig.model_validate({"format": form}), stream=stream)
        structlog.get_logger().info("hello")
        assert stream.getvalue().startswith("{") is is_json, form


def test_a_person_gets_time_level_event_and_fields_in_one_line() -> None:
    stream = human_log()

    structlog.get_logger("bamboo.test").warning("disk_full", path="a b", count=3)

    time, rest = stream.getvalue().split(" ", 1)
    assert len(time) == len("12:34:56.789")
    assert rest == 'warning  disk_full path="a b" count=3 (bamboo.test)\n'


def test_colours_are_for_terminals_only() -> None:
    plain, terminal = human_log(), Terminal()
    structlog.get_logger().info("x")
    configure(LogConfig(), stream=terminal)
    structlog.get_logger().info("x")

    assert "\x1b[" not in plain.getvalue()
    assert "\x1b[32m" in terminal.getvalue()


def test_nothing_from_outside_breaks_a_line_or_reaches_the_terminal() -> None:
    stream = human_log()

    structlog.get_logger().info("a\nb", value="x\ny\x1b[2J", other={"k": "\x07"}, surrogate="\ud800")

    assert stream.getvalue().count("\n") == 1
    assert "\x1b" not in stream.getvalue()
    assert "\x07" not in stream.getvalue()
    stream.getvalue().encode()


def failure() -> ValueError:
    try:
        "".index("inner \x1b[2J")
    except ValueError as error:
        return error
    raise AssertionError


def test_an_exception_has_its_traceback_once() -> None:
    for form in ("json", "human"):
        stream = io.StringIO()
        configure(LogConfig.model_validate({"format": form}), stream=stream)
        structlog.get_logger().error("runner_failed", exc_info=ExceptionGroup("several", [failure()]))

        assert stream.getvalue().count("ValueError: substring not found") == 1
        assert "test_log.py" in stream.getvalue()


def test_a_traceback_sends_nothing_to_the_terminal() -> None:
    stream = human_log()

    structlog.get_logger().error("runner_failed", exc_info=RuntimeError("evil \x1b[2J"))

    assert "RuntimeError: evil ?[2J" in stream.getvalue()


def test_a_json_exception_stays_in_its_line() -> None:
    stream = json_log()

    structlog.get_logger().error("runner_failed", exc_info=failure())

    [line] = json_lines(stream)
    assert line["level"] == "error"
    assert line["exception"].endswith("ValueError: substring not found")


def test_events_below_the_level_are_not_written() -> None:
    stream = json_log("warning")

    structlog.get_logger().info("quiet")
    structlog.get_logger().warning("loud")

    assert [line["event"] for line in json_lines(stream)] == ["loud"]


def test_other_libraries_are_heard_from_warning_up_in_the_same_form() -> None:
    stream = json_log("debug")

    with structlog.contextvars.bound_contextvars(connection_id="c1"):
        logging.getLogger("httpx").info("HTTP Request: POST https://api.openai.com/v1/chat/completions")
        logging.getLogger("hypercorn.error").warning("odd %s", "thing")

    [line] = json_lines(stream)
    del line["time"]
    assert line == {"level": "warning", "event": "odd thing", "logger": "hypercorn.error", "connection_id": "c1"}


def test_another_librarys_exception_has_its_traceback() -> None:
    stream = json_log()

    logging.getLogger("trio").error("%d bad", 1, exc_info=failure())

    [line] = json_lines(stream)
    assert (line["event"], line["level"]) == ("1 bad", "error")
    assert "ValueError: substring not found" in line["exception"]


def test_a_level_of_another_librarys_own_is_taken_for_the_one_below() -> None:
    stream = json_log()

    logging.getLogger("odd").log(logging.ERROR + 5, "x")

    assert json_lines(stream)[0]["level"] == "error"


def test_being_configured_again_writes_each_line_once() -> None:
    first, second = json_log(), json_log()

    logging.getLogger("odd").warning("x")

    assert first.getvalue() == ""
    assert len(json_lines(second)) == 1


@pytest.mark.parametrize(
    "name",
    [
        "token",
        "auth_token",
        "Authorization",
        "api_key",
        "API-Key",
        "openai_api_key",
        "password",
        "client_secret",
        "auth",
        "Set-Cookie",
    ],
)
def test_a_secret_is_masked_wherever_it_stands(name: str) -> None:
    json_stream = json_log()
    structlog.get_logger().info("x", **{name: "hunter2"}, headers={name: "hunter2", "deep": {name: ["hunter2"]}})
    human_stream = human_log()
    structlog.get_logger().info("x", **{name: "hunter2"}, headers={name: "hunter2"})
    structlog.contextvars.bind_contextvars(**{name: "hunter2"})
    structlog.get_logger().info("x")

    for stream in (json_stream, human_stream):
        assert "hunter2" not in stream.getvalue()
        assert "***" in stream.getvalue()


@pytest.mark.parametrize(
    "name", ["content", "text", "delta", "prompt", "system_prompt", "reasoning", "arguments", "messages"]
)
def test_of_a_conversation_only_the_size_is_written(name: str) -> None:
    stream = json_log()

    structlog.get_logger().info("x", **{name: "my secret wish"}, body={name: ["my secret wish"]})

    assert "wish" not in stream.getvalue()
    assert json_lines(stream)[0][name] == "<14 long>"


def test_counts_and_ids_are_not_masked() -> None:
    stream = json_log()

    structlog.get_logger().info("x", prompt_tokens=3, tokens=4, token=None, session_id="s", contents=1)

    line = json_lines(stream)[0]
    assert [line[name] for name in ("prompt_tokens", "tokens", "token", "session_id", "contents")] == [
        3,
        4,
        None,
        "s",
        1,
    ]


def test_what_json_cannot_hold_is_written_all_the_same() -> None:
    stream = json_log()

    structlog.get_logger().info("x", path=trio, odd={1: {2}, (1, 2): 3}, surrogate="\ud800")

    [line] = json_lines(stream)
    assert line["odd"] == {"1": "{2}"}


def test_a_stream_that_is_gone_stops_nothing() -> None:
    configure(LogConfig(), stream=BrokenPipe())

    structlog.get_logger().info("x")
    logging.getLogger("x").error("x")
