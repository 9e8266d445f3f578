"""The store in SQLite. `open_sqlite_store` is all that others need of it."""

from bamboo.store.sqlite.store import open_sqlite_store

__all__ = ["open_sqlite_store"]
