"""OpenAI's chat completion chunks as deltas. Sans-io: decoded text in, deltas out, for every server that nearly speaks
it.

Source: https://platform.openai.com/docs/api-reference/chat-streaming, and what Ollama, vLLM, llama.cpp, OpenRouter,
LiteLLM, Mistral and DeepSeek send in its name.
"""

import secrets
from typing import Any

import orjson

from bamboo.core.types import (
    FinishDelta,
    ProviderDelta,
    ReasoningDelta,
    TextDelta,
    ToolCallDelta,
    Usage,
    UsageDelta,
)


class ChunkError(Exception):
    """This is no chunk of a chat completion. `str(error)` says in which way."""


class ToldError(Exception):
    """The chunk is an error object: `error` is what it holds."""

    def __init__(self, error: object) -> None:
        super().__init__("the provider tells an error")
        self.error = error


class _Call:
    """What was told of one tool call. Slots and no dataclass: it changes."""

    __slots__ = ("id", "index", "named")

    def __init__(self, index: int, call_id: str) -> None:
        self.index = index
        self.id = call_id
        self.named = False


class ChunkDecoder:
    """Decodes the chunks of one answer. Only the choice with index 0 is looked at; there is one FinishDelta in a whole
    answer.
    """

    __slots__ = ("_begun", "_calls", "_current", "_usage", "finished", "seen")

    def __init__(self) -> None:
        self.seen = False
        """A chunk came."""
        self.finished = False
        """The finish reason came: the answer is whole, whatever happens now."""
        self._usage: object = None
        self._begun = 0  # tool calls
        self._calls: dict[int, _Call] = {}  # by the server's index, where it tells one
        self._current: _Call | None = None

    def decode(self, data: str | bytes, deltas: list[ProviderDelta], *, is_error: bool = False) -> None:
        """Append what this chunk tells to `deltas`. Raises ChunkError, ToldError; what was appended before is good.

        `is_error`: it came as an event of type `error`, so it is one, whatever it looks like.
        """
        try:
            chunk = orjson.loads(data)
        except orjson.JSONDecodeError as problem:
            raise ChunkError("not JSON") from problem
        if type(chunk) is not dict:
            raise ChunkError("not an object")
        choices = chunk.get("choices")
        error = chunk.get("error")
        if error or is_error or (choices is None and chunk.get("object") == "error"):
            raise ToldError(error or chunk)
        self.seen = True
        usage = chunk.get("usage")
        if usage:
            self._usage = usage  # some servers tell it with every chunk, growing: the last one counts
        if not choices:
            return
        if type(choices) is not list:
            raise ChunkError("choices is not a list")
        for choice in choices:
            if type(choice) is not dict:
                raise ChunkError("a choice is not an object")
            if not choice.get("index"):
                self._choice(choice, deltas)

    def end(self, deltas: list[ProviderDelta]) -> None:
        """The answer is whole: append what only its end tells."""
        if not self.finished:
            self.finished = True
            deltas.append(FinishDelta("tool_calls" if self._begun else "stop"))
        usage = _usage(self._usage)
        if usage is not None:
            deltas.append(UsageDelta(usage))

    def _choice(self, choice: dict[str, Any], deltas: list[ProviderDelta]) -> None:
        delta = choice.get("delta") or choice.get("message")  # `message`: a whole answer that was not streamed
        if delta:
            if type(delta) is not dict:
                raise ChunkError("delta is not an object")
            reasoning = delta.get("reasoning_content") or delta.get("reasoning")
            if type(reasoning) is str and reasoning:
                deltas.append(ReasoningDelta(reasoning))
            content = delta.get("content") or delta.get("refusal")
            if content:
                text = content if type(content) is str else _text(content)
                if text:
                    deltas.append(TextDelta(text))
            calls = delta.get("tool_calls")
            if calls:
                self._tool_calls(calls, deltas)
        reason = choice.get("finish_reason")
        if reason and not self.finished:
            if type(reason) is not str:
                raise ChunkError("finish_reason is not text")
            self.finished = True
            deltas.append(FinishDelta(reason))

    def _tool_calls(self, calls: object, deltas: list[ProviderDelta]) -> None:
        if type(calls) is not list:
            raise ChunkError("tool_calls is not a list")
        for piece in calls:
            if type(piece) is not dict:
                raise ChunkError("a tool call is not an object")
            function = piece.get("function") or {}
            if type(function) is not dict:
                raise ChunkError("a tool call's function is not an object")
            call_id, tool = piece.get("id") or "", function.get("name") or ""
            if type(call_id) is not str or type(tool) is not str:
                raise ChunkError("a tool call's id or name is not text")
            call, new = self._call(piece.get("index"), call_id, tool)
            name = None if call.named or not tool else tool
            call.named = call.named or bool(tool)
            deltas.append(
                ToolCallDelta(call.index, call.id if new else None, name, _arguments(function.get("arguments")))
            )

    def _call(self, index: object, call_id: str, tool: str) -> tuple[_Call, bool]:
        """The call that a piece belongs to, and whether it begins it.

        A server's index is not always there, nor always told apart from 0; an id is not always there, nor always the
        same in every piece of a call. A name with an id that the call does not have begins another call, whatever the
        index says.
        """
        known = self._calls.get(index) if type(index) is int else self._current
        if known is not None:
            another = tool and (call_id != known.id if call_id else type(index) is not int and known.named)
            if not another:
                self._current = known
                return known, False
        call = self._current = _Call(self._begun, call_id or f"call_{secrets.token_hex(12)}")
        self._begun += 1
        if type(index) is int:
            self._calls[index] = call
        return call, True


def _text(content: object) -> str:
    """A text, or the text parts of a list of parts."""
    if type(content) is str:
        return content
    if type(content) is not list:
        raise ChunkError("content is not text")
    texts = [part.get("text") for part in content if type(part) is dict and part.get("type") == "text"]
    return "".join(text for text in texts if type(text) is str)


def _arguments(arguments: object) -> str:
    """JSON text, also where a server sends the object itself."""
    if type(arguments) is str:
        return arguments
    return "" if arguments is None else orjson.dumps(arguments).decode()


def _usage(usage: object) -> Usage | None:
    """None for what is no usage: an answer is not refused over its bill."""
    if type(usage) is not dict:
        return None
    prompt, completion = usage.get("prompt_tokens") or 0, usage.get("completion_tokens") or 0
    total = usage.get("total_tokens")
    if type(prompt) is not int or type(completion) is not int or not (total is None or type(total) is int):
        return None
    return Usage(prompt, completion, prompt + completion if total is None else total)
