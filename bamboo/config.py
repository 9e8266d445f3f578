"""The configuration: every key with its default, its bounds and what it is for. `bamboo.config_loading` reads it.

The sentence under a key is the one that `bamboo.toml` and `docs/configuration.md` show; a test holds them together.
Values made in code are checked like those that are read: strictly, nothing is turned into another type.
"""

import difflib
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr, model_validator
from pydantic_core import PydanticCustomError

from bamboo.config_types import (
    AnyPath,
    BaseUrl,
    Bind,
    Bytes,
    Count,
    Days,
    Host,
    Network,
    NotStrict,
    Origin,
    ProviderKind,
    ProviderName,
    PublicUrl,
    Seconds,
    Token,
    VariableName,
    is_loopback,
    misplaced,
    same_listener,
    split_bind,
)


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, hide_input_in_errors=True, use_attribute_docstrings=True
    )


class ServerConfig(Section):
    """The HTTP server."""

    host: Host = "127.0.0.1"
    """Address or host name to listen on; anything but loopback needs `auth_token`."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8081
    """TCP port number; 0 takes a free one."""
    auth_token: Token | None = None
    """Text that clients send as `Authorization: Bearer …`; unset, everybody who reaches the address may use it."""
    certfile: AnyPath | None = None
    """File of the TLS certificate with its chain (PEM), needs `keyfile`; set, the server speaks HTTPS."""
    keyfile: AnyPath | None = None
    """File of the certificate's private key (PEM, without a passphrase)."""
    max_connections: Count = 4000
    """Number of connections open at once; one more is refused with 503."""
    max_unauthenticated_per_address: Count = 256
    """Number of connections, on either listener, that one client address may have open without having shown the token;
    one more is refused. Counts only where a token is set."""
    max_failed_auth_per_minute: Count = 30
    """Number of wrong tokens per minute and client address, on both listeners together; above it the address is refused
    with `overloaded`, whatever it shows."""
    trusted_proxies: Annotated[tuple[Network, ...], NotStrict] = ()
    """Addresses and networks of reverse proxies: for what comes from there, the client's address is the last one in
    `X-Forwarded-For` that is not a proxy's."""
    max_header_bytes: Bytes = 64 * 1024
    """Bytes of the largest request head; a larger one is refused with 431."""
    max_body_bytes: Bytes = 8 * 1024 * 1024
    """Bytes of the largest request body; a larger one is refused with 413."""
    allowed_hosts: Annotated[tuple[Host, ...], NotStrict] = ()
    """Host names, besides loopback's own, that a request's `Host` header may have while the bind is loopback."""
    cors_origins: Annotated[tuple[Origin, ...], NotStrict] = ()
    """Origins of other sites' browser pages that may use the HTTP API (CORS); none unless set."""
    drain_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 30
    """Seconds that runs may go on for once the server was told to stop; what is left then ends as `interrupted`."""
    header_timeout_s: Seconds = 15
    """Seconds that a TLS handshake, and a request's head from its first byte on, may take; a new connection on which
    nothing comes is closed after as many."""
    body_timeout_s: Seconds = 60
    """Seconds that a request's body may take to arrive whole; a later one is refused with 408."""
    keep_alive_s: Seconds = 75
    """Seconds after which an idle connection is closed."""
    write_timeout_s: Seconds = 30
    """Seconds that a client, over HTTP or WebSocket, may take nothing of what is written to it before it is cut."""


class GatewayConfig(Section):
    """The WebSocket gateway."""

    enabled: bool = True
    """Whether the gateway listens at all."""
    bind: Bind = "127.0.0.1:18790"
    """Address and TCP port number to listen on, `host:port` or `[::1]:port`; port 0 takes a free one."""
    auth_token: Token | None = None
    """Text that clients send as `Authorization: Bearer …` or in `connect.auth`; unset, it is `server.auth_token`."""
    certfile: AnyPath | None = None
    """File of the TLS certificate with its chain (PEM); unset, it is `server.certfile`."""
    keyfile: AnyPath | None = None
    """File of the certificate's private key; unset, it is `server.keyfile`."""
    max_connections: Count = 1000
    """Number of connections open at once; one more is refused with 503 before the upgrade."""
    max_subscriptions: Count = 100
    """Number of sessions that one connection may follow at once."""
    heartbeat_interval_secs: Seconds = 30
    """Seconds between two heartbeat pings to a connection."""
    heartbeat_timeout_secs: Seconds = 10
    """Seconds that a pong may take before the connection is closed with 4502."""
    connect_timeout_s: Seconds = 10
    """Seconds within which the first frame, `connect`, has to come."""
    max_message_bytes: Bytes = 1024 * 1024
    """Bytes of the largest frame that a client may send; a larger one closes the connection with 1009."""
    allowed_origins: Annotated[tuple[Origin, ...], NotStrict] = ()
    """Origins of browser pages that may connect, besides the HTTP server's own as 127.0.0.1 and as localhost."""
    public_url: PublicUrl | None = None
    """The `ws://` or `wss://` URL that clients are told, where a proxy stands in front."""

    @property
    def host(self) -> str:
        """Of `bind`, without brackets."""
        return split_bind(self.bind)[0]

    @property
    def port(self) -> int:
        """Of `bind`."""
        return split_bind(self.bind)[1]


