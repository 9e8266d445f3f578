"""What the configuration accepts, what it refuses, and what it says then."""

import contextlib
import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from pydantic import ValidationError

from bamboo.config import Config, GatewayConfig, ProviderConfig, ServerConfig
from bamboo.config_loading import DEFAULT_FILE, find_key, keys, load_config, variable_name
from bamboo.errors import ConfigError
from tests.support import reference


@pytest.fixture(autouse=True)
def _in_an_empty_directory(tmp_path: Path) -> Iterator[None]:
    with contextlib.chdir(tmp_path):
        yield


def load(text: str, environ: Mapping[str, str] | None = None) -> Config:
    DEFAULT_FILE.write_text(text, encoding="utf-8")
    return load_config(None, environ or {})


def refusal(text: str, environ: Mapping[str, str] | None = None) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(text, environ)
    return str(caught.value).splitlines()


def env_refusal(name: str, value: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(None, {name: value})
    return str(caught.value)


def test_neither_file_nor_environment_is_needed() -> None:
    assert load_config(None, {}) == Config()


def test_an_empty_file_is_the_defaults() -> None:
    assert load("") == Config()


def test_the_shipped_file_equals_the_defaults() -> None:
    assert load_config(reference.TOML_FILE, {}) == Config()


def test_the_shipped_file_has_every_key() -> None:
    shipped = tomllib.loads(_uncommented(reference.TOML_FILE.read_text(encoding="utf-8")))
    for path, _ in keys():
        table = shipped
        for step in path:
            table = table["openai" if step == "<name>" else step]


def test_the_shipped_file_is_good_with_everything_uncommented() -> None:
    config = load(_uncommented(reference.TOML_FILE.read_text(encoding="utf-8")))

    assert config.gateway.public_url == reference.EXAMPLES["gateway.public_url"]
    assert config.gateway_token == config.gateway.auth_token


def _uncommented(text: str) -> str:
    return re.sub(r"^# (?=\w+ = )", "", text, flags=re.MULTILINE)


def test_every_key_has_a_sentence_and_every_number_a_unit() -> None:
    for table, section in reference.sections():
        assert type(section).__doc__
        for name, field, value in reference.fields(section):
            description = field.description or ""
            assert description.endswith("."), f"{table}.{name}"
            assert len(description.split()) > 3, f"{table}.{name}"
            if isinstance(value, int | float) and not isinstance(value, bool):
                assert reference.units(name, description), f"{table}.{name} does not say what it counts"


def test_the_environment_wins_over_the_file_and_the_file_over_the_defaults() -> None:
    config = load("[server]\nport = 1\nkeep_alive_s = 5\n", {"BAMBOO_SERVER__PORT": "2"})

    assert (config.server.port, config.server.keep_alive_s, config.server.drain_s) == (2, 5, 30)


def test_a_named_file_is_read_instead_of_the_default_one(tmp_path: Path) -> None:
    DEFAULT_FILE.write_text("[server]\nport = 1\n")
    other = tmp_path / "other.toml"
    other.write_text("[server]\nport = 2\n")

    assert load_config(other, {}).server.port == 2


def test_every_key_can_be_set_in_the_environment() -> None:
    for path, _ in keys():
        named = tuple("openai" if step == "<name>" else step for step in path)
        section: object = Config()
        for step in named:
            section = section[step] if isinstance(section, dict) else getattr(section, step)
        text = reference.toml_value(section) if isinstance(section, tuple | bool | int | float) else str(section or "")

        assert load_config(None, {variable_name(named): text}) == Config(), variable_name(named)


def test_variables_are_parsed_as_the_keys_type() -> None:
    config = load_config(
        None,
        {
            "BAMBOO_GATEWAY__ENABLED": "false",
            "BAMBOO_SERVER__DRAIN_S": "2.5",
            "BAMBOO_SERVER__ALLOWED_HOSTS": '["Bamboo.example", "10.0.0.1"]',
            "BAMBOO_SERVER__AUTH_TOKEN": "12345",
            "BAMBOO_STORAGE__PATH": "/var/lib/bamboo/bamboo.db",
            "BAMBOO_AGENT__SYSTEM_PROMPT": "[not a list",
        },
    )

    assert config.gateway.enabled is False
    assert config.server.drain_s == 2.5
    assert config.server.allowed_hosts == ("bamboo.example", "10.0.0.1")
    assert config.server.auth_token is not None
    assert config.server.auth_token.get_secret_value() == "12345"
    assert config.storage.path == Path("/var/lib/bamboo/bamboo.db")
    assert config.agent.system_prompt == "[not a list"


def test_an_empty_variable_unsets_what_can_be_unset() -> None:
    config = load('[server]\nauth_token = "x"\n', {"BAMBOO_SERVER__AUTH_TOKEN": ""})

    assert config.server.auth_token is None


def test_a_provider_that_is_partly_given_keeps_the_shipped_rest() -> None:
    config = load('[llm.providers.openai]\nmodel = "x"\n', {"BAMBOO_LLM__PROVIDERS__OPENAI__CONNECT_TIMEOUT_S": "3"})

    assert config.llm.providers["openai"] == ProviderConfig(
        kind="openai",
        base_url="https://api.openai.com/v1",
        api_key_env="OPENAI_API_KEY",
        model="x",
        connect_timeout_s=3,
    )


def test_a_new_provider_stands_beside_the_shipped_one() -> None:
    config = load(
        '[llm]\ndefault_provider = "ollama"\n[llm.providers.ollama]\nkind = "openai"\nmodel = "qwen3"\n',
        {"BAMBOO_LLM__PROVIDERS__OLLAMA__BASE_URL": "http://127.0.0.1:11434/v1"},
    )

    assert list(config.llm.providers) == ["openai", "ollama"]
    assert config.llm.providers["ollama"].base_url == "http://127.0.0.1:11434/v1"
    assert config.llm.providers["ollama"].api_key_env == ""


def test_what_is_given_in_code_is_not_merged_with_the_shipped_providers() -> None:
    demo = ProviderConfig(kind="scripted", model="demo")

    config = Config.model_validate({"llm": {"default_provider": "demo", "providers": {"demo": demo}}})

    assert config.llm.providers == {"demo": demo}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[server]\nprot = 1\n", "bamboo.toml: server.prot: no such key; did you mean server.port?"),
        (
            "[server]\nwindow_bytes = 4096\n",
            "bamboo.toml: server.window_bytes: no such key; the nearest key is stream.window_bytes",
        ),
        ("[sever]\n", "bamboo.toml: sever: no such key; the nearest key is server."),
        ("prot = 1\n", "bamboo.toml: prot: no such key; the nearest key is server.port"),
        (
            "[llm.providers.openai]\nmodle = 'x'\n",
            "bamboo.toml: llm.providers.openai.modle: no such key; did you mean llm.providers.openai.model?",
        ),
        ('[server]\nport = "8081"\n', "bamboo.toml: server.port: must be a valid integer"),
        ("[server]\nport = 8081.0\n", "bamboo.toml: server.port: must be a valid integer"),
        ("[server]\nport = true\n", "bamboo.toml: server.port: must be a valid integer"),
        ("[server]\nport = 65536\n", "bamboo.toml: server.port: must be less than or equal to 65535"),
        ("[server]\nport = -1\n", "bamboo.toml: server.port: must be greater than or equal to 0"),
        ("[server]\nauth_token = 1\n", "bamboo.toml: server.auth_token: must be"),
        ('[server]\nauth_token = ""\n', "bamboo.toml: server.auth_token: must be 1 to 4096 visible ASCII"),
        ('[server]\nauth_token = "two words"\n', "bamboo.toml: server.auth_token: must be 1 to 4096 visible ASCII"),
        ('[server]\nallowed_hosts = "x"\n', "bamboo.toml: server.allowed_hosts: must be"),
        ('[server]\nallowed_hosts = ["a", 1]\n', "bamboo.toml: server.allowed_hosts.1: must be a valid string"),
        ("[server]\ndrain_s = inf\n", "bamboo.toml: server.drain_s: must be a finite number"),
        ("[server]\nkeep_alive_s = 0\n", "bamboo.toml: server.keep_alive_s: must be greater than 0"),
        ("[storage]\nretention_days = nan\n", "bamboo.toml: storage.retention_days: must be"),
        ("[storage]\nretention_days = 2026-01-01\n", "bamboo.toml: storage.retention_days: must be a valid number"),
        ("[storage]\npath = 3\n", "bamboo.toml: storage.path: "),
        ('[storage]\npath = ""\n', "bamboo.toml: storage.path: must be the path"),
        ('[storage]\nsynchronous = "off"\n', "bamboo.toml: storage.synchronous: must be 'normal' or 'full'"),
        ("server = 1\n", "bamboo.toml: server: must be a table, [server]"),
        ("[llm]\nproviders = []\n", "bamboo.toml: llm.providers: must be a table"),
        ("[llm.providers.Big]\n", "bamboo.toml: llm.providers.Big: must be 1 to 64 of the characters a-z"),
        ('[llm.providers.x]\nmodel = "x"\n', "bamboo.toml: llm.providers.x.kind: is missing"),
        (
            '[llm.providers.x]\nkind = "openai"\nmodel = "x"\n',
            "bamboo.toml: llm.providers.x: needs a base_url",
        ),
        (
            '[llm.providers.x]\nkind = "anthropic"\nmodel = "x"\n',
            'bamboo.toml: llm.providers.x.kind: "anthropic" comes with a later version',
        ),
        (
            '[llm]\ndefault_provider = "opneai"\n',
            "bamboo.toml: llm.default_provider: there is no provider 'opneai' under llm.providers; did you mean",
        ),
    ],
)
def test_a_mistake_in_the_file_is_told_with_file_and_key(text: str, told: str) -> None:
    lines = refusal(text)

    assert any(line.startswith(told) for line in lines), lines


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("BAMBOO_SERVER__PORT", "eighty", "BAMBOO_SERVER__PORT: server.port: must be a valid integer"),
        ("BAMBOO_SERVER__PORT", "", "BAMBOO_SERVER__PORT: server.port: must be a valid integer"),
        ("BAMBOO_SERVER__PORT", "70000", "BAMBOO_SERVER__PORT: server.port: must be less than or equal to 65535"),
        ("BAMBOO_GATEWAY__ENABLED", "perhaps", "BAMBOO_GATEWAY__ENABLED: gateway.enabled: must be a valid boolean"),
        ("BAMBOO_SERVER__ALLOWED_HOSTS", "a,b", "BAMBOO_SERVER__ALLOWED_HOSTS: server.allowed_hosts: must be a list"),
        ("BAMBOO_SERVER__ALLOWED_HOSTS", "[1]", "BAMBOO_SERVER__ALLOWED_HOSTS: server.allowed_hosts: must be a list"),
        ("BAMBOO_AGENT__SYSTEM_PROMPT", "\udcff", "BAMBOO_AGENT__SYSTEM_PROMPT: agent.system_prompt: is not UTF-8"),
        ("BAMBOO_SERVER_PORT", "1", "BAMBOO_SERVER_PORT: no such key; the nearest is BAMBOO_SERVER__PORT"),
        ("BAMBOO_PORT", "1", "BAMBOO_PORT: no such key; the nearest is BAMBOO_"),
        ("BAMBOO_SERVER", "{}", "BAMBOO_SERVER: no such key; the nearest is BAMBOO_SERVER__"),
        ("BAMBOO_SERVER__PROT", "1", "BAMBOO_SERVER__PROT: no such key; the nearest is BAMBOO_SERVER__PORT"),
        ("BAMBOO_SERVER__PORT__X", "1", "BAMBOO_SERVER__PORT__X: no such key; the nearest is BAMBOO_SERVER__PORT"),
        ("BAMBOO_LLM__PROVIDERS", "{}", "BAMBOO_LLM__PROVIDERS: no such key"),
        ("BAMBOO_LLM__PROVIDERS__X", "{}", "BAMBOO_LLM__PROVIDERS__X: no such key"),
        ("BAMBOO_LLM__PROVIDERS____MODEL", "x", "BAMBOO_LLM__PROVIDERS____MODEL: no such key"),
        ("BAMBOO_LLM__PROVIDERS__X__MODEL", "m", "BAMBOO_LLM__PROVIDERS__X__MODEL: llm.providers.x.kind: is missing"),
        ("BAMBOO_CONFIG", "/etc/bamboo.toml", "BAMBOO_CONFIG: no such key"),
    ],
)
def test_a_mistake_in_the_environment_is_told_with_the_variable(name: str, value: str, told: str) -> None:
    assert env_refusal(name, value).startswith(told)


