"""OpenAI's chat completions, streamed: for OpenAI and for every server that speaks it (Ollama, vLLM, llama.cpp,
OpenRouter, LiteLLM, …).
"""

import math
import re
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Any, Final

import httpx
import orjson
import trio

from bamboo.core.types import Message, ModelCall, ProviderDelta, ToolCall, ToolSpec, content_text
from bamboo.errors import ErrorCode, UpstreamError
from bamboo.llm.failures import (
    Redactor,
    body_text,
    connect_error,
    connection_broke,
    retry_after_s,
    status_error,
    told_error,
)
from bamboo.llm.openai_chunks import ChunkDecoder, ChunkError, ToldError
from bamboo.llm.transport import Body, open_answer, open_client
from bamboo.wire.encode import content_json
from bamboo.wire.sse import ServerSentEvent, SseDecoder, SseTooLargeError

MAX_EVENT_BYTES: Final = 4 * 1024 * 1024
"""Of one chunk: far above any delta (a tool call's whole arguments, an image in base64), far below what would hurt."""

MAX_ANSWER_BYTES: Final = 16 * 1024 * 1024
"""Of an answer that is not streamed."""

MAX_ERROR_BYTES: Final = 64 * 1024
ERROR_BODY_S: Final = 5.0
"""How long an error's own words are waited for: the status alone says enough."""

AFTER_FINISH_S: Final = 5.0
"""How long usage and `[DONE]` are waited for behind the finish reason. The answer is whole by then, whatever becomes of
the connection.
"""

AFTER_DONE_S: Final = 0.1
"""How long the end of the HTTP answer is waited for behind `[DONE]`: with it the connection can be used again, without
it it is closed.
"""

_NO_NAME: Final = re.compile(r"[^A-Za-z0-9_-]")

_NOT_FROM_PARAMS: Final = frozenset({"model", "messages", "stream", "stream_options", "tools", "n"})
"""What a chat's `params` cannot set: the run decides it, or reads one streamed answer by it."""


class OpenAIProvider:
    """See `bamboo.llm.base.Provider`. Made by `open_openai`, which owns the client. Never shows its key."""

    def __init__(
        self, name: str, client: httpx.AsyncClient, *, base_url: str, default_model: str, api_key: str | None
    ) -> None:
        self.name = name
        self.kind = "openai"
        self.default_model = default_model
        self.demo = False
        self._client = client
        self._url = f"{base_url.rstrip('/')}/chat/completions"
        self._where = str(httpx.URL(self._url).copy_with(userinfo=b"", query=None))
        self._redactor = Redactor(api_key)
        self._asks_usage = True
        """Until the server refuses to be asked for it (`stream_options` is younger than the rest)."""

    def __repr__(self) -> str:
        return f"<OpenAIProvider {self.name} {self._where}>"

    @asynccontextmanager
    async def stream(self, call: ModelCall) -> AsyncIterator["OpenAIStream"]:
        """See `bamboo.llm.base.Provider.stream`. A server that answers with one JSON object instead of a stream is
        understood too.
        """
        async with AsyncExitStack() as answer:
            response, body = await self._ask(call, answer)
            yield OpenAIStream(self.name, body, streamed=self._streamed(response), redactor=self._redactor)

    async def _ask(self, call: ModelCall, answer: AsyncExitStack) -> tuple[httpx.Response, Body]:
        """The head of a good answer. A server that does not know `stream_options` is asked once more, without."""
        while True:
            asks_usage = self._asks_usage
            content = orjson.dumps(request_fields(call, asks_usage=asks_usage))
            try:
                response, body = await answer.enter_async_context(open_answer(self._client, self._url, content))
            except httpx.TransportError as error:
                raise connect_error(self.name, self._where, error) from error
            if response.status_code == 200:
                return response, body
            raw = await _error_body(body)
            if asks_usage and response.status_code in (400, 422) and b"stream_options" in raw:
                self._asks_usage = False
                await answer.aclose()
                continue
            said = body_text(response.headers.get("content-type", ""), raw) or response.headers.get("location", "")
            raise status_error(
                self.name,
                response.status_code,
                self._redactor.quote(said),
                where=self._where,
                model=call.model,
                retry_after_s=retry_after_s(response.headers, time.time()),
            )

    def _streamed(self, response: httpx.Response) -> bool:
        media_type = response.headers.get("content-type", "").partition(";")[0].strip().lower()
        encoding = response.headers.get("content-encoding", "identity")
        if encoding != "identity":
            raise _protocol(self.name, f"answered in {self._redactor.quote(encoding)}, which was not asked for")
        if media_type in ("text/event-stream", ""):
            return True
        if media_type == "application/json" or media_type.endswith("+json"):
            return False
        raise _protocol(self.name, f"answered with {self._redactor.quote(media_type)} instead of a stream")


