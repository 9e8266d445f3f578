"""A provider on its worst day: one `agent_error` that tells whose doing it is, partial text kept, the session
usable."""

from pathlib import Path
from typing import Any

import pytest
import trio

from bamboo.config import AgentConfig
from tests.support import http_client
from tests.support.server import DEADLINE_S, running, server_config
from tests.support.upstream import Answer, error_answer, open_dead_address, open_upstream

FAULTS = {
    "401": (error_answer(401, "bad key"), "provider_auth", False),
    "404": (error_answer(404, "no such model"), "provider_rejected", False),
    "429": (error_answer(429, "slow down"), "provider_rate_limited", True),
    "500": (error_answer(500, "oops"), "provider_error", True),
    "html": (Answer(status=200, body=b"<html>hello</html>", content_type="text/html"), "provider_protocol", True),
    "bad http": (Answer(fault="bad_http", fault_after=None), "provider_protocol", True),
    "garbage": (Answer(fault="garbage", fault_after=2), "provider_protocol", True),
    "half a chunk": (Answer(fault="half_chunk", fault_after=2), "provider_protocol", True),
    "closed in the middle": (Answer(fault="close", fault_after=2), "provider_protocol", True),
    "reset in the middle": (Answer(fault="reset", fault_after=2), "provider_protocol", True),
    "huge line": (Answer(fault="huge_line", fault_after=2), "provider_protocol", True),
    "error in the stream": (Answer(fault="error", fault_after=2, error={"message": "died"}), "provider_error", True),
    "closed before a token": (Answer(fault="close", fault_after=0), "provider_unreachable", True),
    "reset before a token": (Answer(fault="reset", fault_after=0), "provider_unreachable", True),
    "reset before the head": (Answer(fault="reset", fault_after=None), "provider_unreachable", True),
}


async def chat_to_the_end(url: str, message: str, session_id: str) -> list[dict[str, Any]]:
    async with http_client.connect(url) as connection:
        json = {"message": message, "session_id": session_id}
        reader = await connection.open_sse("POST", "/api/v1/chat", json=json)
        return [item.data for item in await reader.rest()]


@pytest.mark.parametrize("name", FAULTS)
async def test_a_failing_provider_is_one_error_and_the_session_goes_on(tmp_path: Path, name: str) -> None:
    answer, code, retryable = FAULTS[name]
    with trio.fail_after(DEADLINE_S):
        async with open_upstream() as upstream, running(server_config(tmp_path, upstream.base_url)) as server:
            upstream.answer(answer)
            events = await chat_to_the_end(server.http_url, "first", "s")
            again = await chat_to_the_end(server.http_url, "second", "s")
            told = [message["content"] for message in upstream.requests[-1].json["messages"]]
    errors = [event for event in events if event["type"] == "agent_error"]
    assert [(error["code"], error["retryable"]) for error in errors] == [(code, retryable)]
    assert events[-1] == errors[0]
    kept = [event for event in events if event["type"] == "agent_message"]
    if answer.fault_after == 2 and answer.status == 200 and answer.fault is not None:
        assert [(message["content"], message["partial"]) for message in kept] == [("Hello,", True)]
        assert told == ["first", "Hello,", "second"]
    else:
        assert kept == []
        assert told == ["first", "second"]
    assert again[-1]["type"] == "agent_complete"


async def test_a_provider_that_is_not_there(tmp_path: Path) -> None:
    with trio.fail_after(DEADLINE_S):
        async with open_dead_address() as base_url, running(server_config(tmp_path, base_url)) as server:
            events = await chat_to_the_end(server.http_url, "first", "s")
    assert events[-1]["code"] == "provider_unreachable"


@pytest.mark.parametrize(("fault_after", "code"), [(0, "first_token_timeout"), (2, "idle_timeout")])
async def test_a_provider_that_stalls(tmp_path: Path, fault_after: int, code: str) -> None:
    agent = AgentConfig(first_token_timeout_s=0.3, idle_timeout_s=0.3)
    with trio.fail_after(DEADLINE_S):
        async with (
            open_upstream() as upstream,
            running(server_config(tmp_path, upstream.base_url, agent=agent)) as server,
        ):
            reply = upstream.answer(Answer(fault="stall", fault_after=fault_after))
            events = await chat_to_the_end(server.http_url, "first", "s")
            await reply.wait_client_left()
    assert events[-1]["code"] == code


PASSING = {
    "429": (error_answer(429, "slow down"), "provider_rate_limited", None),
    "429 with Retry-After": (
        error_answer(429, "slow down", headers={"Retry-After": "1"}),
        "provider_rate_limited",
        1000,
    ),
    "500": (error_answer(500, "oops"), "provider_error", None),
    "503 with Retry-After": (error_answer(503, "busy", headers={"Retry-After": "1"}), "provider_error", 1000),
    "reset before a token": (Answer(fault="reset", fault_after=0), "provider_unreachable", None),
}


@pytest.mark.parametrize("name", PASSING)
async def test_what_passes_before_the_first_delta_is_told_and_tried_again(tmp_path: Path, name: str) -> None:
    answer, code, delay_ms = PASSING[name]
    with trio.fail_after(DEADLINE_S):
        async with (
            open_upstream() as upstream,
            running(server_config(tmp_path, upstream.base_url, max_retries=1)) as server,
        ):
            upstream.answer(answer)
            events = await chat_to_the_end(server.http_url, "first", "s")
    assert [event["type"] for event in events[:3]] == ["user_message", "run_started", "agent_retry"]
    retry = events[2]
    assert (retry["attempt"], retry["provider"], retry["code"]) == (1, "fake", code)
    assert retry["delay_ms"] == delay_ms if delay_ms is not None else 0 < retry["delay_ms"] <= 1000
    assert "".join(event["token"] for event in events if event["type"] == "agent_token") == "Hello, world!"
    assert events[-1]["type"] == "agent_complete"


async def test_a_failure_behind_the_first_delta_is_not_tried_again(tmp_path: Path) -> None:
    with trio.fail_after(DEADLINE_S):
        async with open_upstream() as upstream:
            async with running(server_config(tmp_path, upstream.base_url, max_retries=3)) as server:
                upstream.answer(Answer(fault="reset", fault_after=2))
                events = await chat_to_the_end(server.http_url, "first", "s")
            assert len(upstream.requests) == 1
    assert "agent_retry" not in [event["type"] for event in events]
    assert [event["type"] for event in events[-2:]] == ["agent_message", "agent_error"]


async def test_an_answer_that_drips_in_byte_by_byte_is_the_same_answer(tmp_path: Path) -> None:
    tokens = ["Grüße, ", "世界", " 🎋", "\r\n", "data: [DONE]\n\n"]
    with trio.fail_after(DEADLINE_S):
        async with open_upstream() as upstream, running(server_config(tmp_path, upstream.base_url)) as server:
            upstream.answer(Answer(tokens=tokens, split=1))
            events = await chat_to_the_end(server.http_url, "first", "s")
    assert [event["token"] for event in events if event["type"] == "agent_token"] == tokens
    assert events[-1]["type"] == "agent_complete"
