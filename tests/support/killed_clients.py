"""Clients that outlive their server: they chat, follow, come back with their cursors and send again what had no answer.

In every life of the server they resume every stream, send every earlier chat again with its key, and chat on: a long
answer as the chat's own stream, several chats that queue up, two in a row over the gateway, sessions that the server
names. In its last life they ask for everything once more, and compare.
"""

import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, suppress
from functools import partial
from itertools import count
from typing import Any, Final, Protocol, TypeVar

import trio

from tests.support import http_client, ws_client
from tests.support.http_client import HttpConnection
from tests.support.promises import NOWHERE, Chat, JsonObject, Ledger, Place
from tests.support.readers import READ_BYTES, WAYS, Reader, Seen, SseReader, Way, WsReader, open_reader

T = TypeVar("T")

GONE: Final = (OSError, trio.BrokenResourceError, trio.ClosedResourceError, http_client.Cut)
"""What a client meets whose server has died, or has stopped listening."""

DYING_S: Final = 20
"""A connection that ends is the server's end: the process is seen to have ended within this."""

LOOK_EVENTS: Final = 80
"""How many events the clients see until they look at the histories again."""

QUEUED: Final = 3
"""Chats in a row to one session: all but the first wait for their turn."""


class Server(Protocol):
    http_url: str
    gateway_url: str
    gone: trio.Event


