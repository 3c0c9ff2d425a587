"""The order in which ``tune_steps`` tries configurations, and for how long: jobs, offers, shares of the time."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

from benchmarks.tune_descent import Assignment, Choice, Descent, Timer, describe, first_choices, in_turns, variants
from engines.kernels.cuda.tuning import BUCKETS, Machine, SkinnyShape, config_for

PATIENCE = 0.05
"""Seconds between looks at what is compiled."""
RUNNERS_UP, VARIED = 2, 2
"""What is tried again in the second sweep; of how many tiles also variants."""
SECOND, BETWEEN = 100.0, 200.0
"""What is added to a job's number to get the priority of its kernels in later sweeps."""
READY = ""

Offer = tuple[SkinnyShape, Choice]


@dataclass
class Job:
    """One number of rows of one model."""

    model: str
    rows: int
    number: int
    """From 1; what is compiled for smaller ones comes first."""
    table: Assignment
    """What the table said at first."""
    kept: Assignment
    """The best that was found right."""
    offers: list[Offer] = field(default_factory=list)
    """Still to be tried; asked to be compiled as changes of ``base``."""
    base: Assignment = field(default_factory=dict)
    descent: Descent | None = None
    before_us: float = 0.0
    after_us: float = 0.0
    """Of the step with ``table`` and ``kept``, taken in turns."""

    @property
    def name(self) -> str:
        return f"{self.model} {self.rows} rows"


class Compiles(Protocol):
    """The kernels of the job's steps; see ``tune_compiles.Compilers``."""

    def want(self, job: Job, assignment: Assignment, priority: float) -> None: ...

    def seen(self, job: Job, assignment: Assignment) -> str | None: ...

    def state(self, job: Job, assignment: Assignment) -> str | None: ...

    def wait(self, seconds: float) -> None: ...


class Bench(Protocol):
    """Where steps are run."""

    def timer(self, job: Job) -> Timer: ...

    def right(self, job: Job, assignment: Assignment) -> bool:
        """Whether the step computes what it should."""

    def lost(self) -> bool:
        """Whether nothing can be run any more."""


