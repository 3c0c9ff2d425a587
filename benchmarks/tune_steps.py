"""Finds the configurations of linear layers by timing whole decode steps, and puts them into the table of the GPU.

    python -m benchmarks.tune_steps r1-1.5b r1-7b v2-lite [--rows 1 8 16 32 64 128] [--seconds 200] [--install]

What is fastest alone is not so in the step, where kernels overlap with the ones around them. So the real layers (few of
them, alike but for their weights), attention over paged caches and the head run in a CUDA graph, and one kind of linear
layer at a time gets another configuration: cuBLAS, what the table has for these rows and for their neighbours, the best
by the model of the machine, then the same tiles with other prefetches, stages and splits. A change is kept if the
step is faster by 0.3 % twice, and right: as near to float32 as with cuBLAS. All cores compile ahead of the GPU.

The first sweep goes over all models and rows, the second tries variants of the winners; then the numbers of rows in
between take what is best of their neighbours'. Files go to ``$OUT`` or benchmarks/results, after each number of rows;
--install also puts the table beside the kernels. Entries that were not tuned stay. Ends in time, and on SIGTERM.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version

import torch

from benchmarks import report
from benchmarks.model_configs import CONFIGS
from benchmarks.tune_chain import Chain, StepTimer, chain_layers, model_config, shapes_of
from benchmarks.tune_checks import Checker
from benchmarks.tune_compiles import Compilers, Step
from benchmarks.tune_descent import Assignment, Timer, describe
from benchmarks.tune_search import PATIENCE, Job, Search
from benchmarks.tune_tables import merged, write_table
from engines.generation.threads import available_cores
from engines.kernels.cuda.binary_cache import choose_folder
from engines.kernels.cuda.skinny import choose_from
from engines.kernels.cuda.tuning import MOST_ROWS, TABLES, Machine, SkinnyShape, machine_of, table_entries

ROWS = (1, 8, 16, 32, 64, 128)
BETWEEN = (2, 4, 24, 48, 96)
CANDIDATES = 12
FIRST_SHARE, SECOND_SHARE = 0.6, 0.93
"""Of the time, at the end of those sweeps; the rest is for the rows in between."""
LAST_SECONDS = 6.0
"""For the last check, and to end."""
REFERENCE_PATIENCE = 15.0


@dataclass
class Subject:
    """A model on the GPU."""

    chain: Chain
    shapes: list[SkinnyShape]
    number: int
    """Of its first job."""
    checker: Checker | None = None

    @property
    def reference(self) -> Assignment:
        return dict.fromkeys(self.shapes)


@dataclass
class GpuBench:
    """The models, and what compiles for them. Implements what ``tune_search`` asks for."""

    compilers: Compilers
    subjects: dict[str, Subject] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def load(self, model: str, number: int) -> Subject:
        config = model_config(model)
        chain = Chain(config, chain_layers(config), torch.device("cuda", 0))
        chain.set_rows(1, 1)
        subject = self.subjects[model] = Subject(
            chain, shapes_of(chain.step(1), table_entries(machine_of(0), TABLES)), number
        )
        return subject

    def want_reference(self, model: str) -> None:
        """What the checks of a model need in float32; first needed at the end of its first job."""
        subject = self.subjects[model]
        self.compilers.want(_exact_step(model, subject), subject.number + 0.5)

    def timer(self, job: Job) -> Timer:
        return StepTimer(self.subjects[job.model].chain, job.rows)

    def right(self, job: Job, assignment: Assignment) -> bool:
        subject = self.subjects[job.model]
        if subject.checker is None:
            exact, until = _exact_step(job.model, subject), time.monotonic() + REFERENCE_PATIENCE
            while self.compilers.state(exact) is None and time.monotonic() < until:
                self.compilers.wait(PATIENCE)
            subject.checker = Checker(subject.chain, model_config(job.model))
            self.notes += [f"{job.model}: {subject.checker.failure}"] if subject.checker.failure else []
        return subject.checker.right(assignment, job.rows)

    def lost(self) -> bool:
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            return True
        return False

    # --- compiling

    def want(self, job: Job, assignment: Assignment, priority: float) -> None:
        self.compilers.want(Step(job.model, job.rows, assignment), priority)

    def seen(self, job: Job, assignment: Assignment) -> str | None:
        return self.compilers.seen(Step(job.model, job.rows, assignment))

    def state(self, job: Job, assignment: Assignment) -> str | None:
        return self.compilers.state(Step(job.model, job.rows, assignment))

    def wait(self, seconds: float) -> None:
        self.compilers.wait(seconds)


def _exact_step(model: str, subject: Subject) -> Step:
    return Step(model, MOST_ROWS, subject.reference, torch.float32)


class Results:
    """Where the table and the times go."""

    def __init__(self, machine: Machine, search: Search, install: bool) -> None:
        self._machine, self._search = machine, search
        self._entries = table_entries(machine, TABLES)
        self._facts: dict[str, object] = {"device": machine.name, "commit": report.commit()}
        self._folder = report.folder_out()
        self._places = [self._folder, TABLES] if install else [self._folder]

    def write(self) -> None:
        """What was found so far."""
        choose_from(None)
        entries = merged(self._entries, self._search.found(), self._machine)
        for place in self._places:
            write_table(place, self._machine, entries)
        times = {job.name: _facts(job) for job in self._search.jobs if job.descent is not None}
        result: dict[str, object] = {**self._facts, "steps": times, "failures": self._search.failures}
        report.write("tune_steps", result, self._folder)


def _facts(job: Job) -> dict[str, object]:
    tried = {} if job.descent is None else job.descent.tried
    return {
        "before_us": round(job.before_us, 2),
        "after_us": round(job.after_us, 2),
        "kept": {shape.key(): describe(choice) for shape, choice in job.kept.items()},
        "tried": {
            shape.key(): {
                describe(choice): round(share, 4) for choice, share in sorted(shares.items(), key=lambda one: one[1])
            }
            for shape, shares in tried.items()
        },
    }


def line(job: Job, layers: int, whole: int) -> str:
    """``layers`` were timed of the ``whole`` model's."""
    changes = "; ".join(
        f"{shape.key()} {describe(job.table[shape])} -> {describe(choice)}"
        for shape, choice in job.kept.items()
        if choice != job.table[shape]
    )
    saved = (job.before_us - job.after_us) / layers
    return (
        f"{job.name}: {job.before_us:.1f} -> {job.after_us:.1f} us with {layers} layers, {saved:.2f} a layer,"
        f" {saved * whole:.0f} a step of {whole}: {changes or 'as it was'}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", choices=list(CONFIGS))
    parser.add_argument("--rows", nargs="+", type=int, default=list(ROWS), help="up to 128 (%(default)s)")
    parser.add_argument("--between", nargs="*", type=int, default=list(BETWEEN), help="(%(default)s)")
    parser.add_argument("--candidates", type=int, default=CANDIDATES, help="by the model of the machine (%(default)s)")
    parser.add_argument("--seconds", type=float, default=200, help="for everything (%(default)s)")
    parser.add_argument("--install", action="store_true", help="also put the table beside the kernels")
    arguments = parser.parse_args()
    begun = time.monotonic()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    torch.set_num_threads(1)
    compilers = Compilers(max(1, available_cores() - 2))
    if not torch.cuda.is_available():
        compilers.close()
        parser.error("steps are timed on a GPU, and there is none")
    machine = machine_of(0)
    choose_folder(version("triton"), machine.name, machine.capability)
    compilers.serve(machine)
    bench = GpuBench(compilers)
    search = Search(machine, bench, bench, time.monotonic)
    results = Results(machine, search, arguments.install)
    try:
        _tune(arguments, bench, search, results, lambda share: begun + share * (arguments.seconds - LAST_SECONDS))
    finally:
        results.write()
        compilers.close()
        for job in search.jobs:
            if job.descent is not None:
                whole = model_config(job.model).layers
                print(line(job, len(bench.subjects[job.model].chain.model.layers), whole))
        failures = bench.notes + search.failures
        print(f"{compilers.compiled} kernels compiled, {len(failures)} failures", *failures[:8], sep="\n  ")
        print(f"{time.monotonic() - begun:.0f} s in all", flush=True)


def _tune(
    arguments: argparse.Namespace, bench: GpuBench, search: Search, results: Results, at: Callable[[float], float]
) -> None:
    """``at``: when a share of the time is over."""
    begun = time.monotonic()

    def sweep(jobs: list[Job], share: float) -> None:
        for job in search.sweep(jobs, at(share)):
            results.write()
            print(f"{time.monotonic() - begun:5.0f} s {job.name} {job.before_us:.1f} -> {job.after_us:.1f}", flush=True)
            if share == FIRST_SHARE:
                search.add_second(job)

    for model in arguments.models:
        subject = bench.load(model, len(search.jobs) + 1)
        search.add(model, arguments.rows, subject.shapes, arguments.candidates)
        bench.want_reference(model)
    first = list(search.jobs)
    sweep(first, FIRST_SHARE)
    sweep(first, SECOND_SHARE)
    sweep([job for model in arguments.models for job in search.add_between(model, arguments.between)], 1.0)


if __name__ == "__main__":
    main()
