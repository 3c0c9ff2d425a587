"""``slimserve chat``: a streaming conversation with a running server."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any, Self

import httpx
from rich.console import Console

from server.errors import CommandFailed

Message = dict[str, str]


class ChatClient:
    """Talks to one server. Raises CommandFailed, in words for a person, for all that goes wrong."""

    def __init__(
        self, url: str, api_key: str | None, options: dict[str, Any], transport: httpx.BaseTransport | None = None
    ) -> None:
        """``options`` go into each request as they are (temperature, max_tokens, seed)."""
        headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        timeout = httpx.Timeout(10, read=None)
        try:
            self._http = httpx.Client(base_url=url, headers=headers, timeout=timeout, transport=transport)
        except httpx.InvalidURL as error:
            raise CommandFailed(f"--url {url}: {error}") from None
        self._url = url
        self._options = options

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def models(self) -> list[str]:
        """Names of the models that the server has."""
        try:
            response = self._http.get("/v1/models", timeout=10)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise self._unreachable(error) from None
        _check(response)
        return [model["id"] for model in response.json()["data"]]

    def answer(self, model: str, messages: list[Message]) -> Iterator[tuple[str, str]]:
        """Pieces of the answer as (kind, text), with kind ``thought`` or ``text``."""
        body = {"model": model, "messages": messages, "stream": True, **self._options}
        try:
            with self._http.stream("POST", "/v1/chat/completions", json=body) as response:
                if response.is_error:
                    response.read()
                _check(response)
                for line in response.iter_lines():
                    if line.startswith("data: ") and line != "data: [DONE]":
                        yield from _pieces(json.loads(line[6:]))
        except httpx.HTTPError as error:
            raise self._unreachable(error) from None

    def _unreachable(self, error: Exception) -> CommandFailed:
        if isinstance(error, httpx.ConnectError):
            return CommandFailed(f"no server answers at {self._url}; start one with slimserve serve, or give --url")
        return CommandFailed(f"the connection to {self._url} broke: {error or type(error).__name__}")


def _check(response: httpx.Response) -> None:
    if response.is_error:
        try:
            text = response.json()["error"]["message"]
        except (ValueError, KeyError, TypeError):
            text = f"the server answered with status {response.status_code}"
        raise CommandFailed(text)


def _pieces(chunk: dict[str, Any]) -> Iterator[tuple[str, str]]:
    if "error" in chunk:
        raise CommandFailed(chunk["error"]["message"])
    for choice in chunk["choices"]:
        if thought := choice["delta"].get("reasoning_content"):
            yield "thought", thought
        if text := choice["delta"].get("content"):
            yield "text", text


def converse(client: ChatClient, model: str | None, system: str | None, console: Console) -> None:
    """A loop of questions on a terminal; one question, all of standard input, when that is a pipe or a file."""
    known = client.models()
    if not known:
        raise CommandFailed("the server has no model")
    model = model or known[0]
    messages: list[Message] = [{"role": "system", "content": system}] if system else []
    if not sys.stdin.isatty():
        question = sys.stdin.read().strip()
        if not question:
            raise CommandFailed("no question came through standard input")
        show(client.answer(model, [*messages, {"role": "user", "content": question}]), console)
        return
    console.print(f"[dim]{model}; Ctrl-C stops an answer, Ctrl-D leaves[/dim]")
    while True:
        # Ctrl-C at the prompt, or in the moment after a stopped answer, leads back to the prompt.
        try:
            question = _ask(console)
            if question is None:
                return
            if question:
                _exchange(client, model, messages, question, console)
        except KeyboardInterrupt:
            console.print()


def _exchange(client: ChatClient, model: str, messages: list[Message], question: str, console: Console) -> None:
    """Put one question and show the answer; ``messages`` grows by both, or by neither where the server refuses."""
    messages.append({"role": "user", "content": question})
    try:
        answer = show(client.answer(model, messages), console)
    except CommandFailed as error:
        messages.pop()
        console.print(str(error), style="red", highlight=False, markup=False)
    else:
        messages.append({"role": "assistant", "content": answer})


def _ask(console: Console) -> str | None:
    """None to leave."""
    try:
        return console.input("[bold cyan]> [/bold cyan]").strip()
    except EOFError:
        console.print()
        return None


def show(pieces: Iterator[tuple[str, str]], console: Console) -> str:
    """Print an answer as it comes; Ctrl-C ends it. The text without the thoughts."""
    text: list[str] = []
    try:
        for kind, piece in pieces:
            if kind == "text":
                text.append(piece)
            console.print(
                piece, end="", style="dim" if kind == "thought" else None, markup=False, highlight=False, soft_wrap=True
            )
    except KeyboardInterrupt:
        console.print(" [dim](stopped)[/dim]", end="")
    console.print()
    return "".join(text)
