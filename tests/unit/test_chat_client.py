from __future__ import annotations

import io
import json
from collections.abc import Callable

import httpx
import pytest
from rich.console import Console

from server.chat_client import ChatClient, converse
from server.errors import CommandFailed

Handler = Callable[[httpx.Request], httpx.Response]


def client(handler: Handler, **options: object) -> ChatClient:
    return ChatClient("http://server", "key", options, transport=httpx.MockTransport(handler))


def event(**delta: str) -> str:
    return f"data: {json.dumps({'choices': [{'delta': delta}]})}\n\n"


def server(stream: str, seen: list[httpx.Request] | None = None) -> Handler:
    def handle(request: httpx.Request) -> httpx.Response:
        if seen is not None:
            seen.append(request)
        if request.url.path == "/v1/models":
            return httpx.Response(200, json={"data": [{"id": "small"}, {"id": "large"}]})
        return httpx.Response(200, text=stream, headers={"content-type": "text/event-stream"})

    return handle


def piped(monkeypatch: pytest.MonkeyPatch, text: str, handler: Handler, model: str | None = None) -> str:
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    output = io.StringIO()
    converse(client(handler, seed=1), model, "be kind", Console(file=output))
    return output.getvalue()


def test_a_piped_question_is_answered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = (
        ": keep-alive\n\n" + event(role="assistant") + event(content="Pa") + event(content="ris") + "data: [DONE]\n\n"
    )
    seen: list[httpx.Request] = []
    assert piped(monkeypatch, " Capital of\nFrance? \n", server(stream, seen)) == "Paris\n"
    body = json.loads(seen[-1].content)
    assert seen[-1].headers["authorization"] == "Bearer key"
    assert (body["model"], body["seed"], body["stream"]) == ("small", 1, True)
    assert [message["content"] for message in body["messages"]] == ["be kind", "Capital of\nFrance?"]


def test_thoughts_are_shown_with_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = event(reasoning_content="hmm ") + event(content="42") + "data: [DONE]\n\n"
    assert piped(monkeypatch, "?", server(stream), "large") == "hmm 42\n"


def test_markup_in_an_answer_is_text(monkeypatch: pytest.MonkeyPatch) -> None:
    assert piped(monkeypatch, "?", server(event(content="[bold]x[/] \\[y]"))) == "[bold]x[/] \\[y]\n"


def test_an_error_in_mid_stream_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = event(content="Pa") + 'data: {"error": {"message": "the worker stopped"}}\n\n'
    with pytest.raises(CommandFailed, match="the worker stopped"):
        piped(monkeypatch, "?", server(stream))


def test_no_question_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CommandFailed, match="no question"):
        piped(monkeypatch, "\n", server(""))


def test_no_server_is_said_with_what_to_do() -> None:
    def refuse(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused")

    with pytest.raises(CommandFailed, match="no server answers at http://server; start one with slimserve serve"):
        client(refuse).models()


@pytest.mark.parametrize(
    ("response", "message"),
    [
        (httpx.Response(401, json={"error": {"message": "A valid API key is needed"}}), "A valid API key"),
        (httpx.Response(502, text="<html>"), "status 502"),
        (httpx.Response(500, json=["odd"]), "status 500"),
    ],
)
def test_refusals_are_shown_in_the_servers_words(response: httpx.Response, message: str) -> None:
    with pytest.raises(CommandFailed, match=message):
        client(lambda request: response).models()
    with pytest.raises(CommandFailed, match=message):
        list(client(lambda request: response).answer("m", []))


@pytest.mark.parametrize("url", ["nonsense", "ftp://x", "http://[::1"])
def test_a_wrong_url_is_one_clear_error(url: str) -> None:
    with pytest.raises(CommandFailed):
        ChatClient(url, None, {}).models()
