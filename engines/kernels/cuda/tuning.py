"""Which configuration of the skinny kernel a linear layer runs: a table found on the device, or a model of the machine.

Tables lie beside this file, one a kind of GPU, written by ``benchmarks/tune_kernels.py``, which times each layer alone,
and ``benchmarks/tune_steps.py``, which times whole steps. A shape that no table knows takes the configuration that the
model finds fastest; nothing is searched or timed when a server starts.
"""

from __future__ import annotations

import functools
import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any

import torch

BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128)
"""Rows: a step runs the configuration of the first that is not smaller. Tables may have others between them."""
MOST_ROWS = BUCKETS[-1]
MODELLED_ROWS = 64
"""For more, only a table says that the kernel is faster than cuBLAS."""
TABLES = Path(__file__).parent / "tables"

WEIGHT_BYTES = 2
WEIGHT_ALIGNMENT = 16
"""Bytes, of a weight's first element: what one load and one prefetch need."""
BYTES_PER_US = 23_000
"""Of memory bandwidth for each multiprocessor: Hopper's; on other GPUs only the order of configurations counts."""
CACHE_BYTES_PER_US = 42_000
"""The same from the L2 cache."""
SHARED_BYTES_PER_US = 70_000
"""The most that one multiprocessor takes in, when others are idle."""
LATENCY_US = 1.0
"""From a load to its bytes, in a busy memory system."""
CYCLES_PER_US = 1700
FIXED_US = 2.0
OVERLAP_US = 1.3
"""Of it, where the next kernel's programs can start beside these and ask for their first weights."""
SPLIT_US = 1.5
"""For the last program of a tile to see and sum what the others wrote."""
PREFETCHED = 32 << 10
"""Bytes of its weights that a program asks the L2 cache for ahead, where nothing better is known."""
PROGRAM_US = 1.0
"""From a program's start to its first bytes, and from its last to its end."""
FEW_WAVES = 4
"""From so many programs a slot, the slots finish together."""
NORM_POWER = 4
REGISTERS = 65_536
MOST_REGISTERS = 210
"""By the estimate; the compiler, whose limit is 255, has been seen to spill from 220."""
PARTIAL_FLOATS = 1 << 21
"""Of scratch for partial sums."""
MOST_TILES = 4096
"""That split programs can count."""
MOST_SQUARES = 4096
"""Sums of squares, of all rows, that each program holds in registers while it computes its product."""


@dataclass(frozen=True, slots=True)
class SkinnyShape:
    """What a linear layer is to the kernel, beside its rows."""

    lines: int
    """Output features; where gated, of gate and up together."""
    depth: int
    """Input features."""
    gated: bool
    norm: bool
    """Inside; not one that was handed over or ran before."""

    def key(self) -> str:
        """In tables."""
        return f"{self.lines}x{self.depth}{'-gated' if self.gated else ''}{'-norm' if self.norm else ''}"


@dataclass(frozen=True, slots=True)
class SkinnyConfig:
    """How the kernel is compiled and launched."""

    block_n: int
    """Weight lines of a program."""
    block_k: int
    """Of the depth, at once."""
    parts: int
    """Into which the warps cut a block of the depth; 0: they share it by wide matrix instructions, BLOCK_N >= 64."""
    splits: int
    """Programs that share a tile along the depth."""
    warps: int
    stages: int
    prefetch: int
    """Bytes of each weight line that the L2 cache is asked for ahead of use, first before the input is there."""
    early: bool
    """Start while the kernel before still runs."""


@dataclass(frozen=True, slots=True)
class Machine:
    name: str
    capability: tuple[int, int]
    multiprocessors: int
    shared_memory: int
    """Bytes of one multiprocessor that its programs can share out."""

    @property
    def hopper(self) -> bool:
        """Whether kernels can start early, prefetch in bulk and use wide matrix instructions on shared memory."""
        return self.capability[0] == 9


@functools.cache
def machine_of(device: int) -> Machine:
    """The GPU of this index."""
    properties: Any = torch.cuda.get_device_properties(device)
    return Machine(
        properties.name,
        (properties.major, properties.minor),
        properties.multi_processor_count,
        properties.shared_memory_per_multiprocessor,
    )


def next_power_of_two(count: int) -> int:
    """The smallest that is not below ``count``."""
    return 1 << max(count - 1, 0).bit_length()


def block_rows(rows: int) -> int:
    """Rows of the tile that holds ``rows``."""
    return max(8, next_power_of_two(rows))


def shared_bytes(config: SkinnyConfig, block_m: int) -> int:
    """Shared memory of one program."""
    stage = WEIGHT_BYTES * config.block_k * (config.block_n + block_m + 1)
    stages = config.stages if config.parts == 0 else config.stages - 1
    return max(stages * stage, 4 * block_m * config.block_n * max(config.parts, 1))


