"""The worker's side of the ZeroMQ PAIR socket, and what wakes its loop."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import zmq

from server.worker.channel import QUEUE
from server.worker.wire import FromWorker, ToWorker, decode_to_worker, more_to_worker, to_frames


class Mailbox:
    """Messages in and out. A ZeroMQ socket is no thread-safe thing: hold ``lock`` around everything but ``wake``.

    The loop's thread holds it all the time, but for the calls into an engine; so the heartbeat thread gets through
    exactly while a step is long.
    """

    def __init__(self, address: str) -> None:
        self.lock = threading.Lock()
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PAIR)
        self._socket.setsockopt(zmq.SNDHWM, QUEUE)
        self._socket.setsockopt(zmq.RCVHWM, QUEUE)
        self._socket.connect(address)
        self._wakeup = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(self._wakeup, zmq.POLLIN)

    def send(self, message: FromWorker) -> None:
        """Queue one message; waits when the API process does not keep up."""
        self._socket.send_multipart(to_frames(message))

    def receive(self, timeout: float) -> list[ToWorker]:
        """All messages that are here, after waiting up to ``timeout`` seconds for one, or for ``wake``."""
        if timeout > 0:
            self._poller.poll(math.ceil(timeout * 1000))
            with suppress(BlockingIOError):
                os.eventfd_read(self._wakeup)
        messages = []
        while True:
            try:
                message = decode_to_worker(self._socket.recv(zmq.NOBLOCK))
                # The rest of a message is here as soon as its first frame is.
                messages.append(more_to_worker(message, self._socket.recv))
            except zmq.Again:
                return messages

    def wake(self) -> None:
        """End a wait in ``receive``. Safe from any thread."""
        os.eventfd_write(self._wakeup, 1)

    @contextmanager
    def unlocked(self) -> Iterator[None]:
        """Let the heartbeat thread through while the loop's thread works inside an engine."""
        self.lock.release()
        try:
            yield
        finally:
            self.lock.acquire()
