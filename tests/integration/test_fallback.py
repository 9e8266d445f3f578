"""Fallbacks over real sockets: what clients see when the default provider is gone."""

from pathlib import Path

import trio

from bamboo.config import Config, LlmConfig, ProviderConfig
from tests.support import http_client
from tests.support.server import DEADLINE_S, running, server_config
from tests.support.upstream import Answer, error_answer, open_dead_address, open_upstream


def with_fallback(directory: Path, first_url: str, second_url: str) -> Config:
    providers = {
        "first": ProviderConfig(kind="openai", base_url=first_url, model="big"),
        "second": ProviderConfig(kind="openai", base_url=second_url, model="small"),
    }
    llm = LlmConfig(default_provider="first", fallback=("second",), max_retries=0, providers=providers)
    return server_config(directory).model_copy(update={"llm": llm})


async def test_another_provider_answers_and_every_reader_can_tell(tmp_path: Path) -> None:
    with trio.fail_after(DEADLINE_S):
        async with open_dead_address() as dead_url, open_upstream() as upstream:
            upstream.answer(Answer(tokens=["here ", "I am"]))
            async with (
                running(with_fallback(tmp_path, dead_url, upstream.base_url)) as server,
                http_client.connect(server.http_url) as connection,
            ):
                reader = await connection.open_sse("POST", "/api/v1/chat", json={"message": "hello"})
                events = [item.data for item in await reader.rest()]
                run_url = f"/api/v1/runs/{reader.head.headers['x-bamboo-run']}"
                run = (await http_client.ask(server.http_url, "GET", run_url)).json()
            asked = upstream.requests[0].json["model"]
    assert [event["type"] for event in events] == [
        "user_message",
        "run_started",
        "agent_retry",
        "agent_token",
        "agent_token",
        "agent_message",
        "agent_complete",
    ]
    started, retry, message = events[1], events[2], events[5]
    assert (started["provider"], started["model"]) == ("first", "big")
    told = (retry["attempt"], retry["provider"], retry["code"], retry["delay_ms"])
    assert told == (1, "second", "provider_unreachable", 0)
    assert (message["provider"], message["model"]) == ("second", "small")
    assert (run["provider"], run["model"]) == ("second", "small")
    assert asked == "small"


async def test_a_request_that_is_too_long_for_one_is_taken_to_no_other(tmp_path: Path) -> None:
    with trio.fail_after(DEADLINE_S):
        async with open_upstream() as first, open_upstream() as second:
            first.answer(error_answer(400, "maximum context length is 8192 tokens"))
            async with (
                running(with_fallback(tmp_path, first.base_url, second.base_url)) as server,
                http_client.connect(server.http_url) as connection,
            ):
                reader = await connection.open_sse("POST", "/api/v1/chat", json={"message": "hello"})
                events = [item.data for item in await reader.rest()]
            assert second.requests == []
    assert [event["type"] for event in events] == ["user_message", "run_started", "agent_error"]
    assert events[-1]["code"] == "provider_rejected"
    assert "8192" in events[-1]["message"]
