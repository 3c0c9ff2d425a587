"""What stands behind Ray's proxy, without Ray: a server as a child, requests forwarded to it, models on demand.

``python -m deploy.ray.check`` does the same with a real Ray cluster.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Message

from deploy.ray.child import Child
from deploy.ray.forward import forward
from server.errors import EngineUnavailable
from server.settings import ModelSettings
from tests.integration.fake_server import PATIENCE, configuration, wait_until
from tests.metrics_text import value

KEY = "the-key-of-all-requests"
ADMIN = "the-key-of-the-operator"
AUTHORIZED = {"authorization": f"Bearer {KEY}"}
BODY = {"model": "fake", "prompt": [1, 2, 3], "max_tokens": 20, "ignore_eos": True}


@pytest.fixture(autouse=True)
def _keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLIMSERVE_API_KEY", KEY)
    monkeypatch.setenv("SLIMSERVE_ADMIN_KEY", ADMIN)


@asynccontextmanager
async def child(folder: Path, *models: str, **options: Any) -> AsyncIterator[Child]:
    config = folder / "slimserve.yaml"
    config.write_text(configuration(*models, **options))
    server = Child(config)
    try:
        await server.start(PATIENCE)
        yield server
    finally:
        await server.stop()


def proxy(server: Child) -> httpx.AsyncClient:
    """Asks as a client on another machine does, through Ray's part."""

    async def handle(request: Request) -> Response:
        return await forward(request, server.http, "replica-1")

    app = Starlette(routes=[Route("/{path:path}", handle, methods=["GET", "POST", "PUT"])])
    transport = httpx.ASGITransport(app=app, client=("203.0.113.7", 1))
    return httpx.AsyncClient(transport=transport, base_url="http://models.example.org", timeout=PATIENCE)


def own_server(port: int) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            line = process.cmdline()
        except psutil.Error:
            continue
        if line[1:4] == ["-P", "-m", "server.cli"] and line[-1] == str(port):
            found.append(process)
    return found


def test_requests_and_answers_go_through(tmp_path: Path) -> None:
    async def main() -> None:
        async with child(tmp_path, "fake", port=1, host="0.0.0.0") as server, proxy(server) as client:
            assert server.locked
            answer = await client.post("/v1/completions", json=BODY, headers=AUTHORIZED)
            assert answer.status_code == 200
            assert answer.headers["x-served-by"] == "replica-1"
            assert answer.json()["usage"]["completion_tokens"] == 20
            streamed = await client.post("/v1/completions", json=BODY | {"stream": True}, headers=AUTHORIZED)
            assert streamed.text.endswith("data: [DONE]\n\n")
            assert (await client.post("/v1/completions", json=BODY)).status_code == 401
            assert (await client.put("/v1/completions?x=%20y", headers=AUTHORIZED)).status_code == 405
            for path in ("/admin/reload", "/admin"):
                refused = await client.post(path, headers={"authorization": f"Bearer {ADMIN}"})
                assert (refused.status_code, refused.json()["error"]["code"]) == (404, "model_not_found")
            await server.check()

    asyncio.run(main())


def test_without_an_admin_key_nobody_behind_the_proxy_is_on_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SLIMSERVE_ADMIN_KEY")

    async def main() -> None:
        async with child(tmp_path, "fake") as server, proxy(server) as client:
            for path in ("/%61dmin/reload", "//admin/reload", "/admin/../admin/reload"):
                assert (await client.post(path)).status_code in (401, 404), path

    asyncio.run(main())


