"""The command line: `serve` (also without a word), `check`, `backup`.

Exit codes: 0 for a clean stop, or for what was asked for; 1 for a server that could not start or that failed, or for a
backup that could not be made; 2 for a configuration or arguments that are refused.
"""

import json
import os
import re
import sys
from collections.abc import Awaitable, Callable, Iterator, Mapping
from pathlib import Path
from typing import Final

import click
import trio

from bamboo import __version__, log
from bamboo.config import Config, ProviderConfig, Section
from bamboo.config_loading import load_config
from bamboo.errors import ConfigError, StartError

EXIT_START: Final = 1
EXIT_CONFIG: Final = 2

config_option = click.option(
    "--config",
    "path",
    type=click.Path(path_type=Path),
    metavar="PATH",
    help="The configuration file. Without it ./bamboo.toml is read, if there is one.",
)


@click.group(invoke_without_command=True)
@config_option
@click.version_option(__version__, prog_name="bamboo", message="%(prog)s %(version)s")
@click.pass_context
def main(context: click.Context, path: Path | None) -> None:
    """Bamboo, a self-hosted server for LLM agents. Without a command it serves."""
    context.obj = path
    if context.invoked_subcommand is None:
        context.invoke(serve, path=None)


@main.command()
@config_option
@click.pass_obj
def serve(outer_path: Path | None, path: Path | None) -> None:
    """Serve until SIGTERM or SIGINT."""
    config = _load(path or outer_path)
    from bamboo.server import serve as serve_config  # noqa: PLC0415 - half of the start-up time, not for `check` and `--help`

    log.configure(config.log)
    run_to_the_end(serve_config, config)


@main.command()
@config_option
@click.pass_obj
def check(outer_path: Path | None, path: Path | None) -> None:
    """Check the configuration and print what is in force, without secrets."""
    config = _load(path or outer_path)
    click.echo("\n".join(effective_toml(config, os.environ)))


@main.command()
@config_option
@click.option("--force", is_flag=True, help="Replace FILE if it is there.")
@click.argument("file", type=click.Path(path_type=Path))
@click.pass_obj
def backup(outer_path: Path | None, path: Path | None, file: Path, *, force: bool) -> None:
    """Copy the database to FILE, while the server runs or not. A server can be started from the copy."""
    config = _load(path or outer_path)
    from bamboo.store.sqlite.backup import BackupError, TargetError, back_up  # noqa: PLC0415 - not for the others

    try:
        size_bytes = back_up(config.storage.path, file, force=force)
    except (BackupError, TargetError) as error:
        click.echo(f"bamboo: {error}", err=True)
        sys.exit(EXIT_CONFIG if isinstance(error, TargetError) else EXIT_START)
    click.echo(f"{file}: {size_bytes} bytes, checked")


def _load(path: Path | None) -> Config:
    # The providers know more of their keys than the configuration does. httpx comes with them: not for `--help`.
    from bamboo.llm.providers import check_providers  # noqa: PLC0415 - as it says

    try:
        config = load_config(path, os.environ)
        check_providers(config.llm, os.environ)
    except ConfigError as error:
        for line in str(error).splitlines():
            click.echo(f"bamboo: {line}", err=True)
        sys.exit(EXIT_CONFIG)
    return config


def run_to_the_end(serve_config: Callable[[Config], Awaitable[None]], config: Config) -> None:
    """Run the server. A component that cannot start (StartError, ConfigError) gives one line and its exit code.

    Any other exception goes on, to its traceback.
    """
    failures: list[Exception] = []
    try:
        trio.run(serve_config, config)
    except* (StartError, ConfigError) as group:
        failures += _leaves(group)
    if failures:
        for failure in failures:
            click.echo(f"bamboo: {failure}", err=True)
        sys.exit(EXIT_CONFIG if isinstance(failures[0], ConfigError) else EXIT_START)


def _leaves(group: BaseExceptionGroup[StartError | ConfigError]) -> Iterator[StartError | ConfigError]:
    for exception in group.exceptions:
        if isinstance(exception, BaseExceptionGroup):
            yield from _leaves(exception)
        else:
            yield exception


def effective_toml(config: Config, environ: Mapping[str, str]) -> Iterator[str]:
    """The configuration as the lines of a TOML file. A secret is `***`; an API key is only said to be there or not."""
    for name, section in config:
        if name != "server":
            yield ""
        yield f"[{name}]"
        yield from _keys_of(section)
    for name, provider in config.llm.providers.items():
        yield ""
        yield f"[llm.providers.{_key(name)}]"
        yield from _keys_of(provider, api_key_env=_key_state(provider, environ))


def _keys_of(section: Section, **remarks: str) -> Iterator[str]:
    for name, value in section:
        if value is None:
            yield f"# {name} is not set"
        elif not isinstance(value, dict):
            yield f"{name} = {_toml(value)}{remarks.get(name, '')}"


def _key_state(provider: ProviderConfig, environ: Mapping[str, str]) -> str:
    if provider.kind != "openai" or not provider.api_key_env:
        return ""
    return (
        "  # set" if environ.get(provider.api_key_env, "").strip() else "  # not set: the built-in demo model answers"
    )


def _key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else _toml(name)


def _toml(value: object) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, str | Path):
        # A TOML basic string is a JSON string but for DEL.
        return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, bool | int | float):
        return json.dumps(value)
    return '"***"'  # a secret, and the safe answer for whatever a later key may hold
