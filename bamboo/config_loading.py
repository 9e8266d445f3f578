"""Reads the configuration: the environment, the file, the shipped providers; tells the place of every mistake.

The first that has a key wins: `BAMBOO_SECTION__KEY` in the environment, the TOML file, the defaults. A value in the
file has to have the key's type; a variable's text is parsed as that type.
"""

import difflib
import json
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, get_args, get_origin

from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings, InitSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict

from bamboo.config import Config, ProviderConfig, Section, shipped_providers
from bamboo.errors import ConfigError

DEFAULT_FILE: Final = Path("bamboo.toml")
"""Read if it is there and no other file is named. Relative to the working directory, as every path in it."""

ENV_PREFIX: Final = "BAMBOO_"

KeyPath = tuple[str, ...]

_SERVICE_LINK: Final = re.compile(
    r"BAMBOO_([A-Z0-9_]+_)?(SERVICE_HOST|SERVICE_PORT(_[A-Z0-9_]+)?|PORT_[0-9]+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)"
)
_SERVICE_ADDRESS: Final = re.compile(r"(tcp|udp|sctp)://")
"""What Kubernetes puts into each pod's environment for a Service named `bamboo` or `bamboo-…`: nobody's mistake."""


def load_config(path: Path | None, environ: Mapping[str, str]) -> Config:
    """The configuration in force. `path` None is `./bamboo.toml` if there is one; a named file has to be there.

    Raises ConfigError, one line per mistake: the file or variable, the dotted key, what is wrong, the nearest known key
    for one that is unknown. No line shows a value, since it may be a secret.
    """
    file = _read_file(path)
    environment = _read_environment(environ)
    sources = (environment, file)
    problems = list(environment.problems)
    config: Config | None = None
    try:
        config = _merge(*(source.values for source in sources), _shipped())
    except ValidationError as error:
        problems += [_told(item, sources) for item in error.errors(include_url=False, include_input=False)]
    named = set(_key_variables(source.values for source in sources))
    problems += [problem for name, problem in environment.unknown.items() if name not in named]
    if problems:
        raise ConfigError("\n".join(dict.fromkeys(problems)))
    assert config is not None
    return config


