"""Records what a loaded server says of itself, one ``/metrics`` page a second, into one compressed file.

    python -m grafana.record --output load.xz --shapes r1-1.5b

``python -m grafana.check_panels --replay load.xz`` shows a recording to Prometheus: so the panels of GPUs are checked
on machines that have none.
"""

from __future__ import annotations

import argparse
import asyncio
import lzma
import threading
from collections.abc import Iterable
from pathlib import Path

from grafana.load import drive, pages, serving, summary

BREAK = "# next scrape\n"
"""Between two pages: a comment in their own format."""
WARM_UP = 8
"""Seconds of load before the first page."""


def write(file: Path, recorded: Iterable[str]) -> None:
    file.write_bytes(lzma.compress(BREAK.join(recorded).encode(), preset=9))


def read(file: Path) -> list[str]:
    """Raises OSError and lzma.LZMAError."""
    return lzma.decompress(file.read_bytes()).decode().split(BREAK)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--shapes", help="random weights in the shapes of this model instead of SmolLM2")
    parser.add_argument("--pages", type=int, default=65)
    parser.add_argument("--clients", type=int, default=80)
    parser.add_argument("--tokens", type=int, default=256, help="most output tokens of a request")
    arguments = parser.parse_args()
    with serving(arguments.shapes, max_queue=arguments.clients - 2) as server:
        seconds = arguments.pages + WARM_UP + 2
        counts: dict[str, int] = {}

        def load() -> None:
            ids = arguments.shapes is not None
            counts.update(asyncio.run(drive(server, arguments.clients, arguments.tokens, ids=ids, seconds=seconds)))

        driver = threading.Thread(target=load)
        driver.start()
        threading.Event().wait(WARM_UP)
        write(arguments.output, list(pages(server, arguments.pages)))
        driver.join()
    size = arguments.output.stat().st_size
    print(f"{arguments.pages} pages in {size} bytes; answers by status {summary(counts)}")


if __name__ == "__main__":
    main()
