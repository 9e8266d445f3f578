"""What the operating system says: CPU time and memory of a process and its children, and what machine this is."""

import contextlib
import importlib.metadata
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import psutil  # type: ignore[import-untyped]  # it ships no types

ROOT: Final = Path(__file__).resolve().parent.parent
_PACKAGES: Final = (
    "bamboo", "trio", "quart", "quart-trio", "hypercorn", "trio-websocket", "httpx", "h11", "httptools", "orjson",
    "pydantic", "fastapi", "starlette", "uvicorn", "uvloop", "websockets", "openai",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class CpuTime:
    """Seconds of CPU. `user_s` and `system_s` come in ticks of 10 ms, `total_s` as exactly as the kernel knows it."""

    total_s: float
    user_s: float
    system_s: float

    def __add__(self, other: "CpuTime") -> "CpuTime":
        return CpuTime(self.total_s + other.total_s, self.user_s + other.user_s, self.system_s + other.system_s)

    def __sub__(self, other: "CpuTime") -> "CpuTime":
        return CpuTime(self.total_s - other.total_s, self.user_s - other.user_s, self.system_s - other.system_s)


def tree_cpu(pid: int) -> CpuTime:
    """CPU time of a process, its living descendants, and those that it has waited for, since their start.

    Raises psutil.NoSuchProcess.
    """
    used = CpuTime(0, 0, 0)
    for process in _tree(pid):
        with contextlib.suppress(*(() if process.pid == pid else (psutil.NoSuchProcess,))):
            used += _own_cpu(process)
    return used


def tree_rss_bytes(pid: int) -> int:
    """Resident memory now, of the process and its descendants."""
    total = 0
    for process in _tree(pid):
        with contextlib.suppress(psutil.NoSuchProcess):
            total += process.memory_info().rss
    return total


def _tree(pid: int) -> Iterator[Any]:
    root = psutil.Process(pid)
    yield root
    yield from root.children(recursive=True)


def _own_cpu(process: Any) -> CpuTime:
    times = process.cpu_times()
    children_s = getattr(times, "children_user", 0.0) + getattr(times, "children_system", 0.0)
    total_s = times.user + times.system
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            # The process's CPU clock, in nanoseconds; clock_getcpuclockid(3) makes the id like this.
            total_s = time.clock_gettime((~process.pid << 3) | 2)
    return CpuTime(total_s + children_s, times.user, times.system)


def cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def describe() -> dict[str, Any]:
    """The machine, the interpreter, the libraries and the commit that a result belongs to."""
    return {
        "commit": _git("rev-parse", "HEAD") or "unknown",
        "changed_since_commit": bool(_git("status", "--porcelain", "--", "bamboo", "benchmarks", "pyproject.toml")),
        "machine": {
            "cpu": cpu_model(),
            "cores": os.cpu_count(),
            "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
            "system": f"{platform.system()} {platform.release()}",
        },
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "versions": {name: version for name in _PACKAGES if (version := _version(name)) is not None},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str:
    """What git prints; empty without git or outside a repository."""
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], check=True, capture_output=True, text=True)
        return done.stdout.strip()
    return ""
