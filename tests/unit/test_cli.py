"""The command line: what it prints, where, and the code that it exits with."""

import contextlib
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
from click.testing import CliRunner, Result

from bamboo import __version__
from bamboo.cli import effective_toml, main, run_to_the_end
from bamboo.config import Config, ProviderConfig
from bamboo.config_loading import load_config
from bamboo.errors import ConfigError, StartError


@pytest.fixture(autouse=True)
def _in_an_empty_directory(tmp_path: Path) -> Iterator[None]:
    with contextlib.chdir(tmp_path):
        yield


def run(*arguments: str, **environ: str) -> Result:
    inherited = {name: None for name in os.environ if name.startswith("BAMBOO_") or name == "OPENAI_API_KEY"}
    return CliRunner().invoke(main, arguments, env={**inherited, **environ})


def module(*arguments: str) -> "subprocess.CompletedProcess[str]":
    clean = {name: text for name, text in os.environ.items() if not name.startswith("BAMBOO_")}
    command = [sys.executable, "-m", "bamboo", *arguments]
    return subprocess.run(command, env=clean, capture_output=True, text=True, timeout=60, check=False)


def test_the_version_is_told() -> None:
    assert run("--version").stdout == f"bamboo {__version__}\n"


def test_check_prints_the_configuration_as_toml_that_can_be_read_again(tmp_path: Path) -> None:
    Path("bamboo.toml").write_text(
        '[server]\nport = 9\n[llm.providers."my.own"]\nkind = "scripted"\nmodel = "a\\"\\u007fb"\n'
    )

    result = run("check", BAMBOO_AGENT__SYSTEM_PROMPT="é\n\x7f", BAMBOO_AGENT__IDLE_TIMEOUT_S="1e300")

    assert (result.exit_code, result.stderr) == (0, "")
    printed = tmp_path / "printed.toml"
    printed.write_text(result.stdout, encoding="utf-8")
    again = load_config(printed, {})
    assert again == load_config(
        None, {"BAMBOO_AGENT__SYSTEM_PROMPT": "é\n\x7f", "BAMBOO_AGENT__IDLE_TIMEOUT_S": "1e300"}
    )


def test_check_shows_no_secret() -> None:
    result = run(
        "check",
        BAMBOO_SERVER__AUTH_TOKEN="hunter2",
        BAMBOO_GATEWAY__AUTH_TOKEN="hunter3",
        OPENAI_API_KEY="sk-hunter4",
    )

    assert result.exit_code == 0
    assert "hunter" not in result.output
    assert tomllib.loads(result.stdout)["server"]["auth_token"] == "***"
    assert tomllib.loads(result.stdout)["gateway"]["auth_token"] == "***"


def test_check_tells_whether_a_providers_key_is_set() -> None:
    line = 'api_key_env = "OPENAI_API_KEY"  # '

    assert f"{line}not set: the built-in demo model answers" in run("check").stdout
    assert f"{line}not set: the built-in demo model answers" in run("check", OPENAI_API_KEY="").stdout
    assert f"{line}set\n" in run("check", OPENAI_API_KEY="sk-x").stdout


def test_a_provider_without_a_key_is_left_alone() -> None:
    ollama = ProviderConfig(kind="openai", base_url="http://127.0.0.1:11434/v1", model="qwen3")
    config = Config.model_validate({"llm": {"default_provider": "ollama", "providers": {"ollama": ollama}}})

    assert 'api_key_env = ""' in list(effective_toml(config, {}))


@pytest.mark.parametrize(
    "arguments",
    [
        ("--config", "other.toml", "check"),
        ("check", "--config", "other.toml"),
        ("--config", "x", "check", "--config", "other.toml"),
    ],
)
def test_the_file_may_be_named_before_and_after_the_command(arguments: tuple[str, ...]) -> None:
    Path("other.toml").write_text("[server]\nport = 9\n")

    result = run(*arguments)

    assert result.exit_code == 0, result.output
    assert tomllib.loads(result.stdout)["server"]["port"] == 9


