"""Chat templates: messages in the form of the API to the text that the model was trained on."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from server.errors import InternalError, InvalidRequest
from server.text.source import SPECIAL_TOKENS

ROLES = ("system", "developer", "user", "assistant", "tool")
RENDER_SECONDS = 2.0
"""CPU time of one render."""
MOST_MEMORY = 1 << 30
"""Bytes of address space of a render process."""
MOST_PROCESSES = 4
"""Renders of one model at the same time: a template that loops on one input does not hold up the others."""

_MESSAGE_FIELDS = ("role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content")
_RESERVED = frozenset(
    ("messages", "chat_template", "tools", "documents", "tokenize", "raise_exception", "strftime_now", *SPECIAL_TOKENS)
)
_SCRIPT = Path(__file__).with_name("render_process.py")
_ENVIRONMENT = ("PATH", "LANG", "LC_ALL", "TZ", "HOME", "LD_LIBRARY_PATH", "PYTHONPATH", "PYTHONHOME")
"""What a render process inherits: no keys, no tokens."""


class _RenderProcess:
    """One ``render_process.py``; one thread at a time uses it."""

    def __init__(self, settings: bytes) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(_SCRIPT)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
        )
        self._send(settings)

    def _send(self, line: bytes) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # it died; reading its answer tells
            self._process.stdin.write(line + b"\n")
            self._process.stdin.flush()

    def render(self, request: bytes) -> dict[str, Any] | None:
        """The answer, or None if the process died over it."""
        assert self._process.stdout is not None
        self._send(request)
        line = self._process.stdout.readline()
        return json.loads(line) if line.endswith(b"\n") else None

    def stop(self) -> int:
        """End the process; how it ended, as ``Popen.returncode``."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdout.close()
        with contextlib.suppress(OSError):  # what was not written yet cannot be
            self._process.stdin.close()
        if self._process.poll() is None:
            self._process.kill()
        return self._process.wait()


class ChatTemplate:
    """One model's chat template. ``render`` is safe from several threads; it blocks, so keep it off the event loop."""

    def __init__(
        self,
        source: str,
        special_tokens: Mapping[str, str],
        most_chars: int,
        *,
        now: Callable[[], datetime],
        seconds: float = RENDER_SECONDS,
    ) -> None:
        self._special_tokens = dict(special_tokens)
        self._knows_developer = "developer" in source
        self._now = now
        self._seconds = seconds
        limits = {"most_chars": most_chars, "seconds": seconds, "most_memory": MOST_MEMORY}
        self._settings = json.dumps({"template": source, **limits}).encode()
        self._free = threading.BoundedSemaphore(MOST_PROCESSES)
        self._idle = [_RenderProcess(self._settings)]
        self.close = weakref.finalize(self, _stop_all, self._idle)

    def render(self, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]) -> str:
        """The prompt. Raises InvalidRequest if the messages or variables are wrong or the template refuses them."""
        reserved = sorted(_RESERVED.intersection(variables))
        if reserved:
            raise InvalidRequest(
                f"chat_template_kwargs may not set {', '.join(reserved)}", param="chat_template_kwargs"
            )
        values: dict[str, Any] = {"add_generation_prompt": True, "tools": None, "documents": None}
        values |= {**variables, **self._special_tokens}
        values["messages"] = [self._message(message) for message in messages]
        request = {"variables": values, "now": self._now().isoformat()}
        try:
            line = json.dumps(request, ensure_ascii=False).encode()
        except RecursionError as error:
            raise InvalidRequest("the messages or chat_template_kwargs are nested too deeply") from error
        except UnicodeEncodeError as error:
            raise InvalidRequest(
                "the messages hold a lone surrogate, which is no character", param="messages"
            ) from error
        answer = self._ask(line)
        text = answer.get("text")
        if text is None:
            raise InvalidRequest(_why_not(answer), param="messages")
        return str(text)

    def _ask(self, request: bytes) -> dict[str, Any]:
        with self._free:
            for _ in range(2):  # a second try where the process was killed from outside while it was idle
                try:
                    process = self._idle.pop()
                except IndexError:
                    process = _RenderProcess(self._settings)
                answer = process.render(request)
                if answer is not None:
                    self._idle.append(process)
                    return answer
                if process.stop() == -signal.SIGPROF:
                    return {"too_slow": self._seconds}
        raise InternalError("the chat template could not be rendered", log="a render process died twice over a request")

    def _message(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """Text parts become one text, as most templates know no lists; ``developer`` becomes the older ``system``."""
        role = message.get("role")
        if role not in ROLES:
            raise InvalidRequest(f"unknown role {str(role)[:40]!r}; known are {', '.join(ROLES)}", param="messages")
        plain = {name: message[name] for name in _MESSAGE_FIELDS if message.get(name) is not None}
        if "reasoning_content" not in plain and message.get("reasoning") is not None:
            plain["reasoning_content"] = message["reasoning"]
        if role == "developer" and not self._knows_developer:
            plain["role"] = "system"
        plain["content"] = _flat(message.get("content"), calls_tools="tool_calls" in plain)
        return plain


def _stop_all(processes: list[_RenderProcess]) -> None:
    while processes:
        processes.pop().stop()


def _flat(content: object, calls_tools: bool) -> str | None:
    if content is None:
        return None if calls_tools else ""
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        raise InvalidRequest("a message's content must be a string or a list of text parts", param="messages")
    texts = []
    for part in content:
        text = part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None
        if not isinstance(text, str):
            raise InvalidRequest("only parts of the type text are supported in a message's content", param="messages")
        texts.append(text)
    return "\n".join(texts)


def _why_not(answer: Mapping[str, Any]) -> str:
    if "raised" in answer:
        return f"the model's chat template refuses these messages: {answer['raised']}"
    if "too_long" in answer:
        return f"the messages give a prompt of more than {answer['too_long']} characters, which the context cannot hold"
    if "too_slow" in answer:
        return f"the model's chat template took more than {answer['too_slow']:g} s of processor time for these messages"
    if "out_of_memory" in answer:
        return "the model's chat template took too much memory for these messages"
    return f"the model's chat template fails on these messages: {answer.get('failed')}"