class Clients:
    """All of them. `begin` before each life of the server but the last."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._life = 0
        self._followed: list[Place] = []
        """Readers of whole sessions, over all lives."""
        self._runs: list[Place] = []
        """Streams of one run."""
        self._nursery: trio.Nursery

    def begin(self) -> None:
        self._life += 1

    async def scenario(self, server: Server, *, to_the_end: bool) -> None:
        """Return when all is over that the clients asked for in this life, or the server is gone; with `to_the_end`
        only then. Then every stream was read to its last byte."""
        earlier = [chat for chat in self._ledger.chats.values() if not chat.message.endswith(f"-{self._life}")]
        async with trio.open_nursery() as self._nursery:
            for index, place in enumerate(self._followed):
                if place.session_id != "ws":  # whose reader is the gateway's client
                    way = WAYS[(self._life + index) % len(WAYS)]
                    self._nursery.start_soon(_enduring, server, partial(self._follow, server, place, way))
            for place in self._runs:
                if not place.ended:
                    self._nursery.start_soon(_enduring, server, partial(self._follow_run, server, place))
            self._nursery.start_soon(_while_it_lives, server, partial(self._look_often, server))
            async with trio.open_nursery() as work:
                work.start_soon(_while_it_lives, server, partial(self._queue, server))
                work.start_soon(_enduring, server, partial(self._long, server))
                work.start_soon(_enduring, server, partial(self._named_by_server, server))
                work.start_soon(_enduring, server, partial(self._send_again, server, earlier))
                work.start_soon(_enduring, server, partial(self._gateway, server, "ws", earlier))
                work.start_soon(_enduring, server, partial(self._gateway, server, None, earlier))
            if to_the_end:
                await server.gone.wait()
            if not server.gone.is_set():
                self._nursery.cancel_scope.cancel()

    async def flight(self, server: Server, task_status: trio.TaskStatus[None]) -> None:
        """A chat whose server is killed now: `started` as soon as it is sent. Should its answer come, it counts."""
        sent = False
        with suppress(*GONE):
            async with http_client.connect(server.http_url) as connection:
                await connection.send(self._request(self._chat("flight", "queue")))
                sent = True
                task_status.started()
                await self._answer(connection, self._chat("flight", "queue"))
        if not sent:
            task_status.started()

    # Chats over HTTP.

    def _chat(self, name: str, session_id: str | None, transport: str = "http") -> Chat:
        """A chat of this life."""
        message = f"{name}-{self._life}"
        return self._ledger.chats.setdefault(message, Chat(message, session_id, transport))

    def _request(self, chat: Chat, accept: str = "application/json") -> bytes:
        body: JsonObject = {"message": chat.message}
        if chat.session_id is not None:
            body["session_id"] = chat.session_id
        headers = {"Content-Type": "application/json", "Accept": accept, "Idempotency-Key": chat.message}
        return http_client.request_bytes("POST", "/api/v1/chat", headers=headers, body=json.dumps(body).encode())

    async def _answer(self, connection: HttpConnection, chat: Chat) -> JsonObject | None:
        """None: the server is stopping."""
        answer = await connection.read_answer("POST")
        if self._is_stopping(answer.status):
            return None
        assert answer.status in (200, 201), answer
        accepted: JsonObject = answer.json()
        self._ledger.answered(chat, accepted, answer.status)
        return accepted

    def _is_stopping(self, status: int) -> bool:
        assert status != 503 or self._ledger.stops, "only a server that was told to stop refuses chats"
        return status == 503

    async def _post(self, connection: HttpConnection, chat: Chat) -> JsonObject | None:
        await connection.send(self._request(chat))
        return await self._answer(connection, chat)

    async def _stream(self, connection: HttpConnection, chat: Chat) -> Place | None:
        """Chat, and take the answer as the run's stream. None: the server is stopping."""
        await connection.send(self._request(chat, "text/event-stream"))
        head = await connection.read_head("POST")
        if self._is_stopping(head.status):
            return None
        assert head.status == 200, (head, await connection.read_piece())
        names = {"session_id": "session", "run_id": "run", "accepted_as": "accepted-as"}
        accepted = {name: head.headers[f"x-bamboo-{header}"] for name, header in names.items()}
        self._ledger.answered(chat, accepted)
        return Place(self._ledger, accepted["session_id"], cursor=None, run_id=accepted["run_id"])

    async def _get(self, server: Server, target: str) -> JsonObject:
        answer = await http_client.ask(server.http_url, "GET", target)
        assert answer.status == 200, answer
        return dict(answer.json())

    # What they do in a life.

    async def look(self, server: Server) -> None:
        """At the history of every session that they know."""
        for session_id in self._ledger.sessions:
            history = await self._get(server, f"/api/v1/history/{session_id}?limit=500")
            self._ledger.snapshots.append(history)

    async def _look_often(self, server: Server) -> None:
        while True:
            await self.look(server)
            await self._ledger.wait_events(self._ledger.events + LOOK_EVENTS)

    async def _send_again(self, server: Server, chats: Sequence[Chat]) -> None:
        async with http_client.connect(server.http_url) as connection:
            for chat in chats:
                if chat.transport == "http":
                    await self._post(connection, chat)

    async def _long(self, server: Server) -> None:
        async with http_client.connect(server.http_url) as connection:
            place = await self._stream(connection, self._chat("long", "long"))
            if place is not None:
                self._runs.append(place)
                if self._follower("long") is None:
                    history = await self._get(server, "/api/v1/history/long")
                    self._begin_to_follow(server, "long", history["cursor"])
                await self._read_run(SseReader(connection, READ_BYTES), place)

    async def _queue(self, server: Server) -> None:
        accepted = []
        async with http_client.connect(server.http_url) as connection:
            for number in range(QUEUED):
                answer = await self._post(connection, self._chat(f"queue-{number}", "queue"))
                if answer is None:
                    return
                accepted.append(answer["run_id"])
                if self._follower("queue") is None:
                    self._begin_to_follow(server, "queue", answer["cursor"])
        await self._ledger.wait(lambda: self._ledger.terminals.keys() >= {*accepted})

    async def _named_by_server(self, server: Server) -> None:
        session_id = None
        for name in ("named", "again"):
            async with http_client.connect(server.http_url) as connection:
                accepted = await self._post(connection, self._chat(name, session_id))
            if accepted is None:
                return
            session_id = accepted["session_id"]
            place = Place(self._ledger, accepted["session_id"], cursor=None, run_id=accepted["run_id"])
            self._runs.append(place)
            await self._follow_run(server, place)

    async def _gateway(self, server: Server, session_id: str | None, earlier: Sequence[Chat]) -> None:
        """Two chats, the second when the first is over, in a session that the client, or (None) the server names."""
        name = session_id or "fresh"
        last = f"-{self._life - 1}"
        mine = [
            chat for chat in earlier if chat.transport == name and (not chat.answers or chat.message.endswith(last))
        ]
        mine += [self._chat(f"{name}-{number}", session_id, name) for number in range(2)]
        places: dict[str, Place] = {}
        """Of the sessions that this connection follows."""
        async with AsyncExitStack() as stack:
            reader = WsReader(await _enter(server, stack, ws_client.open_upgraded(server.gateway_url)), READ_BYTES)
            await self._connect(reader, session_id, places)
            for chat in mine:
                accepted = await _ask(reader, type="chat", content=chat.message, client_message_id=chat.message)
                if accepted["type"] == "error":
                    assert (accepted["code"], self._is_stopping(503)) == ("draining", True), accepted
                    return
                self._ledger.answered(chat, accepted)
                if accepted["session_id"] not in places:
                    places[accepted["session_id"]] = self._begin(accepted["session_id"], accepted["cursor"])
                await self._read_gateway(reader, places, accepted)

    async def _connect(self, reader: WsReader, session_id: str | None, places: dict[str, Place]) -> None:
        if session_id is None:
            await _ask(reader, type="connect")
            return
        place = self._follower(session_id)
        where = {} if place is None else {"after": place.resume()}
        connected = await _ask(reader, type="connect", session_id=session_id, **where)
        if place is None and connected["cursor"] is not None:
            place = self._begin(session_id, connected["cursor"])
        if place is not None:
            places[session_id] = place

    async def _read_gateway(self, reader: Reader, places: Mapping[str, Place], accepted: JsonObject) -> None:
        """Return when the run is over, as this connection has it."""
        terminals, place = self._ledger.terminals, places[accepted["session_id"]]
        while accepted["run_id"] not in terminals or place.seq < terminals[accepted["run_id"]]["seq"]:
            item = await _next(reader)
            places[item.fields["session_id"]].take(item)

    # Following.

    def _follower(self, session_id: str) -> Place | None:
        return next((place for place in self._followed if place.session_id == session_id), None)

    def _begin(self, session_id: str, cursor: str) -> Place:
        place = Place(self._ledger, session_id, cursor=cursor)
        self._followed.append(place)
        return place

    def _begin_to_follow(self, server: Server, session_id: str, cursor: str) -> None:
        place = self._begin(session_id, cursor)
        way = WAYS[self._life % len(WAYS)]
        self._nursery.start_soon(_enduring, server, partial(self._follow, server, place, way))

    async def _follow(self, server: Server, place: Place, way: Way) -> None:
        async with AsyncExitStack() as stack:
            opening = open_reader(server, way, place.session_id, place.resume())
            reader = await _enter(server, stack, opening)
            while True:
                place.take(await _next(reader))

    async def _follow_run(self, server: Server, place: Place) -> None:
        async with AsyncExitStack() as stack:
            opening = open_reader(server, "last_event_id", place.session_id, place.resume(), run_id=place.run_id)
            await self._read_run(await _enter(server, stack, opening), place)

    async def _read_run(self, reader: Reader, place: Place) -> None:
        while not place.ended:
            place.take(await _next(reader))
        assert await reader.next() is None, "a run's stream ends behind its terminal event"

    # The last life.

    async def settle(self, server: Server) -> None:
        """Ask for everything again, and judge it."""
        await self.look(server)
        async with trio.open_nursery() as nursery:
            for index, place in enumerate(self._followed):
                nursery.start_soon(self._follow, server, place, WAYS[index % len(WAYS)])
            for place in self._runs:
                if not place.ended:
                    nursery.start_soon(self._follow_run, server, place)
            for chat in self._ledger.chats.values():
                async with http_client.connect(server.http_url) as connection:
                    assert await self._post(connection, chat) is not None
            for chat in self._ledger.chats.values():
                async with http_client.connect(server.http_url) as connection:
                    run = await self._stream(connection, chat)
                    assert run is not None
                    await self._read_run(SseReader(connection, READ_BYTES), run)
            await self.look(server)
            heads = {history["session_id"]: history["seq"] for history in self._ledger.snapshots}
            await self._ledger.wait(lambda: all(place.seq == heads[place.session_id] for place in self._followed))
            await self._ledger.wait(lambda: all(place.ended for place in self._runs))
            nursery.cancel_scope.cancel()
        await self._judge(server, heads)

    async def _judge(self, server: Server, heads: Mapping[str, int]) -> None:
        listed = await self._get(server, "/api/v1/sessions?limit=500")
        assert {session["session_id"] for session in listed["sessions"]} == {*heads}, "sessions that nobody asked for"
        logs = {}
        for session_id, head in heads.items():
            log = await self._whole_log(server, session_id, head, "after")
            assert log == await self._whole_log(server, session_id, head, "subscribe")
            runs = (await self._get(server, f"/api/v1/sessions/{session_id}/runs?limit=500"))["runs"]
            self._ledger.check_session(session_id, log, runs[::-1])
            logs[session_id] = [item.fields for item in log]
        self._ledger.check_asked(logs)

    async def _whole_log(self, server: Server, session_id: str, head: int, way: Way) -> list[Seen]:
        place = Place(self._ledger, session_id, cursor=NOWHERE)
        log = []
        async with open_reader(server, way, session_id, NOWHERE) as reader:
            while place.seq < head:
                item = await _next(reader)
                place.take(item)
                log.append(item)
        return log[1:]  # the gap that says that the cursor is of no log


