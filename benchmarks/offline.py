"""The real scheduler and the real engine in one process, two steps in flight: the worker's loop without its wire."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from benchmarks.workloads import OUTPUT_TEMPERATURE
from engines.protocol import Engine, SamplingParams, StepPlan
from server.scheduler.config import SchedulerConfig
from server.scheduler.core import MAX_IN_FLIGHT, DynamicBatchScheduler
from server.worker.wire import Item


@dataclass(slots=True)
class StepTimes:
    """One step. Times in seconds."""

    contexts: tuple[int, ...]
    """Tokens that each row attends to where the step only decodes, else empty."""
    graphed: bool
    """It ran as a captured graph."""
    plan: float
    launch: float = 0.0
    settle: float = 0.0
    device: float = 0.0
    interval: float | None = None
    """From the result of the step before to this one's, where both only decode."""


@dataclass(slots=True)
class Run:
    """What all requests of a workload took together. Times in seconds."""

    output_tokens: int = 0
    cached_tokens: int = 0
    """Prompt tokens that a prefix hit saved."""
    seconds: float = 0.0
    prefill: float = 0.0
    """From the start until every request has its first token."""
    steps: list[StepTimes] = field(default_factory=list)

    @property
    def decodes(self) -> list[StepTimes]:
        return [step for step in self.steps if step.contexts]


class OfflineServing:
    """Runs workloads one after the other on one engine. Nothing else may use the engine meanwhile."""

    def __init__(self, engine: Engine, config: SchedulerConfig, clock: Callable[[], float]) -> None:
        self._engine = engine
        self._clock = clock
        self._scheduler = DynamicBatchScheduler(config)
        self._scheduler.add_engine(engine.info.name, engine.capacity, engine.info.fingerprint)
        self._numbers = itertools.count(1)
        self._tickets: deque[tuple[StepPlan, StepTimes]] = deque()
        self._waiting: set[int] = set()
        self._previous: tuple[float, bool] = (0.0, False)
        """When the last result came, and whether its step only decoded."""

    def run(
        self, prompts: Sequence[list[int]], outputs: Sequence[int], on_step: Callable[[], None] | None = None
    ) -> Run:
        """Serve all prompts at once, ``outputs`` tokens each, and return when all are done.

        ``on_step`` is called after each settled step. Raises RuntimeError where the scheduler refuses a request.
        """
        items = deque(self._item(prompt, output) for prompt, output in zip(prompts, outputs, strict=True))
        run, started = Run(), self._clock()
        self._waiting = {item.item for item in items}
        while True:
            self._offer(items, started)
            launched = self._launch()
            if not launched and not self._tickets and not items:
                break
            if self._tickets and (not launched or len(self._tickets) == MAX_IN_FLIGHT):
                self._settle(run, started)
                if on_step is not None:
                    on_step()
        run.seconds = self._clock() - started
        return run

    def _offer(self, items: deque[Item], now: float) -> None:
        """The prompts of one more step. A server's requests come while steps run: the device waits for the first
        ones alone."""
        room = self._engine.capacity.max_step_tokens
        while items and room > 0:
            item = items.popleft()
            refusal = self._scheduler.offer([item], now)
            if refusal is not None:
                raise RuntimeError(f"the scheduler refuses a request: {refusal}")
            room -= len(item.tokens)

    def _item(self, prompt: list[int], output: int) -> Item:
        number = next(self._numbers)
        sampling = SamplingParams(seed=number, temperature=OUTPUT_TEMPERATURE)
        return Item(
            item=number,
            request=number,
            engine=self._engine.info.name,
            tokens=prompt,
            prompt_length=len(prompt),
            max_tokens=output,
            sampling=sampling,
        )

    def _launch(self) -> bool:
        began = self._clock()
        plan = self._scheduler.plan(began, {self._engine.info.name: self._engine.capacity})
        if plan is None:
            return False
        planned = self._clock()
        times = StepTimes(_contexts(plan), bool(plan.graph_rows or plan.graph_tokens), planned - began)
        self._engine.launch(plan)
        times.launch = self._clock() - planned
        self._tickets.append((plan, times))
        return True

    def _settle(self, run: Run, started: float) -> None:
        plan, times = self._tickets.popleft()
        result = self._engine.collect(plan.step)
        now = self._clock()
        updates = self._scheduler.settle(result, now)
        times.settle = self._clock() - now
        times.device = result.seconds
        before, decoded_before = self._previous
        if times.contexts and decoded_before:
            times.interval = now - before
        self._previous = (now, bool(times.contexts))
        run.steps.append(times)
        for update in updates:
            run.output_tokens += len(update.tokens)
            if update.item in self._waiting and update.tokens:
                self._waiting.discard(update.item)
                run.cached_tokens += update.cached_tokens
                run.prefill = now - started


def _contexts(plan: StepPlan) -> tuple[int, ...]:
    if plan.admits or any(row.count != 1 or row.max_new != 1 for row in plan.rows):
        return ()
    return tuple(row.start + 1 for row in plan.rows)
