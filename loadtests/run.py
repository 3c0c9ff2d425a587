"""A load test with locust, from a recorded day's lengths and arrivals.

    python -m loadtests.run --short                              20 s against a server of its own (SmolLM2)
    python -m loadtests.run --short --serve "./model --device cuda"
    python -m loadtests.run --url http://127.0.0.1:8000 --shape burst --users 30 --seconds 300

Ends with status 1 where a limit was missed (--limits), and writes locust's own HTML report (--report). Ctrl-C ends the
run early: requests that are open may end, and what there is by then is shown.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import FrameType

from benchmarks.report import ROOT
from benchmarks.servers import Server, free_port, running, slimserve
from loadtests.figures import WrongLimits, read_limits
from loadtests.shapes import SHAPES, Shape

HERE = Path(__file__).parent
SHORT_SECONDS, SHORT_USERS = 20.0, 10
LAST_ANSWERS = 30.0
"""Seconds after the end in which open requests may end."""
INTERRUPTED = 130


@dataclass(frozen=True, slots=True)
class Plan:
    """The options of the locustfile by their names."""

    seconds: float
    users: int
    pace: float
    length_scale: float
    disconnects: float
    limits: Path
    shape: Shape = "steady"
    report: Path | None = None
    seed: int = 0

    def command(self, url: str, figures: Path | None = None) -> list[str]:
        files = {"--html": self.report, "--figures": figures}
        options = {
            "--host": url,
            "--run-time": f"{self.seconds:g}s",
            "--users": self.users,
            "--stop-timeout": f"{LAST_ANSWERS:g}",
            "--shape": self.shape,
            "--pace": self.pace,
            "--length-scale": self.length_scale,
            "--disconnects": self.disconnects,
            "--limits": self.limits,
            "--seed": self.seed,
        } | {name: file for name, file in files.items() if file is not None}
        words = [word for name, value in options.items() for word in (name, str(value))]
        fixed = ["--headless", "--only-summary", "--loglevel", "WARNING"]
        return [sys.executable, "-m", "locust", "-f", str(HERE / "locustfile.py"), *fixed, *words]


@contextlib.contextmanager
def served(arguments: Sequence[str], queue: int | None = None) -> Iterator[Server]:
    """``slimserve serve`` with these arguments on a free port; without the settings of this shell's environment.
    ``queue`` is the most requests that wait."""
    port = free_port()
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SLIMSERVE_")}
    kept |= {name: os.environ[name] for name in ("SLIMSERVE_HOME", "SLIMSERVE_API_KEY") if name in os.environ}
    if queue is not None:
        kept["SLIMSERVE_MAX_QUEUE"] = str(queue)
    command = slimserve("serve", *arguments, "--port", str(port))
    with tempfile.TemporaryDirectory() as name:
        log = Path(name) / "log"
        with running("slimserve", command, port, "/health/ready", env=kept, log=log, own_session=True) as server:
            yield server


def run_locust(plan: Plan, url: str, figures: Path | None = None) -> int:
    """Its exit status. Ctrl-C, and SIGTERM, let it end what is open; a second one ends it at once."""
    process = subprocess.Popen(plan.command(url, figures), cwd=ROOT, start_new_session=True)
    try:
        try:
            return process.wait()
        except KeyboardInterrupt:
            print("stopping: open requests may end; Ctrl-C again stops at once", flush=True)
            process.send_signal(signal.SIGINT)
            process.wait()
            return INTERRUPTED
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def interrupt(_signal: int, _frame: FrameType | None) -> None:
    """SIGTERM as Ctrl-C, so that what was started is stopped."""
    raise KeyboardInterrupt


def locust_is_here() -> None:
    """Exits with how to get it."""
    if find_spec("locust") is None:
        sys.exit('locust is not here: pip install "slimserve[loadtest]"')


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help=f"{SHORT_SECONDS:g} s of {SHORT_USERS} users")
    parser.add_argument("--url", help="a running server; its key is taken from SLIMSERVE_API_KEY")
    parser.add_argument(
        "--serve", default="smollm2-135m", help="arguments of slimserve serve for the fresh server (smollm2-135m)"
    )
    parser.add_argument("--shape", choices=SHAPES, default="steady", help="users over time (steady)")
    parser.add_argument("--seconds", type=float, help="of the shape (120)")
    parser.add_argument("--users", type=int, help="most at a time (20); one in three completes, the others chat")
    parser.add_argument("--pace", type=float, default=0.2, help="requests a second of each user; 0: no pause (0.2)")
    parser.add_argument("--length-scale", type=float, default=0.1, help="of the recorded lengths (0.1)")
    parser.add_argument("--disconnects", type=float, default=0.2, help="share of clients that leave early (0.2)")
    parser.add_argument("--limits", type=Path, default=HERE / "limits.toml", help="TOML file (loadtests/limits.toml)")
    parser.add_argument("--report", type=Path, help="write locust's HTML report to this file")
    parser.add_argument("--seed", type=int, default=0, help="of lengths, texts and times (0)")
    return parser


def plan_of(arguments: argparse.Namespace) -> Plan:
    """Raises SystemExit with one line where it cannot be run."""
    try:
        read_limits(arguments.limits)
    except (OSError, WrongLimits) as error:
        sys.exit(f"--limits: {error}")
    if arguments.pace < 0 or arguments.length_scale <= 0 or not 0 <= arguments.disconnects <= 1:
        sys.exit("--pace is 0 or more, --length-scale more than 0, --disconnects from 0 to 1")
    short = arguments.short
    seconds = arguments.seconds or (SHORT_SECONDS if short else 120.0)
    users = arguments.users or (SHORT_USERS if short else 20)
    if seconds < 1 or users < 1:
        sys.exit("--seconds and --users are 1 at least")
    return Plan(
        seconds=seconds,
        users=users,
        pace=arguments.pace,
        length_scale=arguments.length_scale,
        disconnects=arguments.disconnects,
        limits=arguments.limits.resolve(),
        shape=arguments.shape,
        report=None if arguments.report is None else arguments.report.resolve(),
        seed=arguments.seed,
    )


def main() -> None:
    arguments = _parser().parse_args()
    locust_is_here()
    plan = plan_of(arguments)
    signal.signal(signal.SIGTERM, interrupt)
    try:
        if arguments.url:
            status = run_locust(plan, arguments.url)
        else:
            print(f"starting slimserve serve {arguments.serve}", flush=True)
            with served(shlex.split(arguments.serve)) as server:
                print(f"{plan.users} users for {plan.seconds:g} s on {server.url}", flush=True)
                status = run_locust(plan, server.url)
    except RuntimeError as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    if plan.report is not None and plan.report.exists():
        print(f"report: {plan.report}")
    sys.exit(status)


if __name__ == "__main__":
    main()
