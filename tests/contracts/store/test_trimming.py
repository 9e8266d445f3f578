"""Retention: what leaves the logs, in which order, and what stays."""

import trio
import trio.testing

from bamboo.core.events import AgentStopped, AgentToken, SessionClosed, SessionCreated
from bamboo.core.types import (
    RunId,
    SessionId,
)
from bamboo.store.base import SLICE_MS, STEP_BYTES, STEP_LOGS, Commit
from bamboo.store.codec import encode_events
from tests.support.store_stands import COMPLETE, DAY_MS, STARTED, Author, Clock, Stand, all_events, said

ONE = SessionId("one")
TWO = SessionId("two")
LIMIT = 1_000_000
HOUR_MS = 3600 * 1000


class Keeper:
    """Writes one row after the other into finished runs of some sessions, and knows what each takes and what is
    kept.
    """

    def __init__(self, stand: Stand) -> None:
        self.stand = stand
        self.sizes: dict[str, list[int]] = {}

    async def put(self, name: str, text: str = "", *, rows: int = 1) -> None:
        """Rows of a message each, in one commit; the first ones make the session and its run."""
        async with self.stand.store.own(SessionId(name)) as log:
            author = Author(log, self.stand.clock)
            sizes = self.sizes.setdefault(name, [])
            if log.session is None:
                commit = author.acceptance(f"r-{name}", COMPLETE)
                await log.commit(commit)
                sizes += [row.size_bytes for row in encode_events(commit.events)]
            events = author.events(None, *(SessionCreated(text) for _ in range(rows)))
            await log.commit(Commit(events))
            sizes += [row.size_bytes for row in encode_events(events)]

    async def kept(self) -> dict[str, int]:
        """How many rows each log has, from its floor on."""
        kept = {}
        for name, sizes in self.sizes.items():
            extent = await self.stand.store.extent(SessionId(name))
            assert extent is not None
            events = await all_events(self.stand.store, SessionId(name))
            assert [event.seq for event in events] == list(range(extent.floor + 1, extent.head + 1))
            assert extent.head == len(sizes)  # a row is one event here
            kept[name] = len(events)
        return kept

    async def log_bytes(self, name: str) -> int:
        """What the log has of bytes, by what was put in and what is left."""
        count = (await self.kept())[name]
        return sum(self.sizes[name][-count:]) if count else 0

    async def trim_all(self, **bounds: int) -> int:
        removed = 0
        while step := await self.stand.store.trim(limit=3, **bounds):
            removed += step
        return removed


async def test_trim_removes_the_old_front_of_the_log_in_small_steps(stand: Stand, clock: Clock) -> None:
    store = stand.store
    async with store.own(ONE) as log:
        author = Author(log, clock)
        await author.start("old")
        await author.write("old", said("x", "m"), COMPLETE)
        clock.now_ms += 1000
        border_ms = clock.now_ms
        await author.start("new")
        await author.write("new", COMPLETE)
    assert await store.trim(before_ms=border_ms - 1000, limit=10) == 0

    assert await store.trim(before_ms=border_ms, limit=3) == 3
    page = await store.read(ONE, 0, max_bytes=LIMIT)
    assert page is not None
    assert (page.extent.floor, page.extent.head) == (3, 7)
    assert [event.seq for event in page.events] == [4, 5, 6, 7]

    assert await store.trim(before_ms=border_ms, limit=3) == 1
    assert await store.trim(before_ms=border_ms, limit=3) == 0
    assert [event.seq for event in await all_events(store, ONE)] == [5, 6, 7]

    clock.now_ms += 1000
    assert await store.trim(before_ms=clock.now_ms, limit=10) == 3
    page = await store.read(ONE, 0, max_bytes=LIMIT)
    assert page is not None
    assert (page.extent.floor, page.extent.head, list(page.events), page.through) == (7, 7, [], 7)
    assert [message.message_id for message in await store.messages(ONE)] == ["old-user", "m", "new-user"]
    run = await store.run(RunId("old"))
    assert run is not None

    async with store.own(ONE) as log:
        assert log.head == 7
        await Author(log, clock).start("newest")
    assert [event.seq for event in await all_events(store, ONE)] == [8, 9]
    assert await store.trim(before_ms=clock.now_ms, limit=10) == 0