def test_other_variables_are_nobodys_business() -> None:
    environ = {
        "bamboo_buildKey": "set by a build server of the same name",
        "BAMBOOZLED": "1",
        "BAMBOO_SERVICE_HOST": "10.0.0.7",
        "BAMBOO_SERVICE_PORT": "8081",
        "BAMBOO_SERVICE_PORT_HTTP": "8081",
        "BAMBOO_PORT": "tcp://10.0.0.7:8081",
        "BAMBOO_PORT_8081_TCP": "tcp://10.0.0.7:8081",
        "BAMBOO_PORT_8081_TCP_ADDR": "10.0.0.7",
        "BAMBOO_SERVER_PORT": "tcp://10.0.0.7:8081",
    }

    assert load_config(None, environ) == Config()


def test_a_providers_key_variable_may_have_our_prefix() -> None:
    text = '[llm.providers.openai]\napi_key_env = "BAMBOO_OPENAI_KEY"\n'

    assert load(text, {"BAMBOO_OPENAI_KEY": "sk-x"}).llm.providers["openai"].api_key_env == "BAMBOO_OPENAI_KEY"


def test_all_mistakes_are_told_at_once() -> None:
    lines = refusal("[server]\nprot = 1\nport = 'x'\n", {"BAMBOO_LOG__LEVEL": "loud", "BAMBOO_NO": "1"})

    assert len(lines) == 4


