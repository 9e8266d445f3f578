"""A provider without a model: deterministic scripts, for a first start without a key, for tests and for benchmarks.

A script is chosen by a call's model, where that names one, else by the configuration (`script`):

| script | what it answers |
| --- | --- |
| `demo` | says that it is the demo model and how to configure a real one, echoes; a word every 15 ms |
| `echo` | the last user text, word by word |
| `reasoning` | a few reasoning deltas, then `echo` |
| `tool` | calls a tool (`get_time` if there is one, else the first that there is), then tells its result |
| `long` | `params`: `tokens` (1,000; at most 100,000) texts, one every `delay_ms` (0; at most 10,000) |
| `silent` | never anything |
| `stall` | three texts, then never anything |
| `error:<code>` | fails with that code before any delta; `<code>` is one of an upstream's (`provider_auth`, …) |
| `break:<code>` | three texts, then fails with that code |

Every answer that ends says how many words it read and how many deltas it wrote, as usage.
"""

import math
import re
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Final

import trio

from bamboo.core.types import (
    FinishDelta,
    ModelCall,
    ProviderDelta,
    ReasoningDelta,
    TextDelta,
    ToolCallDelta,
    Usage,
    UsageDelta,
    content_text,
)
from bamboo.errors import ErrorCode, UpstreamError
from bamboo.llm.base import RequestRejectedError

_DEMO_DELAY_S: Final = 0.015
"""Between two words: fast for a reader, slow enough to be seen streaming."""

_ECHO_CHARS: Final = 400
"""Of the user's text in the demo's answer."""

_STALL_TEXTS: Final = ("This ", "answer ", "stops ")

Step = tuple[float, ProviderDelta]
"""Seconds to wait (inf: for ever), then a delta."""

Script = Callable[[ModelCall], Iterator[Step]]

UPSTREAM_CODES: Final = (
    ErrorCode.PROVIDER_UNREACHABLE,
    ErrorCode.PROVIDER_CONNECT_TIMEOUT,
    ErrorCode.PROVIDER_AUTH,
    ErrorCode.PROVIDER_REJECTED,
    ErrorCode.PROVIDER_RATE_LIMITED,
    ErrorCode.PROVIDER_ERROR,
    ErrorCode.PROVIDER_PROTOCOL,
)
"""What a provider can fail with by itself."""

_RETRY_AFTER_S: Final = 1.0
"""What the scripted rate limit tells."""


class ScriptedProvider:
    """See `bamboo.llm.base.Provider`. `key_env` is what the demo tells to set; `demo`: it stands in for a provider that
    has no key.
    """

    def __init__(
        self,
        name: str,
        *,
        script: str = "demo",
        default_model: str = "demo",
        demo: bool = False,
        key_env: str = "OPENAI_API_KEY",
    ) -> None:
        """Raises ValueError for a script that there is none of."""
        self.name = name
        self.kind = "scripted"
        self.default_model = default_model
        self.demo = demo
        self._scripts = _scripts(key_env)
        if script not in self._scripts:
            raise ValueError(f"there is no script {script!r}: {', '.join(self._scripts)}")
        self._script = script

    def __repr__(self) -> str:
        return f"<ScriptedProvider {self.name} {self._script}>"

    @asynccontextmanager
    async def stream(self, call: ModelCall) -> AsyncIterator["ScriptedStream"]:
        """See `bamboo.llm.base.Provider.stream`."""
        await trio.lowlevel.checkpoint()
        chosen = call.model if call.model in self._scripts else self._script
        kind, _, code = chosen.partition(":")
        if kind == "error":
            raise _failure(ErrorCode(code))
        yield ScriptedStream(call, self._scripts[chosen](call))


class ScriptedStream:
    """See `bamboo.llm.base.ProviderStream`. One delta at a time."""

    __slots__ = ("_call", "_failure", "_finished", "_steps", "_told")

    def __init__(self, call: ModelCall, steps: Iterator[Step]) -> None:
        self._call = call
        self._steps = steps
        self._told = 0
        self._finished = False
        self._failure: UpstreamError | None = None

    async def receive(self) -> Sequence[ProviderDelta]:
        """See `bamboo.llm.base.ProviderStream.receive`."""
        delay_s, deltas = self._step()
        if delay_s:
            await trio.sleep(delay_s)
        else:
            await trio.lowlevel.checkpoint()
        if self._failure is not None:
            raise self._failure
        return deltas

    def _step(self) -> tuple[float, Sequence[ProviderDelta]]:
        try:
            delay_s, delta = next(self._steps)
        except UpstreamError as error:
            self._failure = error
        except StopIteration:
            if not self._finished and self._failure is None:
                self._finished = True
                return 0, (UsageDelta(self._usage()),)
        else:
            self._told += 1
            return delay_s, (delta,)
        return 0, ()

    def _usage(self) -> Usage:
        prompt = sum(len(content_text(message.content).split()) for message in self._call.messages)
        completion = self._told - 1  # the finish reason is nothing that a model wrote
        return Usage(prompt, completion, prompt + completion)


