"""What the documents say is so: their tables are the code's, README's commands and snippets run."""

import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, get_args

import httpx
import trio

from bamboo import __version__
from bamboo.config import Config
from bamboo.config_loading import keys, load_config
from bamboo.core import events
from bamboo.core.events import EventBody
from bamboo.core.types import (
    Epoch,
    MessageId,
    RunStats,
    SessionId,
    ToolCall,
    ToolCallId,
    Usage,
    text_content,
)
from bamboo.errors import RETRYABLE, ErrorCode
from bamboo.server import Server, open_server
from bamboo.wire.encode import HTTP_STATUS, CloseCode, event_fields
from bamboo.wire.frames import _FRAMES
from tests.support import reference

ROOT: Final = Path(__file__).parents[1]
README: Final = (ROOT / "README.md").read_text(encoding="utf-8")
HTTP: Final = (ROOT / "docs" / "http.md").read_text(encoding="utf-8")
WEBSOCKET: Final = (ROOT / "docs" / "websocket.md").read_text(encoding="utf-8")
DEPLOY: Final = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")
PAGES: Final = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]

DEADLINE_S: Final = 60
ENVELOPE: Final = {"type", "session_id", "seq", "cursor", "time"}


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page, flags=re.DOTALL | re.MULTILINE)


def rows(page: str, header: str) -> list[list[str]]:
    """The cells of the table with this first header cell."""
    table = re.search(rf"^\| {re.escape(header)} \|.*\n\| ---.*\n((?:\|.*\n)+)", page, flags=re.MULTILINE)
    assert table is not None, header
    return [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in table[1].splitlines()]


# The configuration.


def test_the_shipped_file_says_what_the_models_say() -> None:
    assert reference.TOML_FILE.read_text(encoding="utf-8") == reference.toml(), "run python -m tests.support.reference"


def test_the_configuration_page_says_what_the_models_say() -> None:
    current = reference.PAGE.read_text(encoding="utf-8")

    assert current == reference.page(current), "run python -m tests.support.reference"


def test_the_configuration_page_has_every_key() -> None:
    page = reference.PAGE.read_text(encoding="utf-8")
    for path, _ in keys():
        section = page.partition(f"## `[{'.'.join(path[:-1])}]`")[2].partition("\n## ")[0]
        assert f"| `{path[-1]}` |" in section, path


def test_keys_that_are_named_in_passing_exist() -> None:
    known = {".".join(key) for key, _ in keys()}
    sections = "|".join(Config.model_fields)
    for path in PAGES:
        for name in re.findall(rf"`((?:{sections})\.[a-z_]+)`", path.read_text(encoding="utf-8")):
            assert name in known | {"llm.providers"} or (ROOT / "bamboo" / name).exists(), f"{path.name}: {name}"


def test_every_configuration_that_is_shown_is_good(tmp_path: Path) -> None:
    shown = [block for path in PAGES for block in blocks(path.read_text(encoding="utf-8"), "toml")]
    assert len(shown) >= 3
    for block in shown:
        file = tmp_path / "shown.toml"
        file.write_text(block, encoding="utf-8")
        load_config(file, {})


