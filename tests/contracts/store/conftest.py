from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio

from tests.support.store_stands import Clock, MemoryStand, SqliteStand, Stand


@pytest.fixture(params=["memory", "sqlite"])
async def stand(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Stand]:
    opening = MemoryStand() if request.param == "memory" else SqliteStand(tmp_path / "bamboo.db")
    with trio.fail_after(30):
        async with opening as opened:
            yield opened


@pytest.fixture
def clock(stand: Stand) -> Clock:
    return stand.clock