@dataclass(slots=True)
class _Source:
    """One place that values come from. `names` says for a key path who set it, as a person would look for it."""

    name: str
    values: dict[str, Any] = field(default_factory=dict)
    names: dict[KeyPath, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    unknown: dict[str, str] = field(default_factory=dict)
    """Variables with our prefix that are no key, and what to say of them."""

    def who(self, path: KeyPath) -> tuple[int, str]:
        """How much of `path` this source has, and the name of who has it."""
        depth, found = 0, self.name
        for known, name in self.names.items():
            common = _common(known, path)
            if common > depth:
                depth, found = common, name
        return depth, found


def _common(a: KeyPath, b: KeyPath) -> int:
    for index, (one, other) in enumerate(zip(a, b, strict=False)):
        if one != other:
            return index
    return min(len(a), len(b))


def _merge(*documents: Mapping[str, Any]) -> Config:
    """The documents merged key by key, the first one's values winning, and checked. Raises ValidationError."""

    class Settings(Config, BaseSettings):
        model_config = SettingsConfigDict(extra="forbid", frozen=True, strict=True, hide_input_in_errors=True)

        @classmethod
        def settings_customise_sources(
            cls, settings_cls: type[BaseSettings], *_: PydanticBaseSettingsSource, **__: PydanticBaseSettingsSource
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            return tuple(InitSettingsSource(settings_cls, dict(document)) for document in documents)

    settings = Settings()
    return Config(**{name: getattr(settings, name) for name in Config.model_fields})


def _shipped() -> dict[str, Any]:
    return {
        "llm": {
            "providers": {
                name: provider.model_dump(exclude_unset=True) for name, provider in shipped_providers().items()
            }
        }
    }


def _read_file(path: Path | None) -> _Source:
    if path is None:
        if not DEFAULT_FILE.exists():
            return _Source("the defaults")
        path = DEFAULT_FILE
    try:
        with path.open("rb") as stream:
            values = tomllib.load(stream)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 (byte {error.start})") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: is not TOML: {error}") from error
    return _Source(str(path), values, {key: str(path) for key in _paths(values)})


def _paths(values: Mapping[str, Any], above: KeyPath = ()) -> Iterator[KeyPath]:
    for key, value in values.items():
        yield (*above, key)
        if isinstance(value, dict):
            yield from _paths(value, (*above, key))


def _read_environment(environ: Mapping[str, str]) -> _Source:
    source = _Source("the environment")
    for name in sorted(environ):
        if not name.startswith(ENV_PREFIX):
            continue
        text = environ[name]
        path = tuple(name.removeprefix(ENV_PREFIX).lower().split("__"))
        found = find_key(path)
        if found is None:
            if not (_SERVICE_LINK.fullmatch(name) or (name.endswith("_PORT") and _SERVICE_ADDRESS.match(text))):
                source.unknown[name] = f"{name}: no such key{_hint_for_variable(path)}"
            continue
        source.names[path] = name
        try:
            value = _parse(found, text)
        except ValueError as error:
            source.problems.append(f"{name}: {'.'.join(path)}: {_first_message(error)}")
            continue
        table = source.values
        for step in path[:-1]:
            table = table.setdefault(step, {})
        table[path[-1]] = value
    return source


def find_key(path: KeyPath) -> FieldInfo | None:
    """The field of a dotted key; None for what is no key, a section included."""
    model: type[Section] | None = Config
    field_info: FieldInfo | None = None
    steps = iter(path)
    for step in steps:
        field_info = model.model_fields.get(step) if model is not None else None
        if field_info is None:
            return None
        model = _section_of(field_info)
        if model is ProviderConfig and next(steps, "") == "":
            return None
    return None if model is not None else field_info


def _section_of(field_info: FieldInfo) -> type[Section] | None:
    """The section that a field holds: itself, or by name as `llm.providers` does."""
    annotation = (
        get_args(field_info.annotation)[-1] if get_origin(field_info.annotation) is dict else field_info.annotation
    )
    return annotation if isinstance(annotation, type) and issubclass(annotation, Section) else None


def _parse(field_info: FieldInfo, text: str) -> object:
    """A variable's text as what the file would hold; bounds are checked later. Raises ValueError.

    No text at all is "not set" for a key that can be that.
    """
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("is not UTF-8")
    annotation = field_info.annotation
    if not text and type(None) in get_args(annotation):
        return None
    if annotation in (bool, int, float):
        return TypeAdapter(annotation).validate_strings(text)
    if get_origin(annotation) is tuple:
        return _parse_list(text)
    return text


def _parse_list(text: str) -> list[str]:
    try:
        items = json.loads(text)
    except ValueError:
        items = None
    if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
        raise ValueError('must be a list as in the file: ["one", "two"]')
    return items


def _first_message(error: ValueError) -> str:
    if isinstance(error, ValidationError):
        return _plain(error.errors(include_url=False, include_input=False)[0])
    return str(error)


def _key_variables(documents: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """The variables that `api_key_env` names: one of them may well begin with BAMBOO_."""
    for document in documents:
        llm = document.get("llm")
        providers = llm.get("providers") if isinstance(llm, dict) else None
        for provider in providers.values() if isinstance(providers, dict) else ():
            name = provider.get("api_key_env") if isinstance(provider, dict) else None
            if isinstance(name, str):
                yield name


def _told(item: ErrorDetails, sources: Sequence[_Source]) -> str:
    """One mistake in one line: who set it, the key, what is wrong."""
    if item["type"] == "misplaced":
        candidates = [tuple(key.split(".")) for key in item["ctx"]["keys"]]
    else:
        candidates = [tuple(str(step) for step in item["loc"] if step != "[key]")]
    for path in candidates:
        for source in sources:
            depth, name = source.who(path)
            if depth == len(path):
                return f"{name}: {'.'.join(path)}: {_plain(item, path)}"
    path = candidates[0]
    name = max((source.who(path) for source in reversed(sources)), key=lambda found: found[0])[1]
    return f"{name}: {'.'.join(path)}: {_plain(item, path)}"


def _plain(item: ErrorDetails, path: KeyPath = ()) -> str:
    """pydantic's message in our words."""
    kind = item["type"]
    if kind == "extra_forbidden":
        return f"no such key{_hint(path)}"
    if kind == "missing":
        return "is missing"
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        return f"must be a table, [{'.'.join(path)}]"
    if kind == "string_pattern_mismatch":
        return "must be 1 to 64 of the characters a-z 0-9 _ . -, a letter or digit first"
    return item["msg"].removeprefix("Value error, ").replace("Input should be", "must be", 1)


def keys(model: type[Section] = Config, above: KeyPath = ()) -> Iterator[tuple[KeyPath, FieldInfo]]:
    """Every key there is, in order. The providers' keys are those of `<name>`."""
    for name, field_info in model.model_fields.items():
        path = (*above, name)
        section = _section_of(field_info)
        if section is None:
            yield path, field_info
        else:
            yield from keys(section, (*path, "<name>") if section is ProviderConfig else path)


def _hint(path: KeyPath) -> str:
    """The nearest known key: a sibling that looks like it, the same key of another section, any that looks like it."""
    known = [key for key, _ in keys()]
    if path[:2] == ("llm", "providers") and len(path) > 3:
        known = [(*path[:3], *key[3:]) if key[:2] == path[:2] and len(key) > 3 else key for key in known]
    siblings = [key for key in known if key[:-1] == path[:-1]]
    near = difflib.get_close_matches(path[-1], [key[-1] for key in siblings], 1, cutoff=0.6)
    if near:
        return f"; did you mean {'.'.join((*path[:-1], near[0]))}?"
    elsewhere = [".".join(key) for key in known if key[-1] == path[-1]]
    dotted = difflib.get_close_matches(".".join(path), elsewhere or [".".join(key) for key in known], 1, cutoff=0.0)
    return f"; the nearest key is {dotted[0]}"


def _hint_for_variable(path: KeyPath) -> str:
    """As `_hint`, for a variable: the likely slip is one underscore for two."""
    names = {variable_name(key): key for key, _ in keys()}
    spelt = ENV_PREFIX + "__".join(path).upper()
    near = difflib.get_close_matches(spelt, names, 1, cutoff=0.0)
    return f"; the nearest is {near[0]}"


def variable_name(path: KeyPath) -> str:
    """The environment variable of a dotted key."""
    return ENV_PREFIX + "__".join(path).upper()
