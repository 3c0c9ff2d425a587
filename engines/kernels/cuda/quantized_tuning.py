"""Which configuration of the quantized kernel a linear layer runs: from a table found on the device, or by a model of
the machine as in ``tuning``.

Tables lie beside those of plain layers, one a kind of GPU, written by ``benchmarks/quantized_speed.py``.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from pathlib import Path

from engines.kernels.cuda.quantized_layout import HALVES, LEVELS, DeviceCodes
from engines.kernels.cuda.tuning import (
    BYTES_PER_US,
    CACHE_BYTES_PER_US,
    CYCLES_PER_US,
    FIXED_US,
    LATENCY_US,
    MOST_TILES,
    NORM_POWER,
    PARTIAL_FLOATS,
    PREFETCHED,
    PROGRAM_US,
    REGISTERS,
    SPLIT_US,
    Machine,
    ceil_div,
    gpu_slug,
)

BUCKETS = (1, 8, 16, 32, 64, 128, 256, 512)
"""Rows: a step runs the configuration of the first that is not smaller. For more, weights are dequantized first."""
MOST_ROWS = BUCKETS[-1]
MOST_TILE_ROWS = 128
TABLES = Path(__file__).parent / "tables"
NARROW_ROWS = 32
"""Most rows of a tile whose sums each warp keeps for all of the program's lines."""
MOST_SUMS = 128
"""Registers of a thread for sums, those of a group and of all together; half as many where there are no groups. The
compiler spills beyond."""


@dataclass(frozen=True, slots=True)
class QuantizedShape:
    """What a layer is to the kernel, beside its rows."""

    format: int
    lines: int
    depth: int
    """With what fills a row up."""
    unit: int
    grouped: bool
    gated: bool

    @classmethod
    def of(cls, codes: DeviceCodes, gated: bool) -> QuantizedShape:
        return cls(codes.format, codes.lines, codes.padded_depth, codes.unit, codes.group > 0, gated)

    @property
    def line_bytes(self) -> int:
        return self.depth // 2 if self.format in (HALVES, LEVELS) else self.depth

    def key(self) -> str:
        """In tables."""
        grouped, gated = "-grouped" if self.grouped else "", "-gated" if self.gated else ""
        return f"{self.format}-{self.lines}x{self.depth}-{self.unit}{grouped}{gated}"


@dataclass(frozen=True, slots=True)
class QuantizedConfig:
    """How the kernel is compiled and launched."""

    block_n: int
    """Weight lines of a program."""
    parts: int
    """Units of the depth at once, shared out among the warps; 0: one by all warps together, BLOCK_N >= 64."""
    splits: int
    """Programs that share a tile along the depth."""
    warps: int
    stages: int
    prefetch: int
    """Bytes of each weight line that the L2 cache is asked for before the input is there."""
    early: bool
    """Start while the kernel before still runs."""

    def block_k(self, unit: int) -> int:
        return unit * max(self.parts, 1)


def tile_rows(rows: int) -> int:
    """Rows of a program's tile."""
    return min(max(8, 1 << (rows - 1).bit_length()), MOST_TILE_ROWS)


def predicted_us(config: QuantizedConfig, shape: QuantizedShape, rows: int, machine: Machine) -> float:
    """What one launch takes; infinite if it cannot run."""
    block_m = tile_rows(rows)
    row_tiles, tiles = ceil_div(rows, block_m), ceil_div(shape.lines, config.block_n)
    block_k = config.block_k(shape.unit)
    steps = ceil_div(ceil_div(shape.depth, block_k), config.splits)
    slots = _resident(config, shape, block_m, machine)
    if not slots or (config.splits - 1) * steps * block_k >= shape.depth:
        return float("inf")
    partial_floats = tiles * config.splits * block_m * (config.block_n + 1)
    if config.splits > 1 and (row_tiles > 1 or tiles > MOST_TILES or partial_floats > PARTIAL_FLOATS):
        return float("inf")
    programs = tiles * config.splits * row_tiles
    step = max(LATENCY_US / (config.stages - 1), _step_cycles(config, shape, block_m) / CYCLES_PER_US)
    weight = shape.lines * shape.line_bytes / machine.multiprocessors
    inputs = 2 * rows * shape.depth * tiles / machine.multiprocessors
    together = min(slots, programs) / machine.multiprocessors
    terms = (
        weight / BYTES_PER_US,
        (weight * row_tiles + inputs) / CACHE_BYTES_PER_US,
        ceil_div(programs, slots) * (PROGRAM_US + steps * step),
        # Programs of one multiprocessor take turns at its units.
        programs / machine.multiprocessors * steps * _step_cycles(config, shape, block_m) / CYCLES_PER_US
        / min(max(together, 1.0), 3.0),
    )  # fmt: skip
    slowest: float = sum(term**NORM_POWER for term in terms) ** (1 / NORM_POWER)
    return FIXED_US + (SPLIT_US if config.splits > 1 else 0.0) + slowest


