"""The store in SQLite: put together, opened and closed."""

import sqlite3
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from types import TracebackType
from typing import Final

import structlog
import trio

from bamboo.bus.log_reader import LogExtent, LogPage
from bamboo.config import StorageConfig
from bamboo.core.types import Message, MessageId, RunId, SessionId
from bamboo.errors import StartError, StoreError
from bamboo.store import wall_clock_ms
from bamboo.store.base import KeyHolder, Run, Session, SessionLog, Snapshot
from bamboo.store.sqlite import erasing, reads, trimming, writes
from bamboo.store.sqlite.checkpoint import Checkpointer
from bamboo.store.sqlite.files import FileLock, connect, connect_writer, locate
from bamboo.store.sqlite.log import SqliteLog
from bamboo.store.sqlite.writer import Writer
from bamboo.store.upkeep import Upkeep

READERS: Final = 3
"""Read-only connections: reads are short, and more threads than this only take turns."""

WAL_LIMIT_BYTES: Final = 64 * 1024 * 1024
"""The size of the write-ahead log at which the writer stops to fold it into the database."""

CLOSE_S: Final = 10.0
"""How long closing may take: what waits is committed, the write-ahead log folded in."""

log = structlog.get_logger("bamboo.store")


class SqliteStore:
    """`bamboo.store.base.Store`, in SQLite."""

    def __init__(
        self,
        writer: Writer,
        checkpointer: Checkpointer,
        readers: reads.Readers,
        now_ms: Callable[[], int],
        generation: int,
    ) -> None:
        self._writer = writer
        self._checkpointer = checkpointer
        self._readers = readers
        self._now_ms = now_ms
        self._generation = generation
        self._upkeep = Upkeep()
        self._owned: set[SessionId] = set()
        self._clean = False

    def __repr__(self) -> str:
        return f"<SqliteStore {len(self._owned)} owned, {self._writer!r}>"

    @asynccontextmanager
    async def own(self, session_id: SessionId, *, new_epoch: bool = False) -> AsyncIterator[SessionLog]:
        assert session_id not in self._owned, f"session {session_id} has an owner already"
        assert not self._clean, "the store is marked as cleanly stopped"
        self._owned.add(session_id)
        session_log = SqliteLog(self._writer, session_id, self._now_ms, self._generation, self._upkeep)
        try:
            await session_log.load(new_epoch=new_epoch)
            yield session_log
        finally:
            session_log.close()
            self._owned.discard(session_id)

    async def mark_clean(self) -> None:
        assert not self._owned, "a session is owned"
        await self._writer.run(writes.mark_clean)
        self._clean = True

    async def healthy(self) -> bool:
        try:
            await self._writer.run(writes.probe if self._writer.failing else writes.nothing)
        except StoreError:
            return False
        return True

    async def idle_sessions(self, *, before_ms: int, limit: int) -> Sequence[SessionId]:
        return await self._readers.run(lambda connection: reads.idle_sessions(connection, before_ms, limit))

    async def trim(self, *, limit: int, before_ms: int = 0, session_bytes: int = 0, total_bytes: int = 0) -> int:
        bounds, now_ms = trimming.Bounds(before_ms, session_bytes, total_bytes), self._now_ms()
        step = await self._readers.run(lambda connection: trimming.choose(connection, bounds, limit, now_ms))
        if not step:
            return 0
        return await self._writer.run(trimming.carry_out(step, limit, now_ms))

    async def erase(self, *, limit: int) -> int:
        if not await self._readers.run(erasing.pending):
            return 0
        erased = await self._writer.run(erasing.erase(limit))
        if not erased.done:
            await self._checkpointer.checkpoint()  # what it does the writer does not have to: folding is short then
            if await self._writer.fold():
                await self._writer.run(erasing.forget(erased.bare))
        return erased.done

    async def wait_deleted(self) -> None:
        await self._upkeep.deleted.wait(1)

    async def wait_grown(self, by_bytes: int) -> None:
        await self._upkeep.grown.wait(by_bytes)

    async def extent(self, session_id: SessionId) -> LogExtent | None:
        return await self._readers.run(lambda connection: reads.extent(connection, session_id))

    async def read(
        self, session_id: SessionId, after_seq: int, *, max_bytes: int, run_id: RunId | None = None
    ) -> LogPage | None:
        return await self._readers.run(
            lambda connection: reads.read_log(connection, session_id, after_seq, max_bytes, run_id)
        )

    async def session(self, session_id: SessionId) -> Session | None:
        return await self._readers.run(lambda connection: reads.find_session(connection, session_id))

    async def sessions(
        self, *, limit: int, before: str | None = None, query: str | None = None
    ) -> tuple[Sequence[Session], str | None]:
        return await self._readers.run(lambda connection: reads.list_sessions(connection, limit, before, query))

    async def history(self, session_id: SessionId, *, limit: int, before: MessageId | None = None) -> Snapshot | None:
        return await self._readers.run(lambda connection: reads.history(connection, session_id, limit, before))

    async def messages(self, session_id: SessionId) -> Sequence[Message]:
        return await self._readers.run(lambda connection: reads.messages(connection, session_id))

    async def run(self, run_id: RunId) -> Run | None:
        return await self._readers.run(lambda connection: reads.find_run(connection, run_id))

    async def runs(self, session_id: SessionId, *, limit: int) -> Sequence[Run]:
        return await self._readers.run(lambda connection: reads.list_runs(connection, session_id, limit))

    async def key_holder(self, key: str, now_ms: int) -> KeyHolder | None:
        return await self._readers.run(lambda connection: reads.key_holder(connection, key, now_ms))

    async def unfinished_sessions(self) -> Sequence[SessionId]:
        return await self._readers.run(reads.unfinished_sessions)