def _scripts(key_env: str) -> Mapping[str, Script]:
    scripts: dict[str, Script] = {
        "demo": lambda call: _demo(call, key_env),
        "echo": _echo,
        "reasoning": _reasoning,
        "tool": _tool,
        "long": _long,
        "silent": _silent,
        "stall": _stall,
    }
    for code in UPSTREAM_CODES:
        scripts[f"error:{code}"] = _silent  # it fails before the first step
        scripts[f"break:{code}"] = _breaking(code)
    return scripts


def _failure(code: ErrorCode) -> UpstreamError:
    message = f"the scripted provider fails with {code}, as it was told to"
    if code is ErrorCode.PROVIDER_REJECTED:
        return RequestRejectedError(message)
    return UpstreamError(
        code,
        message,
        retry_after_s=_RETRY_AFTER_S if code is ErrorCode.PROVIDER_RATE_LIMITED else None,
    )


def _words(text: str) -> list[str]:
    """The text in pieces, each a word with the space before it; together they are the text."""
    return re.findall(r"\s*\S+|\s+", text)


def _last_user_text(call: ModelCall) -> str:
    return next((content_text(message.content) for message in reversed(call.messages) if message.role == "user"), "")


def _texts(texts: Sequence[str], delay_s: float = 0) -> Iterator[Step]:
    for text in texts:
        yield delay_s, TextDelta(text)


def _stop() -> Iterator[Step]:
    yield 0, FinishDelta("stop")


def _demo(call: ModelCall, key_env: str) -> Iterator[Step]:
    said = _last_user_text(call)
    if len(said) > _ECHO_CHARS:
        said = said[: _ECHO_CHARS - 1] + "…"
    text = (
        "Hello! This is Bamboo's built-in demo model: no language model is configured yet, "
        "so these words come from a script. "
        f"For a real one, set {key_env} and start Bamboo again; or point base_url in bamboo.toml at any "
        "OpenAI-compatible server (Ollama, vLLM, llama.cpp, OpenRouter, LiteLLM). "
        f"Everything else works already. You said: {said}"
    )
    yield from _texts(_words(text), _DEMO_DELAY_S)
    yield from _stop()


def _echo(call: ModelCall) -> Iterator[Step]:
    yield from _texts(_words(_last_user_text(call)))
    yield from _stop()


def _reasoning(call: ModelCall) -> Iterator[Step]:
    for text in ("The user ", "wants an echo. ", "So be it."):
        yield 0, ReasoningDelta(text)
    yield from _echo(call)


def _tool(call: ModelCall) -> Iterator[Step]:
    last = call.messages[-1] if call.messages else None
    if last is not None and last.role == "tool":
        yield from _texts(_words(f"The tool says: {content_text(last.content)}"))
        yield from _stop()
        return
    names = [tool.name for tool in call.tools]
    tool = "get_time" if "get_time" in names or not names else names[0]
    yield 0, TextDelta("Let me look. ")
    # Unique in its session, and the same every time: a history only grows.
    yield 0, ToolCallDelta(0, f"call_{len(call.messages)}", tool, "")
    for piece in ('{"time', 'zone": "U', 'TC"}'):
        yield 0, ToolCallDelta(0, None, None, piece)
    yield 0, FinishDelta("tool_calls")


def _long(call: ModelCall) -> Iterator[Step]:
    tokens = _bounded(call, "tokens", 1_000, 100_000)
    delay_s = _bounded(call, "delay_ms", 0, 10_000) / 1_000

    def steps() -> Iterator[Step]:
        for number in range(1, tokens + 1):
            yield delay_s, TextDelta(f"word{number} ")
        yield from _stop()

    return steps()


def _bounded(call: ModelCall, key: str, default: int, most: int) -> int:
    value = (call.params or {}).get(key, default)
    if type(value) is not int or not 0 <= value <= most:
        raise RequestRejectedError(f"params.{key} must be an integer from 0 to {most}")
    return value


def _silent(_call: ModelCall) -> Iterator[Step]:
    yield math.inf, TextDelta("")


def _stall(_call: ModelCall) -> Iterator[Step]:
    yield from _texts(_STALL_TEXTS)
    yield math.inf, TextDelta("")


def _breaking(code: ErrorCode) -> Script:
    def steps(_call: ModelCall) -> Iterator[Step]:
        yield from _texts(_STALL_TEXTS)
        raise _failure(code)

    return steps
