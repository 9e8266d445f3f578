"""The configuration: every key with its default, its bounds and what it is for. `bamboo.config_loading` reads it.

The sentence under a key is the one that `bamboo.toml` and `docs/configuration.md` show; a test holds them together.
Values made in code are checked like those that are read: strictly, nothing is turned into another type.
"""

import difflib
import re
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Final, Literal
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    StringConstraints,
    model_validator,
)
from pydantic_core import PydanticCustomError

_HOST_NAME: Final = re.compile(r"(?!-)[A-Za-z0-9-]{1,63}(?:\.(?!-)[A-Za-z0-9-]{1,63})*\.?")
_ORIGIN: Final = re.compile(r"https?://[^/?#@\s]+")


def _host(text: str) -> str:
    """An IP address, brackets around IPv6 taken off, or a host name."""
    bare = text[1:-1] if text.startswith("[") and text.endswith("]") else text
    try:
        return str(ip_address(bare))
    except ValueError:
        last_label = bare.rstrip(".").rpartition(".")[2]
        if bare is not text or _HOST_NAME.fullmatch(bare) is None or last_label.isdigit():
            raise ValueError("must be an IP address or a host name") from None
        return bare.lower()


def _split_bind(text: str) -> tuple[str, int]:
    host, colon, port = text.rpartition(":")
    if not colon or not re.fullmatch(r"[0-9]{1,5}", port) or int(port) > 65535 or (":" in host and host[0] != "["):
        raise ValueError('must be "host:port" (IPv6: "[::1]:port"), with a port from 0 to 65535')
    return _host(host), int(port)


def _bind(text: str) -> str:
    _split_bind(text)
    return text


def _url(text: str, schemes: tuple[str, ...]) -> str:
    problem = f"must be a URL that begins with {' or '.join(scheme + '://' for scheme in schemes)} and has a host"
    try:
        parts = urlsplit(text)
        port_is_good = parts.port is None or parts.port > 0
    except ValueError:
        raise ValueError(problem) from None
    if parts.scheme not in schemes or not parts.hostname or not port_is_good or re.search(r"\s", text):
        raise ValueError(problem)
    if parts.username is not None or parts.query or parts.fragment:
        raise ValueError("must be a URL without a user name, a password, a query and a fragment")
    return text


def _base_url(text: str) -> str:
    return _url(text, ("http", "https")) if text else text


def _public_url(text: str) -> str:
    return _url(text, ("ws", "wss"))


def _origin(text: str) -> str:
    if _ORIGIN.fullmatch(text) is None:
        raise ValueError('must be an origin as browsers send it, "https://host" or "https://host:port", no path')
    return text.lower()


def _token(secret: SecretStr) -> SecretStr:
    if re.fullmatch(r"[\x21-\x7e]{1,4096}", secret.get_secret_value()) is None:
        raise ValueError("must be 1 to 4096 visible ASCII characters: it travels in an HTTP header")
    return secret


def _variable_name(text: str) -> str:
    if text and re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", text) is None:
        raise ValueError(
            "must be the name of an environment variable (the key itself has no place in the configuration)"
        )
    return text


def _path(path: Path) -> Path:
    if str(path) == "." or "\0" in str(path):
        raise ValueError("must be the path of a file or directory")
    return path


