"""`llm.fallback`: when a provider has failed for good before its first delta, the run goes on with the next one."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

from bamboo.config import AgentConfig
from bamboo.core.events import AgentError, AgentMessage, AgentRetry, Event, Item, RunStarted
from bamboo.core.types import JsonObject, RunStatus, SessionId, ToolResult, content_text
from bamboo.errors import ErrorCode, UpstreamError
from bamboo.llm.base import Providers, RequestRejectedError
from tests.support.agents import World, chat, config, open_world, types
from tests.support.model import PlayedModel
from tests.support.stores import GatedStore
from tests.support.tools import FakeToolbox

S = SessionId("s")
AUTH = UpstreamError(ErrorCode.PROVIDER_AUTH, "provider a refused its key")
GONE = UpstreamError(ErrorCode.PROVIDER_UNREACHABLE, "provider b cannot be reached")


async def look(_: JsonObject) -> ToolResult:
    await trio.lowlevel.checkpoint()
    return ToolResult("seen")


@asynccontextmanager
async def open_models(
    store: GatedStore, *names: str, fallback: Sequence[str] = ("b", "c"), max_retries: int = 0, agent: AgentConfig
) -> AsyncIterator[tuple[World, dict[str, PlayedModel]]]:
    """Providers of these names, `a` the default one; model `a-1` is the default of `a`, and so on."""
    models = {name: PlayedModel(name=name, default_model=f"{name}-1") for name in names}
    async with open_world(
        store,
        config(agent, max_retries=max_retries),
        providers=Providers(models, "a", fallback),
        toolbox=lambda: FakeToolbox(look=look),
    ) as world:
        yield world, models


AGENT = AgentConfig(first_token_timeout_s=10, idle_timeout_s=5, idle_evict_s=100_000)


async def run_of(world: World, **options: object) -> list[Item]:
    accepted = await world.agents.chat(chat("hi", "s", **options))
    return await world.read_run("s", accepted.run_id, accepted.cursor)


async def answer(model: PlayedModel, *texts: str) -> None:
    call = await model.next_call()
    for text in texts:
        call.say(text)
    call.end()


def retries(items: Sequence[Item]) -> list[tuple[int, str, str]]:
    bodies = [item.body for item in items if isinstance(item, Event) and isinstance(item.body, AgentRetry)]
    return [(body.attempt, body.provider, body.code) for body in bodies]


def said_by(items: Sequence[Item]) -> list[tuple[str, str]]:
    bodies = [item.body for item in items if isinstance(item, Event) and isinstance(item.body, AgentMessage)]
    return [(body.provider, body.model) for body in bodies]


def failure(items: Sequence[Item]) -> AgentError:
    assert isinstance(items[-1], Event)
    assert isinstance(items[-1].body, AgentError)
    return items[-1].body


async def test_the_next_provider_answers_with_its_own_model_and_that_is_told(store: GatedStore) -> None:
    with trio.fail_after(5):
        async with open_models(store, "a", "b", "c", agent=AGENT) as (world, models), trio.open_nursery() as nursery:
            models["a"].refusals.append(AUTH)
            nursery.start_soon(answer, models["b"], "here ", "I am")
            items = await run_of(world)
            assert models["b"].calls[0].call.model == "b-1"
            assert models["c"].calls == []
    [started] = [item.body for item in items if isinstance(item, Event) and isinstance(item.body, RunStarted)]
    assert (started.provider, started.model) == ("a", "a-1")
    assert retries(items) == [(1, "b", "provider_auth")]
    assert said_by(items) == [("b", "b-1")]
    [run] = await store.runs(S, limit=5)
    assert (run.status, run.used_provider, run.used_model) == (RunStatus.COMPLETED, "b", "b-1")


async def test_each_provider_has_its_own_retries_and_when_all_have_failed_the_run_says_why(
    store: GatedStore, autojump_clock: trio.testing.MockClock
) -> None:
    async with open_models(store, "a", "b", fallback=["b"], max_retries=1, agent=AGENT) as (world, models):
        models["a"].refusals += [UpstreamError(ErrorCode.PROVIDER_ERROR, "provider a failed")] * 2
        models["b"].refusals += [GONE] * 2
        items = await run_of(world)
    assert retries(items) == [
        (1, "a", "provider_error"),
        (2, "b", "provider_error"),
        (3, "b", "provider_unreachable"),
    ]
    assert failure(items) == AgentError(
        "provider_unreachable", "provider a failed; provider b cannot be reached", retryable=True
    )
    assert autojump_clock.current_time() < 5


async def test_a_provider_that_never_begins_is_left_for_the_next(
    store: GatedStore, autojump_clock: trio.testing.MockClock
) -> None:
    async with (
        open_models(store, "a", "b", fallback=["b"], agent=AGENT) as (world, models),
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(answer, models["b"], "here")
        items = await run_of(world)
        assert models["a"].calls[0].closed.is_set()
    assert retries(items) == [(1, "b", "first_token_timeout")]
    assert types(items)[-1] == "agent_complete"
    assert autojump_clock.current_time() == pytest.approx(10, abs=0.2)


async def test_after_a_delta_no_other_provider_is_asked(store: GatedStore) -> None:
    with trio.fail_after(5):
        async with open_models(store, "a", "b", fallback=["b"], agent=AGENT) as (world, models):
            accepted = await world.agents.chat(chat("hi", "s"))
            call = await models["a"].next_call()
            call.say("half")
            call.fail(UpstreamError(ErrorCode.PROVIDER_UNREACHABLE, "gone"))
            items = await world.read_run("s", accepted.run_id, accepted.cursor)
            assert models["b"].calls == []
    assert failure(items).code == "provider_unreachable"
    assert types(items)[-2:] == ["agent_message", "agent_error"]
    assert said_by(items) == [("a", "a-1")]


async def test_a_request_that_is_too_long_is_told_and_taken_to_nobody_else(store: GatedStore) -> None:
    with trio.fail_after(5):
        async with open_models(store, "a", "b", fallback=["b"], agent=AGENT) as (world, models):
            models["a"].refusals.append(RequestRejectedError("provider a rejected the request: it is too long"))
            items = await run_of(world)
            assert models["b"].calls == []
    assert failure(items).code == "provider_rejected"
    assert retries(items) == []


async def test_a_model_that_the_provider_does_not_have_is_no_fault_of_the_request(store: GatedStore) -> None:
    with trio.fail_after(5):
        async with (
            open_models(store, "a", "b", fallback=["b"], agent=AGENT) as (world, models),
            trio.open_nursery() as nursery,
        ):
            models["a"].refusals.append(UpstreamError(ErrorCode.PROVIDER_REJECTED, "provider a has no model 'a-1'"))
            nursery.start_soon(answer, models["b"], "here")
            items = await run_of(world)
    assert retries(items) == [(1, "b", "provider_rejected")]
    assert types(items)[-1] == "agent_complete"


async def test_later_steps_stay_with_the_provider_that_worked_and_the_next_run_begins_anew(store: GatedStore) -> None:
    with trio.fail_after(5):
        async with open_models(store, "a", "b", fallback=["b"], agent=AGENT) as (world, models):
            models["a"].refusals.append(AUTH)
            accepted = await world.agents.chat(chat("hi", "s"))
            call = await models["b"].next_call()
            call.ask("look")
            call.end()
            await answer(models["b"], "done")
            items = await world.read_run("s", accepted.run_id, accepted.cursor)
            assert models["a"].calls == []
            again = await world.agents.chat(chat("and now?", "s"))
            await answer(models["a"], "I am back")
            later = await world.read_run("s", again.run_id, again.cursor)
    assert said_by(items) == [("b", "b-1"), ("b", "b-1")]
    assert said_by(later) == [("a", "a-1")]


@pytest.mark.parametrize("named", [{"provider": "a"}, {"model": "a-1"}, {"provider": "a", "model": "a-1"}])
@pytest.mark.parametrize("by", ["chat", "session"])
async def test_who_named_a_provider_or_a_model_gets_that_or_its_failure(
    store: GatedStore, named: dict[str, str], by: str
) -> None:
    with trio.fail_after(5):
        async with open_models(store, "a", "b", fallback=["b"], agent=AGENT) as (world, models):
            if by == "session":
                first = await world.agents.chat(chat("hello", "s"))
                await answer(models["a"], "hello")
                await world.read_run("s", first.run_id, first.cursor)
                await world.agents.update_session(S, named)
            models["a"].refusals.append(AUTH)
            items = await run_of(world, **(named if by == "chat" else {}))
            assert models["b"].calls == []
    assert failure(items).code == "provider_auth"


async def test_the_default_provider_and_repetitions_in_the_list_are_asked_once(store: GatedStore) -> None:
    with trio.fail_after(5):
        async with open_models(store, "a", "b", fallback=["a", "b", "a", "b"], agent=AGENT) as (world, models):
            models["a"].refusals += [AUTH] * 3
            models["b"].refusals += [GONE] * 3
            items = await run_of(world)
            assert [len(model.refusals) for model in models.values()] == [2, 2]
    assert retries(items) == [(1, "b", "provider_auth")]
    assert failure(items).code == "provider_unreachable"


async def test_a_demo_that_stands_in_for_a_provider_without_a_key_is_no_fallback(store: GatedStore) -> None:
    with trio.fail_after(5):
        async with open_models(store, "a", "b", fallback=["b"], agent=AGENT) as (world, models):
            models["b"].demo = True
            models["a"].refusals.append(AUTH)
            items = await run_of(world)
    assert failure(items) == AgentError("provider_auth", AUTH.message, retryable=False)


async def test_a_crash_in_a_fallbacks_answer_keeps_its_text_under_its_name(
    store: GatedStore, autojump_clock: trio.testing.MockClock
) -> None:
    with trio.CancelScope() as process:
        async with open_models(store, "a", "b", fallback=["b"], agent=AGENT) as (world, models):
            models["a"].refusals.append(AUTH)
            await world.agents.chat(chat("hi", "s"))
            (await models["b"].next_call()).say("durable")
            await trio.sleep(1)
            process.cancel()
            await trio.lowlevel.checkpoint()
    store.crash()
    async with open_models(store, "a", "b", fallback=["b"], agent=AGENT) as (world, _):
        while (await store.runs(S, limit=1))[0].status is RunStatus.RUNNING:
            await trio.lowlevel.checkpoint()
        log = await world.events("s")
    assert said_by(log) == [("b", "b-1")]
    assert [content_text(message.content) for message in await store.messages(S)] == ["hi", "durable"]
    assert autojump_clock.current_time() < 5