async def test_trim_stops_before_the_oldest_unfinished_run(stand: Stand, clock: Clock) -> None:
    store = stand.store
    async with store.own(ONE) as log, store.own(TWO) as other:
        author = Author(log, clock)
        await author.start("done")  # 1, 2
        await author.accept("waiting")  # 3
        await author.write("done", AgentToken("x"), COMPLETE)  # 4, 5
        await Author(other, clock).start("r")
        clock.now_ms += 1000
        assert await store.trim(before_ms=clock.now_ms, limit=100) == 2
        assert [event.seq for event in await all_events(store, ONE)] == [3, 4, 5]
        assert len(await all_events(store, TWO)) == 2
        assert await store.trim(before_ms=clock.now_ms, limit=100) == 0
        await author.write("waiting", AgentStopped("user"))
        assert await store.trim(before_ms=clock.now_ms, limit=100) == 3
        page = await store.read(ONE, 0, max_bytes=LIMIT)
        assert page is not None
        assert page.extent.floor == 5


async def test_trim_removes_expired_keys(stand: Stand, clock: Clock) -> None:
    async with stand.store.own(ONE) as log:
        author = Author(log, clock)
        for index in range(3):
            await author.accept(f"r{index}", key=f"k{index}")
        clock.now_ms += 10
        await author.accept("later", key="later")
    expired_ms = clock.now_ms - 10 + DAY_MS
    clock.now_ms = expired_ms
    assert await stand.store.trim(before_ms=0, limit=2) == 2
    assert await stand.store.trim(before_ms=0, limit=2) == 1
    assert await stand.store.trim(before_ms=0, limit=2) == 0
    assert await stand.store.key_holder("later", clock.now_ms) is not None


# By bytes


async def test_log_is_trimmed_to_its_bound_and_not_a_row_further(stand: Stand) -> None:
    keeper = Keeper(stand)
    for index in range(10):
        await keeper.put("one", "x" * index * 10)
    await keeper.put("two", "x" * 200)
    sizes = keeper.sizes["one"]
    whole = sum(sizes)
    two_bytes = sum(keeper.sizes["two"])
    assert await stand.store.trim(limit=9, session_bytes=whole) == 0
    assert await stand.store.trim(limit=9, session_bytes=whole - 1) == 1  # the oldest, whatever it takes
    assert await stand.store.trim(limit=9, session_bytes=whole - 1) == 0

    bound = max(whole - sum(sizes[:5]), two_bytes)
    assert await keeper.trim_all(session_bytes=bound) > 0
    assert await keeper.log_bytes("one") <= bound
    assert await keeper.log_bytes("one") + sizes[-(await keeper.kept())["one"] - 1] > bound
    assert (await keeper.kept())["two"] == 3
    session = await stand.store.session(ONE)
    assert session is not None
    assert session.updated_ms == stand.clock.now_ms
    assert [message.message_id for message in await stand.store.messages(ONE)] == []
    assert await stand.store.run(RunId("r-one")) is not None

    assert await keeper.trim_all(session_bytes=1) > 0  # a bound below any row: the log is empty, its head stays
    assert await keeper.kept() == {"one": 0, "two": 0}
    await keeper.put("one")
    assert (await all_events(stand.store, ONE))[0].seq == len(sizes)


async def test_bytes_are_counted_on_through_trims_restarts_and_deltas(stand: Stand, clock: Clock) -> None:
    store, written = stand.store, 0
    async with store.own(ONE) as log:
        author = Author(log, clock)
        commits = [author.acceptance("r", STARTED)]
        await log.commit(commits[0])
        for index in range(5):
            commits.append(Commit(author.events("r", *(AgentToken("tokn") for _ in range(1000 * index + 1)))))
            await log.commit(commits[-1])
        commits.append(Commit(author.events("r", COMPLETE)))
        await log.commit(commits[-1])
    rows = [row for commit in commits for row in encode_events(commit.events)]
    assert len(rows) > 10
    for clean in (True, False):
        written = sum(row.size_bytes for row in rows)
        assert await stand.store.trim(limit=5, total_bytes=written) == 0
        assert await stand.store.trim(limit=5, total_bytes=written - 1) == 1
        del rows[0]
        await stand.restart(clean=clean)
    assert await stand.store.trim(limit=5, session_bytes=1) == 5
    left = sum(row.size_bytes for row in rows[5:])
    assert await stand.store.trim(limit=5, session_bytes=left) == 0
    async with stand.store.own(ONE) as log:
        more = Commit(Author(log, clock).events(None, SessionCreated("more")))
        await log.commit(more)
    left += encode_events(more.events)[0].size_bytes
    assert await stand.store.trim(limit=5, session_bytes=left) == 0
    assert await stand.store.trim(limit=5, session_bytes=left - 1) == 1


