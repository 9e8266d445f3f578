"""The shape of the code, held by walking its syntax trees: imports point one way, each dependency has one home,
and some things never happen. `docs/architecture.md` tells the rules in words.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).parents[1]

LAYERS: Final = (
    {
        "",
        "core",
        "errors",
        "config_types",
        "config",
        "config_loading",
        "log",
        "metrics",
        "open_files",
        "systemd",
        "tls",
    },
    {"wire", "bus"},
    {"store", "llm", "skills", "tools"},
    {"agent"},
    {"web", "gateway"},
    {"server"},
    {"cli"},
    {"__main__"},
)
"""Lowest first; a module may import what stands lower. "" is `bamboo/__init__.py`, which has the version."""

BESIDE: Final = {
    "config": {"config_types", "errors"},
    "config_loading": {"config", "errors"},
    "log": {"config"},
    "metrics": {"errors"},
    "open_files": {"config"},
    "tls": {"errors"},
}
"""The only imports within a layer."""

ONLY: Final = {
    "core": set[str](),
    "errors": set[str](),
    "": set[str](),
    "client": {"core", "wire", "errors"},
    "agent": {
        "store.base",
        "llm.base",
        "skills.manager",
        "tools.toolbox",
        "bus",
        "wire",
        "core",
        "errors",
        "config",
        "log",
    },
}
"""Where less than everything lower may be seen."""

EDGE: Final = (
    "config_types.py",
    "config.py",
    "config_loading.py",
    "wire/schemas.py",
    "wire/frames.py",
    "skills/manifest.py",
)
"""Where what comes in is checked."""

HOMES: Final = {
    "quart": ("web/",),
    "quart_trio": ("web/",),
    "hypercorn": ("web/",),
    "h11": ("web/",),
    "trio_websocket": ("gateway/",),
    "wsproto": ("gateway/",),
    "httpx": ("llm/", "client/"),
    "httptools": ("llm/",),
    "pydantic": EDGE,
    "pydantic_core": EDGE,
    "pydantic_settings": ("config_loading.py",),
    "sqlite3": ("store/sqlite/",),
    "prometheus_client": ("metrics.py",),
    "click": ("cli.py",),
    "asyncio": (),
    "threading": ("store/sqlite/",),
    "unittest": (),
}

SANS_IO: Final = ("core/", "wire/")
"""These take values and return values: no event loop in them."""


def violations(path: str, source: str) -> list[str]:
    """What is wrong with a module of the package; `path` is relative to `bamboo/`."""
    tree = ast.parse(source)
    found = [f"{path}:{line}: {text}" for line, text in _bad_imports(path, tree)]
    found += [f"{path}:{line}: {text}" for line, text in _bad_code(tree)]
    return found


def _bad_imports(path: str, tree: ast.Module) -> Iterator[tuple[int, str]]:
    here = _part(path)
    for line, name in _imports(path, tree):
        top, _, inner = name.partition(".")
        if top == "bamboo":
            part = inner.split(".")[0]
            if part != here and not _may_import(here, part, inner):
                yield line, f"{here or '__init__'} imports bamboo.{inner}"
            continue
        home = HOMES.get(top)
        if home is not None and not any(
            path == place or (place.endswith("/") and path.startswith(place)) for place in home
        ):
            yield line, f"{top} is imported outside of its home"
        if here == "core" and top not in sys.stdlib_module_names:
            yield line, f"core imports {top}"
        if top == "trio" and path.startswith(SANS_IO):
            yield line, "a sans-io module imports trio"


def _part(path: str) -> str:
    """The part of the package that a module belongs to: `store` for `store/sqlite/writer.py`, "" for `__init__.py`."""
    part = path.removesuffix(".py").split("/")[0]
    return "" if part == "__init__" else part


def _may_import(here: str, part: str, inner: str) -> bool:
    if here in ONLY:
        return any(inner == allowed or inner.startswith(allowed + ".") for allowed in ONLY[here])
    if part in BESIDE.get(here, ()):
        return True
    return _layer(part) < _layer(here)


def _layer(part: str) -> int:
    for index, layer in enumerate(LAYERS):
        if part in layer:
            return index
    raise AssertionError(f"bamboo.{part} has no place in the layout: give it one here and in docs/architecture.md")


def _imports(path: str, tree: ast.Module) -> Iterator[tuple[int, str]]:
    package = ["bamboo", *path.split("/")[:-1]]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names = [alias.name for alias in node.names]
            if module == "bamboo" or _is_package(module):
                yield from (
                    (node.lineno, f"{module}.{name}" if _is_module(f"{module}.{name}") else module) for name in names
                )
            else:
                yield node.lineno, module


def _is_package(module: str) -> bool:
    return module.startswith("bamboo.") and (ROOT / module.replace(".", "/")).is_dir()


def _is_module(module: str) -> bool:
    place = ROOT / module.replace(".", "/")
    planned = module.removeprefix("bamboo.") in set[str]().union(*LAYERS)
    return planned or place.is_dir() or place.with_suffix(".py").is_file()


def _bad_code(tree: ast.Module) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler):
            names = _names(node.type)
            if node.type is None:
                yield node.lineno, "a bare except"
            elif names & {"BaseException", "BaseExceptionGroup", "Cancelled", "KeyboardInterrupt", "GeneratorExit"}:
                yield node.lineno, f"except {ast.unparse(node.type)}"
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            arguments = [ast.unparse(argument) for argument in node.args]
            if called == "print":
                yield node.lineno, "print"
            elif called in ("time.sleep", "sleep"):
                yield node.lineno, called
            elif called.endswith("suppress") and any("BaseException" in argument for argument in arguments):
                yield node.lineno, "suppress(BaseException)"
            elif "open_memory_channel" in called and any(_infinite(argument) for argument in arguments):
                yield node.lineno, "an unbounded channel"


def _names(node: ast.expr | None) -> set[str]:
    if node is None:
        return set()
    return {
        ast.unparse(part).rpartition(".")[2] for part in ast.walk(node) if isinstance(part, ast.Name | ast.Attribute)
    }


def _infinite(argument: str) -> bool:
    return argument in ("math.inf", "inf", "sys.maxsize") or argument.replace('"', "'").lower().startswith("float('inf")


def modules() -> list[Path]:
    return sorted((ROOT / "bamboo").rglob("*.py"))


def test_the_package_is_as_it_was_designed() -> None:
    found = [
        problem
        for module in modules()
        for problem in violations(module.relative_to(ROOT / "bamboo").as_posix(), module.read_text(encoding="utf-8"))
    ]

    assert found == []


def test_there_is_something_to_look_at() -> None:
    assert {"cli.py", "errors.py", "event_bus.py"} <= {module.name for module in modules()}


def test_every_directory_of_the_package_is_a_package() -> None:
    for module in modules():
        assert (module.parent / "__init__.py").is_file(), module


@pytest.mark.parametrize(
    ("path", "source", "told"),
    [
        ("store/memory.py", "import bamboo.llm.base", "store imports bamboo.llm.base"),
        ("store/memory.py", "from bamboo.agent.registry import Agents", "store imports bamboo.agent.registry"),
        ("store/sqlite/writer.py", "from ...web import app", "store imports bamboo.web"),
        ("web/app.py", "from bamboo.gateway import listener", "web imports bamboo.gateway"),
        ("gateway/listener.py", "from bamboo import server", "gateway imports bamboo.server"),
        ("gateway/listener.py", "def f():\n    import bamboo.server", "gateway imports bamboo.server"),
        ("agent/runner.py", "from bamboo.store.memory import MemoryStore", "agent imports bamboo.store.memory"),
        ("agent/runner.py", "from bamboo.store import memory", "agent imports bamboo.store.memory"),
        ("bus/topic.py", "from bamboo.wire.encode import event_json", "bus imports bamboo.wire.encode"),
        ("wire/encode.py", "from bamboo.bus.event_bus import EventBus", "wire imports bamboo.bus"),
        ("core/run.py", "from bamboo.errors import ErrorCode", "core imports bamboo.errors"),
        ("core/run.py", "import orjson", "core imports orjson"),
        ("core/run.py", "import trio", "a sans-io module imports trio"),
        ("wire/sse.py", "from trio import sleep", "a sans-io module imports trio"),
        ("errors.py", "from bamboo.config import Config", "errors imports bamboo.config"),
        ("__init__.py", "from bamboo.cli import main", "__init__ imports bamboo.cli"),
        ("gateway/listener.py", "from quart import Quart", "quart is imported outside"),
        ("server.py", "import hypercorn.trio", "hypercorn is imported outside"),
        ("web/app.py", "import trio_websocket", "trio_websocket is imported outside"),
        ("web/app.py", "import httpx", "httpx is imported outside"),
        ("agent/runner.py", "import pydantic", "pydantic is imported outside"),
        ("wire/encode.py", "import pydantic", "pydantic is imported outside"),
        ("store/memory.py", "import sqlite3", "sqlite3 is imported outside"),
        ("bus/topic.py", "import asyncio", "asyncio is imported outside"),
        ("bus/topic.py", "from unittest import mock", "unittest is imported outside"),
        ("bus/topic.py", "print(1)", "print"),
        ("bus/topic.py", "try:\n    pass\nexcept:\n    pass", "a bare except"),
        ("bus/topic.py", "try:\n    pass\nexcept BaseException:\n    raise", "except BaseException"),
        (
            "bus/topic.py",
            "try:\n    pass\nexcept (OSError, BaseException):\n    pass",
            "except (OSError, BaseException)",
        ),
        ("bus/topic.py", "try:\n    pass\nexcept* BaseException:\n    pass", "except BaseException"),
        ("bus/topic.py", "try:\n    pass\nexcept trio.Cancelled:\n    raise", "except trio.Cancelled"),
        ("bus/topic.py", "with contextlib.suppress(BaseException):\n    pass", "suppress(BaseException)"),
        ("bus/topic.py", "trio.open_memory_channel(math.inf)", "an unbounded channel"),
        ("bus/topic.py", "trio.open_memory_channel[None](float('inf'))", "an unbounded channel"),
        ("bus/topic.py", "trio.open_memory_channel(inf)", "an unbounded channel"),
        ("bus/topic.py", "time.sleep(1)", "time.sleep"),
    ],
)
def test_a_violation_is_found(path: str, source: str, told: str) -> None:
    found = violations(path, source)

    assert any(problem.partition(": ")[2].startswith(told) for problem in found), found


@pytest.mark.parametrize(
    ("path", "source"),
    [
        (
            "store/sqlite/writer.py",
            "import sqlite3\nfrom bamboo.store.base import Commit\nfrom bamboo.bus.log_reader import LogPage",
        ),
        (
            "agent/runner.py",
            "from bamboo.store.base import Store\nfrom bamboo.store import base\nimport structlog, trio",
        ),
        ("web/app.py", "from bamboo.agent.registry import Agents\nfrom quart_trio import QuartTrio"),
        ("server.py", "from bamboo.web.serving import open_web\nfrom bamboo.gateway.listener import open_gateway"),
        ("cli.py", "import click\nfrom bamboo import __version__, server\nclick.echo('x')"),
        ("core/run.py", "from bamboo.core.types import Cursor\nimport dataclasses"),
        ("log.py", "from bamboo.config import LogConfig"),
        (
            "bus/topic.py",
            "trio.open_memory_channel(1)\nawait_ = trio.sleep_forever\ntry:\n    pass\nexcept Exception:\n    pass",
        ),
    ],
)
def test_what_is_allowed_is_not_found(path: str, source: str) -> None:
    assert violations(path, source) == []


def test_a_module_without_a_place_is_told() -> None:
    with pytest.raises(AssertionError, match=r"bamboo\.helpers has no place"):
        violations("web/app.py", "import bamboo.helpers")