class OpenAIStream:
    """See `bamboo.llm.base.ProviderStream`."""

    __slots__ = (
        "_begun",
        "_body",
        "_chunks",
        "_ended",
        "_failure",
        "_give_up_at",
        "_name",
        "_redactor",
        "_sse",
        "_streamed",
    )

    def __init__(self, name: str, body: Body, *, streamed: bool, redactor: Redactor) -> None:
        self._name = name
        self._body = body
        self._streamed = streamed
        self._redactor = redactor
        self._sse = SseDecoder(max_event_bytes=MAX_EVENT_BYTES)
        self._chunks = ChunkDecoder()
        self._begun = False  # a delta came
        self._ended = False  # the answer is whole, and all of it was decoded
        self._give_up_at = math.inf  # trio's time, from the finish reason on
        self._failure: UpstreamError | None = None  # for the next receive: deltas that came before it go first

    async def receive(self) -> Sequence[ProviderDelta]:
        """See `bamboo.llm.base.ProviderStream.receive`: one network read's deltas, as many as it brought."""
        if self._failure is not None:
            await trio.lowlevel.checkpoint()
            raise self._failure
        deltas: list[ProviderDelta] = []
        while not deltas and not self._ended:
            try:
                if self._streamed:
                    self._decode(await self._read(), deltas)
                else:
                    self._decode_whole(await self._read_whole(), deltas)
            except UpstreamError as error:
                self._failure = error
                if not deltas:
                    raise
        self._begun = True
        if not deltas:
            await self._drain()
        return deltas

    async def _read(self) -> bytes:
        """The next piece; b"" when no more comes, or none is needed."""
        try:
            if not self._chunks.finished:
                return await self._body.receive()
            if self._give_up_at == math.inf:
                self._give_up_at = trio.current_time() + AFTER_FINISH_S
            with trio.CancelScope(deadline=self._give_up_at):
                return await self._body.receive()
        except httpx.TransportError as error:
            if not self._chunks.finished:
                raise self._broken(error) from error
        return b""

    async def _read_whole(self) -> bytes:
        try:
            return await self._body.read(MAX_ANSWER_BYTES)
        except httpx.TransportError as error:
            raise self._broken(error) from error

    async def _drain(self) -> None:
        """See the HTTP answer's end, if it is near."""
        with trio.move_on_after(AFTER_DONE_S), suppress(httpx.TransportError):
            while await self._body.receive():
                pass

    def _decode(self, data: bytes, deltas: list[ProviderDelta]) -> None:
        if not data:
            if not self._chunks.finished:
                raise _protocol(self._name, "ended its answer before it was whole")
            self._end(deltas)
            return
        try:
            events = self._sse.feed(data)
        except SseTooLargeError as error:
            self._take(error.events, deltas)
            raise _protocol(self._name, f"sent a chunk above {MAX_EVENT_BYTES} bytes") from error
        self._take(events, deltas)

    def _take(self, events: list[ServerSentEvent], deltas: list[ProviderDelta]) -> None:
        for event in events:
            if self._ended:
                return
            if event.data == "[DONE]":
                if not self._chunks.seen:
                    raise _protocol(self._name, "answered nothing")
                self._end(deltas)
            else:
                self._chunk(event.data, deltas, is_error=event.event == "error")

    def _decode_whole(self, data: bytes, deltas: list[ProviderDelta]) -> None:
        if len(data) >= MAX_ANSWER_BYTES:
            raise _protocol(self._name, f"sent an answer above {MAX_ANSWER_BYTES} bytes")
        self._chunk(data, deltas)
        if not self._chunks.finished:
            raise _protocol(self._name, "answered with JSON that is no chat completion")
        self._end(deltas)

    def _chunk(self, data: str | bytes, deltas: list[ProviderDelta], *, is_error: bool = False) -> None:
        try:
            self._chunks.decode(data, deltas, is_error=is_error)
        except ChunkError as error:
            raise _protocol(self._name, f"sent what is no chunk of a chat completion: {error}") from error
        except ToldError as error:
            raise told_error(self._name, error.error, self._redactor) from error

    def _end(self, deltas: list[ProviderDelta]) -> None:
        self._ended = True
        self._chunks.end(deltas)

    def _broken(self, error: httpx.TransportError) -> UpstreamError:
        if not self._begun and connection_broke(error):
            message = f"provider {self._name} closed the connection before it said anything"
            return UpstreamError(ErrorCode.PROVIDER_UNREACHABLE, message)
        what = "connection broke in the middle of its answer" if connection_broke(error) else "answer is not HTTP"
        return UpstreamError(ErrorCode.PROVIDER_PROTOCOL, f"provider {self._name}: the {what}")


