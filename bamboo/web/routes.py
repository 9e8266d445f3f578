"""The calls of the HTTP API: each reads a request, asks the agents or the store, and says what came of it.

A handler is cancelled when its client leaves, so nothing that must finish runs in one.
"""

from typing import Final
from urllib.parse import quote

import trio
from quart import Response, request
from quart_trio import QuartTrio

from bamboo.bus.subscription import Subscription
from bamboo.core.types import Accepted, Cursor, MessageId, RunId, SessionId
from bamboo.errors import BambooError, ClientError, ErrorCode, StoreError, run_not_found, session_not_found
from bamboo.store.base import Run
from bamboo.store.records import page_fields, run_fields, session_fields, sessions_fields, snapshot_fields
from bamboo.web.bodies import json_response, query_int, read_object
from bamboo.web.middleware import EXCHANGE, Exchange
from bamboo.web.services import Services
from bamboo.web.stream import HEADERS, EventStream
from bamboo.wire.encode import accepted_fields, receipt_fields
from bamboo.wire.schemas import (
    DEFAULT_PAGE,
    MAX_PAGE,
    ChatRequest,
    SessionPatch,
    StopRequest,
    parse_cursor,
    parse_run_id,
    parse_session_id,
    validate,
)

MAX_KEY_CHARS: Final = 256
"""Of an Idempotency-Key, as of a client_message_id."""

READY_TIMEOUT_S: Final = 2.0
"""How long the store may take to say that it works: whoever asks for readiness does not wait longer."""


def add_routes(app: QuartTrio, services: Services) -> None:
    chats, sessions, about = Chats(services), Sessions(services), About(services)
    for method, rule, view in (
        ("POST", "/api/v1/chat", chats.chat),
        ("GET", "/api/v1/stream/<session_id>", chats.stream),
        ("POST", "/api/v1/stop/<session_id>", chats.stop),
        ("GET", "/api/v1/runs/<run_id>", chats.run),
        ("POST", "/api/v1/runs/<run_id>/cancel", chats.cancel),
        ("GET", "/api/v1/history/<session_id>", sessions.history),
        ("GET", "/api/v1/sessions", sessions.list),
        ("GET", "/api/v1/sessions/<session_id>", sessions.get),
        ("PATCH", "/api/v1/sessions/<session_id>", sessions.patch),
        ("DELETE", "/api/v1/sessions/<session_id>", sessions.delete),
        ("GET", "/api/v1/sessions/<session_id>/runs", sessions.runs),
        ("GET", "/api/v1/models", about.models),
        ("GET", "/api/v1/limits", about.limits),
        ("GET", "/healthz", about.healthz),
        ("GET", "/health", about.healthz),
        ("GET", "/readyz", about.readyz),
    ):
        app.add_url_rule(rule, f"{method} {rule}", view, methods=[method], provide_automatic_options=False)


class Chats:
    """Chatting, following and stopping."""

    def __init__(self, services: Services) -> None:
        self._services = services

    async def chat(self) -> Response:
        asked = validate(ChatRequest, await read_object())
        chat = asked.chat(asked.message, idempotency_key=_idempotency_key())
        accepted = await self._services.agents.chat(chat)
        if _wants_event_stream():
            return await self._follow(accepted)
        fields = accepted_fields(accepted) | {"stream_url": _stream_url(accepted.session_id, accepted.run_id)}
        return json_response(fields, 200 if accepted.accepted_as == "duplicate" else 201)

    async def _follow(self, accepted: Accepted) -> Response:
        """The run's events as this chat's answer. What goes wrong here undoes nothing: the run is accepted."""
        run = None
        if accepted.accepted_as == "duplicate":
            run = await self._services.store.run(accepted.run_id)
        subscription = self._subscribe(accepted.session_id, accepted.run_id)
        if await subscription.begin(accepted.cursor) is None:
            raise session_not_found(accepted.session_id)
        if run is not None:
            subscription.begin_at(subscription.seq, until=run.last_seq)
        return self._event_stream(
            subscription,
            {
                "X-Bamboo-Session": accepted.session_id,
                "X-Bamboo-Run": accepted.run_id,
                "X-Bamboo-Accepted-As": accepted.accepted_as,
            },
        )

    async def stream(self, session_id: str) -> Response:
        session = parse_session_id(session_id)
        after = _after()
        if "run_id" in request.args:
            return await self._stream_run(session, parse_run_id(request.args["run_id"]), after)
        subscription = self._subscribe(session, None)
        if await subscription.begin(after) is None:
            raise session_not_found(session)
        return self._event_stream(subscription)

    async def _stream_run(self, session_id: SessionId, run_id: RunId, after: Cursor | None) -> Response:
        run = await self._services.store.run(run_id)
        if run is None or run.session_id != session_id:
            if await self._services.store.session(session_id) is None:
                raise session_not_found(session_id)
            raise run_not_found(run_id)
        subscription = self._subscribe(session_id, run_id)
        place = after if after is not None else run.first_cursor
        assert place is not None, "a stored run has its first event"
        if await subscription.begin(place) is None:
            raise session_not_found(session_id)
        if run.last_seq is not None:
            if after is not None and subscription.seq >= run.last_seq:
                return Response(b"", status=204)
            subscription.begin_at(subscription.seq, until=run.last_seq)
        return self._event_stream(subscription)

    def _subscribe(self, session_id: SessionId, run_id: RunId | None) -> Subscription:
        """A subscription for this request's answer; it closes with the exchange, wherever that ends."""
        return _exchange().resources.enter_context(self._services.bus.subscribe(session_id, run_id=run_id))

    def _event_stream(self, subscription: Subscription, headers: dict[str, str] | None = None) -> Response:
        headers = HEADERS | (headers or {})
        if request.method == "HEAD":
            head = Response(b"", headers=headers)
            del head.headers["Content-Length"]  # a stream says none
            return head
        stream = EventStream(subscription, keep_alive_s=self._services.config.stream.keep_alive_s)
        _exchange().resources.enter_context(self._services.streams.joined(stream))
        response = Response(stream, headers=headers)
        response.timeout = None  # else Quart cuts it after RESPONSE_TIMEOUT, in silence
        return response

    async def stop(self, session_id: str) -> Response:
        session = parse_session_id(session_id)
        asked = validate(StopRequest, await read_object(optional=True))
        run_id = None if asked.run_id is None else parse_run_id(asked.run_id)
        return json_response(receipt_fields(await self._services.agents.stop(session, run_id)))

    async def run(self, run_id: str) -> Response:
        return json_response(run_fields(await self._run(run_id)))

    async def cancel(self, run_id: str) -> Response:
        await read_object(optional=True)
        run = await self._run(run_id)
        return json_response(receipt_fields(await self._services.agents.stop(run.session_id, run.run_id)))

    async def _run(self, text: str) -> Run:
        run_id = parse_run_id(text)
        run = await self._services.store.run(run_id)
        if run is None:
            raise run_not_found(run_id)
        return run