def _registers(config: SkinnyConfig, shape: SkinnyShape, block_m: int) -> int:
    """Of one thread, about."""
    threads = 32 * config.warps
    sums = block_m * config.block_n * max(5 * config.parts // 4, 1) // threads
    # Beside the sums of squares, what is being scaled: all of a block, or what wide instructions leave to be stored.
    squares = (8 if config.parts else 5) * block_m * config.block_k // (4 * threads) if shape.norm else 0
    return max(64, 60 + sums + squares)


def resident_programs(config: SkinnyConfig, shape: SkinnyShape, block_m: int, machine: Machine) -> int:
    """Programs that run at once; 0 where not even one fits."""
    registers = _registers(config, shape, block_m)
    shared = shared_bytes(config, block_m) + 1024
    if registers > MOST_REGISTERS or shared > machine.shared_memory - 1024:
        return 0
    return machine.multiprocessors * min(machine.shared_memory // shared, REGISTERS // (32 * config.warps * registers))


def steps_of_split(config: SkinnyConfig, depth: int) -> int:
    """Blocks of the depth that each of the programs of a tile takes; the last one may have less."""
    return ceil_div(ceil_div(depth, config.block_k), config.splits)


def ceil_div(whole: int, part: int) -> int:
    return -(-whole // part)


def predicted_us(config: SkinnyConfig, shape: SkinnyShape, rows: int, machine: Machine) -> float:
    """What one launch takes, by memory, by cache, and by the programs that run at once; infinite if it cannot run."""
    block_m = block_rows(rows)
    slots = resident_programs(config, shape, block_m, machine)
    tiles = ceil_div(shape.lines, config.block_n)
    steps = steps_of_split(config, shape.depth)
    if not slots or (config.splits - 1) * steps * config.block_k >= shape.depth:
        return float("inf")  # too large, or a split without work
    partial_floats = tiles * config.splits * block_m * (config.block_n + 1)
    if config.splits > 1 and (tiles > MOST_TILES or partial_floats > PARTIAL_FLOATS):
        return float("inf")
    arrival = LATENCY_US / (config.stages - 1)
    step = max(arrival, _step_cycles(config, shape, block_m) / CYCLES_PER_US)
    programs = tiles * config.splits
    waves = ceil_div(programs, slots) if programs < FEW_WAVES * slots else programs / slots
    share = WEIGHT_BYTES * shape.lines * shape.depth / machine.multiprocessors
    fullest = ceil_div(programs, machine.multiprocessors) * machine.multiprocessors / programs
    terms = (
        share / BYTES_PER_US,
        share * (1 + rows / config.block_n) / CACHE_BYTES_PER_US,
        share * fullest / SHARED_BYTES_PER_US,
        waves * (PROGRAM_US + steps * step),
    )
    # Not just the largest: what is only a little faster than memory still delays it.
    slowest: float = sum(term**NORM_POWER for term in terms) ** (1 / NORM_POWER)
    fixed = FIXED_US - OVERLAP_US * overlap(config, shape, rows, machine)
    return fixed + (SPLIT_US if config.splits > 1 else 0.0) + slowest


def overlap(config: SkinnyConfig, shape: SkinnyShape, rows: int, machine: Machine) -> float:
    """The share, up to 1, of a second kernel of this kind that finds room beside the first."""
    if not config.early or not config.prefetch:
        return 0.0
    places = resident_programs(config, shape, block_rows(rows), machine) // machine.multiprocessors
    taken = ceil_div(ceil_div(shape.lines, config.block_n) * config.splits, machine.multiprocessors)
    return min(max(places / taken - 1, 0.0), 1.0)


def _step_cycles(config: SkinnyConfig, shape: SkinnyShape, block_m: int) -> float:
    """Of one block of the depth in one program."""
    scaling = block_m * config.block_k / 32 if shape.norm else 0.0
    if config.parts == 0:
        copies = config.block_n / 64 * 4 / config.warps
        return 400 + scaling + config.block_k / 16 * max(16, block_m / 2) * copies
    chain = config.block_k / config.parts / 16
    return 400 + scaling + chain * max(33, block_m / 8 * config.block_n / 16 * 8)


def candidates(shape: SkinnyShape, rows: int, machine: Machine) -> Iterator[SkinnyConfig]:
    """All configurations that can run."""
    parts = [(n, k, w, w) for n in (16, 32, 64) for k in (128, 256, 512) for w in (4, 8)]
    # Four warps take 64 lines at once; sums of 128 lines and many rows are too many registers for four.
    warps_of = {64: (4,), 128: (4, 8) if block_rows(rows) <= 32 else (8,)}
    wide = [(n, k, 0, w) for n in (64, 128) for k in (64, 128, 256) for w in warps_of[n]]
    for block_n, block_k, part, warps in parts + (wide if machine.hopper else []):
        prefetch = PREFETCHED // block_n if machine.hopper else 0
        for splits in (1, 2, 3, 4, 6, 8):
            for stages in (3, 4, 5, 6):
                config = SkinnyConfig(block_n, block_k, part, splits, warps, stages, prefetch, machine.hopper)
                if predicted_us(config, shape, rows, machine) < float("inf"):
                    yield config


@functools.cache
def predicted_config(shape: SkinnyShape, rows: int, machine: Machine) -> SkinnyConfig | None:
    """The fastest by the model; None where nothing fits."""
    return min(
        candidates(shape, rows, machine),
        key=lambda config: predicted_us(config, shape, rows, machine),
        default=None,
    )


def ranked(shape: SkinnyShape, rows: int, machine: Machine, count: int) -> list[SkinnyConfig]:
    """``count`` that are fast by the model: half of them leave room for the next kernel, half use all of the machine.

    No two differ in stages alone, and at most two divide the weight among programs alike.
    """
    found: dict[bool, list[SkinnyConfig]] = {True: [], False: []}
    alike: Counter[tuple[int, ...]] = Counter()
    for config in sorted(candidates(shape, rows, machine), key=lambda one: predicted_us(one, shape, rows, machine)):
        roomy = overlap(config, shape, rows, machine) >= 0.5
        division = (roomy, config.parts == 0, config.block_n, config.splits)
        kind = (*division, config.block_k, config.warps)
        if not alike[kind] and alike[division] < 2:
            alike[kind] += 1
            alike[division] += 1
            found[roomy].append(config)
    half = max(count // 2, count - len(found[False]))
    return found[True][:half] + found[False][: count - len(found[True][:half])]


class Table:
    """Configurations found on one kind of GPU."""

    def __init__(self, entries: dict[str, dict[str, list[int] | None]]) -> None:
        """``entries``: by shape, then rows: a configuration's fields in order, or None where cuBLAS is faster."""
        self._entries = entries

    def find(self, shape: SkinnyShape, rows: int) -> tuple[bool, SkinnyConfig | None]:
        """Whether the table knows, and what it says. A shape is found with and without its norm, of little weight;
        rows take what its entry says of the fewest that are not fewer, or cuBLAS."""
        entry = self._entries.get(shape.key()) or self._entries.get(replace(shape, norm=not shape.norm).key(), {})
        known = min((bucket for bucket in map(int, entry) if rows <= bucket), default=None)
        fields = None if known is None else entry[str(known)]
        return bool(entry), None if fields is None else _config_of(fields)


def fields_of(config: SkinnyConfig) -> list[int]:
    """As tables hold it."""
    return [int(value) for value in astuple(config)]


def _config_of(fields: list[int]) -> SkinnyConfig:
    block_n, block_k, parts, splits, warps, stages, prefetch, early = fields
    return SkinnyConfig(block_n, block_k, parts, splits, warps, stages, prefetch, bool(early))


def gpu_slug(gpu: str) -> str:
    """A kind of GPU as names of files have it."""
    return re.sub("[^a-z0-9]+", "-", gpu.lower()).strip("-")


def table_name(gpu: str) -> str:
    """File name of a kind of GPU."""
    return f"linear-{gpu_slug(gpu)}.json"


def table_entries(machine: Machine, folder: Path) -> dict[str, dict[str, list[int] | None]]:
    """This GPU's, else those of a GPU with the same chip, else none."""
    own = folder / table_name(machine.name)
    for path in [own] if own.exists() else sorted(folder.glob("linear-*.json")):
        data = json.loads(path.read_text())
        if path == own or (tuple(data["capability"]), data["multiprocessors"]) == (
            machine.capability,
            machine.multiprocessors,
        ):
            entries: dict[str, dict[str, list[int] | None]] = data["entries"]
            return entries
    return {}


@functools.cache
def _table(machine: Machine, folder: Path) -> Table:
    return Table(table_entries(machine, folder))


_preferred: Table | None = None


def prefer_table(table: Table | None) -> None:
    """From now on ``config_for`` asks this table, None: the one of the GPU at hand, as at the start."""
    global _preferred
    _preferred = table
    config_for.cache_clear()


@functools.cache
def config_for(shape: SkinnyShape, rows: int, machine: Machine) -> SkinnyConfig | None:
    """What ``rows`` rows of a layer run; None: cuBLAS."""
    bucket = next((bucket for bucket in BUCKETS if rows <= bucket), None)
    if bucket is None:
        return None
    known, config = (_preferred or _table(machine, TABLES)).find(shape, rows)
    if known or bucket > MODELLED_ROWS:
        return config
    return predicted_config(shape, bucket, machine)
