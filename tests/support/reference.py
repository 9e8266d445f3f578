"""Writes what people read about the configuration from the models: `bamboo.toml` and `docs/configuration.md`'s tables.

`python -m tests.support.reference` brings both up to date; `tests/test_docs.py` fails while they are not.
"""

import json
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, Literal, get_args, get_origin

from pydantic import SecretStr
from pydantic.fields import FieldInfo

from bamboo.config import Config, ProviderConfig, Section

ROOT: Final = Path(__file__).parents[2]
TOML_FILE: Final = ROOT / "bamboo.toml"
PAGE: Final = ROOT / "docs" / "configuration.md"
MARK: Final = ("<!-- keys: begin (python -m tests.support.reference) -->", "<!-- keys: end -->")

EXAMPLES: Final = {
    "server.certfile": "/etc/bamboo/fullchain.pem",
    "server.keyfile": "/etc/bamboo/privkey.pem",
    "gateway.certfile": "/etc/bamboo/fullchain.pem",
    "gateway.keyfile": "/etc/bamboo/privkey.pem",
    "server.auth_token": "a-long-random-text",
    "gateway.auth_token": "another-long-random-text",
    "gateway.public_url": "wss://bamboo.example/gateway",
}
"""What a commented-out key shows: one that is unset by default."""

_HEAD: Final = """\
# Bamboo's configuration, as shipped: every value here is the default, so whatever you do not change may be left out.
# ./bamboo.toml is read if there is one; `python -m bamboo --config PATH` names another. Each key can be set in the
# environment too, which wins: BAMBOO_SERVER__PORT=8082. `python -m bamboo check` prints what is in force.
"""


def sections() -> Iterator[tuple[str, Section]]:
    """Every table of the default configuration, by its dotted name."""
    for name, section in Config():
        yield name, section
        if name == "llm":
            for provider_name, provider in section.providers.items():
                yield f"llm.providers.{provider_name}", provider


def fields(section: Section) -> Iterator[tuple[str, FieldInfo, Any]]:
    for name, field in type(section).model_fields.items():
        if get_origin(field.annotation) is not dict:
            yield name, field, getattr(section, name)


def toml() -> str:
    lines = [_HEAD.rstrip()]
    for table, section in sections():
        lines += ["", f"# {type(section).__doc__}", f"[{table}]"]
        for name, field, value in fields(section):
            lines += textwrap.wrap(field.description or "", 112, initial_indent="# ", subsequent_indent="# ")
            lines.append(
                f"# {name} = {toml_value(EXAMPLES[f'{table}.{name}'])}"
                if value is None
                else f"{name} = {toml_value(value)}"
            )
    return "\n".join(lines) + "\n"


def tables() -> str:
    lines: list[str] = []
    for table, section in sections():
        title = "llm.providers.<name>" if isinstance(section, ProviderConfig) else table
        lines += ["", f"## `[{title}]`", "", str(type(section).__doc__), ""]
        if isinstance(section, ProviderConfig):
            lines += [
                "Defaults in brackets are those of the shipped `openai` provider only; another has to say them.",
                "",
            ]
        lines += ["| key | type | default | what it is |", "| --- | --- | --- | --- |"]
        for name, field, value in fields(section):
            lines.append(f"| `{name}` | {_type(field.annotation)} | {_default(field, value)} | {field.description} |")
    return "\n".join(lines[1:]) + "\n"


def page(current: str) -> str:
    """The page with its tables brought up to date."""
    begin, end = MARK
    before, _, rest = current.partition(begin)
    _, found, after = rest.partition(end)
    assert found, f"{PAGE} has lost its marks"
    return f"{before}{begin}\n{tables()}{end}{after}"


def toml_value(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(toml_value, value))}]"
    return json.dumps(str(value) if isinstance(value, Path) else value)


def _type(annotation: Any) -> str:
    if get_origin(annotation) is tuple:
        return f"list of {_type(get_args(annotation)[0])}s"
    if get_origin(annotation) is Literal:
        return " or ".join(f'`"{choice}"`' for choice in get_args(annotation))
    inner = [argument for argument in get_args(annotation) if argument is not type(None)]
    if inner:  # Annotated[X, …] and X | None
        return _type(inner[0])
    return {bool: "true or false", int: "integer", float: "number", SecretStr: "text"}.get(annotation, "text")


def _default(field: FieldInfo, value: Any) -> str:
    if value is None:
        return "unset"
    shown = f"`{toml_value(value)}`"
    return shown if field.default == value else f"({shown})"


def units(name: str, description: str) -> bool:
    """The key says what its number counts, by its name or in its sentence."""
    named = re.search(r"_(s|secs|ms|bytes|days)$", name)
    return (
        bool(named)
        or re.match(r"(Number of|Seconds|Bytes|Days|TCP port number|Address and TCP port)", description) is not None
    )


if __name__ == "__main__":
    TOML_FILE.write_text(toml(), encoding="utf-8")
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
