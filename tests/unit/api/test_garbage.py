"""What requests leave behind is freed at once: cycles would wait for a full collection, which stops all streams."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Iterator

import pytest

from engines.manifest import Manifest
from server.api.state import ApiSettings
from server.errors import Overloaded
from tests.unit.api.harness import ScriptedDispatcher, run, until
from tests.unit.api.test_line import Browser

ROUNDS = 3


@pytest.fixture
def kept() -> Iterator[list[object]]:
    """Nothing is collected while a test runs; what could only be is found in ``gc.garbage``."""
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    yield gc.garbage
    gc.set_debug(0)
    gc.garbage.clear()
    gc.enable()
    gc.collect()


def ours(kept: list[object]) -> list[str]:
    """Types of our own objects that only a collection would free."""
    gc.collect()
    return [type(each).__qualname__ for each in kept if type(each).__module__.startswith("server.")]


@pytest.mark.parametrize("stream", [True, False])
def test_answered_requests(manifest: Manifest, kept: list[object], stream: bool) -> None:
    async def main() -> None:
        dispatcher = ScriptedDispatcher(lambda request, choice: "abc")
        browser = Browser(manifest, dispatcher)
        for _ in range(ROUNDS):
            browser.ask(stream=stream, max_tokens=3, stop="x")
            await until(lambda: browser.heard()[1])
        await asyncio.sleep(0)
        dispatcher.replies.clear()
        dispatcher.closed.clear()
        dispatcher.requests.clear()
        assert ours(kept) == []

    run(main())


def test_refused_requests(manifest: Manifest, kept: list[object]) -> None:
    async def main() -> None:
        dispatcher = ScriptedDispatcher()
        browser = Browser(manifest, dispatcher)
        for _ in range(ROUNDS):
            dispatcher.refusal = Overloaded("no room", retry_after=2)
            browser.ask()
            await until(lambda: browser.heard()[1])
        dispatcher.refusal = None
        await asyncio.sleep(0)
        assert ours(kept) == []

    run(main())


def test_client_that_left(manifest: Manifest, kept: list[object]) -> None:
    async def main() -> None:
        dispatcher = ScriptedDispatcher()
        browser = Browser(manifest, dispatcher, ApiSettings(max_pending_tokens=8))
        browser.ask()
        await until(lambda: dispatcher.replies)
        dispatcher.replies[0].deliver(0, 0, [97], "", now=1.0)
        browser.wire.close()
        browser.connection.connection_lost(None)
        await until(lambda: dispatcher.closed)
        for _ in range(5):
            await asyncio.sleep(0)
        dispatcher.replies.clear()
        dispatcher.closed.clear()
        dispatcher.requests.clear()
        assert ours(kept) == []

    run(main())
