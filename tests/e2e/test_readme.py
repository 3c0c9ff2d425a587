"""The README's commands, typed as they stand there."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.servers import Server, free_port, running

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)


def block_with(text: str) -> str:
    found = [block for block in BLOCKS if text in block]
    assert len(found) == 1, f"README has {len(found)} shell blocks with {text!r}"
    return str(found[0])


def environment() -> dict[str, str]:
    """The README's ``.venv`` is this interpreter's own environment; its commands are first on the path."""
    return os.environ | {"VENV": sys.prefix, "PATH": f"{sys.prefix}/bin:{os.environ['PATH']}"}


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The first command, on another port than the README's so that it does not meet a server of the user's own."""
    port = free_port()
    command = [*block_with("quickstart.sh").split(), "--port", str(port)]
    log = tmp_path_factory.mktemp("quickstart") / "log"
    os.chdir(ROOT)
    with running("quickstart", command, port, "/health/ready", env=environment(), log=log) as server:
        yield server


def typed(command: str, server: Server, stdin: str = "") -> str:
    command = command.replace("http://127.0.0.1:8000", server.url).replace(".venv/bin/", "")
    process = subprocess.run(
        ["bash", "-euc", command],
        input=stdin,
        capture_output=True,
        text=True,
        env=environment(),
        cwd=ROOT,
        timeout=120,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


def test_curl_streams_a_sensible_answer(quickstart: Server) -> None:
    lines = [line.removeprefix("data: ") for line in typed(block_with("curl -N"), quickstart).splitlines() if line]
    assert lines[-1] == "[DONE]"
    chunks = [json.loads(line) for line in lines[:-1]]
    assert "Paris" in "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)


def test_chat_answers_a_piped_question(quickstart: Server) -> None:
    command = f"{block_with('.venv/bin/slimserve chat').strip()} --url {quickstart.url} --temperature 0"
    assert "Paris" in typed(command, quickstart, stdin="What is the capital of France?\n")


def test_three_lines_compress_serve_and_ask(tmp_path: Path) -> None:
    compress, serve, chat = (line.partition("#")[0].strip() for line in block_with("slimserve compress").splitlines())
    made = subprocess.run(
        ["bash", "-euc", compress], capture_output=True, text=True, env=environment(), cwd=tmp_path, timeout=300
    )
    assert made.returncode == 0, made.stderr
    port = free_port()
    command = [*serve.replace("./small", str(tmp_path / "small")).split(), "--port", str(port)]
    with running("small", command, port, "/health/ready", env=environment(), log=tmp_path / "log") as server:
        answer = typed(f"{chat} --url {server.url} --temperature 0", server, "What is the capital of France?\n")
    assert "Paris" in answer


def test_every_documented_page_exists() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
