"""The worker process of one device: a loop of plan -> launch -> collect -> settle over the engines it holds.

    python -m server.worker.main ADDRESS INCARNATION --flight-record DESCRIPTOR --scheduler-config JSON

Standard input is a pipe that the API process holds: its end means that the API process died, and the worker exits.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import threading
import time
from pathlib import Path

import msgspec

from server.scheduler.config import SchedulerConfig
from server.worker.flight_record import FlightRecord
from server.worker.loop import WorkerLoop
from server.worker.mailbox import Mailbox


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


def main() -> int:
    parser = argparse.ArgumentParser(prog="slimserve-worker")
    parser.add_argument("address")
    parser.add_argument("incarnation", type=int)
    parser.add_argument("--flight-record", type=int)
    parser.add_argument("--scheduler-config", default="{}")
    parser.add_argument("--log-level", default="info")
    arguments = parser.parse_args()
    logging.basicConfig(
        level=arguments.log_level.upper(),
        format=f"%(asctime)s %(levelname)s worker[{os.getpid()}] %(name)s: %(message)s",
    )
    threading.Thread(target=exit_with_parent, args=(arguments.address,), daemon=True).start()
    config = msgspec.json.decode(arguments.scheduler_config, type=SchedulerConfig)
    mailbox = Mailbox(arguments.address)
    descriptor = arguments.flight_record
    record = FlightRecord.create() if descriptor is None else FlightRecord(descriptor)
    loop = WorkerLoop(mailbox, config, record=record, incarnation=arguments.incarnation, clock=time.monotonic)
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