class Sessions:
    """What is kept."""

    def __init__(self, services: Services) -> None:
        self._store = services.store
        self._agents = services.agents

    async def history(self, session_id: str) -> Response:
        session = parse_session_id(session_id)
        limit = query_int("limit", DEFAULT_PAGE, MAX_PAGE)
        before = request.args.get("before")
        snapshot = await self._store.history(session, limit=limit, before=None if before is None else MessageId(before))
        if snapshot is None:
            raise session_not_found(session)
        return json_response(snapshot_fields(snapshot) if before is None else page_fields(snapshot))

    async def list(self) -> Response:
        limit = query_int("limit", DEFAULT_PAGE, MAX_PAGE)
        try:
            sessions, next_page = await self._store.sessions(
                limit=limit, before=request.args.get("before"), query=request.args.get("q")
            )
        except ValueError as error:
            raise ClientError(ErrorCode.INVALID_REQUEST, "before: the `next` of another page is needed") from error
        return json_response(sessions_fields(sessions, next_page))

    async def get(self, session_id: str) -> Response:
        wanted = parse_session_id(session_id)
        session = await self._store.session(wanted)
        if session is None:
            raise session_not_found(wanted)
        return json_response(session_fields(session))

    async def patch(self, session_id: str) -> Response:
        wanted = parse_session_id(session_id)
        changes = validate(SessionPatch, await read_object()).changes()
        return json_response(session_fields(await self._agents.update_session(wanted, changes)))

    async def delete(self, session_id: str) -> Response:
        await self._agents.delete(parse_session_id(session_id))
        return Response(b"", status=204)

    async def runs(self, session_id: str) -> Response:
        wanted = parse_session_id(session_id)
        limit = query_int("limit", DEFAULT_PAGE, MAX_PAGE)
        runs = await self._store.runs(wanted, limit=limit)
        if not runs and await self._store.session(wanted) is None:
            raise session_not_found(wanted)
        return json_response({"runs": [run_fields(run) for run in runs]})


class About:
    """The server itself."""

    def __init__(self, services: Services) -> None:
        self._services = services

    async def models(self) -> Response:
        providers = self._services.providers
        return json_response(
            {
                "default_provider": providers.default,
                "providers": [
                    {
                        "name": name,
                        "kind": provider.kind,
                        "default_model": provider.default_model,
                        "demo": provider.demo,
                    }
                    for name, provider in providers.by_name.items()
                ],
            }
        )

    async def limits(self) -> Response:
        services = self._services
        return json_response({"limits": services.config.limits, "gateway_url": services.gateway_url})

    async def healthz(self) -> Response:
        return json_response({"status": "ok"})

    async def readyz(self) -> Response:
        if self._services.agents.draining:
            raise BambooError(ErrorCode.DRAINING, "the server is stopping", retry_after_s=1)
        if not self._services.ready():
            raise BambooError(ErrorCode.STARTING, "the server is starting", retry_after_s=1)
        with trio.move_on_after(READY_TIMEOUT_S):
            if await self._services.store_probe.healthy():
                return json_response({"status": "ready"})
        raise StoreError("the store does not take writes")


def _exchange() -> Exchange:
    exchange = request.scope["state"][EXCHANGE]
    assert isinstance(exchange, Exchange)
    return exchange


def _after() -> Cursor | None:
    """Where the reader wants to go on. Raises ClientError `invalid_cursor`."""
    text = request.headers.get("Last-Event-ID") or request.args.get("after")
    return None if text is None else parse_cursor(text)


def _idempotency_key() -> str | None:
    key = request.headers.get("Idempotency-Key")
    if key is not None and not 1 <= len(key) <= MAX_KEY_CHARS:
        raise ClientError(ErrorCode.INVALID_REQUEST, f"Idempotency-Key: 1 to {MAX_KEY_CHARS} characters")
    return key


def _wants_event_stream() -> bool:
    """Whether Accept names text/event-stream, and not after application/json. Wildcards mean JSON."""
    quality: dict[str, float] = {}
    for value, weight in request.accept_mimetypes:
        quality[value.lower()] = max(weight, quality.get(value.lower(), 0))
    return quality.get("text/event-stream", 0) > 0 and quality["text/event-stream"] >= quality.get(
        "application/json", 0
    )


def _stream_url(session_id: SessionId, run_id: RunId) -> str:
    return f"/api/v1/stream/{session_id}?run_id={quote(run_id, safe='')}"
