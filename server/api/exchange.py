"""One HTTP request while it waits for its replies, with an eye on whether the client is still there."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Self

from starlette.types import Message, Receive, Send

from server.requests import ChoiceNews, ClientGone, Reply

News = Sequence[tuple[int, ChoiceNews]]
"""What happened to choices, each with the index of its reply."""


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

        ``tick``: silence of this many seconds is news too, an empty list; None waits for as long as it takes."""
        self._replies = replies
        self._receive = receive
        self._on_exit = on_exit
        self._tick = tick
        self._quiet = False
        self._left = False
        self._sending: asyncio.Task[Any] | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._loop = asyncio.get_running_loop()
        self._take: Callable[[News], bool] | None = None
        self._taken = asyncio.Event()
        self._error: Exception | None = None
        self._flush_due = False
        for reply in replies:
            reply.watch(self._wake, max_pending_tokens, self._on_overflow)

    async def __aenter__(self) -> Self:
        self._watcher = asyncio.create_task(self._watch_client())
        self._restart_timer()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for reply in self._replies:
            reply.close()
            reply.unwatch()
        self._on_exit()
        if self._watcher is not None:
            self._watcher.cancel()
        # Its error's traceback ends here: without this, all that belongs to a request would wait for a full garbage
        # collection, which holds up every stream for the tens of milliseconds that some hundred of them take.
        self._watcher = None
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None

    async def feed(self, take: Callable[[News], bool]) -> None:
        """Give ``take`` all news as it comes, until it returns True.

        It is called from the event loop, once for all that a turn of the loop brought: to wake the task for each
        token would cost more than to format it. Raises what ``take`` raises, the error that ended a reply once all
        news before it was taken, and ClientGone.
        """
        self._take = take
        self._taken.clear()
        try:
            self._flush()
            await self._taken.wait()
        finally:
            self._take = None
        error, self._error = self._error, None
        if error is not None:
            try:
                raise error
            finally:
                del error  # its traceback holds this frame: what the two hold would wait for the garbage collector

    async def next(self) -> News:
        """The next news alone."""
        found: list[News] = []

        def take(news: News) -> bool:
            found.append(news)
            return True

        await self.feed(take)
        return found[0]

    def _wake(self) -> None:
        """There is news, now and perhaps more of it in this turn of the loop."""
        if not self._flush_due:
            self._flush_due = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flush_due = False
        take = self._take
        if take is None:  # the handler writes, and looks for news when it is done
            return
        try:
            if self._feed(take):
                self._stop_feeding()
        except Exception as error:  # noqa: BLE001 - it is raised where the handler waits
            self._error = error
            self._stop_feeding()

    def _feed(self, take: Callable[[News], bool]) -> bool:
        if self._left:
            raise ClientGone
        news = [(index, each) for index, reply in enumerate(self._replies) for each in reply.take()]
        if news:
            self._last_news = self._loop.time()
        elif not self._quiet:
            return False
        self._quiet = False
        return take(news)

    def _stop_feeding(self) -> None:
        self._take = None
        self._taken.set()

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
        self._wake()

    def _restart_timer(self) -> None:
        if self._tick is None:
            return
        self._last_news = self._loop.time()
        self._timer = self._loop.call_later(self._tick, self._on_timer, self._tick)

    def _on_timer(self, tick: float) -> None:
        """One timer a stream, not one an event: it looks how long the silence has been and sleeps for the rest."""
        remaining = self._last_news + tick - self._loop.time()
        if remaining <= 0:
            self._quiet = True
            self._wake()
            remaining = tick
            self._last_news = self._loop.time()
        self._timer = self._loop.call_later(remaining, self._on_timer, tick)
