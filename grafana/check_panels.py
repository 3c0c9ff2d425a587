"""Runs every query of both dashboards against a real Prometheus that scrapes a loaded server.

    python -m grafana.check_panels                    # SmolLM2, a minute of traffic; panels of GPUs are left out
    python -m grafana.check_panels --replay load.xz   # over recorded pages, with the panels of GPUs

Each query must give at least one series, and finite values only. Exits with 1 where one does not.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import math
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from grafana.build import DASHBOARDS
from grafana.load import drive, serving, summary
from grafana.prometheus import Prometheus, PrometheusMissing, program, scraping
from grafana.queries import filled, of_gpu
from grafana.record import read

WINDOW, STEP = 20.0, 5.0
"""Seconds at the end of the load that are looked at, and between two looks."""


@dataclass(frozen=True, slots=True)
class Verdict:
    panel: str
    query: str
    series: int
    last: float | None
    fault: str = ""
    """Empty where all is well."""


def check(prometheus: Prometheus, end: float, *, gpus: bool) -> Iterator[Verdict]:
    """Each query over the last seconds before ``end``; those of GPUs only with ``gpus``."""
    for name, dashboard in DASHBOARDS.items():
        for panel in dashboard.panels:
            for query in panel.queries:
                if gpus or not of_gpu(query.expression):
                    title = f"{name}: {panel.title}"
                    yield judge(title, query.legend, prometheus, filled(query.expression), end)


def judge(panel: str, legend: str, prometheus: Prometheus, expression: str, end: float) -> Verdict:
    try:
        series = prometheus.over(expression, end - WINDOW, end, STEP)
    except ValueError as error:
        return Verdict(panel, legend, 0, None, str(error))
    values = [value for each in series for value in each]
    if not values:
        return Verdict(panel, legend, len(series), None, "empty")
    if not all(math.isfinite(value) for value in values):
        return Verdict(panel, legend, len(series), values[-1], "not finite")
    return Verdict(panel, legend, len(series), values[-1])


@contextlib.contextmanager
def replaying(pages: list[str]) -> Iterator[int]:
    """A server that gives the next page at each scrape, and the last one for ever; its port."""
    left = iter(pages)
    state = {"page": pages[0]}

    class Pages(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            state["page"] = next(left, state["page"])
            body = state["page"].encode()
            self.send_response(200)
            self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Says nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Pages)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()


def check_replay(file: Path) -> list[Verdict]:
    """At the speed of the recording: a page is a second."""
    pages = read(file)
    with replaying(pages) as port, scraping(port) as prometheus:
        time.sleep(len(pages) - 1)
        return list(check(prometheus, time.time(), gpus=any("slimserve_gpu_info{" in page for page in pages)))


def check_live(seconds: float, clients: int) -> list[Verdict]:
    with serving(None, max_queue=clients - 2) as server, scraping(server.port) as prometheus:
        counts = asyncio.run(drive(server, clients, 24, ids=False, seconds=seconds))
        print(f"answers by status: {summary(counts)}")
        return list(check(prometheus, time.time() - 2, gpus=False))


def show(verdicts: list[Verdict]) -> int:
    """How many faults."""
    for verdict in verdicts:
        last = "" if verdict.last is None else f"{verdict.last:.5g}"
        print(f"{verdict.fault or 'ok':12} {verdict.series:3} series {last:>12}  {verdict.panel} | {verdict.query}")
    faults = sum(bool(verdict.fault) for verdict in verdicts)
    print(f"{len(verdicts)} queries, {faults} with a fault")
    return faults


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replay", type=Path, help="recording of grafana.record")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--clients", type=int, default=10)
    arguments = parser.parse_args()
    try:
        program()
    except PrometheusMissing as missing:
        sys.exit(str(missing))
    verdicts = (
        check_live(arguments.seconds, arguments.clients) if arguments.replay is None else check_replay(arguments.replay)
    )
    sys.exit(1 if show(verdicts) else 0)


if __name__ == "__main__":
    main()
