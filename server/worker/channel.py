"""The API side of the ZeroMQ PAIR socket to one worker process, on the asyncio loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import zmq

from server.errors import Overloaded
from server.worker.wire import FromWorker, ToWorker, decode_from_worker, more_from_worker, to_frames

QUEUE = 4096
"""Most messages that wait in each direction."""
BURST = 64
"""Messages taken before the loop gets a turn for its other work."""


class Channel:
    """Binds ``address``; one worker connects. ``on_message`` gets each message in order, on the loop.

    A frame that is no message of ours is given to ``on_error`` instead.
    """

    def __init__(
        self, address: str, on_message: Callable[[FromWorker], None], on_error: Callable[[Exception], None]
    ) -> None:
        self._on_message = on_message
        self._on_error = on_error
        self._loop = asyncio.get_running_loop()
        self._file = Path(address.removeprefix("ipc://"))
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PAIR)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.SNDHWM, QUEUE)
        self._socket.setsockopt(zmq.RCVHWM, QUEUE)
        self._socket.bind(address)
        self._loop.add_reader(self._socket.FD, self._drain)

    def send(self, message: ToWorker) -> None:
        """Queue one message. Raises Overloaded when the worker is gone or does not keep up."""
        if self._socket.closed:
            raise Overloaded("The model's worker is restarting; try again.", retry_after=1)
        try:
            self._socket.send_multipart(to_frames(message), zmq.NOBLOCK)
        except zmq.Again:
            raise Overloaded("The model's worker does not keep up; try again.", retry_after=1) from None
        # The descriptor signals edges, and a send can swallow one: look again for what has arrived.
        self._loop.call_soon(self._drain)

    def close(self) -> None:
        """Idempotent; nothing is delivered afterwards."""
        if not self._socket.closed:
            self._loop.remove_reader(self._socket.FD)
            self._socket.close()
            self._file.unlink(missing_ok=True)

    def _drain(self) -> None:
        for _ in range(BURST):
            if self._socket.closed:
                return
            try:
                frame = self._socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                # The rest of a message is here as soon as its first frame is.
                self._on_message(more_from_worker(decode_from_worker(frame), self._socket.recv))
            except Exception as error:  # noqa: BLE001 - whatever it is, the worker's owner ends the worker
                self._on_error(error)
        self._loop.call_soon(self._drain)
