"""The process' limit of open files, against what the configuration may need."""

import resource
from typing import Final

import structlog

from bamboo.config import Config

OWN_FILES: Final = 64
"""The database, its threads, the listeners, standard streams, and some to spare."""

log = structlog.get_logger("bamboo.open_files")


def files_needed(config: Config) -> int:
    """What the server may have open at once: every client, and a connection to a provider for every active run."""
    clients = config.server.max_connections + (config.gateway.max_connections if config.gateway.enabled else 0)
    return clients + config.agent.max_active_runs + OWN_FILES


def raise_open_files(config: Config) -> None:
    """Raise the process' soft limit of open files to what may be needed, as far as its hard limit lets it.

    Shells and service managers commonly start a process with 1,024, and a server that runs out of them can neither
    serve a client nor tell it so.
    """
    needed = files_needed(config)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    reachable = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    if soft != resource.RLIM_INFINITY and soft < reachable:
        resource.setrlimit(resource.RLIMIT_NOFILE, (reachable, hard))
    if reachable < needed:
        hint = "raise it (ulimit -n, LimitNOFILE=), or lower max_connections"
        log.warning("open_files_limited", limit=reachable, needed=needed, hint=hint)