async def _enduring(server: Server, talk: Callable[[], Awaitable[None]]) -> None:
    """Whatever a client was about, it may end with its server, and only so."""
    try:
        await talk()
    except GONE:
        await _died(server)


async def _while_it_lives(server: Server, talk: Callable[[], Awaitable[None]]) -> None:
    """The same for one that waits for more than its connection."""

    async def give_up() -> None:
        await server.gone.wait()
        nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(give_up)
        await _enduring(server, talk)
        nursery.cancel_scope.cancel()


async def _died(server: Server) -> None:
    with trio.fail_after(DYING_S):
        await server.gone.wait()


async def _enter(server: Server, stack: AsyncExitStack, opening: AbstractAsyncContextManager[T]) -> T:
    """Connect. What is amiss with the answer is that the server died meanwhile, or it is raised."""
    try:
        return await stack.enter_async_context(opening)
    except (AssertionError, *GONE) as error:
        with trio.move_on_after(DYING_S):
            await server.gone.wait()
            raise http_client.Cut("the server died") from error
        raise


async def _next(reader: Reader) -> Seen:
    item = await reader.next()
    if item is None:
        raise http_client.Cut(f"the stream ended, {reader.ended}")
    return item


_refs = count(1)


async def _ask(reader: WsReader, **frame: Any) -> JsonObject:
    """The answer to a frame. Events that come before it wait."""
    ref = next(_refs)
    await reader.send(**frame, ref=ref)
    while True:
        for other in reader.others:
            if other.get("ref") == ref:
                return other
        if reader.ended is not None:
            raise http_client.Cut(f"the connection ended, {reader.ended}")
        await reader._read()