async def test_log_that_a_deleted_session_had_counts_no_more(stand: Stand, clock: Clock) -> None:
    keeper = Keeper(stand)
    await keeper.put("one", "x" * 1000, rows=5)
    await keeper.put("two")
    async with stand.store.own(ONE) as log:
        await log.commit(Commit(Author(log, clock).events(None, SessionClosed()), delete=True))
    assert await stand.store.trim(limit=9, total_bytes=sum(keeper.sizes["two"])) == 0
    assert await stand.store.trim(limit=9, total_bytes=sum(keeper.sizes["two"]) - 1) == 1


async def test_log_keeps_more_than_its_bound_only_from_its_oldest_unfinished_run_on(stand: Stand, clock: Clock) -> None:
    async with stand.store.own(ONE) as log:
        author = Author(log, clock)
        await author.start("done")  # 1, 2
        await author.accept("waiting")  # 3
        await author.write("done", AgentToken("x" * 1000), COMPLETE)  # 4, 5
        assert await stand.store.trim(limit=9, session_bytes=1) == 2
        assert await stand.store.trim(limit=9, session_bytes=1) == 0
        assert await stand.store.trim(limit=9, total_bytes=1) == 0
        assert [event.seq for event in await all_events(stand.store, ONE)] == [3, 4, 5]
        await author.write("waiting", AgentStopped("user"))
        assert await stand.store.trim(limit=9, total_bytes=1) == 4


async def test_oldest_rows_of_all_logs_go_first_an_hours_at_a_time(stand: Stand) -> None:
    keeper = Keeper(stand)
    assert SLICE_MS == HOUR_MS
    for _ in range(3):
        for name in ("b", "a", "c"):  # in the order in which they are stored
            await keeper.put(name, "x" * 100, rows=2)
            stand.clock.now_ms += 5 * 60 * 1000 if name != "c" else 55 * 60 * 1000
    # Log b at minute 0, 65, 130; a at 5, 70, 135; c at 10, 75, 140. The first commit of each adds two rows more.
    gone = []
    for _ in range(9):
        total = sum([await keeper.log_bytes(name) for name in keeper.sizes])
        before = await keeper.kept()
        assert await stand.store.trim(limit=1, total_bytes=total - 1) == 1
        after = await keeper.kept()
        gone += [name for name in after if after[name] != before[name]]
    assert gone == ["b"] * 4 + ["a"] * 4 + ["c"]
    assert await stand.store.trim(limit=6, total_bytes=1) == 6  # c's three of minute 10, b's two of 65, a's first of 70
    assert await keeper.kept() == {"b": 2, "a": 3, "c": 4}
    assert await keeper.trim_all(total_bytes=1) == 9


async def test_logs_of_one_moment_lose_rows_in_the_order_in_which_they_were_stored(stand: Stand) -> None:
    keeper = Keeper(stand)
    for name in ("b", "a"):
        await keeper.put(name, rows=2)
    assert await stand.store.trim(limit=5, total_bytes=1) == 5
    assert await keeper.kept() == {"b": 0, "a": 3}


async def test_total_is_looked_at_once_every_log_is_within_its_own_bounds(stand: Stand) -> None:
    keeper = Keeper(stand)
    await keeper.put("small", "x" * 100)
    stand.clock.now_ms += 1
    await keeper.put("big", "x" * 100, rows=6)
    bound = sum(keeper.sizes["small"])
    assert await stand.store.trim(limit=100, session_bytes=bound, total_bytes=1) > 2
    kept = await keeper.kept()
    assert kept["small"] == 3
    left = bound + await keeper.log_bytes("big")
    assert left <= 2 * bound
    assert await stand.store.trim(limit=100, session_bytes=bound, total_bytes=left) == 0
    assert await stand.store.trim(limit=100, session_bytes=bound, total_bytes=left - 1) == 1
    assert await keeper.kept() == {"small": 2, "big": kept["big"]}


