"""Runs a program and samples its main thread from the inside: `python -m benchmarks.sampler OUTPUT MODULE ARGUMENT…`.

SIGUSR1 begins, SIGUSR2 ends and writes OUTPUT. A timer on the main thread's own CPU clock sends SIGPROF, so a sample
is taken per so much CPU used, and none while the thread waits. (Samplers that look from outside, by the wall clock,
find a mostly idle thread just gone to sleep again and take the wait for work: py-spy gave epoll half of load B.) What
C code or the kernel did is seen when it returns, in the Python function that called it. Other threads are not looked
into: their part of the CPU is the process's without the main thread's.

On trio a sample wakes the loop once: a per cent or so by estimate, not measured. Linux only.
"""

import ctypes
import os
import runpy
import signal
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, Final

import orjson

SAMPLE_CPU_S: Final = 0.003  # the kernel rounds it up to its tick, often 4 ms

# From <time.h>, <signal.h> and timer_create(2), the same on every Linux architecture that CPython supports.
_CLOCK_THREAD_CPUTIME_ID: Final = 3
_SIGEV_THREAD_ID: Final = 4


class _SigEvent(ctypes.Structure):
    _fields_ = (
        ("value", ctypes.c_void_p),
        ("signo", ctypes.c_int),
        ("notify", ctypes.c_int),
        ("thread_id", ctypes.c_int),
        ("rest", ctypes.c_char * 44),
    )


class _TimerSpec(ctypes.Structure):
    _fields_ = (
        ("interval_s", ctypes.c_long),
        ("interval_ns", ctypes.c_long),
        ("value_s", ctypes.c_long),
        ("value_ns", ctypes.c_long),
    )


class CpuTimer:
    """Sends SIGPROF to the calling thread for every so many seconds of CPU that it uses."""

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._timer = ctypes.c_void_p()
        event = _SigEvent(signo=signal.SIGPROF, notify=_SIGEV_THREAD_ID, thread_id=threading.get_native_id())
        self._check(self._libc.timer_create(_CLOCK_THREAD_CPUTIME_ID, ctypes.byref(event), ctypes.byref(self._timer)))

    def set(self, every_cpu_s: float) -> None:
        """0 stops it."""
        ns = int(every_cpu_s * 1e9)
        spec = _TimerSpec(0, ns, 0, ns)
        self._check(self._libc.timer_settime(self._timer, 0, ctypes.byref(spec), None))

    def _check(self, result: int) -> None:
        if result != 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))


class Sampler:
    """Counts the main thread's stacks between SIGUSR1 and SIGUSR2. Create it in the main thread."""

    def __init__(self, output: Path) -> None:
        self._output = output
        self._timer = CpuTimer()
        self._stacks: Counter[tuple[CodeType, ...]] = Counter()
        self._main_s = 0.0
        self._process_s = 0.0
        signal.signal(signal.SIGPROF, self._sample)
        signal.signal(signal.SIGUSR1, self._begin)
        signal.signal(signal.SIGUSR2, self._end)

    def _sample(self, _signum: int, frame: FrameType | None) -> None:
        stack: list[CodeType] = []
        while frame is not None:
            stack.append(frame.f_code)
            frame = frame.f_back
        self._stacks[tuple(stack)] += 1

    def _begin(self, _signum: int, _frame: FrameType | None) -> None:
        self._stacks.clear()
        self._main_s, self._process_s = time.thread_time(), time.process_time()
        self._timer.set(SAMPLE_CPU_S)

    def _end(self, _signum: int, _frame: FrameType | None) -> None:
        self._timer.set(0)
        main_s, process_s = time.thread_time() - self._main_s, time.process_time() - self._process_s
        # Under another name first: who waits for the file must not see half of it.
        part = self._output.with_suffix(".part")
        part.write_bytes(orjson.dumps(self._seen(main_s, process_s)))
        part.replace(self._output)

    def _seen(self, main_s: float, process_s: float) -> dict[str, Any]:
        """Innermost frame first; a frame is (path, function)."""
        return {
            "main_s": main_s,
            "process_s": process_s,
            "stacks": [
                [[(code.co_filename, code.co_qualname) for code in stack], count]
                for stack, count in self._stacks.most_common()
            ],
        }


def main() -> None:
    output, module, *arguments = sys.argv[1:]
    sys.argv = [module, *arguments]
    sampler = Sampler(Path(output))
    runpy.run_module(module, run_name="__main__", alter_sys=True)
    del sampler


if __name__ == "__main__":
    main()
