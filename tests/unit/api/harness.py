"""A small real tokenizer, a dispatcher that answers from a script, and two ways to call the application."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import httpx
from starlette.types import ASGIApp, Message
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from engines.manifest import Manifest, read_manifest
from engines.protocol import End, TokenLogprobs
from server.api.routes import create_api
from server.api.state import ApiSettings, ApiState, ModelState, ReadyState, ServedModel
from server.errors import SlimserveError
from server.metrics import Metrics
from server.requests import Reply, Request, Targets
from server.tenants import TenantTable
from server.text import ModelText, load_text

T = TypeVar("T")

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
THINK = ("<think>", "</think>")
VOCAB_SIZE = 256 + len(SPECIAL) + len(THINK)
EOS = 256
IM_END = 258
MAX_MODEL_LEN = 256

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
THINKING = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")


def write_model(folder: Path, template: str | None = CHATML, generation: dict[str, Any] | None = None) -> Manifest:
    """A folder with a byte-level tokenizer (id = byte, then the special tokens) and the config of a tiny model."""
    folder.mkdir(parents=True, exist_ok=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet(), key=_byte_of)
    tokenizer = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([*SPECIAL])
    if template == THINKING:
        tokenizer.add_tokens([*THINK])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": MAX_MODEL_LEN,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "eos_token_id": [EOS, IM_END],
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template} if template else {}))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return read_manifest(folder, random_weights=True)


def _byte_of(character: str) -> int:
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in printable]
    table: dict[str, int] = {chr(byte): byte for byte in printable}
    table |= {chr(256 + index): byte for index, byte in enumerate(hidden)}
    return table[character]


class ScriptedDispatcher:
    """Answers each choice with the bytes of a text, one token a loop turn, as far as ``max_tokens`` allows.

    With ``answer`` None it answers nothing, and the test delivers by hand.
    """

    def __init__(self, answer: Callable[[Request, int], str] | None = None) -> None:
        self.requests: list[Request] = []
        self.replies: list[Reply] = []
        self.closed: list[Reply] = []
        self.stopped: list[tuple[int, int]] = []
        self.refusal: SlimserveError | None = None
        self.cached_tokens = 0
        self._answer = answer
        self._tasks: list[asyncio.Task[None]] = []

    def submit(self, request: Request) -> Reply:
        if self.refusal is not None:
            raise self.refusal
        reply = Reply(request, self.closed.append)
        reply.cached_tokens = self.cached_tokens
        self.requests.append(request)
        self.replies.append(reply)
        if self._answer is not None:
            for choice in range(len(request.sampling)):
                self._tasks.append(asyncio.create_task(self._play(reply, choice, self._answer(request, choice))))
        return reply

    def stop_choice(self, reply: Reply, choice: int) -> None:
        self.stopped.append((reply.request.id, choice))
        reply.end_choice(choice, "stop")

    async def _play(self, reply: Reply, choice: int, answer: str) -> None:
        request = reply.request
        tokens = [*_spell(answer), *request.sampling[choice].stop_token_ids[:1]][: request.max_tokens]
        prompt = [logprob(token) for token in request.prompt[1:]] if request.prompt_logprobs is not None else []
        if not tokens:
            reply.deliver(choice, 0, [], "length", now=0.0, prompt_logprobs=prompt)
        for index, token in enumerate(tokens):
            await asyncio.sleep(0)
            end: End = ""
            if token in request.sampling[choice].stop_token_ids:
                end = "stop"
            elif index + 1 == request.max_tokens:
                end = "length"
            entries = [] if request.sampling[choice].logprobs is None else [logprob(token)]
            reply.deliver(choice, index, [token], end, now=0.0, logprobs=entries, prompt_logprobs=prompt)
            prompt = []


def _spell(answer: str) -> list[int]:
    """One token a byte; the think tags are tokens of their own."""
    for token, tag in enumerate(THINK, 256 + len(SPECIAL)):
        answer = answer.replace(tag, chr(0xE000 + token))
    return [token for char in answer for token in ([ord(char) - 0xE000] if char >= "\ue000" else char.encode())]


def logprob(token: int) -> TokenLogprobs:
    return TokenLogprobs(-0.5, [token, 1], [-0.5, float("-inf")])


@dataclass(slots=True)
class Now:
    seconds: float = 100.0

    def __call__(self) -> float:
        return self.seconds


READY = ReadyState(True, True, (ModelState(name="tiny", state="ready"),))


_texts: dict[Path, ModelText] = {}
_executor = ThreadPoolExecutor(2)


def close_texts() -> None:
    """End what renders the templates."""
    for text in _texts.values():
        text.close()


def make_state(
    manifest: Manifest,
    dispatcher: Any,
    *,
    settings: ApiSettings | None = None,
    ready: Callable[[], ReadyState] = lambda: READY,
    names: Sequence[str] = ("tiny",),
    tenants: TenantTable | None = None,
    targets: Mapping[str, Targets] | None = None,
    clock: Callable[[], float] | None = None,
) -> ApiState:
    if manifest.source not in _texts:
        _texts[manifest.source] = load_text(manifest)
    served = {
        name: ServedModel(
            name=name,
            created=1700000000,
            manifest=manifest,
            text=_texts[manifest.source],
            max_model_len=MAX_MODEL_LEN,
        )
        for name in names
    }
    return ApiState(
        models=served,
        dispatcher=dispatcher,
        metrics=Metrics(names, version="1.2.3", tenants=() if tenants is None else tenants.names),
        settings=settings or ApiSettings(),
        ready=ready,
        clock=clock or Now(),
        wall_clock=lambda: 1700000001.5,
        executor=_executor,
        version="1.2.3",
        tenants=tenants or TenantTable(),
        targets=targets or {},
    )


def call(
    app: ASGIApp, *requests: tuple[str, str, Any], headers: Mapping[str, str] | None = None
) -> list[httpx.Response]:
    """Requests (method, path, JSON body or bytes), all at once, against the application in this process."""

    async def run() -> list[httpx.Response]:
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test", headers=headers) as client:
            return await asyncio.gather(*(_one(client, *request) for request in requests))

    return asyncio.run(run())


async def _one(client: httpx.AsyncClient, method: str, path: str, body: Any) -> httpx.Response:
    if isinstance(body, bytes):
        return await client.request(method, path, content=body, headers={"content-type": "application/json"})
    return await client.request(method, path, json=body)


def post(state: ApiState, path: str, **body: Any) -> httpx.Response:
    return call(create_api(state), ("POST", path, {"model": "tiny"} | body))[0]


def events(response: httpx.Response) -> list[Any]:
    """Parsed ``data:`` lines of a stream that ended well."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in response.text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1] if not line.startswith(":")]


