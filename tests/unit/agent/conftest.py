import pytest

from bamboo.store import wall_clock_ms
from tests.support.stores import GatedStore


@pytest.fixture
def store() -> GatedStore:
    return GatedStore(wall_clock_ms)