class Search:
    """Goes through the jobs. ``clock`` in seconds."""

    def __init__(self, machine: Machine, compiles: Compiles, bench: Bench, clock: Callable[[], float]) -> None:
        self._machine, self._compiles, self._bench, self._clock = machine, compiles, bench, clock
        self.jobs: list[Job] = []
        self.failures: list[str] = []
        self._runs = 0

    # --- what to try

    def add(self, model: str, rows: Iterable[int], shapes: Iterable[SkinnyShape], candidates: int) -> None:
        """Jobs with their first offers, behind the others; compiling for them begins."""
        for count in rows:
            job = self._new_job(model, count, shapes)
            self._compiles.want(job, job.kept, job.number)
            near = _neighbours(count)
            lists = []
            for shape in job.kept:
                known = [config_for(shape, other, self._machine) for other in near]
                choices = first_choices(shape, count, self._machine, candidates, known)
                lists.append([(shape, choice) for choice in choices])
            self._set_offers(job, in_turns(lists), job.number)

    def add_second(self, job: Job) -> None:
        """What is left of the first offers, what came close, and variants of what is best."""
        if job.descent is None:
            return
        lists: list[list[Offer]] = []
        for shape, best in job.descent.best.items():
            close = job.descent.runners_up(shape, RUNNERS_UP)
            tiles = [one for one in (best, *close) if one is not None][:VARIED]
            changed = [one for tile in tiles for one in variants(tile, shape, job.rows, self._machine)]
            lists.append([(shape, choice) for choice in (*close, *changed)])
        self._set_offers(job, job.offers + in_turns(lists), SECOND + job.number)

    def add_between(self, model: str, rows: Iterable[int]) -> list[Job]:
        """Jobs that choose from what the nearest numbers of rows of that model have."""
        done = sorted((job for job in self.jobs if job.model == model and job.descent), key=lambda job: job.rows)
        added = []
        for count in rows:
            above = next((job for job in done if job.rows > count), None)
            below = next((job for job in reversed(done) if job.rows < count), None)
            if above is None or below is None or any(job.rows == count for job in done):
                continue
            job = self._new_job(model, count, above.kept)
            if count not in BUCKETS:
                # Without an entry of their own, these rows would run what the next larger number does.
                job.kept = dict(above.kept)
            lists = [[(shape, near.kept[shape]) for near in (above, below)] for shape in job.kept]
            self._compiles.want(job, job.kept, BETWEEN + job.number)
            self._set_offers(job, in_turns(lists), BETWEEN + job.number)
            added.append(job)
        return added

    def _new_job(self, model: str, rows: int, shapes: Iterable[SkinnyShape]) -> Job:
        table = {shape: config_for(shape, rows, self._machine) for shape in shapes}
        job = Job(model, rows, len(self.jobs) + 1, table, dict(table))
        self.jobs.append(job)
        return job

    def _set_offers(self, job: Job, offers: list[Offer], priority: float) -> None:
        job.base = dict(job.kept)
        job.offers = [offer for offer in dict.fromkeys(offers) if job.kept[offer[0]] != offer[1]]
        self._want_offers(job, priority)

    def _want_offers(self, job: Job, priority: float) -> None:
        for place, (shape, choice) in enumerate(job.offers):
            self._compiles.want(job, job.base | {shape: choice}, priority + place / 1000)

    # --- trying it

    def sweep(self, jobs: list[Job], end: float) -> Iterator[Job]:
        """Yields each job that was run. Each has its share of the time until ``end``, and what others leave of theirs:
        at most twice as much."""
        for index, job in enumerate(jobs):
            now = self._clock()
            if now >= end or self._bench.lost():
                return
            deadline = now + 2 * (end - now) / (len(jobs) - index + 1)
            try:
                if self._run(job, deadline):
                    yield job
            except Exception as error:  # noqa: BLE001 - one failure must not end the search
                self.failures.append(f"{job.name}: {type(error).__name__}: {error}"[:200])

    def _run(self, job: Job, deadline: float) -> bool:
        # Before what earlier jobs had no time to wait for.
        self._runs += 1
        self._want_offers(job, -self._runs)
        if not self._wait_for(job, job.kept, deadline):
            return False
        timer = self._bench.timer(job)
        us = timer.measure(job.kept, float("inf"))
        if job.descent is None:
            job.descent = Descent(timer, dict(job.kept), us)
        else:
            job.descent.timer, job.descent.us = timer, us
        self._offer_all(job, job.descent, deadline)
        self._keep_right(job, job.descent)
        if self._compiles.state(job, job.table) == READY:
            job.before_us, job.after_us = self._bench.timer(job).compare(job.table, job.kept)
        return True

    def _wait_for(self, job: Job, assignment: Assignment, deadline: float) -> bool:
        while (state := self._compiles.state(job, assignment)) is None and self._clock() < deadline:
            self._compiles.wait(PATIENCE)
        if state:
            self.failures.append(f"{job.name}: {state}"[:200])
        return state == READY

    def _offer_all(self, job: Job, descent: Descent, deadline: float) -> None:
        """Each offer as soon as it is compiled; those for which there is no time stay in the job."""
        waiting = deque(job.offers)
        while waiting and self._clock() < deadline:
            idle = True
            for _ in range(len(waiting)):
                if self._clock() >= deadline:
                    break
                offer = waiting.popleft()
                if self._try(job, descent, offer):
                    idle = False
                else:
                    waiting.append(offer)
            if idle:
                self._compiles.wait(PATIENCE)
        job.offers = list(waiting)

    def _try(self, job: Job, descent: Descent, offer: Offer) -> bool:
        """False as long as it is not compiled."""
        shape, choice = offer
        change = {shape: choice}
        state = self._compiles.seen(job, job.base | change)
        if state == READY:
            # Elsewhere in the step, a layer's kernel may depend on what its neighbours run by now.
            state = self._compiles.state(job, descent.best | change)
        if state is None:
            return False
        if state == READY:
            try:
                descent.offer(shape, choice)
            except Exception as error:
                if self._bench.lost():
                    raise
                state = f"{type(error).__name__}: {error}"
        if state:
            self._failed(job, offer, state)
        return True

    def _keep_right(self, job: Job, descent: Descent) -> None:
        """Of the changes."""
        if descent.best == job.kept:
            return
        if self._bench.right(job, descent.best):
            job.kept = dict(descent.best)
            return
        for shape, choice in descent.best.items():
            trial = job.kept | {shape: choice}
            if trial == job.kept or self._bench.right(job, trial):
                job.kept = trial
            else:
                self._failed(job, (shape, choice), "its results are wrong")
        descent.best = dict(job.kept)

    def _failed(self, job: Job, offer: Offer, why: str) -> None:
        self.failures.append(f"{job.name}, {offer[0].key()} {describe(offer[1])}: {why}"[:200])

    # --- what was found

    def found(self) -> dict[SkinnyShape, dict[int, Choice]]:
        """By rows; where models share a layer, the first one's."""
        found: dict[SkinnyShape, dict[int, Choice]] = {}
        for job in self.jobs:
            if job.descent is not None:
                for shape, choice in job.kept.items():
                    found.setdefault(shape, {}).setdefault(job.rows, choice)
        return found


def _neighbours(rows: int) -> list[int]:
    """``rows`` itself, then the buckets below and above."""
    below = [bucket for bucket in BUCKETS if bucket < rows][-1:]
    above = [bucket for bucket in BUCKETS if bucket > rows][:1]
    return [rows, *below, *above]
