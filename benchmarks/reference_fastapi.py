"""The reference: what most people write. FastAPI under uvicorn[standard], the model asked with the openai SDK or httpx.

It streams the same deltas to the same clients and nothing more: nothing is stored, nobody can resume, stop or watch,
a reader that leaves ends the run, and its events carry a seq and the token, no ids and no time. What Bamboo is
compared with does less.

    python -m benchmarks.reference_fastapi --flavour openai --port 8000 --upstream http://127.0.0.1:9000/v1
"""

import argparse
import json
from collections.abc import AsyncIterator, Callable
from typing import Any, Literal

import httpx
import openai
import uvicorn
from fastapi import FastAPI, WebSocket, WebSocketDisconnect
from fastapi.responses import StreamingResponse
from pydantic import BaseModel

Tokens = Callable[[str, str], AsyncIterator[str]]
"""(model, message) → the text deltas of the answer."""


class ChatBody(BaseModel):
    message: str
    model: str


def openai_tokens(upstream: str) -> Tokens:
    client = openai.AsyncOpenAI(base_url=upstream, api_key="none")

    async def tokens(model: str, message: str) -> AsyncIterator[str]:
        stream = await client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": message}], stream=True
        )
        async for chunk in stream:
            if chunk.choices and chunk.choices[0].delta.content:
                yield chunk.choices[0].delta.content

    return tokens


def httpx_tokens(upstream: str) -> Tokens:
    # The default of 100 connections would make half of load C wait.
    limits = httpx.Limits(max_connections=1000, max_keepalive_connections=20)
    client = httpx.AsyncClient(timeout=60, limits=limits)

    async def tokens(model: str, message: str) -> AsyncIterator[str]:
        request = {"model": model, "messages": [{"role": "user", "content": message}], "stream": True}
        async with client.stream("POST", f"{upstream}/chat/completions", json=request) as response:
            response.raise_for_status()
            async for line in response.aiter_lines():
                if line.startswith("data: ") and line != "data: [DONE]":
                    choices = json.loads(line[6:])["choices"]
                    if choices and choices[0]["delta"].get("content"):
                        yield choices[0]["delta"]["content"]

    return tokens


async def events(tokens: AsyncIterator[str]) -> AsyncIterator[dict[str, Any]]:
    seq = 0
    async for token in tokens:
        seq += 1
        yield {"type": "agent_token", "seq": seq, "token": token}
    yield {"type": "agent_complete", "seq": seq + 1, "finish_reason": "stop"}


async def sse(tokens: AsyncIterator[str]) -> AsyncIterator[str]:
    async for event in events(tokens):
        yield f"id: {event['seq']}\ndata: {json.dumps(event)}\n\n"


def create_app(tokens: Tokens) -> FastAPI:
    app = FastAPI()

    @app.get("/readyz")
    async def readyz() -> dict[str, str]:
        return {"status": "ok"}

    @app.post("/api/v1/chat")
    async def chat(body: ChatBody) -> StreamingResponse:
        return StreamingResponse(sse(tokens(body.model, body.message)), media_type="text/event-stream")

    @app.websocket("/")
    async def gateway(websocket: WebSocket) -> None:
        await websocket.accept()
        try:
            while True:
                frame = await websocket.receive_json()
                if frame["type"] == "connect":
                    await websocket.send_json({"type": "connected"})
                elif frame["type"] == "chat":
                    await websocket.send_json({"type": "accepted"})
                    async for event in events(tokens(frame["model"], frame["content"])):
                        await websocket.send_json(event)
        except WebSocketDisconnect:
            pass

    return app


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--flavour", choices=["openai", "httpx"], required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--upstream", required=True)
    arguments = parser.parse_args()
    flavour: Literal["openai", "httpx"] = arguments.flavour
    tokens = openai_tokens(arguments.upstream) if flavour == "openai" else httpx_tokens(arguments.upstream)
    uvicorn.run(create_app(tokens), host="127.0.0.1", port=arguments.port)


if __name__ == "__main__":
    main()
