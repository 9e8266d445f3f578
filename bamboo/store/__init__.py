"""What Bamboo keeps, behind one contract (`base.py`): in memory (`memory.py`, its oracle) and in SQLite (`sqlite/`)."""

from time import time_ns


def wall_clock_ms() -> int:
    """Milliseconds since the Unix epoch."""
    return time_ns() // 1_000_000