class ProviderConfig(Section):
    """One LLM API."""

    kind: ProviderKind
    """`openai` is any server with an OpenAI-compatible API; `scripted` answers from a script, without a model."""
    base_url: BaseUrl = ""
    """Where the API is, up to and without `/chat/completions`; needed by kind `openai`."""
    api_key_env: VariableName = ""
    """Name of the environment variable that holds the API key; empty for a server that needs none."""
    model: Annotated[str, Field(min_length=1)]
    """The model that answers where a chat and its session name none."""
    connect_timeout_s: Seconds = 10
    """Seconds that connecting may take, TLS included."""
    script: Annotated[str, Field(min_length=1)] = "demo"
    """Kind `scripted` only: name of the script that answers."""

    @model_validator(mode="after")
    def _has_an_address(self) -> "ProviderConfig":
        if self.kind == "openai" and not self.base_url:
            raise PydanticCustomError("missing_base_url", "needs a base_url, such as https://api.openai.com/v1")
        return self


def shipped_providers() -> dict[str, ProviderConfig]:
    """The providers that there are without any configuration; a file's or the environment's are merged into them."""
    return {
        "openai": ProviderConfig(
            kind="openai", base_url="https://api.openai.com/v1", api_key_env="OPENAI_API_KEY", model="gpt-4o-mini"
        )
    }


class LlmConfig(Section):
    """The model providers."""

    default_provider: ProviderName = "openai"
    """Name of the provider that answers where a chat and its session name none; one of `llm.providers`."""
    fallback: Annotated[tuple[ProviderName, ...], NotStrict] = ()
    """Names of providers that are tried in this order, each with its own model, when a model call of the default one
    has failed for good before its first delta; only for chats that named neither provider nor model."""
    max_retries: Annotated[int, Field(ge=0, le=20)] = 2
    """Number of further attempts after a model call that failed before its first delta."""
    providers: dict[ProviderName, ProviderConfig] = Field(default_factory=shipped_providers)
    """The providers by name; those of the configuration are added to, or change single keys of, the shipped one."""


class AgentConfig(Section):
    """Runs: how many, and how long."""

    system_prompt: str = ""
    """Text that the model is told first, where a chat and its session have none of their own."""
    max_active_runs: Count = 200
    """Number of runs that work at once; further ones are queued."""
    max_live_sessions: Count = 10000
    """Number of sessions in memory at once; above it the one that has been idle longest leaves, and if none is idle the
    chat is refused with `overloaded`."""
    max_queued_runs: Count = 2000
    """Number of queued runs in all; above it chats are refused with `overloaded`."""
    max_queued_runs_per_session: Count = 20
    """Number of queued runs of one session; above it its chats are refused with `overloaded`."""
    max_steps: Count = 50
    """Number of model calls that one run may make."""
    inbox_size: Count = 64
    """Number of requests that may wait for one session; above it they are refused with `overloaded`."""
    idle_evict_s: Seconds = 60
    """Seconds after which a session without work leaves memory; it stays in the store."""
    run_timeout_s: Seconds = 1800
    """Seconds that one run may take, waiting for an approval not counted."""
    first_token_timeout_s: Seconds = 120
    """Seconds that a provider may take until its first delta."""
    idle_timeout_s: Seconds = 60
    """Seconds that a provider may be silent between two deltas."""
    tool_timeout_s: Seconds = 120
    """Seconds that one tool call may take."""
    queue_timeout_s: Seconds = 3600
    """Seconds that a run may be queued before it fails with `queue_timeout`."""


class StreamConfig(Section):
    """How events reach readers."""

    window_bytes: Bytes = 256 * 1024
    """Bytes of one live session's newest events that are held in memory."""
    max_uncommitted_bytes: Bytes = 4 * 1024 * 1024
    """Bytes of one session's events that may wait for the store; above it the run stops reading its provider."""
    keep_alive_s: Seconds = 15
    """Seconds of silence after which an SSE stream gets a comment line."""


