"""`python -m benchmarks`: every question, or those that are named."""

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any, Final

from benchmarks import cpu_per_token, restart, shares, slow_readers, stop
from benchmarks.harness import SERVERS, TRANSPORTS, BenchmarkError
from benchmarks.load import LOADS, QUICK_LOADS
from benchmarks.report import README, refresh_readme, write_result

QUESTIONS: Final = {
    cpu_per_token.NAME: ("A", "B", "C"),
    shares.NAME: ("A", "B"),
    restart.NAME: (),
    stop.NAME: (),
    slow_readers.NAME: (),
}
"""Each question, and the loads that it is asked for unless others are named."""

RUNS: Final = {
    cpu_per_token.NAME: 3,
    restart.NAME: restart.DEFAULT_RUNS,
    stop.NAME: stop.DEFAULT_RUNS,
    slow_readers.NAME: slow_readers.DEFAULT_RUNS,
}
"""How often each question is measured, where that can be chosen."""


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("questions", nargs="*", metavar="question", help=f"of {', '.join(QUESTIONS)}; default: all")
    parser.add_argument(
        "--quick", action="store_true", help="tiny loads, once: does it work? Writes nothing but to --out"
    )
    defaults = ", ".join(f"{name} {runs}" for name, runs in RUNS.items())
    parser.add_argument("--runs", type=int, help=f"how often everything is measured (default: {defaults})")
    parser.add_argument("--servers", nargs="+", choices=list(SERVERS), help="default: all")
    parser.add_argument("--loads", nargs="+", choices=list(LOADS), help="default: all")
    parser.add_argument("--transports", nargs="+", choices=TRANSPORTS, help="default: all")
    parser.add_argument("--out", type=Path, help="write JSON there, and leave README.md and results/ alone")
    parsed = parser.parse_args(arguments)
    unknown = [name for name in parsed.questions if name not in QUESTIONS]
    if unknown:
        parser.error(f"no such question: {', '.join(unknown)}; there are {', '.join(QUESTIONS)}")
    if parsed.runs is not None and parsed.runs < 1:
        parser.error("--runs must be at least 1")
    return parsed


def answer(name: str, options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """A question's result and its section of the README. Raises BenchmarkError."""
    runs = 1 if options.quick else options.runs or RUNS.get(name, 1)
    if name == restart.NAME:
        cases = restart.QUICK_CASES if options.quick else restart.CASES
        result = restart.run(restart.Plan(cases, runs), say)
        return result, restart.render(result)
    if name == stop.NAME:
        result = stop.run(stop.QUICK_PLAN if options.quick else stop.plan(runs, options.transports), say)
        return result, stop.render(result)
    if name == slow_readers.NAME:
        result = slow_readers.run(slow_readers.QUICK_PLAN if options.quick else slow_readers.plan(runs), say)
        return result, slow_readers.render(result)
    available = QUICK_LOADS if options.quick else LOADS
    loads = [available[load] for load in options.loads or QUESTIONS[name]]
    transports = options.transports or TRANSPORTS
    if name == shares.NAME:
        sample_s = shares.QUICK_SAMPLE_S if options.quick else shares.SAMPLE_S
        result = shares.run(shares.Plan(loads, sample_s, transports), say)
        return result, shares.render(result)
    servers = [SERVERS[server] for server in options.servers] if options.servers else cpu_per_token.DEFAULT_SERVERS
    result = cpu_per_token.run(cpu_per_token.Plan(loads, runs, servers, transports), say)
    return result, cpu_per_token.render(result)


def say(line: str) -> None:
    print(line, flush=True)


def main() -> int:
    options = parse()

    def leave(_signum: int, _frame: FrameType | None) -> None:
        raise SystemExit(143)  # so that every block is left and its process ended

    signal.signal(signal.SIGTERM, leave)
    for name in options.questions or QUESTIONS:
        try:
            result, section = answer(name, options)
        except BenchmarkError as error:
            print(error, file=sys.stderr)
            return 1
        say(f"\n{section}\n")
        if options.out is not None:
            say(f"written to {write_result(name, result, options.out)}")
        elif not options.quick:
            say(f"written to {write_result(name, result)}")
            refresh_readme(name, section)
            say(f"written to {README}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
