"""``slimserve pull`` from a hub that runs here, with the hub's real client."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest

from benchmarks.servers import free_port, slimserve
from server.catalog import MARKER

COMMIT = "c" * 40
FILES = {
    "config.json": b'{"model_type": "llama"}',
    "model.safetensors": bytes(range(256)) * 4000,
    "tokenizer.json": b"{}",
    "pytorch_model.bin": b"a pickle",
    "modeling_evil.py": b"raise SystemExit",
}


class Hub(ThreadingHTTPServer):
    """As much of the hub as its client asks for; ``asked`` has the file names."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.files = dict(FILES)
        self.corrupt = ""
        self.asked: list[str] = []
        self.may_send = threading.Event()
        """Weights are not sent before."""
        self.may_send.set()
        self.tokens: set[tuple[str, str | None]] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def info(self) -> dict[str, object]:
        siblings = []
        for name, content in self.files.items():
            blob = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
            sibling: dict[str, object] = {"rfilename": name, "size": len(content), "blobId": blob}
            if name.endswith(".safetensors"):
                digest = hashlib.sha256(content).hexdigest()
                sibling["lfs"] = {"sha256": digest, "size": len(content), "pointerSize": 1}
            siblings.append(sibling)
        return {"id": "org/tiny", "sha": COMMIT, "siblings": siblings}


class HubHandler(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.server.tokens.add((self.path.split("?")[0].split("/")[1], self.headers.get("Authorization")))
        path = self.path.split("?")[0]
        if path in ("/api/models/org/tiny", "/api/models/org/tiny/revision/v1"):
            return self.answer(json.dumps(self.server.info()).encode(), "application/json")
        prefix = f"/org/tiny/resolve/{COMMIT}/"
        name = path.removeprefix(prefix)
        if not path.startswith(prefix) or name not in self.server.files:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return None
        if self.command == "GET":
            self.server.asked.append(name)
        content = self.server.files[name]
        return self.answer(content[:-1] + b"?" if name == self.server.corrupt else content, "application/octet-stream")

    def answer(self, content: bytes, kind: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command == "GET":
            if len(content) > 10_000:
                self.server.may_send.wait(60)
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # who asked was killed
                self.wfile.write(content)

    def log_message(self, format: str, *arguments: object) -> None:
        """Nothing: pytest shows stderr."""


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.may_send.set()
    server.shutdown()
    thread.join()
    server.server_close()


def environment(hub: Hub, home: Path) -> dict[str, str]:
    settings = {
        "SLIMSERVE_HOME": str(home),
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": "hf_secret",
        "HF_HOME": str(home / "hf"),
    }
    return os.environ | settings


def pull(hub: Hub, home: Path, name: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        slimserve("pull", name), capture_output=True, text=True, env=environment(hub, home), timeout=60, check=False
    )


@contextlib.contextmanager
def serving(hub: Hub, home: Path) -> Iterator[tuple[subprocess.Popen[str], httpx.Client]]:
    """A server that has begun to download its model's weights, which the hub does not send yet."""
    hub.may_send.clear()
    port = free_port()
    process = subprocess.Popen(
        slimserve("serve", "hf:org/tiny", "--port", str(port)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(hub, home),
    )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
            deadline = time.monotonic() + 60
            while "model.safetensors" not in hub.asked:
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.02)
            yield process, client
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("name", ["hf:org/tiny", "hf:org/tiny@v1"])
def test_pull_from_the_hub_takes_what_serving_needs(hub: Hub, tmp_path: Path, name: str) -> None:
    answer = pull(hub, tmp_path, name)
    assert answer.returncode == 0, answer.stderr
    [folder] = (tmp_path / "models").glob("hf--org--tiny*")
    wanted = {"config.json", "model.safetensors", "tokenizer.json"}
    assert {path.name for path in folder.iterdir()} == wanted | {MARKER}
    assert all((folder / file).read_bytes() == FILES[file] for file in wanted)
    assert set(hub.asked) == wanted
    assert {("api", "Bearer hf_secret"), ("org", "Bearer hf_secret")} <= hub.tokens
    assert "hf_secret" not in answer.stdout + answer.stderr


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_a_file_with_a_wrong_hash_is_never_kept(hub: Hub, tmp_path: Path, file: str) -> None:
    hub.corrupt = file
    answer = pull(hub, tmp_path, "hf:org/tiny")
    assert answer.returncode == 1
    assert file in answer.stderr
    assert answer.stderr.count("\n") == 1
    assert not list((tmp_path / "models").glob("hf--*"))
    hub.corrupt = ""
    assert pull(hub, tmp_path, "hf:org/tiny").returncode == 0


def test_a_repository_of_pickles_is_refused_before_any_download(hub: Hub, tmp_path: Path) -> None:
    del hub.files["model.safetensors"]
    answer = pull(hub, tmp_path, "hf:org/tiny")
    assert answer.returncode == 1
    assert "pickle" in answer.stderr
    assert hub.asked == []


def test_an_unknown_repository_is_one_line(hub: Hub, tmp_path: Path) -> None:
    answer = pull(hub, tmp_path, "hf:org/none")
    assert answer.returncode == 1
    assert answer.stderr.startswith("Error: hf:org/none could not be downloaded from the hub:")
    assert answer.stderr.count("\n") == 1


def test_a_server_that_downloads_its_model_is_alive_and_not_ready(hub: Hub, tmp_path: Path) -> None:
    with serving(hub, tmp_path) as (process, client):
        assert client.get("/health/live").status_code == 200
        ready = client.get("/health/ready")
        assert ready.status_code == 503
        (model,) = ready.json()["models"]
        assert (model["name"], model["state"], model["phase"]) == ("tiny", "starting", "downloading")
        assert model["total"] > len(FILES["model.safetensors"])
        body = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}]}
        refused = client.post("/v1/chat/completions", json=body)
        assert refused.status_code == 503
        assert refused.headers["retry-after"] == "5"
        assert client.post("/admin/reload").status_code == 409
        assert client.get("/openapi.json").status_code == client.get("/metrics").status_code == 200
        hub.may_send.set()
        # What the hub has is no model: the server says so in a line and ends, as it does for a folder.
        output, errors = process.communicate(timeout=60)
        assert process.returncode == 1
        assert "config.json" in errors
        assert "Traceback" not in errors
        assert "tiny: downloading" in output


def test_a_stop_does_not_wait_for_a_download(hub: Hub, tmp_path: Path) -> None:
    with serving(hub, tmp_path) as (process, client):
        assert client.get("/health/live").status_code == 200
        process.terminate()
        assert process.wait(10) == 0