def is_loopback(host: str) -> bool:
    """Nobody but this machine reaches what listens on `host`. A name other than localhost may stand for any address."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host.rstrip(".") == "localhost"


def _same_listener(a: str, b: str) -> bool:
    """Whether listening on one port of both hosts would fail, as far as the names tell."""
    wildcards, local = {"0.0.0.0", "::"}, {"localhost", "127.0.0.1", "::1"}  # noqa: S104 - compared with, not bound
    return a == b or bool({a, b} & wildcards) or ("localhost" in (a, b) and {a, b} <= local)


def misplaced(text: str, *keys: str) -> PydanticCustomError:
    """A value that is good by itself but not beside the others. `keys` are the dotted keys to change, best first."""
    return PydanticCustomError("misplaced", "{text}", {"text": text, "keys": list(keys)})


def _kind(value: object) -> object:
    if value == "anthropic":
        raise ValueError('"anthropic" comes with a later version; this one has "openai" and "scripted"')
    return value


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, hide_input_in_errors=True, use_attribute_docstrings=True
    )


Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Bytes = Annotated[int, Field(ge=1024)]
Host = Annotated[str, AfterValidator(_host)]
Token = Annotated[SecretStr, AfterValidator(_token)]
AnyPath = Annotated[Path, Field(strict=False), AfterValidator(_path)]
HostName = Annotated[str, AfterValidator(_host)]
Origin = Annotated[str, AfterValidator(_origin)]
ProviderName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_.-]{0,63}\z")]
NotStrict = Field(strict=False)  # a TOML array, or a list in code, for a tuple; its items stay strict


class ServerConfig(Section):
    """The HTTP server."""

    host: Host = "127.0.0.1"
    """Address or host name to listen on; anything but loopback needs `auth_token`."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8081
    """TCP port number; 0 takes a free one."""
    auth_token: Token | None = None
    """Text that clients send as `Authorization: Bearer …`; unset, everybody who reaches the address may use it."""
    max_connections: Count = 4000
    """Number of connections open at once; one more is not served until another closes."""
    max_body_bytes: Bytes = 8 * 1024 * 1024
    """Bytes of the largest request body; a larger one is refused with 413."""
    allowed_hosts: Annotated[tuple[HostName, ...], NotStrict] = ()
    """Host names, besides loopback's own, that a request's `Host` header may have while the bind is loopback."""
    drain_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 30
    """Seconds that runs may go on for once the server was told to stop; what is left then ends as `interrupted`."""
    keep_alive_s: Seconds = 75
    """Seconds after which an idle connection is closed."""
    write_timeout_s: Seconds = 30
    """Seconds that a client, over HTTP or WebSocket, may take nothing of what is written to it before it is cut."""


class GatewayConfig(Section):
    """The WebSocket gateway."""

    enabled: bool = True
    """Whether the gateway listens at all."""
    bind: Annotated[str, AfterValidator(_bind)] = "127.0.0.1:18790"
    """Address and TCP port number to listen on, `host:port` or `[::1]:port`; port 0 takes a free one."""
    auth_token: Token | None = None
    """Text that clients send as `Authorization: Bearer …` or in `connect.auth`; unset, it is `server.auth_token`."""
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
    public_url: Annotated[str, AfterValidator(_public_url)] | None = None
    """The `ws://` or `wss://` URL that clients are told, where a proxy stands in front."""

    @property
    def host(self) -> str:
        """Of `bind`, without brackets."""
        return _split_bind(self.bind)[0]

    @property
    def port(self) -> int:
        """Of `bind`."""
        return _split_bind(self.bind)[1]


class ProviderConfig(Section):
    """One LLM API."""

    kind: Annotated[Literal["openai", "scripted"], BeforeValidator(_kind)]
    """`openai` is any server with an OpenAI-compatible API; `scripted` answers from a script, without a model."""
    base_url: Annotated[str, AfterValidator(_base_url)] = ""
    """Where the API is, up to and without `/chat/completions`; needed by kind `openai`."""
    api_key_env: Annotated[str, AfterValidator(_variable_name)] = ""
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
    retention_days: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 7
    """Days that events stay in a session's log, 0 for ever; messages stay in any case."""


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
        if gateway.enabled and server.port == gateway.port != 0 and _same_listener(server.host, gateway.host):
            raise misplaced(
                f"the HTTP server and the gateway cannot both listen on port {server.port}",
                "gateway.bind",
                "server.port",
                "server.host",
            )
        if llm.default_provider not in llm.providers:
            near = difflib.get_close_matches(llm.default_provider, llm.providers, 1, cutoff=0.0)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise misplaced(f"there is no provider of that name under llm.providers{hint}", "llm.default_provider")
        return self

    @property
    def gateway_token(self) -> SecretStr | None:
        """What the gateway's clients have to show: its own token, else the HTTP server's."""
        return self.gateway.auth_token or self.server.auth_token