def test_the_mistakes_that_are_shown_are_told_like_that(tmp_path: Path) -> None:
    (tmp_path / "bamboo.toml").write_text('[server]\nprot = 1\n[agent]\nrun_timeout_s = "x"\n')
    page = reference.PAGE.read_text(encoding="utf-8")
    told = subprocess.run(
        [sys.executable, "-m", "bamboo", "check"], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )
    public = subprocess.run(
        [sys.executable, "-m", "bamboo", "check"],
        cwd=ROOT,
        env={"BAMBOO_SERVER__HOST": "192.0.2.1"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert sorted(blocks(page, "text")[0].splitlines()) == sorted((told.stderr + public.stderr).splitlines())


# The contract with clients.


def test_the_error_table_is_the_codes() -> None:
    without_status = {
        ErrorCode.RUN_TIMEOUT,
        ErrorCode.QUEUE_TIMEOUT,
        ErrorCode.BUDGET_EXCEEDED,
        ErrorCode.LOOP_DETECTED,
        ErrorCode.INTERRUPTED,
        ErrorCode.INVALID_MESSAGE,
        ErrorCode.NOT_CONNECTED,
        ErrorCode.UNKNOWN_COMMAND,
    }
    table = rows(HTTP, "code")

    assert len(table) == len(ErrorCode)
    assert {code: (status, retryable) for code, status, retryable, _ in table} == {
        f"`{code}`": (
            "–" if code in without_status else str(HTTP_STATUS[code]),
            "yes" if code in RETRYABLE else "no",
        )
        for code in ErrorCode
    }


CALL: Final = ToolCall(ToolCallId("c"), "t", "{}")
SAMPLES: Final[list[tuple[EventBody, EventBody]]] = [
    (events.SessionCreated(), events.SessionCreated("title")),
    (
        events.UserMessage(MessageId("m"), text_content("x")),
        events.UserMessage(MessageId("m"), text_content("x"), client_message_id="c"),
    ),
    (events.RunQueued(1),) * 2,
    (events.RunStarted("p", "m", 0),) * 2,
    (events.AgentToken("x"),) * 2,
    (events.AgentReasoning("x"),) * 2,
    (events.AgentRetry(1, "p", "provider_error", 1),) * 2,
    (
        events.AgentMessage(MessageId("m"), text_content("x"), "p", "m"),
        events.AgentMessage(MessageId("m"), text_content("x"), "p", "m", tool_calls=(CALL,), partial=True),
    ),
    (events.AgentToolStart(ToolCallId("c"), "t", {}),) * 2,
    (
        events.AgentToolComplete(MessageId("m"), ToolCallId("c"), "t", ok=True, result="", elapsed_ms=1),
        events.AgentToolComplete(
            MessageId("m"), ToolCallId("c"), "t", ok=False, result="", elapsed_ms=1, truncated=True, status="stopped"
        ),
    ),
    (events.ApprovalRequired("a", ToolCallId("c"), "t", {}, 1),) * 2,
    (events.ApprovalResolved("a", "deny"),) * 2,
    (
        events.AgentComplete("stop", None, RunStats(1, None, 1)),
        events.AgentComplete("stop", Usage(1, 2, 3), RunStats(1, 2, 3)),
    ),
    (events.AgentError("internal", "x", retryable=False),) * 2,
    (events.AgentStopped("user"),) * 2,
    (events.SessionClosed(),) * 2,
]
"""Each event with as little and with as much as it can have."""


def test_the_event_table_is_what_is_sent() -> None:
    def sent(body: EventBody) -> set[str]:
        return set(event_fields(events.Event(SessionId("s"), Epoch("e"), 1, 0, None, body))) - ENVELOPE

    shown = {kind: re.findall(r"`(\w+)`(\??)", fields) for kind, fields, _ in rows(HTTP, "type")}

    assert {type(body) for body, _ in SAMPLES} == set(get_args(EventBody))
    assert list(shown) == [f"`{body.type}`" for body, _ in SAMPLES]
    for least, most in SAMPLES:
        fields = shown[f"`{least.type}`"]
        assert {name for name, _ in fields} == sent(most), least.type
        assert {name for name, optional in fields if not optional} == sent(least), least.type


def test_the_close_codes_are_the_gateways() -> None:
    shown = {int(code) for code, *_ in rows(WEBSOCKET, "close code")}

    assert shown == set(CloseCode)


def test_the_frame_table_has_every_frame() -> None:
    shown = {name.strip("`"): fields for name, fields, _ in rows(WEBSOCKET, "frame")}

    assert set(shown) == set(_FRAMES) - {"approve"}
    for name, fields in shown.items():
        if name != "chat":  # its fields are those of POST /api/v1/chat
            own = {field for field in _FRAMES[name].model_fields if field != "ref"}
            assert set(re.findall(r"`(\w+)`", fields)) == own, name


def test_every_link_leads_somewhere() -> None:
    for path in PAGES:
        for target in re.findall(r"\]\(([^)]+)\)", path.read_text(encoding="utf-8")):
            if target.startswith("https://"):
                continue
            file, _, anchor = target.partition("#")
            page = path.parent / file if file else path
            assert page.exists(), f"{path.name}: {target}"
            if anchor:
                titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
                assert anchor in {title.lower().replace(" ", "-") for title in titles}, f"{path.name}: {target}"


def test_the_version_is_one() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

    assert project["version"] == __version__
    assert f"\n## {__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


# README's snippets, against a real server.


@asynccontextmanager
async def running(directory: Path) -> AsyncIterator[Server]:
    config = Config.model_validate(
        {"server": {"port": 0}, "gateway": {"bind": "127.0.0.1:0"}, "storage": {"path": directory / "bamboo.db"}}
    )
    with trio.fail_after(DEADLINE_S):
        async with open_server(config, environ={}) as server:
            yield server


@dataclass(frozen=True)
class Curl:
    """What a curl command of README asks for."""

    url: str
    headers: dict[str, str]
    data: str | None

    @classmethod
    def parse(cls, command: str) -> "Curl":
        words = iter(shlex.split(command))
        assert next(words) == "curl"
        url, data, headers = "", None, {}
        for word in words:
            if word == "-H":
                name, _, value = next(words).partition(": ")
                headers[name] = value
            elif word == "-d":
                data = next(words)
            elif word not in ("-s", "-sN"):
                assert word.startswith("http"), f"this test does not know curl's {word}"
                url = word
        return cls(url, headers, data)

    async def send(self, server: Server, until: str | None = None, **texts: str) -> str:
        """The answer's body, up to a line that has `until` in it. `texts` stand in for what a person would fill in."""
        url = self.url.replace("http://127.0.0.1:8081", server.http_url)
        for name, text in texts.items():
            url = url.replace(name, text)
        method = "GET" if self.data is None else "POST"
        body = b""
        with trio.CancelScope() as seen:
            async with (
                httpx.AsyncClient(trust_env=False, timeout=DEADLINE_S) as client,
                client.stream(method, url, headers=self.headers, content=self.data) as answer,
            ):
                assert answer.is_success, answer.status_code
                async for piece in answer.aiter_raw():
                    body += piece
                    if until is not None and until.encode() in body:
                        seen.cancel()  # leaving the loop would leave httpx' generators unfinished
        return body.decode()


CURLS: Final = [
    Curl.parse(command) for block in blocks(README, "sh") for command in re.findall(r"^curl .*", block, re.MULTILINE)
]


async def test_the_first_chat_of_the_readme_streams_its_events(tmp_path: Path) -> None:
    async with running(tmp_path) as server:
        answer = await CURLS[0].send(server)

    for event in ("user_message", "run_started", "agent_token", "agent_message", "agent_complete"):
        assert f'data: {{"type":"{event}"' in answer


async def test_the_chat_in_steps_of_the_readme_does_what_it_says(tmp_path: Path) -> None:
    _, chat, stream, history = CURLS
    promised = re.findall(r'"(\w+)":', blocks(README, "json")[0])
    async with running(tmp_path) as server:
        accepted = httpx.Response(200, text=await chat.send(server)).json()
        followed = await stream.send(server, until="agent_complete", CURSOR=accepted["cursor"])
        said = await history.send(server)

    assert list(accepted) == promised
    assert accepted["stream_url"] == f"/api/v1/stream/first?run_id={accepted['run_id']}"
    assert "user_message" in followed
    assert "Hello!" in said
    assert "demo model" in said


async def test_the_python_snippet_of_the_readme_prints_an_answer(tmp_path: Path) -> None:
    async with running(tmp_path) as server:
        assert server.gateway_url is not None
        snippet = blocks(README, "python")[0].replace("ws://127.0.0.1:18790/", server.gateway_url)
        done = await trio.run_process([sys.executable, "-c", snippet], capture_stdout=True)

    assert "demo model" in done.stdout.decode()


async def test_what_the_browser_snippet_calls_is_there(tmp_path: Path) -> None:
    [snippet] = blocks(README, "js")
    async with running(tmp_path) as server, httpx.AsyncClient(base_url=server.http_url, trust_env=False) as client:
        body = re.search(r"JSON.stringify\(\{ message: (\".*?\") \}\)", snippet)
        assert body is not None
        headers = {"Content-Type": "application/json", "Origin": server.http_url}
        [path] = re.findall(r'fetch\("(.*?)"', snippet)
        accepted = await client.post(path, headers=headers, content=f'{{"message": {body[1]}}}')
        followed = await client.get(accepted.json()["stream_url"], headers={"Accept": "text/event-stream"})
        cursor = re.findall(r"^id: (.*)$", followed.text, flags=re.MULTILINE)[-1]
        again = await client.get(accepted.json()["stream_url"], headers={"Last-Event-ID": cursor})
        foreign = await client.post(path, headers=headers | {"Origin": "https://elsewhere.example"}, content="{}")

    assert "agent_complete" in followed.text
    assert again.status_code == 204
    assert foreign.status_code == 403


async def test_every_call_of_the_http_page_is_there(tmp_path: Path) -> None:
    calls = [call for cell, _ in rows(HTTP, "call") for call in re.findall(r"`(\w+) (/\S+)`", cell)]
    assert len(calls) > 15
    async with running(tmp_path) as server, httpx.AsyncClient(base_url=server.http_url, trust_env=False) as client:
        for method, path in calls:
            answer = await client.request(method, re.sub(r"\{\w+\}", "none", path), json={"title": "x"})
            code = answer.json()["error"]["code"] if answer.is_error else None
            assert code not in ("not_found", "method_not_allowed", "internal"), f"{method} {path}"


# Commands.


def test_the_readme_has_two_commands_first() -> None:
    start, test = (block.strip() for block in blocks(README, "sh")[:2])

    assert start.endswith("&& .venv/bin/python -m bamboo")
    assert test.endswith("&& .venv/bin/python -m pytest")
    assert "\n" not in start + test


def test_the_unit_file_starts_what_there_is() -> None:
    [unit] = blocks(DEPLOY, "ini")

    assert "-m bamboo --config " in unit
    assert "\nType=notify\n" in unit  # the server asks for the time that draining takes by itself


def test_the_readme_names_what_the_command_line_has() -> None:
    command = [sys.executable, "-m", "bamboo", "--help"]
    told = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout

    assert "python -m bamboo check" in README
    assert "\n  check " in told
    assert "--config PATH" in told
