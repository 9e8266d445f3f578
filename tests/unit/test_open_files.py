import resource
from collections.abc import Iterator

import pytest
from structlog.testing import capture_logs

from bamboo.config import AgentConfig, Config, GatewayConfig, ServerConfig
from bamboo.open_files import OWN_FILES, files_needed, raise_open_files


@pytest.fixture
def soft_limit() -> Iterator[int]:
    """A soft limit as shells set it; the test's own is put back."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowered = 512
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowered, before[1]))
    yield lowered
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def needing(clients: int) -> Config:
    return Config(
        server=ServerConfig(max_connections=clients),
        gateway=GatewayConfig(max_connections=50),
        agent=AgentConfig(max_active_runs=30),
    )


def test_what_is_needed_is_every_client_and_every_active_run() -> None:
    assert files_needed(needing(100)) == 100 + 50 + 30 + OWN_FILES
    without_gateway = needing(100).model_copy(update={"gateway": GatewayConfig(enabled=False)})
    assert files_needed(without_gateway) == 100 + 30 + OWN_FILES


def test_the_soft_limit_is_raised_to_what_is_needed(soft_limit: int) -> None:
    with capture_logs() as lines:
        raise_open_files(needing(soft_limit))
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == files_needed(needing(soft_limit))
    assert lines == []


def test_a_limit_that_is_high_enough_stays(soft_limit: int) -> None:
    raise_open_files(needing(10))
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == soft_limit


def test_a_hard_limit_below_the_need_is_told(soft_limit: int) -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    assert hard > soft_limit
    with capture_logs() as lines:
        raise_open_files(needing(hard))
    [line] = lines
    assert (line["event"], line["log_level"], line["limit"]) == ("open_files_limited", "warning", hard)
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == hard
