from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator

import pytest

from server.worker.flight_record import FlightRecord


@pytest.fixture
def record() -> Iterator[FlightRecord]:
    created = FlightRecord.create()
    yield created
    created.close()


def test_it_holds_the_items_of_steps_launched_and_not_settled(record: FlightRecord) -> None:
    assert record.items() == set()
    record.launched(1, [5, 6])
    record.launched(2, [6, 7])
    assert record.items() == {5, 6, 7}
    record.settled(1)
    assert record.items() == {6, 7}
    record.launched(3, [2**62])
    record.settled(2)
    assert record.items() == {2**62}
    record.settled(3)
    assert record.items() == set()


def test_a_step_of_more_items_than_it_has_room_for_is_recorded_in_part(record: FlightRecord) -> None:
    record.launched(1, range(100_000))
    record.launched(2, [-1])
    assert 4000 < len(record.items()) < 10_000
    record.settled(1)
    assert record.items() == {-1}


def test_close_is_idempotent(record: FlightRecord) -> None:
    record.close()
    record.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(record.descriptor)


def test_it_outlives_the_process_that_wrote_it(record: FlightRecord) -> None:
    script = f"""
        import os, signal
        from server.worker.flight_record import FlightRecord
        FlightRecord({record.descriptor}).launched(9, [3, 4])
        os.kill(os.getpid(), signal.SIGSEGV)
    """
    ended = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], pass_fds=(record.descriptor,), check=False)
    assert ended.returncode == -11
    assert record.items() == {3, 4}
