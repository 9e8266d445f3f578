"""The configured providers, opened together: who answers, and who stands in for one that has no key."""

from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Final

from bamboo.config import LlmConfig, ProviderConfig
from bamboo.errors import ConfigError
from bamboo.llm.base import Provider, Providers
from bamboo.llm.openai import open_openai
from bamboo.llm.scripted import ScriptedProvider

_DEMO_MODEL: Final = "demo"


@asynccontextmanager
async def open_providers(config: LlmConfig, environ: Mapping[str, str]) -> AsyncIterator[Providers]:
    """Open every configured provider; leaving closes their connections. No provider is contacted before it is asked
    something.

    Keys are read from `environ`, here and only here. A provider whose `api_key_env` names a variable that is missing or
    empty is stood in for, under its name, by the demo (`demo` is true). Raises ConfigError, before anything is opened.
    """
    check_providers(config, environ)
    async with AsyncExitStack() as stack:
        by_name: dict[str, Provider] = {}
        for name, provider in config.providers.items():
            by_name[name] = await _open(stack, name, provider, environ)
        yield Providers(by_name, config.default_provider, config.fallback)


async def _open(stack: AsyncExitStack, name: str, config: ProviderConfig, environ: Mapping[str, str]) -> Provider:
    if config.kind == "scripted":
        return ScriptedProvider(name, script=config.script, default_model=config.model)
    key = _key(config, environ)
    if config.api_key_env and key is None:
        return ScriptedProvider(name, default_model=_DEMO_MODEL, demo=True, key_env=config.api_key_env)
    return await stack.enter_async_context(
        open_openai(
            name,
            base_url=config.base_url,
            default_model=config.model,
            api_key=key,
            connect_timeout_s=config.connect_timeout_s,
        )
    )


def check_providers(config: LlmConfig, environ: Mapping[str, str]) -> None:
    """Raises ConfigError for what could not answer: its message names the key of the configuration, never a secret."""
    chosen = [("default_provider", config.default_provider), *(("fallback", name) for name in config.fallback)]
    for where, name in chosen:
        if name not in config.providers:
            names = ", ".join(config.providers) or "none"
            raise ConfigError(f"llm.{where}: there is no provider {name!r} (there is: {names})")
    for name, provider in config.providers.items():
        where = f"llm.providers.{name}"
        if provider.kind == "scripted":
            try:
                ScriptedProvider(name, script=provider.script)
            except ValueError as error:
                raise ConfigError(f"{where}.script: {error}") from error
            continue
        key = _key(provider, environ)
        if key is not None and not (key.isascii() and key.isprintable() and " " not in key):
            raise ConfigError(
                f"{where}.api_key_env: {provider.api_key_env} holds no key: it has a character that no key has"
            )


def _key(config: ProviderConfig, environ: Mapping[str, str]) -> str | None:
    return environ.get(config.api_key_env, "").strip() or None if config.api_key_env else None