@dataclass
class Connection:
    """One request against the application by hand, so that a test decides when the client leaves or reads."""

    app: ASGIApp
    path: str
    body: Any
    key: str = ""
    sent: list[Message] = field(default_factory=list)
    writable: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.writable.set()
        self._incoming: asyncio.Queue[Message] = asyncio.Queue()
        self._incoming.put_nowait({"type": "http.request", "body": json.dumps(self.body).encode(), "more_body": False})
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "path": self.path,
            "raw_path": self.path.encode(),
            "query_string": b"",
            "root_path": "",
            "scheme": "http",
            "server": ("test", 80),
            "client": ("test", 1),
            "headers": [(b"content-type", b"application/json"), (b"authorization", f"Bearer {self.key}".encode())],
        }
        self.task = asyncio.ensure_future(self._run(scope))

    async def _run(self, scope: dict[str, Any]) -> None:
        await self.app(scope, self._incoming.get, self._send)

    async def _send(self, message: Message) -> None:
        await self.writable.wait()
        self.sent.append(message)

    def leave(self) -> None:
        self._incoming.put_nowait({"type": "http.disconnect"})

    @property
    def status(self) -> int | None:
        return next((message["status"] for message in self.sent if message["type"] == "http.response.start"), None)

    @property
    def text(self) -> str:
        return b"".join(message.get("body", b"") for message in self.sent).decode()


async def until(condition: Callable[[], object]) -> None:
    """Let the loop turn until it holds."""
    async with asyncio.timeout(10):
        for _ in itertools.count():
            if condition():
                return
            await asyncio.sleep(0)


def run(main: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(main)