async def test_age_and_a_logs_own_bound_are_one_order(stand: Stand) -> None:
    keeper = Keeper(stand)
    await keeper.put("old", rows=2)
    stand.clock.now_ms += 1
    before_ms = stand.clock.now_ms
    await keeper.put("big", "x" * 1000, rows=4)
    assert await stand.store.trim(limit=6, before_ms=before_ms, session_bytes=1100) == 6
    assert await keeper.kept() == {"old": 0, "big": 4}
    assert await stand.store.trim(limit=9, before_ms=before_ms, session_bytes=1100) == 3
    assert await keeper.kept() == {"old": 0, "big": 1}


async def test_without_a_bound_nothing_goes(stand: Stand) -> None:
    await Keeper(stand).put("one", "x" * 100_000)
    stand.clock.now_ms += 100 * DAY_MS
    assert await stand.store.trim(limit=9) == 0
    assert await stand.store.trim(limit=9, before_ms=0, session_bytes=0, total_bytes=0) == 0


async def test_step_removes_no_further_row_once_enough_bytes_have_gone(stand: Stand) -> None:
    keeper = Keeper(stand)
    await keeper.put("one")
    await keeper.put("one", "x" * (STEP_BYTES // 4), rows=9)
    stand.clock.now_ms += 1
    assert await stand.store.trim(limit=100, before_ms=stand.clock.now_ms) == 3 + 4  # three small ones, then four
    await keeper.put("one", "x" * 3 * STEP_BYTES)
    assert await stand.store.trim(limit=100, total_bytes=1) == 4
    assert await stand.store.trim(limit=100, total_bytes=1) == 2
    assert await stand.store.trim(limit=100, total_bytes=1) == 0


async def test_step_touches_few_logs(stand: Stand) -> None:
    keeper = Keeper(stand)
    names = [f"s{index}" for index in range(STEP_LOGS + 5)]
    for name in names:
        await keeper.put(name)
    stand.clock.now_ms += 1
    assert await stand.store.trim(limit=1000, before_ms=stand.clock.now_ms) == STEP_LOGS * 3
    assert await stand.store.trim(limit=1000, before_ms=stand.clock.now_ms) == 5 * 3
    for bound in ("session_bytes", "total_bytes"):
        for name in names:
            await keeper.put(name)
        assert await stand.store.trim(limit=1000, **{bound: 1}) == STEP_LOGS
        assert await keeper.kept() == {name: int(name in names[-5:]) for name in names}
        assert await stand.store.trim(limit=1000, **{bound: 1}) == 5


async def test_oldest_rows_go_first_among_more_logs_than_a_step_touches(stand: Stand) -> None:
    keeper = Keeper(stand)
    names = [f"s{index}" for index in range(STEP_LOGS + 5)]
    for name in names:
        await keeper.put(name)
    while await stand.store.trim(limit=1000, total_bytes=1):
        pass
    for name in reversed(names):
        await keeper.put(name)
        stand.clock.now_ms += 1
    assert await stand.store.trim(limit=3, total_bytes=1) == 3
    assert [name for name, count in (await keeper.kept()).items() if not count] == names[-3:]
    assert await stand.store.trim(limit=2, session_bytes=1) == 2
    assert await stand.store.trim(limit=1, before_ms=stand.clock.now_ms) == 1
    assert [name for name, count in (await keeper.kept()).items() if not count] == names[-6:]


async def test_growth_is_told_when_commits_have_added_so_much(stand: Stand, clock: Clock) -> None:
    keeper, told = Keeper(stand), 0
    await keeper.put("one", "x" * 1000)
    await keeper.put("two", "x" * 1000)
    written = sum(map(sum, keeper.sizes.values()))

    async def listen() -> None:
        nonlocal told
        await stand.store.wait_grown(written)  # of before anybody listened
        told = 1
        await stand.store.wait_grown(2 * written)
        told = 2

    async def told_now() -> int:
        await trio.testing.wait_all_tasks_blocked()
        return told

    async with trio.open_nursery() as nursery:
        nursery.start_soon(listen)
        assert await told_now() == 1
        grown = 0
        while grown < 2 * written:
            assert await told_now() == 1
            await keeper.put("two", "x" * 500)
            grown += keeper.sizes["two"][-1]
            async with stand.store.own(ONE) as log:  # adds nothing
                await log.commit(Commit(session=Author(log, clock).session()))
            while await stand.store.trim(limit=9, total_bytes=1):  # and what goes is not taken off
                pass
        assert await told_now() == 2