def test_no_value_is_shown() -> None:
    lines = refusal(
        '[server]\nauth_token = "hunter two"\nallowed_hosts = ["hunter two"]\n'
        '[llm.providers.openai]\napi_key_env = "hunter-two"\nbase_url = "https://hunter:two@example"\n',
        {"BAMBOO_SERVER__DRAIN_S": "hunter two"},
    )

    assert len(lines) == 5
    assert "hunter" not in "".join(lines)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("port = \n", "is not TOML: Invalid value (at line 1"),
        ("[server]\nport = 1\nport = 2\n", "is not TOML: Cannot overwrite a value (at line 3"),
    ],
)
def test_what_is_not_toml_is_told_with_its_place(text: str, told: str) -> None:
    assert refusal(text)[0].startswith(f"bamboo.toml: {told}")


def test_a_file_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    not_utf8 = tmp_path / "latin.toml"
    not_utf8.write_bytes(b"# caf\xe9\n")

    for path, told in (
        (tmp_path / "none.toml", "No such file"),
        (tmp_path, "Is a directory"),
        (not_utf8, "is not UTF-8 (byte 5)"),
    ):
        with pytest.raises(ConfigError, match=re.escape(told)) as caught:
            load_config(path, {})
        assert str(caught.value).startswith(f"{path}: ")


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "[::1]", "localhost", "LOCALHOST", "127.9.9.9"])
def test_a_loopback_address_needs_no_token(host: str) -> None:
    ServerConfig(host=host)
    Config(server=ServerConfig(host=host))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "bamboo.example", "::ffff:10.0.0.1"])  # noqa: S104 - refused here
