"""A worker as the API process sees it on the wire: a real process, or its loop in a thread of the test."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import msgspec
import pytest
import zmq

from engines import registry
from engines.fake import FakeEngine, fake_token
from engines.protocol import EngineSpec, SamplingParams, StepResult
from server.scheduler.config import SchedulerConfig
from server.worker.flight_record import FlightRecord
from server.worker.loop import WorkerLoop
from server.worker.mailbox import Mailbox
from server.worker.wire import (
    Cancel,
    Configure,
    FromWorker,
    Hello,
    Item,
    Loaded,
    LoadEngine,
    LoadFailed,
    LoadReport,
    Offer,
    Refused,
    StepOutputs,
    Stop,
    ToWorker,
    Unloaded,
    UnloadEngine,
    decode_from_worker,
    encode,
)
from tests.integration.fake_server import LATE, PATIENCE
from tests.unit.generation.tiny_models import LLAMA, model_folder, tiny_spec

M = TypeVar("M", bound=FromWorker)
FAKE = EngineSpec(name="m", kind="fake")


class ApiSide:
    """The other end of the socket."""

    def __init__(self, address: str) -> None:
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PAIR)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.RCVTIMEO, 20_000)
        self._socket.bind(address)

    def send(self, message: ToWorker) -> None:
        self._socket.send(encode(message))

    def next(self, kind: type[M]) -> M:
        """The next message of this kind; others are passed over."""
        while True:
            message = decode_from_worker(self._socket.recv())
            if isinstance(message, kind):
                return message

    def close(self) -> None:
        self._socket.close()


def item(number: int, *, engine: str = "m", max_tokens: int = 5) -> Item:
    return Item(
        item=number,
        request=number,
        engine=engine,
        tokens=[1, 2, 3],
        prompt_length=3,
        max_tokens=max_tokens,
        sampling=SamplingParams(seed=number),
    )


def tokens_of(api: ApiSide, number: int) -> tuple[list[int], str]:
    """All tokens of an item up to its end."""
    tokens: list[int] = []
    while True:
        outputs = api.next(StepOutputs)
        if number in outputs.items:
            place = outputs.items.index(number)
            assert outputs.first_index[place] == len(tokens)
            tokens += outputs.tokens[place]
            if outputs.ends[place]:
                return tokens, outputs.ends[place]


@pytest.fixture
def api(tmp_path: Path) -> Iterator[ApiSide]:
    side = ApiSide(f"ipc://{tmp_path}/socket")
    yield side
    side.close()


@pytest.fixture
def process(api: ApiSide, tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "server.worker.main", f"ipc://{tmp_path}/socket", "7"]
    with (tmp_path / "log").open("wb") as log, subprocess.Popen(command, stdin=subprocess.PIPE, stderr=log) as worker:
        yield worker
        worker.kill()


def test_hello_load_offer_cancel_unload_stop(api: ApiSide, process: subprocess.Popen[bytes]) -> None:
    hello = api.next(Hello)
    assert (hello.incarnation, hello.pid) == (7, process.pid)
    api.send(LoadEngine(FAKE))
    assert api.next(Loaded).info.name == "m"
    api.send(Offer([item(1), item(2, max_tokens=1500)]))
    assert tokens_of(api, 1) == ([fake_token(1, 0, position) for position in range(5)], "length")
    api.send(Cancel([2, 999]))
    report = api.next(LoadReport)
    while report.engines[0].running:
        report = api.next(LoadReport)
    assert report.incarnation == 7
    assert report.engines[0].blocks_used == 0
    assert report.engines[0].integrity_errors == 0
    api.send(UnloadEngine("m"))
    assert api.next(Unloaded).name == "m"
    api.send(Offer([item(3)]))
    assert api.next(Refused).items == [3]
    api.send(Stop())
    assert process.wait(5) == 0


def test_other_settings_forget_all_items_and_serve_on(api: ApiSide, process: subprocess.Popen[bytes]) -> None:
    api.send(LoadEngine(FAKE))
    api.next(Loaded)
    api.send(Offer([item(1, max_tokens=1500)]))
    api.next(StepOutputs)
    api.send(Configure(msgspec.json.encode(SchedulerConfig(max_batch=1, policy="static"))))
    api.send(Offer([item(2), item(3)]))
    assert tokens_of(api, 2) == ([fake_token(2, 0, position) for position in range(5)], "length")
    assert tokens_of(api, 3)[1] == "length"
    report = api.next(LoadReport)
    while report.engines[0].running:
        report = api.next(LoadReport)
    assert report.engines[0].blocks_used == 0
    assert report.steps > 5, "steps count on"


def test_the_first_step_is_predicted_from_what_the_engine_measured(
    api: ApiSide, process: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    api.send(LoadEngine(tiny_spec(model_folder(tmp_path, LLAMA), name="m")))
    api.next(Loaded)
    api.send(Offer([item(1)]))
    assert api.next(StepOutputs).stats.predicted_seconds > 0


def test_items_of_an_unloaded_engine_end_with_an_error(api: ApiSide, process: subprocess.Popen[bytes]) -> None:
    api.send(LoadEngine(FAKE))
    api.next(Loaded)
    api.send(Offer([item(1, max_tokens=1500)]))
    api.next(StepOutputs)
    api.send(UnloadEngine("m"))
    assert tokens_of_last(api) == "error"
    assert api.next(Unloaded).name == "m"


def tokens_of_last(api: ApiSide) -> str:
    while True:
        outputs = api.next(StepOutputs)
        if any(outputs.ends):
            return outputs.ends[0]


def test_a_model_that_cannot_be_loaded_is_a_message_and_the_worker_goes_on(
    api: ApiSide, process: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    (tmp_path / "model").mkdir()
    api.send(LoadEngine(EngineSpec(name="bad", source=str(tmp_path / "model"))))
    failed = api.next(LoadFailed)
    assert failed.name == "bad"
    assert "config.json" in failed.reason
    api.send(LoadEngine(FAKE))
    assert api.next(Loaded).info.name == "m"


def test_end_of_standard_input_ends_the_worker_and_its_socket(
    api: ApiSide, process: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    api.next(Hello)
    assert process.stdin is not None
    started = time.monotonic()
    process.stdin.close()
    assert process.wait(PATIENCE) != 0
    assert time.monotonic() - started < 2 + LATE
    assert not (tmp_path / "socket").exists()


class SlowEngine(FakeEngine):
    """Holds its first step until told to go on."""

    go = threading.Event()

    def collect(self, ticket: int) -> StepResult:
        assert self.go.wait(20)
        return super().collect(ticket)


class BrokenEngine(FakeEngine):
    def collect(self, ticket: int) -> StepResult:
        raise ArithmeticError("the device is on fire")


class LoopInThread:
    def __init__(self, address: str) -> None:
        self.error: BaseException | None = None
        self._record = FlightRecord.create()
        self._loop = WorkerLoop(
            Mailbox(address), SchedulerConfig(), record=self._record, incarnation=1, clock=time.monotonic
        )
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._loop.run()
        except ArithmeticError as error:
            self.error = error

    def join(self) -> None:
        self._thread.join(20)
        assert not self._thread.is_alive()
        self.launched = self._record.items()
        self._record.close()


def test_a_report_leaves_while_a_step_is_long(api: ApiSide, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "create", SlowEngine.load)
    loop = LoopInThread(f"ipc://{tmp_path}/socket")
    api.send(LoadEngine(FAKE))
    api.next(Loaded)
    api.send(Offer([item(1)]))
    reports = [api.next(LoadReport) for _ in range(3)]
    assert reports[-1].phase == "step"
    assert reports[-1].steps == 0
    assert reports[-1].engines[0].running == 1
    SlowEngine.go.set()
    assert tokens_of(api, 1)[1] == "length"
    api.send(Stop())
    loop.join()
    assert loop.error is None
    assert loop.launched == set()


def test_what_a_step_raises_ends_the_loop(api: ApiSide, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "create", BrokenEngine.load)
    loop = LoopInThread(f"ipc://{tmp_path}/socket")
    api.send(LoadEngine(FAKE))
    api.send(Offer([item(0)]))
    api.next(Loaded)
    api.send(Offer([item(1)]))
    loop.join()
    assert isinstance(loop.error, ArithmeticError)
    assert loop.launched == {1}


def test_engines_that_serve_go_on_while_another_one_loads(
    api: ApiSide, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loading, finish = threading.Event(), threading.Event()

    def create(spec: EngineSpec, report: object) -> FakeEngine:
        if spec.name == "slow":
            loading.set()
            assert finish.wait(20)
        return FakeEngine.load(spec, lambda progress: None)

    monkeypatch.setattr(registry, "create", create)
    loop = LoopInThread(f"ipc://{tmp_path}/socket")
    api.send(LoadEngine(FAKE))
    api.next(Loaded)
    api.send(LoadEngine(EngineSpec(name="slow", kind="fake")))
    assert loading.wait(20)
    api.send(Offer([item(1)]))
    assert tokens_of(api, 1)[1] == "length"
    finish.set()
    assert api.next(Loaded).info.name == "slow"
    api.send(Offer([item(2, engine="slow")]))
    assert tokens_of(api, 2)[1] == "length"
    api.send(Stop())
    loop.join()