class _Files:
    """Everything that an open database holds: the lock, the connections, the threads."""

    def __init__(self, config: StorageConfig) -> None:
        """Open the files and bring the database to this version. Blocks. Raises StartError, with nothing left open."""
        with ExitStack() as opened:
            self.path: Path = locate(config.path)
            lock = FileLock(self.path)
            opened.callback(lock.release)
            self.connection, self.generation = connect_writer(self.path, config.synchronous)
            opened.callback(self.connection.close)
            try:
                self.checkpoints = connect(self.path)
                opened.callback(self.checkpoints.close)
                self.readers: list[sqlite3.Connection] = []
                for _ in range(READERS):
                    self.readers.append(connect(self.path, read_only=True))
                    opened.callback(self.readers[-1].close)
            except sqlite3.Error as error:
                raise StartError(f"storage.path: cannot open the database {self.path}: {error}") from error
            self._opened = opened.pop_all()

    def close(self) -> None:
        """Blocks. Connections that their threads have closed already stay closed; the lock goes last."""
        self._opened.close()


class _Opening:
    """`open_sqlite_store`: the store while the block lasts."""

    def __init__(self, config: StorageConfig, now_ms: Callable[[], int], wal_limit_bytes: int) -> None:
        self._config = config
        self._now_ms = now_ms
        self._wal_limit_bytes = wal_limit_bytes

    async def __aenter__(self) -> SqliteStore:
        self._files = files = await trio.to_thread.run_sync(_Files, self._config)
        self._checkpointer = Checkpointer(files.checkpoints)
        self._writer = Writer(files.path, files.connection, self._checkpointer, wal_limit_bytes=self._wal_limit_bytes)
        self._checkpointer.start()
        self._writer.start()
        readers = reads.Readers(files.readers)
        return SqliteStore(self._writer, self._checkpointer, readers, self._now_ms, files.generation)

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with trio.move_on_after(CLOSE_S, shield=True) as scope:
            await trio.to_thread.run_sync(self._close, abandon_on_cancel=True)
        if scope.cancelled_caught:
            log.error("store_close_gave_up", path=str(self._files.path), after_s=CLOSE_S)

    def _close(self) -> None:
        self._checkpointer.stop()
        self._writer.stop()
        self._files.close()


def open_sqlite_store(
    config: StorageConfig,
    *,
    now_ms: Callable[[], int] = wall_clock_ms,
    wal_limit_bytes: int = WAL_LIMIT_BYTES,
) -> _Opening:
    """The store in the database file `config.path`, for as long as the block lasts. The file is made if there is
    none; a directory is not.

    Entering raises StartError: the file is in use by another process, cannot be written, is no database of ours, or
    of a newer version. Leaving commits what waits, within CLOSE_S, also if it is cancelled; without `mark_clean`
    before, the next start is an unclean one.
    """
    return _Opening(config, now_ms, wal_limit_bytes)
