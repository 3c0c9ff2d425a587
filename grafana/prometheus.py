"""A Prometheus of our own, which scrapes one server once a second."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx

from benchmarks.servers import free_port, running


class PrometheusMissing(Exception):
    """The text says how to get it."""


@dataclass(frozen=True, slots=True)
class Prometheus:
    url: str

    def over(self, expression: str, start: float, end: float, step: float) -> list[list[float]]:
        """Values of each series at the times ``start``, ``start + step``, ... Raises ValueError with Prometheus's own
        text where the query is wrong."""
        times = {"start": str(start), "end": str(end), "step": str(step)}
        answer = httpx.get(f"{self.url}/api/v1/query_range", params={"query": expression, **times}, timeout=30).json()
        if answer["status"] != "success":
            raise ValueError(answer["error"])
        return [[float(value) for _, value in series["values"]] for series in answer["data"]["result"]]


def program() -> str:
    """Raises PrometheusMissing."""
    found = shutil.which("prometheus", path=os.environ.get("PROMETHEUS_FOLDER"))
    if found is None:
        raise PrometheusMissing(
            "prometheus is not here: apt-get install prometheus, or PROMETHEUS_FOLDER=the folder that holds it"
        )
    return found


@contextlib.contextmanager
def scraping(port: int) -> Iterator[Prometheus]:
    """Scrape the server on this port of this machine, in a job of the name that the alert rules expect."""
    rules = Path(__file__).with_name("alerts") / "slimserve.yaml"
    config = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "5s"},
        "rule_files": [str(rules.resolve())],
        "scrape_configs": [{"job_name": "slimserve", "static_configs": [{"targets": [f"127.0.0.1:{port}"]}]}],
    }
    with tempfile.TemporaryDirectory() as name:
        folder, own = Path(name), free_port()
        file = folder / "prometheus.yaml"
        file.write_text(json.dumps(config))
        command = [program(), f"--config.file={file}", f"--storage.tsdb.path={folder / 'data'}"]
        command += [f"--web.listen-address=127.0.0.1:{own}"]
        with running("prometheus", command, own, "/-/ready", log=folder / "log") as server:
            yield Prometheus(server.url)
