"""Results as JSON files, and the tables of README.md, each between two markers that name it."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import orjson

HERE: Final = Path(__file__).resolve().parent
RESULTS: Final = HERE / "results"
README: Final = HERE / "README.md"


def write_result(name: str, result: dict[str, Any], directory: Path = RESULTS) -> Path:
    """The file that it was written to. The last result of a question replaces the one before; git has the history."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{name}.json"
    path.write_bytes(orjson.dumps(result, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))
    return path


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; numbers to the right."""
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines)


def setting_line(result: dict[str, Any]) -> str:
    """Where and with what a result was made, in one line."""
    machine, versions = result["machine"], result["versions"]
    changed = " with changes" if result["changed_since_commit"] else ""
    libraries = ", ".join(
        f"{name} {versions[name]}" for name in ("trio", "fastapi", "uvicorn", "openai") if name in versions
    )
    return (
        f"Made {result['made']} at commit `{result['commit'][:12]}`{changed}: "
        f"{machine['cpu']}, {machine['cores']} cores, {machine['system']}, {result['python']}, {libraries}."
    )


def replace_section(text: str, name: str, content: str) -> str:
    """`text` with what is between the markers of `name` replaced. Raises ValueError unless they are there once."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    replaced, count = re.subn(
        f"{re.escape(begin)}.*?{re.escape(end)}", lambda _: f"{begin}\n{content}\n{end}", text, flags=re.DOTALL
    )
    if count != 1:
        raise ValueError(f"{begin} … {end} must be there once, is there {count} times")
    return replaced


def refresh_readme(name: str, content: str, readme: Path = README) -> None:
    readme.write_text(replace_section(readme.read_text(), name, content))