def test_any_other_address_needs_a_token(host: str) -> None:
    with pytest.raises(ValidationError, match=r"needs server\.auth_token"):
        Config(server=ServerConfig(host=host))
    bind = f"[{host}]:9" if ":" in host else f"{host}:9"
    with pytest.raises(ValidationError, match=r"needs gateway\.auth_token or server\.auth_token"):
        Config(gateway=GatewayConfig(bind=bind))

    Config.model_validate({"server": {"host": host, "auth_token": "x"}, "gateway": {"bind": bind}})
    Config.model_validate({"gateway": {"bind": bind, "auth_token": "x"}})
    Config.model_validate({"gateway": {"bind": bind, "enabled": False}})


def test_a_gateway_token_does_not_open_the_http_server() -> None:
    with pytest.raises(ValidationError, match=r"needs server\.auth_token"):
        Config.model_validate({"server": {"host": "10.0.0.1"}, "gateway": {"auth_token": "x"}})


@pytest.mark.parametrize(
    "host", ["", "256.1.1.1", "127.0.0.1.5", "http://x", "a b", "-x", "a..b", "x:80", "[::1", "[x]"]
)
def test_a_bad_host_is_refused(host: str) -> None:
    with pytest.raises(ValidationError, match="must be an IP address or a host name"):
        ServerConfig(host=host)


