"""The worker process of one device: a loop of plan -> launch -> collect -> settle over the engines it holds.

    python -m server.worker.main ADDRESS INCARNATION --flight-record DESCRIPTOR --scheduler-config JSON
        --prepare-kind KIND --prepare-device DEVICE

Standard input is a pipe that the API process holds: its end means that the API process died, and the worker exits.
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import sys
import threading
import time
from pathlib import Path
from typing import get_args

import msgspec

from engines.protocol import EngineKind
from server.logs import LogFormat, configure_logging
from server.scheduler.config import SchedulerConfig
from server.worker.flight_record import FlightRecord
from server.worker.loop import WorkerLoop
from server.worker.mailbox import Mailbox

RARE_COLLECTIONS = (50_000, 20, 50)
"""Of garbage in cycles, of which the loop makes hardly any: by default it is looked for so often that full searches,
each as long as several steps, hold up every stream."""


def exit_with_parent(address: str) -> None:
    """Wait for the end of standard input, then end this process whatever its other threads do."""
    while os.read(sys.stdin.fileno(), 64):
        pass
    socket_file = Path(address.removeprefix("ipc://"))
    try:
        socket_file.unlink(missing_ok=True)
        socket_file.parent.rmdir()
    except OSError:  # another worker's socket is still in the folder: that worker removes it
        pass
    os._exit(1)


def _process_start() -> float:
    """On the monotonic clock: the kernel counts ticks from the machine's start, as that clock does."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return ticks / os.sysconf("SC_CLK_TCK") - time.clock_gettime(time.CLOCK_BOOTTIME) + time.monotonic()


def main() -> int:
    parser = argparse.ArgumentParser(prog="slimserve-worker")
    parser.add_argument("address")
    parser.add_argument("incarnation", type=int)
    parser.add_argument("--flight-record", type=int)
    parser.add_argument("--scheduler-config", default="{}")
    parser.add_argument("--log-level", default="info")
    parser.add_argument("--log-format", choices=get_args(LogFormat), default="text")
    parser.add_argument("--prepare-kind", choices=get_args(EngineKind))
    parser.add_argument("--prepare-device", default="cpu")
    arguments = parser.parse_args()
    configure_logging(arguments.log_level, arguments.log_format, process="worker")
    gc.set_threshold(*RARE_COLLECTIONS)
    threading.Thread(target=exit_with_parent, args=(arguments.address,), daemon=True).start()
    config = msgspec.json.decode(arguments.scheduler_config, type=SchedulerConfig)
    mailbox = Mailbox(arguments.address)
    descriptor = arguments.flight_record
    record = FlightRecord.create() if descriptor is None else FlightRecord(descriptor)
    loop = WorkerLoop(
        mailbox,
        config,
        record=record,
        incarnation=arguments.incarnation,
        clock=time.monotonic,
        begun=_process_start(),
    )
    if arguments.prepare_kind is not None:
        loop.prepare(arguments.prepare_kind, arguments.prepare_device)
    try:
        loop.run()
    except Exception:
        logging.getLogger(__name__).exception("the worker dies")
        return 1
    return 0


if __name__ == "__main__":
    status = main()
    logging.shutdown()
    # No interpreter shutdown: a load thread or an engine's thread inside a long operation would hold it up.
    os._exit(status)