def test_a_client_that_leaves_ends_its_request(tmp_path: Path) -> None:
    async def main() -> None:
        async with child(tmp_path, "fake fake_step_seconds=0.05") as server:
            question = server.http.build_request(
                "POST", "/v1/completions", json=BODY | {"stream": True, "max_tokens": 1000}, headers=AUTHORIZED
            )
            scope: dict[str, Any] = {
                "type": "http",
                "method": "POST",
                "path": "/v1/completions",
                "query_string": b"",
                "client": None,
            }
            scope["headers"] = [(k.lower(), v) for k, v in question.headers.raw]
            first = asyncio.Event()

            async def receive() -> Message:
                return {"type": "http.request", "body": question.content, "more_body": False}

            async def send(message: Message) -> None:
                if message.get("body"):
                    first.set()

            response = await forward(Request(scope, receive), server.http, "replica-1")
            sending = asyncio.create_task(response(scope, receive, send))
            await asyncio.wait_for(first.wait(), PATIENCE)
            await until_running(server, 1)
            sending.cancel()
            await asyncio.wait({sending})
            await until_running(server, 0)

    asyncio.run(main())


async def until_running(server: Child, count: int) -> None:
    for _ in range(int(PATIENCE / 0.05)):
        page = await server.http.get("/metrics", headers=AUTHORIZED)
        if value(page.text, "slimserve_requests_running") == count:
            return
        await asyncio.sleep(0.05)
    raise AssertionError(f"waited for {count} running requests in vain")


def test_models_come_and_go_on_demand(tmp_path: Path) -> None:
    first, second = (ModelSettings(name=name, kind="fake") for name in ("first", "second"))
    broken = ModelSettings(name="broken", source=str(tmp_path / "nothing"))

    async def names(client: httpx.AsyncClient) -> list[str]:
        return [each["id"] for each in (await client.get("/v1/models", headers=AUTHORIZED)).json()["data"]]

    async def main() -> None:
        async with child(tmp_path, "fake") as server, proxy(server) as client:
            await server.serve_also([first], PATIENCE)
            assert await names(client) == ["fake", "first"]
            answer = await client.post("/v1/completions", json=BODY | {"model": "first"}, headers=AUTHORIZED)
            assert answer.status_code == 200
            await asyncio.gather(*(server.serve_also([first, second], PATIENCE) for _ in range(3)))
            assert await names(client) == ["fake", "first", "second"]
            with pytest.raises(EngineUnavailable):
                await server.serve_also([second, broken], PATIENCE)
            await server.serve_also([second], PATIENCE)
            assert await names(client) == ["fake", "second"]

    asyncio.run(main())


def test_a_server_that_died_is_told_of(tmp_path: Path) -> None:
    async def main() -> None:
        async with child(tmp_path, "fake") as server, proxy(server) as client:
            [process] = own_server(server.http.base_url.port or 0)
            process.kill()
            with pytest.raises(httpx.HTTPError):
                await server.check()
            refused = await client.post("/v1/completions", json=BODY, headers=AUTHORIZED)
            assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
            assert refused.json()["error"]["code"] == "engine_unavailable"

    asyncio.run(main())


def test_a_model_that_cannot_be_served_is_told_of(tmp_path: Path) -> None:
    config = tmp_path / "slimserve.yaml"
    config.write_text(f"models: [{{source: {tmp_path / 'nothing'}}}]")

    async def main() -> None:
        server = Child(config)
        try:
            with pytest.raises(EngineUnavailable):
                await server.start(PATIENCE)
        finally:
            await server.stop()

    asyncio.run(main())


def test_the_server_ends_with_a_replica_that_is_killed(tmp_path: Path) -> None:
    config = tmp_path / "slimserve.yaml"
    config.write_text(configuration("fake"))
    code = f"""
        import asyncio
        from pathlib import Path
        from deploy.ray.child import Child

        async def main():
            server = Child(Path({str(config)!r}))
            await server.start({PATIENCE})
            print(server.http.base_url.port, flush=True)
            await asyncio.sleep(600)

        asyncio.run(main())
    """
    root = str(Path(__file__).resolve().parents[2])
    replica = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, cwd=root)
    try:
        assert replica.stdout is not None
        port = next(int(line) for line in replica.stdout if line.strip().isdigit())
        [server] = own_server(port)
        workers = server.children()
        assert workers
    finally:
        replica.kill()
        replica.wait()
        if replica.stdout is not None:
            replica.stdout.close()
    wait_until(
        lambda: not any(each.is_running() and each.status() != "zombie" for each in [server, *workers]), "the end"
    )