def _resident(config: QuantizedConfig, shape: QuantizedShape, block_m: int, machine: Machine) -> int:
    """Programs that run at once; 0 where not even one fits."""
    threads = 32 * config.warps
    sums = block_m * config.block_n * max(config.parts, 1) // threads * (2 if shape.grouped else 1)
    block_k = config.block_k(shape.unit)
    code_bytes = block_k * shape.line_bytes // shape.depth * config.block_n
    shared = config.stages * (code_bytes + 2 * block_k * block_m)
    if shape.format == LEVELS:
        shared += 4 * block_k * config.block_n  # the levels of a block, which pass through it
    shared = max(shared, 4 * block_m * config.block_n * max(config.parts, 1)) + 1024
    if sums > (MOST_SUMS if shape.grouped else MOST_SUMS // 2) or shared > machine.shared_memory - 1024:
        return 0
    registers = 80 + sums + block_k * config.block_n // threads // 4
    if registers > 255:
        return 0
    return machine.multiprocessors * min(machine.shared_memory // shared, REGISTERS // (threads * registers))


def _step_cycles(config: QuantizedConfig, shape: QuantizedShape, block_m: int) -> float:
    """Of one block of the depth in one program."""
    weights = config.block_k(shape.unit) * config.block_n
    # Codes to values at two instructions each, levels at the rate of scattered loads; matrix instructions beside them.
    unpacking = weights / (16 if shape.format == LEVELS else 64)
    products = weights * block_m / (16_384 if config.parts == 0 else 4096)
    return 300 + max(unpacking, products) + min(unpacking, products) / 2


def candidates(shape: QuantizedShape, rows: int, machine: Machine) -> Iterator[QuantizedConfig]:
    """All configurations that can run."""
    forms = [(n, 0, w) for n in (64, 128) for w in (4, 8) if n >= 16 * w]
    if tile_rows(rows) <= NARROW_ROWS:
        most = max(512 // shape.unit, 4)
        forms += [(n, p, w) for n in (16, 32, 64) for w in (4, 8) for p in (w, 2 * w, 4 * w) if p <= max(most, w)]
    for block_n, parts, warps in forms:
        for splits in (1, 2, 3, 4, 6, 8):
            for stages in (2, 3, 4, 5):
                line = min(PREFETCHED // block_n, shape.line_bytes // splits) // 16 * 16
                prefetch = line if machine.hopper else 0
                config = QuantizedConfig(block_n, parts, splits, warps, stages, prefetch, machine.hopper)
                if predicted_us(config, shape, rows, machine) < float("inf"):
                    yield config


def ranked(shape: QuantizedShape, rows: int, machine: Machine, count: int) -> list[QuantizedConfig]:
    """``count`` that are fast by the model, of each form half where both can run; no two differ in stages alone."""
    found: dict[bool, dict[tuple[int, ...], QuantizedConfig]] = {True: {}, False: {}}
    for config in sorted(candidates(shape, rows, machine), key=lambda one: predicted_us(one, shape, rows, machine)):
        kind = (config.block_n, config.parts, config.splits, config.warps)
        found[config.parts > 0].setdefault(kind, config)
    narrow, wide = list(found[True].values()), list(found[False].values())
    half = max(count // 2, count - len(wide))
    chosen = narrow[:half] + wide[: count - len(narrow[:half])]
    return sorted(chosen, key=lambda one: predicted_us(one, shape, rows, machine))


@functools.cache
def predicted_config(shape: QuantizedShape, rows: int, machine: Machine) -> QuantizedConfig | None:
    """The fastest by the model; None where nothing fits."""
    return min(candidates(shape, rows, machine), key=lambda one: predicted_us(one, shape, rows, machine), default=None)


def table_path(machine: Machine, folder: Path = TABLES) -> Path:
    """Where this kind of GPU's table is."""
    return folder / f"quantized-{gpu_slug(machine.name)}.json"


@functools.cache
def _table(machine: Machine) -> dict[str, dict[str, list[int] | None]]:
    path = table_path(machine)
    if not path.exists():
        return {}
    entries: dict[str, dict[str, list[int] | None]] = json.loads(path.read_text())["entries"]
    return entries


def fields_of(config: QuantizedConfig) -> list[int]:
    """As tables hold it."""
    return [int(value) for value in astuple(config)]


@functools.cache
def config_for(shape: QuantizedShape, rows: int, machine: Machine) -> QuantizedConfig | None:
    """What ``rows`` rows of a layer run; None: weights are dequantized and cuBLAS multiplies."""
    bucket = next((bucket for bucket in BUCKETS if rows <= bucket), None)
    if bucket is None:
        return None
    entry = _table(machine).get(shape.key(), {})
    if str(bucket) in entry:
        fields = entry[str(bucket)]
        if fields is None:
            return None
        block_n, parts, splits, warps, stages, prefetch, early = fields
        return QuantizedConfig(block_n, parts, splits, warps, stages, prefetch, bool(early))
    return predicted_config(shape, bucket, machine)