@pytest.mark.parametrize(
    "bind", ["", "127.0.0.1", ":1", "127.0.0.1:", "127.0.0.1:x", "127.0.0.1:65536", "::1:80", "a:+1"]
)
def test_a_bad_bind_is_refused(bind: str) -> None:
    with pytest.raises(ValidationError, match="must be"):
        GatewayConfig(bind=bind)


@pytest.mark.parametrize(
    ("bind", "host", "port"),
    [("127.0.0.1:18790", "127.0.0.1", 18790), ("[::1]:0", "::1", 0), ("localhost:65535", "localhost", 65535)],
)
def test_a_bind_is_a_host_and_a_port(bind: str, host: str, port: int) -> None:
    gateway = GatewayConfig(bind=bind)

    assert (gateway.host, gateway.port) == (host, port)


@pytest.mark.parametrize(
    ("host", "bind", "clash"),
    [
        ("127.0.0.1", "127.0.0.1:8081", True),
        ("::1", "[0:0:0:0:0:0:0:1]:8081", True),
        ("localhost", "127.0.0.1:8081", True),
        ("0.0.0.0", "127.0.0.1:8081", True),  # noqa: S104 - compared with, not bound
        ("127.0.0.1", "[::]:8081", True),
        ("127.0.0.1", "127.0.0.2:8081", False),
        ("127.0.0.1", "[::1]:8081", False),
        ("127.0.0.1", "127.0.0.1:8082", False),
    ],
)
def test_two_listeners_on_one_port_are_refused(host: str, bind: str, *, clash: bool) -> None:
    values = {"server": {"host": host, "auth_token": "x"}, "gateway": {"bind": bind}}
    if clash:
        with pytest.raises(ValidationError, match="cannot both listen on port 8081"):
            Config.model_validate(values)
        Config.model_validate({**values, "gateway": {"bind": bind, "enabled": False}})
    else:
        Config.model_validate(values)


def test_two_listeners_may_both_take_a_free_port() -> None:
    Config(server=ServerConfig(port=0), gateway=GatewayConfig(bind="127.0.0.1:0"))


def test_a_clash_is_told_at_the_key_that_was_set() -> None:
    assert env_refusal("BAMBOO_SERVER__PORT", "18790").startswith("BAMBOO_SERVER__PORT: server.port: ")
    assert env_refusal("BAMBOO_GATEWAY__BIND", "127.0.0.1:8081").startswith("BAMBOO_GATEWAY__BIND: gateway.bind: ")


@pytest.mark.parametrize(
    "url",
    [
        "",
        "api.openai.com",
        "ftp://x/v1",
        "https://",
        "https://u:p@x/v1",
        "https://x/v1?a=b",
        "https://x:y",
        "http://a b",
    ],
)
def test_a_bad_base_url_is_refused(url: str) -> None:
    with pytest.raises(ValidationError):
        ProviderConfig(kind="openai", base_url=url, model="x")


@pytest.mark.parametrize("origin", ["*", "bamboo.example", "https://x/", "https://x/y", "https://u@x", "null"])
def test_a_bad_origin_is_refused(origin: str) -> None:
    with pytest.raises(ValidationError, match="must be an origin"):
        GatewayConfig(allowed_origins=(origin,))


def test_the_gateways_token_is_its_own_or_else_the_servers() -> None:
    own = Config.model_validate({"server": {"auth_token": "a"}, "gateway": {"auth_token": "b"}})
    shared = Config.model_validate({"server": {"auth_token": "a"}})

    assert own.gateway_token is not None
    assert own.gateway_token.get_secret_value() == "b"
    assert shared.gateway_token is not None
    assert shared.gateway_token.get_secret_value() == "a"
    assert Config().gateway_token is None


def test_a_section_is_no_key() -> None:
    assert find_key(("server",)) is None
    assert find_key(("server", "port")) is not None
    assert find_key(("llm", "providers", "x", "model")) is not None
    assert find_key(()) is None