class StorageConfig(Section):
    """The database."""

    path: AnyPath = Path("bamboo.db")
    """File of the SQLite database, relative to the working directory; it is made if it is not there."""
    synchronous: Literal["normal", "full"] = "normal"
    """`normal` survives a crash of the process, `full` also a power cut, at one disk flush per commit."""
    commit_timeout_s: Seconds = 10
    """Seconds that a commit may take before the store counts as unavailable."""
    retention_days: Days = 7
    """Days that events stay in a session's log, 0 for ever; messages stay in any case."""
    retention_session_bytes: Annotated[int, Field(ge=0)] = 64 * 1024 * 1024
    """Bytes that one session's log may keep, 0 for any number; above it its oldest events go, its messages stay."""
    retention_total_bytes: Annotated[int, Field(ge=0)] = 4 * 1024 * 1024 * 1024
    """Bytes that all logs together may keep, 0 for any number; above it the oldest events of all go."""
    session_retention_days: Days = 0
    """Days after which a session in which nothing happens is deleted whole, its messages too; 0 never."""


class SkillsConfig(Section):
    """Skills, which come with a later version."""

    directories: Annotated[tuple[AnyPath, ...], NotStrict] = (Path("skills"),)
    """Directories of skills, relative to the working directory; this version checks the key and looks at nothing."""


class LogConfig(Section):
    """The server's own log, on standard error."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    """The least severity that is written."""
    format: Literal["auto", "human", "json"] = "auto"
    """`human`, `json`, or `auto`: human on a terminal, JSON otherwise; one line per event."""


class Config(Section):
    """Everything that can be set. Frozen: a running server's configuration does not change."""

    server: ServerConfig = ServerConfig()
    gateway: GatewayConfig = GatewayConfig()
    llm: LlmConfig = Field(default_factory=LlmConfig)
    agent: AgentConfig = AgentConfig()
    stream: StreamConfig = StreamConfig()
    storage: StorageConfig = StorageConfig()
    skills: SkillsConfig = SkillsConfig()
    log: LogConfig = LogConfig()

    @model_validator(mode="after")
    def _fits_together(self) -> "Config":
        server, gateway, llm = self.server, self.gateway, self.llm
        if not is_loopback(server.host) and server.auth_token is None:
            raise misplaced("is reachable from other machines, which needs server.auth_token", "server.host")
        if gateway.enabled and not is_loopback(gateway.host) and self.gateway_token is None:
            raise misplaced(
                "is reachable from other machines, which needs gateway.auth_token or server.auth_token", "gateway.bind"
            )
        if gateway.enabled and server.port == gateway.port != 0 and same_listener(server.host, gateway.host):
            raise misplaced(
                f"the HTTP server and the gateway cannot both listen on port {server.port}",
                "gateway.bind",
                "server.port",
                "server.host",
            )
        for section in ("server", "gateway"):
            certfile, keyfile = getattr(self, section).certfile, getattr(self, section).keyfile
            if (certfile is None) is not (keyfile is None):
                missing = "certfile" if certfile is None else "keyfile"
                raise misplaced(f"is needed too: TLS takes certfile and keyfile ({section})", f"{section}.{missing}")
        for name, key in [(llm.default_provider, "llm.default_provider"), *((n, "llm.fallback") for n in llm.fallback)]:
            if name not in llm.providers:
                near = difflib.get_close_matches(name, llm.providers, 1, cutoff=0.0)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise misplaced(f"there is no provider {name!r} under llm.providers{hint}", key)
        return self

    @property
    def limits(self) -> dict[str, int | float]:
        """Every number that bounds something, by its dotted key: what `GET /api/v1/limits` and `connected.limits`
        tell."""
        limits: dict[str, int | float] = {}
        for name, section in (
            ("server", self.server),
            ("gateway", self.gateway),
            ("llm", self.llm),
            ("agent", self.agent),
            ("stream", self.stream),
            ("storage", self.storage),
        ):
            if name == "gateway" and not self.gateway.enabled:
                continue
            for key, value in section:
                if isinstance(value, int | float) and not isinstance(value, bool) and key != "port":
                    limits[f"{name}.{key}"] = value
        return limits

    @property
    def gateway_tls(self) -> tuple[Path, Path] | None:
        """The gateway's certificate and key: its own, else the HTTP server's."""
        own = self.gateway if self.gateway.certfile is not None else self.server
        return None if own.certfile is None or own.keyfile is None else (own.certfile, own.keyfile)

    @property
    def gateway_token(self) -> SecretStr | None:
        """What the gateway's clients have to show: its own token, else the HTTP server's."""
        return self.gateway.auth_token or self.server.auth_token
