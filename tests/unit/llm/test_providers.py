"""Opening the configured providers: keys, the demo that stands in, and what is refused."""

import pytest

from bamboo.config import LlmConfig, ProviderConfig
from bamboo.errors import ClientError, ConfigError, ErrorCode
from bamboo.llm.providers import open_providers

OPENAI = ProviderConfig(kind="openai", base_url="http://127.0.0.1:1/v1", api_key_env="THE_KEY", model="m1")
KEYLESS = ProviderConfig(kind="openai", base_url="http://127.0.0.1:1/v1", model="m2")
SCRIPTED = ProviderConfig(kind="scripted", script="echo", model="echo")
SECRET = "sk-very-secret"


def config(default: str = "a", fallback: tuple[str, ...] = (), **providers: ProviderConfig) -> LlmConfig:
    return LlmConfig(default_provider=default, fallback=fallback, providers=providers)


async def test_every_entry_is_a_provider_under_its_name() -> None:
    async with open_providers(config(a=OPENAI, b=KEYLESS, c=SCRIPTED), {"THE_KEY": SECRET}) as providers:
        assert {name: (p.name, p.kind, p.default_model, p.demo) for name, p in providers.by_name.items()} == {
            "a": ("a", "openai", "m1", False),
            "b": ("b", "openai", "m2", False),
            "c": ("c", "scripted", "echo", False),
        }
        assert providers.resolve(None, None)[0].name == "a"
        assert providers.resolve("c", "other")[1] == "other"


@pytest.mark.parametrize("environ", [{}, {"THE_KEY": ""}, {"THE_KEY": "  \n"}])
async def test_a_provider_without_its_key_is_stood_in_for_by_the_demo(environ: dict[str, str]) -> None:
    async with open_providers(config(a=OPENAI), environ) as providers:
        provider, model = providers.resolve(None, None)

        assert (provider.name, provider.kind, provider.demo, model) == ("a", "scripted", True, "demo")


async def test_no_key_is_ever_shown() -> None:
    async with open_providers(config(a=OPENAI), {"THE_KEY": SECRET}) as providers:
        assert SECRET not in repr(providers)
        assert SECRET not in repr(vars(providers.by_name["a"]))


@pytest.mark.parametrize("key", ["sk-\x00a", "sk-a b", "sk-ключ"])
async def test_a_key_that_no_header_can_carry_is_refused_without_being_shown(key: str) -> None:
    with pytest.raises(ConfigError, match=r"llm\.providers\.a\.api_key_env: THE_KEY") as refused:
        async with open_providers(config(a=OPENAI), {"THE_KEY": key}):
            pass

    assert key not in str(refused.value)


async def test_a_line_end_behind_the_key_is_not_part_of_it() -> None:
    async with open_providers(config(a=OPENAI), {"THE_KEY": f"{SECRET}\n"}) as providers:
        assert providers.by_name["a"].kind == "openai"


async def test_a_default_that_is_not_configured_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"llm\.default_provider: there is no provider 'x' \(there is: a\)"):
        async with open_providers(config("x", a=SCRIPTED), {}):
            pass


async def test_an_unknown_script_is_refused() -> None:
    wrong = ProviderConfig(kind="scripted", script="nonsense", model="m")

    with pytest.raises(ConfigError, match=r"llm\.providers\.a\.script: .*nonsense"):
        async with open_providers(config(a=wrong), {}):
            pass


async def test_a_chat_with_an_unknown_provider_is_the_clients_mistake() -> None:
    async with open_providers(config(a=SCRIPTED), {}) as providers:
        with pytest.raises(ClientError) as refused:
            providers.resolve("b", None)

        assert refused.value.code is ErrorCode.INVALID_REQUEST


@pytest.mark.parametrize(
    ("fallback", "asked"),
    [
        ((), [("a", "m2")]),
        (("b",), [("a", "m2"), ("b", "m2")]),
        (("c", "b"), [("a", "m2"), ("c", "echo"), ("b", "m2")]),
        (("a", "b", "a", "b"), [("a", "m2"), ("b", "m2")]),
        (("d", "b"), [("a", "m2"), ("b", "m2")]),
    ],
    ids=["none", "one", "in their order", "the default and repetitions", "a demo"],
)
async def test_the_default_is_asked_then_each_fallback_once_for_its_own_model(
    fallback: tuple[str, ...], asked: list[tuple[str, str]]
) -> None:
    """`d` has no key: a demo stands in for it."""
    async with open_providers(config("a", fallback, a=KEYLESS, b=KEYLESS, c=SCRIPTED, d=OPENAI), {}) as providers:
        assert [(provider.name, model) for provider, model in providers.in_turn()] == asked


async def test_a_demo_that_is_the_default_answers() -> None:
    async with open_providers(config("a", ("b",), a=OPENAI, b=KEYLESS), {}) as providers:
        assert [provider.demo for provider, _ in providers.in_turn()] == [True, False]


async def test_a_fallback_that_is_not_configured_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"llm\.fallback: there is no provider 'x' \(there is: a\)"):
        async with open_providers(config("a", ("x",), a=SCRIPTED), {}):
            pass


async def test_the_default_model_of_a_provider_that_is_no_more_is_nothing() -> None:
    async with open_providers(config(a=OPENAI), {"THE_KEY": SECRET}) as providers:
        assert providers.default_model("a") == "m1"
        assert providers.default_model("gone") == ""
