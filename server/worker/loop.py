"""What a worker process does all day: take messages, plan, launch, collect, settle, report."""

from __future__ import annotations

import gc
import logging
import os
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import msgspec
import psutil

from engines.protocol import Engine, EngineKind, StepPlan, TensorEngine
from server.scheduler.config import SchedulerConfig
from server.scheduler.core import MAX_IN_FLIGHT, DynamicBatchScheduler, ItemUpdate, StepWork
from server.worker.counted_work import count_work
from server.worker.flight_record import FlightRecord
from server.worker.loading import LoadThread
from server.worker.mailbox import Mailbox
from server.worker.wire import (
    Cancel,
    Configure,
    Hello,
    LoadEngine,
    LoadReport,
    Offer,
    Refused,
    StepOutputs,
    StepStats,
    Stop,
    ToWorker,
    Unloaded,
    UnloadEngine,
)

REPORT_EVERY = 0.5
"""Seconds between two load reports."""
log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Ticket:
    plan: StepPlan
    plan_seconds: float


class WorkerLoop:
    """Owns the scheduler and the engines of one device. ``run`` returns when the API process says stop."""

    def __init__(
        self,
        mailbox: Mailbox,
        config: SchedulerConfig,
        *,
        record: FlightRecord,
        incarnation: int,
        clock: Callable[[], float],
        begun: float | None = None,
    ) -> None:
        """``record`` tells after this process's death which items were in launched steps. The process began at
        ``begun``, or now."""
        self._mailbox = mailbox
        self._record = record
        self._scheduler = DynamicBatchScheduler(config)
        self._incarnation = incarnation
        self._clock = clock
        self._loads = LoadThread(incarnation, wake=mailbox.wake, clock=clock, begun=begun)
        self._engines: dict[str, Engine] = {}
        self._inputs: dict[int, bytes] = {}  # packed tensors of one-shot items that wait
        self._tickets: deque[_Ticket] = deque()
        self._steps = 0
        self._reported_at = clock()
        self._checked = True
        self._process = psutil.Process()

    def prepare(self, kind: EngineKind, device: str) -> None:
        """Import already what an engine of this kind needs on this device."""
        self._loads.prepare(kind, device)

    def run(self) -> None:
        """Raises whatever a step raised: the worker is of no use then."""
        with self._mailbox.lock:
            self._mailbox.send(Hello(self._incarnation, os.getpid()))
            threading.Thread(target=self._heartbeat, daemon=True).start()
            wait = 0.0
            while self._handle(self._mailbox.receive(wait)):
                self._take_loaded()
                ticket = self._plan()
                if ticket is not None:
                    self._launch(ticket)
                if self._tickets and (ticket is None or len(self._tickets) == MAX_IN_FLIGHT):
                    self._settle_oldest()
                self._report_when_due()
                wait = self._patience(ticket)

    def _plan(self) -> _Ticket | None:
        began = self._clock()
        plan = self._scheduler.plan(began, {name: engine.capacity for name, engine in self._engines.items()})
        for dropped in self._scheduler.dropped():
            self._forget_inputs(dropped.items)
            self._mailbox.send(
                Refused(self._incarnation, dropped.items, dropped.reason, dropped.kind, dropped.retry_after)
            )
        return None if plan is None else _Ticket(plan, self._clock() - began)

    def _launch(self, ticket: _Ticket) -> None:
        self._tickets.append(ticket)
        self._checked = False
        plan = ticket.plan
        items = [row.item for row in plan.rows] + [row.item for row in plan.one_shot]
        self._record.launched(plan.step, items)
        engine = self._engines[plan.engine]
        if isinstance(engine, TensorEngine):
            for row in plan.one_shot:
                engine.put(row.item, self._inputs.pop(row.item))
        with self._mailbox.unlocked():
            engine.launch(plan)

    def _settle_oldest(self) -> None:
        ticket = self._tickets[0]
        with self._mailbox.unlocked():
            result = self._engines[ticket.plan.engine].collect(ticket.plan.step)
        self._tickets.popleft()
        began = self._clock()
        updates = self._scheduler.settle(result, began)
        seconds = ticket.plan_seconds + self._clock() - began
        if not result.irregular:
            _log_step(self._scheduler.settled_work, result.seconds)
        self._steps += 1
        self._send(ticket.plan, updates, self._stats(ticket.plan, result.seconds, seconds))
        self._record.settled(ticket.plan.step)

    def _stats(self, plan: StepPlan, seconds: float, plan_seconds: float) -> StepStats:
        work = self._scheduler.settled_work
        counted = count_work(plan, work, self._engines[plan.engine].info.work)
        return StepStats(
            seconds=seconds,
            plan_seconds=plan_seconds,
            rows=work.rows,
            tokens=work.tokens,
            prompt_tokens=work.prompt_tokens,
            predicted_seconds=work.seconds,
            padding=counted.padding,
            flops=counted.flops,
            bytes_read=counted.bytes_read,
        )

    def _send(self, plan: StepPlan, updates: list[ItemUpdate], stats: StepStats) -> None:
        self._mailbox.send(
            StepOutputs(
                incarnation=self._incarnation,
                engine=plan.engine,
                step=plan.step,
                items=[update.item for update in updates],
                first_index=[update.first_index for update in updates],
                tokens=[update.tokens for update in updates],
                ends=[update.end for update in updates],
                cached_tokens=[update.cached_tokens for update in updates],
                queue_seconds=[update.queue_seconds for update in updates],
                logprobs={update.item: update.logprobs for update in updates if update.logprobs},
                prompt_logprobs={update.item: update.prompt_logprobs for update in updates if update.prompt_logprobs},
                outputs={update.item: update.output for update in updates if update.output},
                errors={update.item: update.error for update in updates if update.error},
                stats=stats,
            )
        )

    def _patience(self, ticket: _Ticket | None) -> float:
        """Seconds that the next ``receive`` may wait for a message."""
        if ticket is not None or self._tickets:
            return 0.0
        self._check_integrity()
        report_due = self._reported_at + REPORT_EVERY
        batch_due = self._scheduler.due()
        return max(0.0, min(report_due, report_due if batch_due is None else batch_due) - self._clock())

    def _check_integrity(self) -> None:
        if not self._checked:
            self._checked = True
            for problem in self._scheduler.integrity():
                log.error("the block pool is not clean: %s", problem)

    # --- messages

    def _handle(self, messages: list[ToWorker]) -> bool:
        """False when the worker is to stop."""
        for message in messages:
            match message:
                case Offer():
                    self._offer(message)
                case Cancel(items):
                    self._checked = False
                    self._scheduler.cancel(items)
                    self._forget_inputs(items)
                case LoadEngine(spec):
                    self._loads.start(spec)
                case UnloadEngine(name):
                    self._unload(name)
                case Configure(config):
                    self._configure(msgspec.json.decode(config, type=SchedulerConfig))
                case Stop():
                    return False
        return True

    def _offer(self, offer: Offer) -> None:
        refusal = self._scheduler.offer(offer.items, self._clock())
        if refusal is not None:
            self._mailbox.send(Refused(self._incarnation, [item.item for item in offer.items], refusal))
        elif offer.inputs:
            self._inputs.update(zip((item.item for item in offer.items), offer.inputs, strict=True))

    def _forget_inputs(self, items: list[int]) -> None:
        for item in items:
            self._inputs.pop(item, None)

    def _configure(self, config: SchedulerConfig) -> None:
        self._settle_all()
        self._scheduler.configure(config)
        self._inputs.clear()

    def _settle_all(self) -> None:
        while self._tickets:
            self._settle_oldest()

    def _take_loaded(self) -> None:
        for message, engine in self._loads.news():
            if engine is not None:
                self._engines[engine.info.name] = engine
                measured = engine.info.measured
                profile = () if measured is None else measured.profile
                self._scheduler.add_engine(engine.info.name, engine.capacity, engine.info.fingerprint, profile)
                gc.collect()
                gc.freeze()
            self._mailbox.send(message)

    def _unload(self, name: str) -> None:
        self._settle_all()
        if name in self._engines:
            updates = self._scheduler.remove_engine(name)
            self._forget_inputs([update.item for update in updates])
            nothing = StepStats(seconds=0.0, plan_seconds=0.0, rows=0, tokens=0, prompt_tokens=0)
            self._send(StepPlan(step=self._steps, engine=name), updates, nothing)
            self._engines.pop(name).close()
        self._mailbox.send(Unloaded(self._incarnation, name))

    # --- load report, which is the heartbeat too

    @property
    def _phase(self) -> str:
        return "step" if self._tickets else "load" if self._loads.busy else "idle"

    def _report_when_due(self) -> None:
        now = self._clock()
        if now - self._reported_at < REPORT_EVERY:
            return
        self._reported_at = now
        self._mailbox.send(
            LoadReport(
                incarnation=self._incarnation,
                steps=self._steps,
                phase=self._phase,
                rss_bytes=self._process.memory_info().rss,
                engines=self._scheduler.load(),
            )
        )

    def _heartbeat(self) -> None:
        """In its own thread: report while the loop is inside a long step."""
        pause = threading.Event()
        while not pause.wait(REPORT_EVERY / 2):
            with self._mailbox.lock:
                self._report_when_due()


def _log_step(work: StepWork, seconds: float) -> None:
    """For those who study step times: ``benchmarks/served_steps.py`` reads these lines."""
    if log.isEnabledFor(logging.DEBUG):
        log.debug("step: %s", msgspec.json.encode({"took": seconds, "work": work}).decode())
