"""The types of the configuration's values: what a good one looks like, and what a bad one is told."""

import re
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Annotated, Final, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, StringConstraints
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


def split_bind(text: str) -> tuple[str, int]:
    """`host:port`, the host without brackets. Raises ValueError."""
    host, colon, port = text.rpartition(":")
    if not colon or not re.fullmatch(r"[0-9]{1,5}", port) or int(port) > 65535 or (":" in host and host[0] != "["):
        raise ValueError('must be "host:port" (IPv6: "[::1]:port"), with a port from 0 to 65535')
    return _host(host), int(port)


def _bind(text: str) -> str:
    split_bind(text)
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


def same_listener(a: str, b: str) -> bool:
    """Whether listening on one port of both hosts would fail, as far as the names tell."""
    wildcards, local = {"0.0.0.0", "::"}, {"localhost", "127.0.0.1", "::1"}  # noqa: S104 - compared with, not bound
    return a == b or bool({a, b} & wildcards) or ("localhost" in (a, b) and {a, b} <= local)


def misplaced(text: str, *keys: str) -> PydanticCustomError:
    """A value that is good by itself but not beside the others. `keys` are the dotted keys to change, best first."""
    return PydanticCustomError("misplaced", "{text}", {"text": text, "keys": list(keys)})


def _network(text: str) -> str:
    try:
        return str(ip_network(text))
    except ValueError:
        raise ValueError('must be an IP address, or a network such as "10.0.0.0/8"') from None


def _provider_kind(value: object) -> object:
    if value == "anthropic":
        raise ValueError('"anthropic" comes with a later version; this one has "openai" and "scripted"')
    return value


Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Bytes = Annotated[int, Field(ge=1024)]
Host = Annotated[str, AfterValidator(_host)]
Token = Annotated[SecretStr, AfterValidator(_token)]
AnyPath = Annotated[Path, Field(strict=False), AfterValidator(_path)]
Network = Annotated[str, AfterValidator(_network)]
Bind = Annotated[str, AfterValidator(_bind)]
BaseUrl = Annotated[str, AfterValidator(_base_url)]
PublicUrl = Annotated[str, AfterValidator(_public_url)]
VariableName = Annotated[str, AfterValidator(_variable_name)]
ProviderKind = Annotated[Literal["openai", "scripted"], BeforeValidator(_provider_kind)]
Days = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Origin = Annotated[str, AfterValidator(_origin)]
ProviderName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_.-]{0,63}\z")]
NotStrict = Field(strict=False)  # a TOML array, or a list in code, for a tuple; its items stay strict
