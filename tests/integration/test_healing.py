"""Streams outlive workers: killed, stopped, hung, crashed, killed again while they start; with real processes."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from benchmarks.servers import Server
from engines.fake import BLOCK_SIZE
from tests.integration.fake_server import (
    LATE,
    PATIENCE,
    FakeServer,
    configuration,
    fake_server,
    sabotage,
    wait_until,
    workers_of,
)
from tests.integration.stream_readers import StreamReader, reading
from tests.metrics_text import metric

SLOW = "fake fake_step_seconds=0.005"
STEP_TIMEOUT = 2.0
TOKENS = 150
ROWS, CONTEXT = 16, 1024
"""Of a server whose number of KV blocks a test must know."""


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeServer]:
    folder = tmp_path_factory.mktemp("server")
    with fake_server(folder, configuration(SLOW, step_timeout=STEP_TIMEOUT)) as running:
        yield running


@pytest.fixture
def server(shared: FakeServer) -> FakeServer:
    """Its worker has settled a step, so that its restart budget is whole."""
    shared.wait_ready()
    assert shared.complete().status_code == 200
    return shared


def asks(server: FakeServer, count: int, **fields: Any) -> list[dict[str, Any]]:
    """Requests of different lengths and seeds."""
    return [server.body(seed=seed, prompt=[seed % 7, 2, 3], **{"max_tokens": TOKENS} | fields) for seed in range(count)]


def assert_undisturbed(server: FakeServer, bodies: Sequence[dict[str, Any]], readers: Sequence[StreamReader]) -> None:
    """Nothing lost, changed or repeated: each stream says what the same request gives with nobody in its way."""
    with reading(server.url, bodies) as references:
        pass
    for reader, reference in zip(readers, references, strict=True):
        reader.assert_whole()
        reference.assert_whole()
        assert reader.text == reference.text
        assert reader.tokens == reference.tokens
        assert reader.finish == reference.finish


def kill(server: FakeServer) -> psutil.Process:
    [worker] = server.workers()
    worker.kill()
    return worker


def await_next(server: FakeServer, killed: psutil.Process) -> None:
    """A process has taken its place; nothing is loaded yet."""
    wait_until(lambda: server.workers() not in ([], [killed]), "the next process")


def moved(readers: Sequence[StreamReader], patience: float = PATIENCE) -> None:
    """Every stream that goes on has had news since now."""
    before = [reader.events() for reader in readers]
    wait_until(
        lambda: all(
            reader.done or reader.error is not None or reader.events() > events
            for reader, events in zip(readers, before, strict=True)
        ),
        "all streams to move",
        patience,
    )


def test_killed_worker_costs_its_streams_a_pause_and_nothing_else(server: FakeServer) -> None:
    restarts = metric(server.url, "slimserve_worker_restarts_total") if "died" in server.log else 0
    bodies = asks(server, 20, max_tokens=2 * TOKENS)
    with reading(server.url, bodies) as readers:
        for _ in range(3):
            kill(server)
            moved(readers)
    assert_undisturbed(server, bodies, readers)
    assert metric(server.url, "slimserve_worker_restarts_total") == restarts + 3
    assert metric(server.url, "slimserve_replayed_requests_total") >= 20
    assert metric(server.url, "slimserve_requests_total", ending="error") == 0
    assert "SIGKILL" in server.log


def test_choices_with_log_probabilities_go_on_too(server: FakeServer) -> None:
    bodies = asks(server, 4, logprobs=1)
    with reading(server.url, bodies) as readers:
        kill(server)
    assert_undisturbed(server, bodies, readers)
    assert all(len(reader.tokens) == TOKENS for reader in readers)


def test_requests_that_wait_for_one_answer_get_it(server: FakeServer) -> None:
    body = server.body(max_tokens=TOKENS, n=3, seed=4)
    expected = httpx.post(f"{server.url}/v1/completions", json=body, timeout=PATIENCE).json()["choices"]
    answers: list[httpx.Response] = []

    def ask() -> None:
        answers.append(httpx.post(f"{server.url}/v1/completions", json=body, timeout=PATIENCE))

    thread = threading.Thread(target=ask)
    thread.start()
    wait_until(lambda: metric(server.url, "slimserve_requests_running") == 3, "the request to run")
    kill(server)
    thread.join(PATIENCE)
    assert answers[0].status_code == 200
    assert answers[0].json()["choices"] == expected
    assert answers[0].json()["usage"]["completion_tokens"] == 3 * TOKENS


def test_requests_that_come_during_a_restart_wait_for_it(server: FakeServer) -> None:
    kill(server)
    wait_until(lambda: not server.ready(), "readiness to go")
    assert server.complete().status_code == 200


def test_stopped_worker_is_found_in_time_and_its_streams_go_on(server: FakeServer) -> None:
    bodies = asks(server, 8)
    with reading(server.url, bodies) as readers:
        [worker] = server.workers()
        worker.suspend()
        found = wait_until(lambda: not server.ready(), "the stop to be found")
    assert found <= STEP_TIMEOUT + LATE
    assert_undisturbed(server, bodies, readers)
    assert "it said nothing for" in server.log


def test_worker_killed_while_it_starts_again_is_started_again(server: FakeServer) -> None:
    bodies = asks(server, 8)
    with reading(server.url, bodies) as readers:
        for _ in range(3):
            await_next(server, kill(server))
    assert_undisturbed(server, bodies, readers)


def test_cancelled_during_a_restart_means_cancelled(server: FakeServer) -> None:
    with httpx.Client(timeout=PATIENCE) as client:
        body = server.body(stream=True, max_tokens=2000)
        with client.stream("POST", f"{server.url}/v1/completions", json=body) as response:
            assert next(response.iter_lines())
            kill(server)
            wait_until(lambda: not server.ready(), "readiness to go")
    server.wait_ready()
    wait_until(lambda: metric(server.url, "slimserve_kv_blocks_used") == 0, "the blocks to return")
    assert metric(server.url, "slimserve_requests_running") == 0


def test_with_the_restart_budget_spent_each_stream_gets_one_error_and_the_server_ends(tmp_path: Path) -> None:
    with fake_server(tmp_path, configuration(SLOW, max_restarts=1)) as server:
        bodies = asks(server, 4, max_tokens=1500)
        with reading(server.url, bodies) as readers:
            await_next(server, kill(server))
            kill(server)
            assert server.wait() == 1
        for reader in readers:
            reader.join()
            assert reader.error is not None
            assert reader.error["type"] == "engine_unavailable"
            assert not reader.done
        assert "given up" in server.log


def test_streams_of_a_dead_replica_go_on_at_the_other_at_once(tmp_path: Path) -> None:
    # Ready is whoever has one of them; only a worker that has loaded reports blocks.
    blocks = ROWS * -(-CONTEXT // BLOCK_SIZE)
    config = configuration(f"{SLOW} replicas=2 max_model_len={CONTEXT}", max_batch=ROWS)
    with fake_server(tmp_path, config) as server:
        wait_until(lambda: metric(server.url, "slimserve_kv_blocks") == 2 * blocks, "both replicas")
        bodies = asks(server, 8, max_tokens=4 * TOKENS)
        with reading(server.url, bodies) as readers:
            server.workers()[0].kill()
            moved(readers)
            assert server.ready()
            assert metric(server.url, "slimserve_replayed_requests_total") == 4, "they shared the load"
        assert_undisturbed(server, bodies, readers)
        wait_until(lambda: len(server.workers()) == 2, "the second worker to come back")


def test_full_disk_under_the_log_changes_nothing(tmp_path: Path) -> None:
    with fake_server(tmp_path, configuration(SLOW), log=Path("/dev/full")) as server:
        bodies = asks(server, 4)
        with reading(server.url, bodies) as readers:
            kill(server)
            moved(readers)
        assert_undisturbed(server, bodies, readers)


POISON = 66
HANG = 77


@pytest.fixture
def poisonous(tmp_path: Path) -> Iterator[FakeServer]:
    """Its engine crashes on prompts with one token, and never ends a step over prompts with another one."""
    environment = sabotage(
        tmp_path,
        f"""
        import os, signal, time
        from engines.fake import FakeEngine

        healthy = FakeEngine.launch

        def launch(engine, plan):
            ticket = healthy(engine, plan)
            first_tokens = {{engine._slots[row.slot].tokens[0] for row in plan.rows}}
            if {POISON} in first_tokens:
                os.kill(os.getpid(), signal.SIGSEGV)
            while {HANG} in first_tokens:
                time.sleep(1)
            return ticket

        FakeEngine.launch = launch
        """,
    )
    with fake_server(tmp_path, configuration(SLOW, step_timeout=1), environment=environment) as running:
        yield running


@pytest.mark.parametrize(("token", "choices"), [(POISON, 1), (POISON, 2), (HANG, 1)])
def test_request_that_kills_is_ended_and_the_others_go_on(poisonous: FakeServer, token: int, choices: int) -> None:
    bodies = asks(poisonous, 12)
    with reading(poisonous.url, bodies) as readers:
        answer = httpx.post(
            f"{poisonous.url}/v1/completions",
            json=poisonous.body(prompt=[token, 2, 3], n=choices),
            timeout=PATIENCE,
        )
    assert answer.status_code == 500
    assert "died of this request" in answer.json()["error"]["message"]
    assert_undisturbed(poisonous, bodies, readers)
    assert metric(poisonous.url, "slimserve_worker_restarts_total") <= 4
    assert metric(poisonous.url, "slimserve_strikes_total") >= 3
    assert metric(poisonous.url, "slimserve_requests_total", ending="error") == 1


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("return None", "a message of it could not be handled"),
        ("mailbox._socket.disconnect(sys.argv[1])", "it said nothing for"),
        ("mailbox._socket.close()", "it ended with status 1"),
    ],
    ids=["one message is lost", "the connection is gone", "the socket is closed"],
)
def test_broken_connection_costs_a_pause(tmp_path: Path, fault: str, reason: str) -> None:
    environment = sabotage(
        tmp_path,
        f"""
        import sys
        from server.worker.mailbox import Mailbox
        from server.worker.wire import StepOutputs

        healthy = Mailbox.send
        sent = 0

        def send(mailbox, message):
            global sent
            sent += isinstance(message, StepOutputs)
            if sent == 50 and sys.argv[2] == "1":
                {fault}
            healthy(mailbox, message)

        Mailbox.send = send
        """,
    )
    with fake_server(tmp_path, configuration(SLOW, step_timeout=STEP_TIMEOUT), environment=environment) as server:
        bodies = asks(server, 6)
        with reading(server.url, bodies) as readers:
            pass
        assert_undisturbed(server, bodies, readers)
        assert reason in server.log


def test_real_model_goes_on_with_the_same_text(real_server: Server) -> None:
    """In fp32 byte for byte, also where tokens are drawn at random. Many more: ``benchmarks/worker_kills.py``."""
    bodies = [
        {"model": "smollm2", "prompt": f"A tale of {seed} rivers", "max_tokens": 40, "ignore_eos": True}
        | {"seed": seed, "temperature": 0.5 * (seed % 3)}
        for seed in range(16)
    ]
    with reading(real_server.url, bodies) as references:
        pass
    with reading(real_server.url, bodies) as readers:
        for _ in range(2):
            [worker] = workers_of(real_server.process)
            worker.kill()
            moved(readers, patience=100)
    for reader, reference in zip(readers, references, strict=True):
        reader.assert_whole()
        assert reader.text == reference.text
