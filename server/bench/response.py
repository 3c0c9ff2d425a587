"""Reading one streamed HTTP/1.1 answer with little work an event: the client must not be the limit of a benchmark."""

from __future__ import annotations

import msgspec

LARGEST_HEAD = 64 << 10
LARGEST_EVENT = 4 << 20
"""Bytes. A server that sends more at once is broken."""


class BadResponseError(Exception):
    """The server does not speak HTTP/1.1, or sends more than it may."""


class BodyReader:
    """Takes bytes as they come and gives the body without its framing. For one response."""

    def __init__(self) -> None:
        self.status = 0
        self.keep_alive = True
        self.done = False
        self._head = b""
        self._buffer = b""
        self._left: int | None = None
        """Bytes of the body, or of the present chunk, still to come; None for a body that ends with the connection."""
        self._chunked = False
        self._trailers = False

    def feed(self, data: bytes) -> bytes:
        """Raises BadResponseError."""
        if not self.status:
            data = self._read_head(data)
        if not self.status or self.done:
            return b""
        if self._chunked:
            return self._read_chunks(data)
        if self._left is None:
            return data
        body = data[: self._left]
        self._left -= len(body)
        self.done = self._left == 0
        return body

    def closed(self) -> None:
        """The connection ended; that ends a body of unknown length. Anything else stays not ``done``."""
        if self.status and not self._chunked and self._left is None:
            self.done = True

    def _read_head(self, data: bytes) -> bytes:
        self._head += data
        head, found, rest = self._head.partition(b"\r\n\r\n")
        if not found:
            if len(self._head) > LARGEST_HEAD:
                raise BadResponseError("the head of the response does not end")
            return b""
        first, *lines = head.split(b"\r\n")
        version, _, status = first.partition(b" ")
        if not version.startswith(b"HTTP/1.") or not status[:3].isdigit():
            raise BadResponseError("the answer is not HTTP/1.1")
        if status.startswith(b"1"):  # an interim response: the real one follows
            self._head = b""
            return self._read_head(rest)
        headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(b":") for line in lines)}
        self.status = int(status[:3])
        self.keep_alive = headers.get(b"connection", b"").lower() != b"close" and version != b"HTTP/1.0"
        self._chunked = headers.get(b"transfer-encoding", b"").lower() == b"chunked"
        self._left = self._length(headers.get(b"content-length"))
        self.done = self._left == 0 and not self._chunked
        return rest

    def _length(self, text: bytes | None) -> int | None:
        if self._chunked:
            return 0
        if text is None:
            self.keep_alive = False
            return None
        if not text.isdigit():
            raise BadResponseError("the length of the response is no number")
        return int(text)

    def _read_chunks(self, data: bytes) -> bytes:
        assert self._left is not None
        if self._buffer:
            data = self._buffer + data
            self._buffer = b""
        pieces = []
        while data and not self.done:
            if self._left > 2:  # inside a chunk; its last two bytes are the line's end
                piece = data[: self._left - 2]
                pieces.append(piece)
                self._left -= len(piece)
                data = data[len(piece) :]
            elif self._left:
                end = data[: self._left]
                self._left -= len(end)
                data = data[len(end) :]
            else:
                line, found, rest = data.partition(b"\r\n")
                if not found:
                    self._keep(data)
                    break
                data = rest
                self._read_line(line)
        return b"".join(pieces)

    def _keep(self, part: bytes) -> None:
        if len(part) > LARGEST_HEAD:
            raise BadResponseError("a line of the response does not end")
        self._buffer = part

    def _read_line(self, line: bytes) -> None:
        """A chunk's size, or after the last chunk a trailer, of which the empty one ends the response."""
        if self._trailers:
            self.done = not line
            return
        size = line.partition(b";")[0].strip()
        try:
            length = int(size, 16)
        except ValueError:
            length = -1
        if length < 0:
            raise BadResponseError("a chunk of the response has no size")
        self._trailers = length == 0
        self._left = length + 2 if length else 0


class _Delta(msgspec.Struct):
    role: str | None = None
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None

    @property
    def carries_text(self) -> bool:
        return bool(self.content or self.reasoning_content or self.reasoning)


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None
    finish_reason: str | None = None

    @property
    def carries_token(self) -> bool:
        """It has text, or stands for a token without any (half a character); not a mere role or ending."""
        if self.text or (self.delta is not None and self.delta.carries_text):
            return True
        return self.finish_reason is None and (self.delta is None or self.delta.role is None)


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: msgspec.Raw = msgspec.Raw(b"null")


_decode = msgspec.json.Decoder(_Event).decode


class EventLog:
    """Server-sent events of one answer: when those with tokens came, and what the server says at the end."""

    def __init__(self) -> None:
        self.first = 0.0
        self.last = 0.0
        self.longest_gap = 0.0
        self.events = 0
        self.input_tokens = 0
        self.output_tokens: int | None = None
        """As the server counts; None where it did not tell."""
        self.complete = False
        """``[DONE]`` came."""
        self.error = ""
        self._rest = b""

    def feed(self, body: bytes, now: float) -> None:
        """Raises BadResponseError for what is no event of an OpenAI stream."""
        if b"\r" in body:
            body = body.replace(b"\r", b"")
        *events, self._rest = (self._rest + body if self._rest else body).split(b"\n\n")
        if len(self._rest) > LARGEST_EVENT:
            raise BadResponseError("an event does not end")
        for event in events:
            if event.startswith(b"data:"):
                self._read(event[5:].strip(), now)

    def _read(self, data: bytes, now: float) -> None:
        if data == b"[DONE]":
            self.complete = True
            return
        try:
            event = _decode(data)
        except msgspec.DecodeError:
            raise BadResponseError("an event is not of the OpenAI API") from None
        if bytes(event.error) != b"null":
            self.error = bytes(event.error).decode(errors="replace")
        if event.usage is not None:
            self.input_tokens, self.output_tokens = event.usage.prompt_tokens, event.usage.completion_tokens
        for choice in event.choices:
            if choice.carries_token:
                self._count(now)
                break

    def _count(self, now: float) -> None:
        if self.events:
            self.longest_gap = max(self.longest_gap, now - self.last)
        else:
            self.first = now
        self.last = now
        self.events += 1