@pytest.mark.parametrize("arguments", [("check",), ("serve",), ()])
def test_a_refused_configuration_is_told_on_stderr_with_code_2(arguments: tuple[str, ...]) -> None:
    Path("bamboo.toml").write_text("[server]\nprot = 9\n")

    result = run(*arguments, BAMBOO_LOG__LEVEL="loud")

    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.splitlines() == [
        "bamboo: bamboo.toml: server.prot: no such key; did you mean server.port?",
        "bamboo: BAMBOO_LOG__LEVEL: log.level: must be 'debug', 'info', 'warning' or 'error'",
    ]


@pytest.mark.parametrize(
    "arguments", [("--config", "none.toml", "check"), ("--config", "none.toml"), ("serve", "--config", "none.toml")]
)
def test_a_named_file_that_is_not_there_is_refused_with_code_2(arguments: tuple[str, ...]) -> None:
    result = run(*arguments)

    assert result.exit_code == 2
    assert result.stderr == "bamboo: none.toml: cannot be read: No such file or directory\n"


def test_an_unknown_command_is_refused_with_code_2() -> None:
    assert run("chek").exit_code == 2


def test_the_module_is_the_command() -> None:
    checked = module("check")
    Path("bamboo.toml").write_text("x = 1\n")
    served = module()

    assert (checked.returncode, checked.stderr) == (0, "")
    assert tomllib.loads(checked.stdout)["server"]["port"] == 8081
    assert served.returncode == 2
    assert served.stderr.startswith("bamboo: bamboo.toml: x: no such key")


def test_checking_loads_no_server() -> None:
    code = "import sys; from bamboo.cli import main; main(['check'], standalone_mode=False); print(sorted(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)

    for heavy in ("quart", "hypercorn", "trio_websocket", "sqlite3"):
        assert f"'{heavy}'" not in result.stdout


def test_what_only_the_providers_know_to_be_wrong_is_refused_too() -> None:
    Path("bamboo.toml").write_text('[llm.providers.demo]\nkind = "scripted"\nmodel = "x"\nscript = "none"\n')

    script, key = run("check"), run("check", "--config", os.devnull, OPENAI_API_KEY="sk\x07hunter2")

    assert (script.exit_code, script.stdout) == (2, "")
    assert script.stderr.startswith("bamboo: llm.providers.demo.script: there is no script 'none'")
    assert (key.exit_code, key.stdout) == (2, "")
    assert key.stderr.startswith("bamboo: llm.providers.openai.api_key_env: ")
    assert "hunter" not in key.stderr


def test_a_clean_stop_is_no_error() -> None:
    async def serve(config: Config) -> None:
        assert config == Config()
        await trio.lowlevel.checkpoint()

    run_to_the_end(serve, Config())


def test_a_component_that_cannot_start_gives_one_line_and_code_1(capsys: pytest.CaptureFixture[str]) -> None:
    async def fail() -> None:
        await trio.lowlevel.checkpoint()
        raise StartError("port 8081 of 127.0.0.1 is taken")

    async def in_groups(_config: Config) -> None:
        async with trio.open_nursery() as outer, trio.open_nursery() as inner:
            outer.start_soon(trio.sleep_forever)
            inner.start_soon(fail)

    async def bare(_config: Config) -> None:
        await fail()

    for serve in (in_groups, bare):
        with pytest.raises(SystemExit) as caught:
            run_to_the_end(serve, Config())
        assert caught.value.code == 1
        assert capsys.readouterr() == ("", "bamboo: port 8081 of 127.0.0.1 is taken\n")


def test_a_configuration_that_a_component_refuses_exits_with_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    async def serve(_config: Config) -> None:
        await trio.lowlevel.checkpoint()
        raise ExceptionGroup("components", [ConfigError("llm.providers.x: no")])

    with pytest.raises(SystemExit) as caught:
        run_to_the_end(serve, Config())

    assert caught.value.code == 2
    assert capsys.readouterr() == ("", "bamboo: llm.providers.x: no\n")


def test_any_other_failure_goes_on_to_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    async def serve(_config: Config) -> None:
        await trio.lowlevel.checkpoint()
        raise ExceptionGroup("components", [StartError("port taken"), ValueError("a bug")])

    with pytest.raises(ExceptionGroup) as caught:
        run_to_the_end(serve, Config())

    assert caught.group_contains(ValueError, match="a bug")
    assert not caught.group_contains(StartError)
    assert capsys.readouterr().out == ""
