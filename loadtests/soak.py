"""Ten minutes of mixed traffic with clients that leave, against a fresh server: does it fail, does its memory grow?

    python -m loadtests.soak
    python -m loadtests.soak --report docs                       # docs/soak.md and docs/images/soak.png
    PROMETHEUS_FOLDER=/folder/of/prometheus python -m loadtests.soak

Passes where the limits are kept (loadtests/soak.toml: nothing fails, under 1 % is refused), memory at the end is within
5 % of that at minute two, and every query of both Grafana dashboards has finite data in a Prometheus that scraped the
server; this last check is left out, and said to be, where there is no Prometheus. Panels of refusals need some: after
the ten minutes, more clients than the queue holds come for a moment. They are not counted.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import shlex
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from grafana.check_panels import Verdict, check
from grafana.load import drive, summary
from grafana.prometheus import Prometheus, PrometheusMissing, program, scraping
from loadtests.figures import Figures, read_limits
from loadtests.memory import MIB, Sampler
from loadtests.run import HERE, INTERRUPTED, Plan, interrupt, locust_is_here, run_locust, served
from loadtests.soak_report import Soak, write_report

SERVE = "smollm2-135m --target-ttft 30s --target-tpot 1s --memory-limit 1000MiB --max-model-len 2048"
"""Targets give the panels of targets data. The KV cache is small enough to have been touched as a whole by minute two:
a page of it costs memory from its first use on."""
NAME = "m"
QUEUE = 32
SETTLED = 120.0
"""Seconds until memory is looked at for the first time, or a third of a soak that is shorter than six minutes."""
BURST_CLIENTS, BURST_SECONDS = QUEUE + 24, 15.0
BURST_TOKENS = 24


def run_soak(plan: Plan, serve: str) -> Soak:
    """Raises KeyboardInterrupt where it was ended early, RuntimeError where the server did not start."""
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        server = stack.enter_context(served([*shlex.split(serve), "--served-model-name", NAME], queue=QUEUE))
        prometheus = stack.enter_context(_maybe_scraping(server.port))
        file = Path(name) / "figures.json"
        with Sampler(server.process.pid) as memory:
            if run_locust(plan, server.url, file) == INTERRUPTED:
                raise KeyboardInterrupt
        found = {kind: Figures.from_json(each) for kind, each in json.loads(file.read_text()).items()}
        soak = Soak(serve, plan, min(SETTLED, plan.seconds / 3), memory, found, read_limits(plan.limits))
        if isinstance(prometheus, str):
            soak.panels_skipped = prometheus
            return soak

        def burst() -> None:
            counts = asyncio.run(drive(server, BURST_CLIENTS, BURST_TOKENS, ids=False, seconds=BURST_SECONDS))
            soak.burst = summary(counts)

        soak.panels = check_panels(lambda: list(check(prometheus, time.time() - 2, gpus=False)), burst)
        return soak


def check_panels(look: Callable[[], list[Verdict]], burst: Callable[[], None]) -> list[Verdict]:
    """At the end of the load, and what was empty there once more after a burst that refuses some."""
    first = look()
    if not any(verdict.fault for verdict in first):
        return first
    burst()
    return [again if before.fault else before for before, again in zip(first, look(), strict=True)]


@contextlib.contextmanager
def _maybe_scraping(port: int) -> Iterator[Prometheus | str]:
    """Or why there is none."""
    try:
        program()
    except PrometheusMissing as missing:
        yield str(missing)
        return
    with scraping(port) as prometheus:
        yield prometheus


def show(soak: Soak) -> None:
    """Below what locust's process has shown: figures and limits."""
    begin, end = soak.memory.at(soak.settled) / MIB, soak.memory.at(soak.plan.seconds) / MIB
    print(f"memory: {begin:.0f} MiB after {soak.settled:g} s, {end:.0f} MiB at the end, {soak.growth:+.2%}")
    if soak.panels_skipped:
        print(f"panels were not checked: {soak.panels_skipped}")
    else:
        print(f"{len(soak.panels)} queries of panels, {len(soak.faults)} with a fault")
    missed = soak.missed()
    print("passed" if not missed else "MISSED: " + "; ".join(missed))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600, help="of load (600)")
    parser.add_argument("--users", type=int, default=12, help="(12)")
    parser.add_argument("--pace", type=float, default=0.1, help="requests a second of each user (0.1)")
    parser.add_argument("--length-scale", type=float, default=0.1, help="of the recorded lengths (0.1)")
    parser.add_argument("--disconnects", type=float, default=0.1, help="share of clients that leave early (0.1)")
    parser.add_argument("--serve", default=SERVE, help=f"arguments of slimserve serve ({SERVE})")
    parser.add_argument("--limits", type=Path, default=HERE / "soak.toml", help="TOML file (loadtests/soak.toml)")
    parser.add_argument("--report", type=Path, help="folder to write soak.md and images/soak.png to")
    arguments = parser.parse_args()
    locust_is_here()
    if arguments.seconds < 60:
        parser.error("--seconds is 60 at least: growth of memory needs time")
    plan = Plan(
        seconds=arguments.seconds,
        users=arguments.users,
        pace=arguments.pace,
        length_scale=arguments.length_scale,
        disconnects=arguments.disconnects,
        limits=arguments.limits.resolve(),
    )
    signal.signal(signal.SIGTERM, interrupt)
    try:
        soak = run_soak(plan, arguments.serve)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except RuntimeError as error:
        sys.exit(str(error))
    show(soak)
    if arguments.report is not None:
        print(f"report: {write_report(soak, arguments.report)}")
    sys.exit(1 if soak.missed() else 0)


if __name__ == "__main__":
    main()
