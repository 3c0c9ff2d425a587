"""The HTTP application in a thread of this process, over the real scheduler and the fake engine."""

from __future__ import annotations

import asyncio
import itertools
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import uvicorn

from engines.fake import FakeEngine, fake_token
from engines.manifest import Manifest
from engines.protocol import Capacity, StepPlan
from server.admission import Door
from server.api.routes import create_api
from server.api.state import ApiSettings, ApiState
from server.errors import Overloaded
from server.http_server import HttpConnection
from server.requests import Reply, Request
from server.scheduler.config import SchedulerConfig
from server.scheduler.core import DynamicBatchScheduler, ItemUpdate
from server.tenants import TenantTable
from server.worker.places import Place
from server.worker.wire import Refused
from tests.unit.api.harness import MAX_MODEL_LEN, make_state

CAPACITY = Capacity(blocks=512, block_size=16, max_rows=32, max_step_tokens=512, max_model_len=MAX_MODEL_LEN)


class InProcessDispatcher:
    """Implements ``Dispatcher``: one step a loop turn, as long as there is something to do."""

    def __init__(self) -> None:
        self.engine = FakeEngine("tiny", CAPACITY)
        self.scheduler = DynamicBatchScheduler(SchedulerConfig())
        self.scheduler.add_engine("tiny", CAPACITY, "fake")
        self._door = Door(clock=time.monotonic)
        self._numbers = itertools.count()
        self._places: dict[int, tuple[Reply, int]] = {}
        self._stepping: asyncio.Task[None] | None = None

    def submit(self, request: Request) -> Reply:
        now, reply = time.monotonic(), Reply(request, self._closed)
        items = [Place(next(self._numbers), reply, choice).to_item(now) for choice in range(len(request.sampling))]
        reason = self.scheduler.offer(items, now)
        if reason is not None:
            raise Overloaded(reason, retry_after=1)
        self._places |= {item.item: (reply, item.sampling.choice) for item in items}
        if self._stepping is None or self._stepping.done():
            self._stepping = asyncio.create_task(self._step_on())
        return reply

    def stop_choice(self, reply: Reply, choice: int) -> None:
        reply.end_choice(choice, "stop")
        self._cancel([item for item, place in self._places.items() if place == (reply, choice)])

    def _closed(self, reply: Reply) -> None:
        self._cancel([item for item, place in self._places.items() if place[0] is reply])

    def _cancel(self, items: list[int]) -> None:
        for item in items:
            del self._places[item]
        self.scheduler.cancel(items)

    async def _step_on(self) -> None:
        while (plan := self._plan()) is not None:
            result = self.engine.collect(self.engine.launch(plan))
            for update in self.scheduler.settle(result, time.monotonic()):
                self._deliver(update)
            await asyncio.sleep(0)

    def _plan(self) -> StepPlan | None:
        plan = self.scheduler.plan(time.monotonic(), {"tiny": CAPACITY})
        for dropped in self.scheduler.dropped():
            error = self._door.refusal(Refused(0, dropped.items, dropped.reason, dropped.kind, dropped.retry_after))
            for reply, _ in [self._places.pop(item) for item in dropped.items]:
                reply.fail(error)
        return plan

    def _deliver(self, update: ItemUpdate) -> None:
        place = self._places.get(update.item)
        if place is None:
            return
        reply, choice = place
        reply.cached_tokens = max(reply.cached_tokens, update.cached_tokens)
        reply.deliver(
            choice,
            update.first_index,
            update.tokens,
            update.end,
            now=time.monotonic(),
            logprobs=update.logprobs,
            prompt_logprobs=update.prompt_logprobs,
        )
        if update.end:
            self._places.pop(update.item, None)


@dataclass(frozen=True, slots=True)
class Running:
    url: str
    state: ApiState
    dispatcher: InProcessDispatcher

    def blocks_used(self) -> int:
        return self.dispatcher.scheduler.load()[0].blocks_used

    def expected_text(self, seed: int, tokens: int, choice: int = 0) -> str:
        """What the fake engine says, through the model's tokenizer."""
        ids = [fake_token(seed, choice, position) for position in range(tokens)]
        return self.state.language_models["tiny"].text.decode(ids)


@contextmanager
def serving(
    manifest: Manifest, settings: ApiSettings | None = None, tenants: TenantTable | None = None
) -> Iterator[Running]:
    dispatcher = InProcessDispatcher()
    state = make_state(manifest, dispatcher, settings=settings, tenants=tenants, clock=time.monotonic)
    config = uvicorn.Config(create_api(state), http=HttpConnection, ws="none", lifespan="off", log_level="warning")
    server = uvicorn.Server(config)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        while not server.started and thread.is_alive():
            time.sleep(0.005)
        try:
            yield Running(f"http://127.0.0.1:{listener.getsockname()[1]}", state, dispatcher)
        finally:
            server.should_exit = True
            thread.join()