async def _error_body(body: Body) -> bytes:
    with trio.move_on_after(ERROR_BODY_S), suppress(httpx.TransportError):
        return await body.read(MAX_ERROR_BYTES)
    return b""


def _protocol(name: str, what: str) -> UpstreamError:
    return UpstreamError(ErrorCode.PROVIDER_PROTOCOL, f"provider {name} {what}")


def request_fields(call: ModelCall, *, asks_usage: bool) -> dict[str, Any]:
    """The request's JSON object. `params` go in as they are, except what is not theirs to set."""
    fields = {key: value for key, value in (call.params or {}).items() if key not in _NOT_FROM_PARAMS}
    messages = [_message(message) for message in call.messages]
    if call.system_prompt:
        messages.insert(0, {"role": "system", "content": call.system_prompt})
    fields |= {"model": call.model, "messages": messages, "stream": True}
    if asks_usage:
        fields["stream_options"] = {"include_usage": True}
    if call.tools:
        fields["tools"] = [_tool(tool) for tool in call.tools]
    return fields


def _message(message: Message) -> dict[str, Any]:
    if message.role == "assistant":
        text = content_text(message.content)
        if not message.tool_calls:
            return {"role": "assistant", "content": text}
        calls = [_tool_call(call) for call in message.tool_calls]
        return {"role": "assistant", "content": text or None, "tool_calls": calls}
    if message.role == "tool":
        return {"role": "tool", "tool_call_id": message.tool_call_id, "content": content_text(message.content)}
    return {"role": message.role, "content": content_json(message.content)}


def _tool_call(call: ToolCall) -> dict[str, Any]:
    function = {"name": _sent_name(call.tool), "arguments": _sent_arguments(call.arguments)}
    return {"id": call.tool_call_id, "type": "function", "function": function}


def _sent_name(tool: str) -> str:
    """A name that the API takes, whatever the model called: 1 to 64 of A-Z a-z 0-9 _ - (OpenAI's reference, `function`
    of a tool call). Else one call of a tool that there is not would spoil its session for good.
    """
    return _NO_NAME.sub("_", tool)[:64] or "unknown"


def _sent_arguments(arguments: str) -> str:
    """A JSON object, always: several servers decode it, and one call that the model botched would spoil its session for
    good.
    """
    try:
        if isinstance(orjson.loads(arguments or "{}"), dict):
            return arguments or "{}"
    except orjson.JSONDecodeError:
        pass
    return orjson.dumps({"invalid_arguments": arguments}).decode()


def _tool(tool: ToolSpec) -> dict[str, Any]:
    function = {"name": tool.name, "description": tool.description, "parameters": tool.parameters}
    return {"type": "function", "function": function}


@asynccontextmanager
async def open_openai(
    name: str, *, base_url: str, default_model: str, api_key: str | None, connect_timeout_s: float
) -> AsyncIterator[OpenAIProvider]:
    """A provider with a client of its own; leaving closes its connections. Without a key no Authorization is sent."""
    async with open_client(connect_timeout_s=connect_timeout_s) as client:
        if api_key is not None:
            client.headers["authorization"] = f"Bearer {api_key}"
        yield OpenAIProvider(name, client, base_url=base_url, default_model=default_model, api_key=api_key)
