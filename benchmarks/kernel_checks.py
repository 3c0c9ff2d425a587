"""Kernels that may be wrong or hang: each is checked in a process of its own, and what is right is timed in another."""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress

KILL_PATIENCE = 2
"""Seconds."""


def tile_arguments(description: str | None, seconds: float, what: str) -> argparse.Namespace:
    """Of a module that times ``what`` after ``what`` for so many seconds; ``check`` and ``times`` name tiles by their
    places in its list."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--seconds", type=float, default=seconds, help=f"no {what} is begun later than this after the checks"
    )
    parser.add_argument("--check", type=int, metavar="TILE", help="check this tile alone, by its place in the list")
    parser.add_argument("--times", type=int, nargs="+", metavar="TILE", help="time these alone, without checks")
    return parser.parse_args()


def passing(module: str, kernels: Mapping[str, str], seconds: float) -> list[str]:
    """Those of ``kernels``, names by what ``--check`` of the module takes, whose checks pass; all run at once, and
    are killed after so many seconds. Prints what the others end with."""
    command = [sys.executable, "-m", module, "--check"]
    started = {
        kernel: subprocess.Popen([*command, kernel], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for kernel in kernels
    }
    passed, deadline = [], time.perf_counter() + seconds
    for kernel, process in started.items():
        try:
            output = process.communicate(timeout=max(deadline - time.perf_counter(), 0.1))[0]
        except subprocess.TimeoutExpired:
            _end(process)
            output = f"no end after {seconds} s"
        if process.returncode == 0:
            passed.append(kernel)
        else:
            print(f"{kernels[kernel]}: WRONG: {output.strip()[-300:]}", flush=True)
    return passed


def _end(process: subprocess.Popen[str]) -> None:
    """Kills it. One that hangs in the GPU's driver may stay for longer than anybody waits."""
    process.kill()
    with suppress(subprocess.TimeoutExpired):
        process.communicate(timeout=KILL_PATIENCE)


def time_apart(module: str, kernels: list[str], seconds: float, grace: int) -> int:
    """Exit status of ``--times`` of the module, which begins nothing after ``seconds``; 1 where there are no kernels,
    or where it has not ended ``grace`` seconds later."""
    if not kernels:
        return 1
    command = [sys.executable, "-m", module, "--seconds", str(seconds), "--times", *kernels]
    try:
        return subprocess.run(command, timeout=seconds + grace).returncode
    except subprocess.TimeoutExpired:
        print(f"# no end {grace} s after the time was over")
        return 1
