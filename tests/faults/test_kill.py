"""kill -9: a real server process dies at a commit or at any moment, with clients attached, and is started again on what
it left. After the last start every promise is checked: `tests.support.promises` has them, `killed_clients` has what the
clients do.

BAMBOO_KILLS is how often a server is killed, if that is more than the usual fifteen: then also at every commit that
there is, and at moments drawn from seeds, which are in the tests' names. BAMBOO_KILL_SEED is the first one.
"""

import os
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from random import Random
from typing import Final

import pytest

from tests.support.killing import STALLED, Kill, open_world

BIRTH: Final = (Kill("schema:1:after"), Kill("session:1:before"), Kill("session:1:after"))
"""Until there is a first session."""

COMMITS: Final = (
    Kill("accept:3:before"),
    Kill("queued_start:1:before"),
    Kill("deltas:1:before"),
    Kill("agent_complete:2:after"),
)
"""One of each kind in a run's life."""

RECOVERY: Final = (Kill(seen=120), Kill("epoch:1:before"), Kill("agent_error:1:after"), Kill(texts=60))
"""Each start finds what the one before did not get done."""

STOP: Final = (Kill("clean:1:before", stop=60), Kill("clean:1:after", stop=60))
"""While it stops properly."""

DEEP: Final = int(os.environ.get("BAMBOO_KILLS", "0")) - sum(map(len, (BIRTH, COMMITS, RECOVERY, STOP)))
"""Kills besides these."""

FIRST_SEED: Final = int(os.environ.get("BAMBOO_KILL_SEED", "1"))

A_LIFE: Final = 22
"""Commits of one life, about; a server that has fewer is killed when all is over."""

EVERY_COMMIT: Final = tuple(Kill(f"any:{number}:{when}") for number in range(1, A_LIFE) for when in ("before", "after"))


def drawn(seed: int) -> list[Kill]:
    """One to four kills, one after the other."""
    random = Random(seed)  # noqa: S311 - not a secret
    return [_draw(random) for _ in range(random.randint(1, 4))]


def _draw(random: Random) -> Kill:
    when = random.choice(("before", "after"))
    match random.randrange(6):
        case 0 | 1:
            return Kill(seen=random.randint(1, 300))
        case 2:
            return Kill(texts=random.randint(1, 200))
        case 3:
            return Kill(f"any:{random.randint(2, A_LIFE)}:{when}")
        case 4:
            return Kill(f"{random.choice(('epoch', 'agent_error', 'run_started'))}:{random.randint(1, 4)}:{when}")
        case _:
            return Kill(f"{random.choice(('agent_error:1', 'clean:1'))}:{when}", stop=random.randint(1, 150))


def histories() -> Iterator[tuple[str, list[Kill]]]:
    """At every commit, as far as DEEP goes, and at random for the rest, or once."""
    left = DEEP
    for kill in EVERY_COMMIT[: max(0, left)]:
        yield str(kill), [kill]
        left -= 1
    for seed in count(FIRST_SEED):
        yield f"seed-{seed}", drawn(seed)
        left -= len(drawn(seed))
        if left <= 0:
            return


HISTORIES: Final = dict(histories())


async def live_through(directory: Path, kills: Sequence[Kill], *, exactly: bool = True) -> int:
    """Be killed so often, and keep every promise. Returns how many gaps clients were told of.

    `exactly`: each at its commit, none because all was over before.
    """
    async with open_world(directory) as world:
        for kill in kills:
            server = await world.live(kill)
            assert not exactly or bool(server.at) is bool(kill.at), f"there was no {kill}: {server.commits}"
        await world.settle()
        return world.ledger.gaps


async def test_a_server_that_is_killed_before_it_has_a_session_starts_as_if_nothing_had_been(tmp_path: Path) -> None:
    assert await live_through(tmp_path, BIRTH) == 0, "nothing was streamed"


@pytest.mark.parametrize("kill", COMMITS, ids=str)
async def test_a_server_that_is_killed_at_a_commit_loses_nothing_but_the_last_deltas(
    tmp_path: Path, kill: Kill
) -> None:
    gaps = await live_through(tmp_path, [kill])
    assert gaps or kill.at != "deltas:1:before", "the deltas on their way to the disk were seen, and those readers told"


async def test_a_server_that_is_killed_again_while_it_recovers_recovers(tmp_path: Path) -> None:
    await live_through(tmp_path, RECOVERY)


async def test_a_server_that_is_killed_while_it_stops_was_stopped_once_it_is_marked(tmp_path: Path) -> None:
    """Right before the mark it is a crash, without a loss; right after, it is none."""
    async with open_world(tmp_path) as world:
        for kill, crashes in zip(STOP, (0, 1), strict=True):
            server = await world.live(kill)
            assert server.at == ["clean"]
            assert world.ledger.crashes == crashes
        await world.settle()
        assert (world.ledger.crashes, world.ledger.gaps) == (1, 0)


@pytest.mark.parametrize("name", HISTORIES)
async def test_a_server_that_is_killed_at_any_moment_keeps_every_promise(tmp_path: Path, name: str) -> None:
    await live_through(tmp_path, HISTORIES[name], exactly=False)


async def test_a_server_that_is_stopped_in_mid_stream_interrupts_its_runs_before_their_clients_eyes(
    tmp_path: Path,
) -> None:
    """No gap, no new epoch."""
    async with open_world(tmp_path) as world:
        stopped = await world.live(Kill(stall=10))
        assert stopped.process.returncode == 0
        seen = {run_id: end["code"] for run_id, end in world.ledger.terminals.items()}
        assert list(seen.values()) == ["interrupted"] * STALLED
        await world.settle()
    after = {run_id for run_id, end in world.ledger.terminals.items() if end["type"] == "agent_error"}
    assert after == seen.keys(), "the start found nothing to settle"
    assert (world.ledger.gaps, world.ledger.crashes) == (0, 0)
