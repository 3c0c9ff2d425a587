"""``slimserve chat`` against a running server, through a pipe and on a terminal."""

from __future__ import annotations

import os
import pty
import re
import signal
import subprocess
import time
from collections.abc import Iterator

import httpx
import pytest

from benchmarks.servers import slimserve
from tests.integration.fake_server import PATIENCE, FakeServer, configuration, fake_server, wait_until


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeServer]:
    config = configuration("fake fake_step_seconds=0.01", api_key="sesame")
    with fake_server(tmp_path_factory.mktemp("chat"), config) as started:
        yield started


def running(server: FakeServer) -> float:
    page = httpx.get(f"{server.url}/metrics", headers={"Authorization": "Bearer sesame"}, timeout=PATIENCE).text
    found = re.search(r'slimserve_requests_running{model="fake"} (\S+)', page)
    assert found, page
    return float(found[1])


def chat(server: FakeServer, *options: str) -> list[str]:
    return slimserve("chat", "--url", server.url, "--seed", "1", *options)


def environment(key: str = "sesame") -> dict[str, str]:
    return os.environ | {"SLIMSERVE_API_KEY": key, "TERM": "dumb"}


def test_a_piped_question_gets_its_answer(server: FakeServer) -> None:
    command = chat(server, "--max-tokens", "20")
    answers = [
        subprocess.run(command, input=b"hello\n", capture_output=True, env=environment(), timeout=PATIENCE, check=True)
        for _ in range(2)
    ]
    assert len(answers[0].stdout.strip()) > 5
    assert answers[0].stdout == answers[1].stdout


@pytest.mark.parametrize(
    ("options", "key", "message"),
    [((), "wrong", b"API key"), (("--model", "other"), "sesame", b"other")],
)
def test_refusals_are_one_line(server: FakeServer, options: tuple[str, ...], key: str, message: bytes) -> None:
    answer = subprocess.run(
        chat(server, *options), input=b"hello", capture_output=True, env=environment(key), timeout=PATIENCE, check=False
    )
    assert answer.returncode == 1
    assert message in answer.stderr
    assert answer.stderr.count(b"\n") == 1


class Terminal:
    """A process on a pseudo terminal of its own."""

    def __init__(self, command: list[str]) -> None:
        self.output = b""
        pid, self._master = pty.fork()
        if pid == 0:
            os.execvpe(command[0], command, environment())
        self.pid = pid

    def read(self) -> bool:
        """False at the end."""
        try:
            chunk = os.read(self._master, 4096)
        except OSError:
            return False
        self.output += chunk
        return bool(chunk)

    def read_until(self, text: bytes) -> None:
        started = time.monotonic()
        while text not in self.output:
            assert self.read(), self.output
            assert time.monotonic() - started < PATIENCE, self.output

    def type(self, text: bytes) -> None:
        self.output = b""
        os.write(self._master, text)

    def wait(self) -> int:
        while self.read():
            pass
        os.close(self._master)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_on_a_terminal_ctrl_c_stops_an_answer_and_ctrl_d_leaves(server: FakeServer) -> None:
    terminal = Terminal(chat(server))
    terminal.read_until(b"> ")
    terminal.type(b"tell me much\n")
    terminal.read_until(b"much\r\n")
    echo = len(terminal.output)
    while len(terminal.output) < echo + 20:
        assert terminal.read(), terminal.output
    wait_until(lambda: running(server) == 1, "a report of the answer")
    os.kill(terminal.pid, signal.SIGINT)
    terminal.read_until(b"(stopped)")
    wait_until(lambda: running(server) == 0, "the cancel")
    # The answer itself may hold what looks like a prompt.
    terminal.output = terminal.output.partition(b"(stopped)")[2]
    terminal.read_until(b"> ")
    terminal.type(b"\x03")
    terminal.read_until(b"> ")
    terminal.type(b"\x04")
    assert terminal.wait() == 0
