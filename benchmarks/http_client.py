"""A client so light that it hardly shows in what it measures: one HTTP request over one connection, read as bytes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    """0 where the connection broke."""
    first: float
    """Seconds from the request's last byte to the answer's first."""
    total: float
    """Seconds to its last."""
    body: bytes
    complete: bool
    """A stream came to its ``[DONE]``, or a refusal is there."""

    @property
    def error(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.body)["error"]
        return found


async def ask(port: int, body: Mapping[str, object], *, key: str | None = None, route: str = "completions") -> Answer:
    """POST to /v1/``route``. A server that closes the connection early gives an answer that is not complete."""
    payload = json.dumps(body).encode()
    lines = [f"POST /v1/{route} HTTP/1.1", "Host: x", "Content-Type: application/json", "Connection: close"]
    lines += [f"Content-Length: {len(payload)}", *([] if key is None else [f"Authorization: Bearer {key}"])]
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    chunks: list[bytes] = []
    started = time.perf_counter()
    first = 0.0
    try:
        writer.write("\r\n".join([*lines, "", ""]).encode() + payload)
        while chunk := await reader.read(1 << 16):
            first = first or time.perf_counter() - started
            chunks.append(chunk)
    finally:
        total = time.perf_counter() - started
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
    head, _, rest = b"".join(chunks).partition(b"\r\n\r\n")
    status = int(head.split(b" ", 2)[1]) if head else 0
    return Answer(status, first, total, rest, status != 200 or b"data: [DONE]" in rest)
