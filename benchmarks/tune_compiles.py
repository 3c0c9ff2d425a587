"""Compiles what steps launch, in all cores and in the order in which it is wanted, while the GPU is timing others.

Which kernels a step launches is found as engines do it before they start: the step itself runs on the meta device.
"""

from __future__ import annotations

import functools
import heapq
import itertools
import multiprocessing
import os
import threading
from collections.abc import Hashable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, fields
from functools import partial
from importlib.metadata import version

import torch
from triton.runtime.cache import triton_key

from benchmarks.tune_chain import DTYPE, Chain, checked_layers, least_layers, model_config
from benchmarks.tune_descent import Assignment, table_of
from engines.generation.rehearsal import META, launched_by
from engines.kernels.cuda.binary_cache import choose_folder
from engines.kernels.cuda.compile_pool import CompilePool, compile_for
from engines.kernels.cuda.device import rehearse_on
from engines.kernels.cuda.launch import Specialisation
from engines.kernels.cuda.skinny import choose_from
from engines.kernels.cuda.tuning import Machine

Key = Hashable
"""Of a kernel in one form, the same in all processes."""
READY = ""
URGENT = float("-inf")


@dataclass(frozen=True, slots=True)
class Step:
    """Whose kernels are wanted."""

    model: str
    rows: int
    assignment: Assignment
    dtype: torch.dtype = DTYPE

    @property
    def identity(self) -> Hashable:
        return self.model, self.rows, tuple(self.assignment.items()), self.dtype


# --- in the processes that compile, which have no GPU

_known: dict[Key, Specialisation] = {}


@functools.cache
def _become(machine: Machine) -> None:
    torch.set_num_threads(1)
    choose_folder(version("triton"), machine.name, machine.capability)
    compile_for(machine.capability)
    rehearse_on(machine)


@functools.cache
def _chain(model: str, dtype: torch.dtype) -> Chain:
    config = model_config(model)
    return Chain(config, least_layers(config) if dtype is DTYPE else checked_layers(config), META, dtype)


def keys_of(machine: Machine, step: Step) -> tuple[Key, ...]:
    """The kernels that the step launches."""
    _become(machine)
    chain = _chain(step.model, step.dtype)
    choose_from(table_of(step.assignment, step.rows))
    with torch.inference_mode():
        found = {_key(one): one for one in launched_by(chain.step(step.rows))}
    _known.update(found)
    return tuple(found)


def _key(one: Specialisation) -> Key:
    parts = (getattr(one, part.name) for part in fields(one) if part.name != "launcher")
    return one.name, *parts


def compile_key(machine: Machine, step: Step, key: Key) -> str:
    """One of the step's kernels into the cache on disk; returns what went wrong. A process of its own does it, so that
    a compiler that crashes ends nothing else."""
    if key not in _known:
        keys_of(machine, step)
    here = os.getpid()
    try:
        for compiled in CompilePool([_known[key]], 1).results():
            return compiled.error
        return "the compiler crashed"
    finally:
        if os.getpid() != here:
            os._exit(1)  # the forked one, which nobody waits for any more


def _awake() -> None:
    """The first task: its processes are forked off for it."""


# --- in the process that times


class Compilers:
    """Processes that compile. Make it before this process touches its GPU: they are forked off."""

    def __init__(self, processes: int) -> None:
        # Once for all processes: the one reads all of Triton, some 400 MB, the other imports for seconds.
        triton_key()
        torch.empty(1, device="meta").normal_()
        context = multiprocessing.get_context("fork")
        self._pool = ProcessPoolExecutor(processes, context)
        # One walks through what is wanted some time, the other through what is wanted now.
        self._walkers = [ProcessPoolExecutor(1, context) for _ in range(2)]
        for executor in (self._pool, *self._walkers):
            executor.submit(_awake).result()
        self._places = processes + 2
        self._machine: Machine | None = None
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._order = itertools.count()
        self._wanted: list[tuple[float, int, Key, Step]] = []
        self._begun: set[Key] = set()
        self._done: dict[Key, str] = {}
        """What went wrong, or READY."""
        self._urgent: set[Hashable] = set()
        self._keys: dict[Hashable, tuple[Key, ...]] = {}

    def serve(self, machine: Machine) -> None:
        """Compile for this kind of GPU."""
        self._machine = machine

    def want(self, step: Step, priority: float) -> None:
        """Begin, some time, with what the step launches; the lower the priority's number, the earlier."""
        walked: Future[tuple[Key, ...]] = self._walkers[0].submit(keys_of, self._chip, step)
        walked.add_done_callback(partial(self._found, step, priority))

    def seen(self, step: Step) -> str | None:
        """Of a step that was wanted: READY, or None as long as something is being compiled, or what went wrong."""
        with self._lock:
            keys = self._keys.get(step.identity)
            states = [None] if keys is None else [self._done.get(key) for key in keys]
        return next(filter(None, states), None if None in states else READY)

    def state(self, step: Step) -> str | None:
        """As ``seen``, of any step; what is missing is compiled before all else."""
        if step.identity not in self._keys:
            keys = self._walkers[1].submit(keys_of, self._chip, step).result()
            with self._lock:
                self._keys[step.identity] = keys
        if (state := self.seen(step)) is None and step.identity not in self._urgent:
            self._urgent.add(step.identity)
            self._push(step, list(self._keys[step.identity]), URGENT)
        return state

    def wait(self, seconds: float) -> None:
        """Until something more is compiled, or for so long."""
        with self._changed:
            self._changed.wait(seconds)

    @property
    def compiled(self) -> int:
        return len(self._done)

    def close(self) -> None:
        """At once."""
        with self._lock:
            self._wanted.clear()
        for process in multiprocessing.active_children():
            process.kill()
        for executor in (self._pool, *self._walkers):
            executor.shutdown(wait=False, cancel_futures=True)

    @property
    def _chip(self) -> Machine:
        if self._machine is None:
            raise RuntimeError("nobody has said what to compile for")
        return self._machine

    def _found(self, step: Step, priority: float, walked: Future[tuple[Key, ...]]) -> None:
        if not walked.cancelled() and walked.exception() is None:
            with self._lock:
                self._keys[step.identity] = walked.result()
            self._push(step, list(walked.result()), priority)

    def _push(self, step: Step, keys: list[Key], priority: float) -> None:
        with self._lock:
            for key in keys:
                if key not in self._begun:
                    heapq.heappush(self._wanted, (priority, next(self._order), key, step))
        self._feed()

    def _feed(self) -> None:
        """Keep all processes busy, and no more than that waiting where nothing can overtake it."""
        while True:
            with self._lock:
                if not self._wanted or len(self._begun) - len(self._done) >= self._places:
                    return
                _, _, key, step = heapq.heappop(self._wanted)
                if key in self._begun:
                    continue
                self._begun.add(key)
            try:
                self._pool.submit(compile_key, self._chip, step, key).add_done_callback(partial(self._end, key))
            except (RuntimeError, BrokenProcessPool):
                return  # closed

    def _end(self, key: Key, compiled: Future[str]) -> None:
        error = "cancelled"
        if not compiled.cancelled():
            failure = compiled.exception()
            error = compiled.result() if failure is None else f"{type(failure).__name__}: {failure}"[:200]
        with self._changed:
            self._done[key] = error
            self._changed.notify_all()
        self._feed()
