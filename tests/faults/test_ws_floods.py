"""Many WebSocket clients at once, and none that behaves: the gateway refuses in time, says so, and comes back."""

import json
import resource
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog.testing
import trio
import trio.testing
from trio.testing import MockClock

from bamboo.gateway.door import MAX_HANDSHAKES
from bamboo.gateway.listener import GOODBYE_S
from tests.support.gateway import GatewayWorld, gateway_config, open_gateway_world
from tests.support.server import ServerProcess, server_process
from tests.support.ws_client import HandshakeAnswer, RawClient, connect, open_raw, open_upgraded, upgrade_request

DEADLINE_S = 60

CROWD = 2000
CAP = 1000


@pytest.fixture
def many_files() -> Iterator[None]:
    """Enough of them for the clients, which are in this process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert hard >= CROWD + 500, "this test needs many open files: ulimit -Hn"
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, CROWD + 500), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def healthy(server: ServerProcess) -> None:
    """A client comes in, and is served."""
    async with connect(server.gateway_url) as client:
        await client.chat("hello")
        assert (await client.until_terminal())[-1]["type"] == "agent_complete"


def scripted() -> dict[str, str]:
    """The environment of a server whose model is in it."""
    return {
        "BAMBOO_LLM__DEFAULT_PROVIDER": "echo",
        "BAMBOO_LLM__PROVIDERS__ECHO__KIND": "scripted",
        "BAMBOO_LLM__PROVIDERS__ECHO__MODEL": "echo",
        "BAMBOO_LLM__PROVIDERS__ECHO__SCRIPT": "echo",
    }


class Crowd:
    """Clients that come at once, ask to be let in, and stay until they may go."""

    def __init__(self, url: str) -> None:
        self._url = url
        self.answers: list[HandshakeAnswer] = []
        self.all_answered = trio.Event()
        self.may_go = trio.Event()
        self.inside: list[RawClient] = []

    async def one(self, size: int) -> None:
        async with open_raw(self._url) as client:
            await client.send(upgrade_request(self._url))
            answer = await client.handshake_answer()
            self.answers.append(answer)
            if len(self.answers) == size:
                self.all_answered.set()
            if answer.status == 101:
                self.inside.append(client)
                await self.may_go.wait()


@pytest.mark.usefixtures("many_files")
async def test_of_two_thousand_at_once_as_many_come_in_as_may_and_the_rest_is_told_when_to_come_back(
    tmp_path: Path,
) -> None:
    with trio.fail_after(DEADLINE_S):
        async with server_process(
            tmp_path, BAMBOO_GATEWAY__MAX_CONNECTIONS=str(CAP), BAMBOO_GATEWAY__CONNECT_TIMEOUT_S="60", **scripted()
        ) as server:
            crowd = Crowd(server.gateway_url)
            async with connect(server.gateway_url) as first, trio.open_nursery() as nursery:
                for _ in range(CROWD):
                    nursery.start_soon(crowd.one, CROWD)
                while not crowd.all_answered.is_set():
                    assert (await first.call({"type": "ping"}))["type"] == "pong"
                assert Counter(answer.status for answer in crowd.answers) == {101: CAP - 1, 503: CROWD - CAP + 1}
                refused = [answer for answer in crowd.answers if answer.status == 503]
                assert {answer.headers["retry-after"] for answer in refused} == {"5"}
                assert {answer.error_code for answer in refused} == {"overloaded"}
                for client in (crowd.inside[0], crowd.inside[-1]):
                    await client.send_frame({"type": "connect"})
                    assert (await client.receive_json())["type"] == "connected"
                crowd.may_go.set()
            await healthy(server)
            server.send_signal(signal.SIGTERM)
            assert await server.wait() == 0
            assert {line["event"] for line in server.lines} & {"connection_failed", "accept_failed"} == set()


async def test_without_a_file_descriptor_the_gateway_waits_serves_who_is_in_and_comes_back(tmp_path: Path) -> None:
    with trio.fail_after(DEADLINE_S):
        async with server_process(tmp_path, **scripted()) as server:
            await healthy(server)
            async with connect(server.gateway_url) as first:
                _, hard = resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE)
                resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, (64, hard))
                crowd = Crowd(server.gateway_url)
                async with trio.open_nursery() as nursery:
                    for _ in range(100):
                        nursery.start_soon(crowd.one, 100)
                    await server.wait_logged("accept_failed")
                    await first.chat("still here?")
                    assert (await first.until_terminal())[-1]["type"] == "agent_complete"
                    assert len(crowd.answers) < 100
                    crowd.may_go.set()  # each that leaves lets another in
                    await crowd.all_answered.wait()
                assert {answer.status for answer in crowd.answers} == {101}
            await healthy(server)
            await server.wait_logged("accept_resumed")
            server.send_signal(signal.SIGTERM)
            assert await server.wait() == 0
            failures = [line for line in server.lines if line["event"] == "accept_failed"]
            assert len(failures) < 20, "told once each time it begins, not each time it is tried"


async def test_connections_that_say_nothing_are_gone_at_their_deadline(mock_clock: MockClock) -> None:
    """And so are those that say it too slowly: the deadline does not move."""
    async with open_gateway_world() as world, trio.open_nursery() as nursery:
        ended: list[bytes] = []

        async def silent(said: bytes) -> None:
            async with open_raw(world.url) as client:
                await client.send(said)
                ended.append(await client.rest())

        async def slow() -> None:
            async with open_raw(world.url) as client:
                for byte in upgrade_request(world.url):
                    if ended:
                        break
                    await client.send(bytes((byte,)))
                    await trio.sleep(1)
                ended.append(await client.rest())

        half = upgrade_request(world.url)[:60]
        for said in [b""] * 50 + [half] * 50:
            nursery.start_soon(silent, said)
        for _ in range(50):
            nursery.start_soon(slow)
        while world.gateway.waiting < 150:
            await trio.testing.wait_all_tasks_blocked()
        for _ in range(9):
            await trio.testing.wait_all_tasks_blocked()
            mock_clock.jump(1)
        await trio.testing.wait_all_tasks_blocked()
        assert (world.gateway.waiting, ended) == (150, [])
        mock_clock.jump(1)
        while world.gateway.waiting:
            await trio.testing.wait_all_tasks_blocked()
            mock_clock.jump(1)
        while len(ended) < 150:
            await trio.testing.wait_all_tasks_blocked()
            mock_clock.jump(1)
        assert set(ended) == {b""}
        nursery.cancel_scope.cancel()


async def test_more_silent_connections_than_fit_on_the_way_in_keep_nobody_out() -> None:
    """Their deadline is far away, so it is the door that makes room."""
    with trio.fail_after(DEADLINE_S):
        config = gateway_config(connect_timeout_s=3600, max_connections=5)
        async with open_gateway_world(config) as world, trio.open_nursery() as nursery:

            async def silent() -> None:
                async with open_raw(world.url) as client:
                    await client.rest()

            for _ in range(MAX_HANDSHAKES + 50):
                nursery.start_soon(silent)
            while world.gateway.waiting < MAX_HANDSHAKES:
                await trio.testing.wait_all_tasks_blocked(0.001)
            await world.assert_alive()
            nursery.cancel_scope.cancel()


async def test_the_end_is_bounded_whatever_the_clients_do() -> None:
    async with trio.open_nursery() as nursery:
        with trio.fail_after(DEADLINE_S):

            async def hold(world: GatewayWorld, kind: str, task_status: trio.TaskStatus[None]) -> None:
                if kind == "says nothing":
                    async with open_raw(world.url):
                        task_status.started()
                        await trio.sleep_forever()
                async with open_upgraded(world.url, receive_buffer=4096) as client:
                    if kind == "stops reading":
                        await world.stall(client, "big")
                    if kind == "never answers":
                        await client.send_frame({"type": "connect"})
                    if kind == "has half a frame out":
                        await client.send(b"\x81\xfe\x7f")
                    task_status.started()
                    await trio.sleep_forever()

            with structlog.testing.capture_logs() as logs:
                async with open_gateway_world(gateway_config(connect_timeout_s=3600)) as world:
                    await world.big_session()
                    for kind in ("says nothing", "stops reading", "never answers", "has half a frame out"):
                        for _ in range(20):
                            await nursery.start(hold, world, kind)
                    began = trio.current_time()
                assert trio.current_time() - began < 2 * GOODBYE_S + 1
            assert [entry for entry in logs if entry["log_level"] == "error"] == []
        nursery.cancel_scope.cancel()


async def test_a_crowd_that_resets_while_it_is_let_in_leaves_nothing() -> None:
    with trio.fail_after(DEADLINE_S):
        config = gateway_config(server={"auth_token": "right-token"}, max_connections=50)
        async with open_gateway_world(config) as world:
            with structlog.testing.capture_logs() as logs:
                async with trio.open_nursery() as nursery:

                    async def reset(steps: int) -> None:
                        async with open_raw(world.url) as client:
                            frame = {"type": "connect", "auth": "right-token"}
                            if steps:
                                await client.send(upgrade_request(world.url))
                                await client.send_frame(frame)
                            for _ in range(steps):
                                await trio.lowlevel.checkpoint()
                            client.reset()

                    for n in range(400):
                        nursery.start_soon(reset, n % 40)
                await world.until_idle()
                await world.no_handshake_left()
                assert world.gateway._taken == 0
                assert repr(world.addresses).startswith("<AddressLimits 0 with connections,")
            assert [entry for entry in logs if entry["log_level"] == "error"] == []
            async with world.connect(auth="right-token") as client:
                assert json.dumps(await client.call({"type": "ping"}))
