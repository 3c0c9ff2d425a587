"""One HTTP request while it waits for its replies, with an eye on whether the client is still there."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Self

from starlette.types import Message, Receive, Send

from server.requests import ChoiceNews, ClientGone, Reply


class Exchange:
    """Waits for several replies at once. As a context manager it closes them all at the end, however that comes."""

    def __init__(
        self,
        replies: Sequence[Reply],
        receive: Receive,
        on_exit: Callable[[], None],
        *,
        max_pending_tokens: int | None,
        tick: float | None = None,
    ) -> None:
        """``on_exit`` is called once all replies are closed.

        ``tick``: ``next`` gives an empty list after this many seconds without news; None never does."""
        self._replies = replies
        self._receive = receive
        self._on_exit = on_exit
        self._tick = tick
        self._quiet = False
        self._left = False
        self._sending: asyncio.Task[Any] | None = None
        self._wake = asyncio.Event()
        for reply in replies:
            reply.watch(self._wake, max_pending_tokens, self._on_overflow)

    async def __aenter__(self) -> Self:
        self._watcher = asyncio.create_task(self._watch_client())
        self._timer: asyncio.TimerHandle | None = None
        self._restart_timer()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for reply in self._replies:
            reply.close()
        self._on_exit()
        self._watcher.cancel()
        if self._timer is not None:
            self._timer.cancel()

    async def next(self) -> list[tuple[int, ChoiceNews]]:
        """News with the index of their reply. Raises the error that ended a reply, and ClientGone."""
        while True:
            if self._left:
                raise ClientGone
            if news := [(index, each) for index, reply in enumerate(self._replies) for each in reply.take()]:
                self._last_news = asyncio.get_running_loop().time()
                return news
            if self._quiet:
                self._quiet = False
                return []
            self._wake.clear()
            await self._wake.wait()

    async def send(self, send: Send, message: Message) -> None:
        """Write to the client. Raises ClientGone when it reads so slowly that a reply overflows meanwhile."""
        task = asyncio.current_task()
        self._sending = task
        try:
            await send(message)
        except asyncio.CancelledError:
            if task is None or not self._left:
                raise
            task.uncancel()
            raise ClientGone from None
        finally:
            self._sending = None

    def _on_overflow(self) -> None:
        if self._sending is not None and not self._left:
            self._sending.cancel()
        self._left = True

    async def _watch_client(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._left = True
        self._wake.set()

    def _restart_timer(self) -> None:
        if self._tick is None:
            return
        loop = asyncio.get_running_loop()
        self._last_news = loop.time()
        self._timer = loop.call_later(self._tick, self._on_timer, loop, self._tick)

    def _on_timer(self, loop: asyncio.AbstractEventLoop, tick: float) -> None:
        """One timer a stream, not one an event: it looks how long the silence has been and sleeps for the rest."""
        remaining = self._last_news + tick - loop.time()
        if remaining <= 0:
            self._quiet = True
            self._wake.set()
            remaining = tick
            self._last_news = loop.time()
        self._timer = loop.call_later(remaining, self._on_timer, loop, tick)
