"""A client process of ``slimserve bench serve``: reads a job, makes its prompts, waits for the start, sends.

    python -m server.bench.client

Talks JSON lines over standard input and output (``wire``). The end of standard input stops it.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import random
import sys
import time
from collections.abc import Callable, Iterator

import msgspec

from server.bench.connection import Address, Answer, ConnectionPool
from server.bench.summary import quantile
from server.bench.wire import Ask, Done, Finished, FromClient, Health, Job, Outcome, Ready, Start

LAG_EVERY = 0.02
"""Seconds between two looks at how late the event loop is."""
LONGEST_LINE = 256 << 20
WORDS = ("river", "stone", "light", "engine", "paper", "seven", "cloud", "garden", "winter", "music", "table", "clock")


def prompt_of(job: Job, length: int, randomness: random.Random) -> object:
    if job.prompt == "ids":
        return [randomness.randrange(job.vocab) for _ in range(length)]
    return " ".join(randomness.choices(WORDS, k=length))


def request_of(job: Job, ask: Ask, address: Address, randomness: random.Random) -> bytes:
    """A whole HTTP request. Its prompt is as random as ``randomness``, so that no two share a prefix."""
    prompt = prompt_of(job, ask.input_tokens, randomness)
    body: dict[str, object] = {
        "model": job.model,
        "max_tokens": ask.output_tokens,
        "temperature": job.temperature,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    body |= {"messages": [{"role": "user", "content": prompt}]} if job.prompt == "chat" else {"prompt": prompt}
    if job.ignore_eos:
        body["ignore_eos"] = True
    payload = msgspec.json.encode(body)
    route = "/chat/completions" if job.prompt == "chat" else "/completions"
    lines = [
        f"POST {address.path}{route} HTTP/1.1",
        f"Host: {address.authority}",
        "Content-Type: application/json",
        "Accept: text/event-stream",
        f"Content-Length: {len(payload)}",
    ]
    if job.api_key is not None:
        lines.append(f"Authorization: Bearer {job.api_key}")
    return "\r\n".join([*lines, "", ""]).encode() + payload


def failure_of(answer: Answer, ask: Ask, job: Job) -> tuple[str, str]:
    """Kind and detail of what went wrong with an answer that has ended; both empty for a good one."""
    if answer.body.status and answer.body.status != 200:
        return f"http {answer.body.status}", answer.error_text.decode(errors="replace")
    if answer.failure:
        return answer.failure.partition(":")[0], answer.failure
    if answer.log.error:
        return "error event", answer.log.error
    if not answer.log.complete or not answer.log.events:
        return "broken stream", "the stream ended without tokens or [DONE]"
    given = answer.log.output_tokens
    if job.ignore_eos and given is not None and given != ask.output_tokens:
        return "wrong length", f"{given} tokens came where {ask.output_tokens} were asked for"
    return "", ""


class Client:
    def __init__(self, job: Job, tell: Callable[[FromClient], None], clock: Callable[[], float]) -> None:
        self._job = job
        self._tell = tell
        self._clock = clock
        address = Address.parse(job.url)
        randomness = random.Random()
        self._work = [(ask, request_of(job, ask, address, randomness)) for ask in job.asks]
        self._pool = ConnectionPool(address, clock)
        self._lags: list[float] = []
        self._began = (clock(), time.process_time())

    def health(self) -> Health:
        """Since the start."""
        wall, cpu = self._clock() - self._began[0], time.process_time() - self._began[1]
        lag = quantile(self._lags, 0.99) if self._lags else 0.0
        return Health(cpu_share=cpu / max(wall, 1e-9), loop_lag_p99=lag)

    async def run(self, start: float) -> None:
        """Until every request has ended."""
        await asyncio.sleep(max(0.0, start - self._clock()))
        self._began = (self._clock(), time.process_time())
        watch = asyncio.create_task(self._watch_lag())
        if self._job.concurrency:
            work = iter(self._work)
            await asyncio.gather(*(self._stream(work) for _ in range(self._job.concurrency)))
        else:
            await self._open_loop(start)
        watch.cancel()

    async def _open_loop(self, start: float) -> None:
        open_requests: list[asyncio.Task[None]] = []
        for ask, request in self._work:
            wait = start + ask.at - self._clock()
            if wait > 0:
                await asyncio.sleep(wait)
            open_requests.append(asyncio.create_task(self._one(ask, request, start + ask.at)))
        await asyncio.gather(*open_requests)

    async def _stream(self, work: Iterator[tuple[Ask, bytes]]) -> None:
        for ask, request in work:
            await self._one(ask, request, self._clock())

    async def _one(self, ask: Ask, request: bytes, due: float) -> None:
        sent = self._clock()
        try:
            async with asyncio.timeout(self._job.timeout):
                answer = await self._pool.exchange(request)
        except TimeoutError:
            outcome = self._failed(due, sent, "timeout", f"no complete answer within {self._job.timeout:g} s")
        except OSError as error:
            outcome = self._failed(due, sent, "no connection", str(error))
        else:
            outcome = self._outcome(ask, answer, due, sent)
        self._tell(Done(outcome))

    def _failed(self, due: float, sent: float, error: str, detail: str) -> Outcome:
        return Outcome(due=due, sent=sent, ended=self._clock(), error=error, detail=detail)

    def _outcome(self, ask: Ask, answer: Answer, due: float, sent: float) -> Outcome:
        log = answer.log
        error, detail = failure_of(answer, ask, self._job)
        return Outcome(
            due=due,
            sent=sent,
            first=log.first,
            last=log.last,
            ended=self._clock(),
            longest_gap=log.longest_gap,
            events=log.events,
            input_tokens=log.input_tokens or ask.input_tokens,
            tokens=log.events if log.output_tokens is None else log.output_tokens,
            counted=log.output_tokens is not None,
            error=error,
            detail=detail[:300],
        )

    async def _watch_lag(self) -> None:
        while True:
            due = self._clock() + LAG_EVERY
            await asyncio.sleep(LAG_EVERY)
            self._lags.append(self._clock() - due)


def tell(message: FromClient) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(message) + b"\n")
    sys.stdout.buffer.flush()


async def main() -> None:
    loop = asyncio.get_running_loop()
    lines = asyncio.StreamReader(limit=LONGEST_LINE)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    client = Client(msgspec.json.decode(await lines.readline(), type=Job), tell, time.monotonic)
    gc.collect()
    gc.freeze()
    tell(Ready())
    line = await lines.readline()
    if not line:
        return
    running = asyncio.create_task(client.run(msgspec.json.decode(line, type=Start).at))
    stopped = asyncio.create_task(lines.read(1))
    await asyncio.wait({running, stopped}, return_when=asyncio.FIRST_COMPLETED)
    health = client.health()
    stopped.cancel()
    running.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await running
    tell(Finished(health))


if __name__ == "__main__":
    asyncio.run(main())
