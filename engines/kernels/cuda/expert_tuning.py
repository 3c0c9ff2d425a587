"""How the products of an expert layer are cut: by a table found on the device, or what suits a Hopper GPU.

Tables lie beside this file, one a kind of GPU, written by ``benchmarks/tune_experts.py``.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path

import torch

from engines.kernels.cuda.device import machine_at
from engines.kernels.cuda.tuning import gpu_slug

BUCKETS = (1, 4, 8, 16, 32, 64, 128, 256)
"""Tokens: a step runs the tiles of the first that is not smaller."""
MOST_FEW = BUCKETS[-1]
"""Tokens up to which programs find their expert's pairs themselves."""
MANY = 0
"""The bucket of steps with more tokens."""
TABLES = Path(__file__).parent / "tables"


@dataclass(frozen=True, slots=True)
class Tile:
    """How a product is cut: pairs, columns and depth of a program's tile.

    A step of one token has forms of its own, without tiles of pairs; down's depth there is of each expert.
    """

    pairs: int
    columns: int
    depth: int
    warps: int
    stages: int


@dataclass(frozen=True, slots=True)
class Tiles:
    gate_up: Tile
    down: Tile


DEFAULTS: dict[int, Tiles] = {
    1: Tiles(Tile(16, 32, 128, 4, 5), Tile(8, 16, 64, 8, 6)),
    16: Tiles(Tile(16, 32, 128, 4, 4), Tile(16, 32, 128, 4, 5)),
    128: Tiles(Tile(16, 32, 128, 4, 4), Tile(16, 64, 128, 4, 4)),
    MOST_FEW: Tiles(Tile(32, 64, 64, 4, 4), Tile(32, 64, 128, 4, 4)),
}
MANY_TILES = Tiles(Tile(128, 128, 64, 8, 4), Tile(128, 256, 64, 8, 4))


def bucket_of(tokens: int) -> int:
    """The bucket of a step of so many tokens."""
    return next((bucket for bucket in BUCKETS if tokens <= bucket), MANY)


def default_tiles(tokens: int) -> Tiles:
    """Without a table."""
    return next((tiles for most, tiles in DEFAULTS.items() if tokens <= most), MANY_TILES)


def table_name(gpu: str) -> str:
    """File name of a kind of GPU."""
    return f"experts-{gpu_slug(gpu)}.json"


def layer_key(width: int, inner: int, experts: int) -> str:
    """A kind of layer in tables."""
    return f"{experts}x{inner}x{width}"


@functools.cache
def _table(gpu: str) -> dict[str, dict[str, list[list[int]]]]:
    path = TABLES / table_name(gpu)
    entries: dict[str, dict[str, list[list[int]]]] = json.loads(path.read_text())["entries"] if path.exists() else {}
    return entries


@functools.cache
def tiles_for(tokens: int, width: int, inner: int, experts: int, device: torch.device) -> Tiles:
    """Of a step of so many tokens through a layer of ``experts``, the shared ones counted."""
    machine = machine_at(device)
    if machine is not None:
        entry = _table(machine.name).get(layer_key(width, inner, experts), {})
        if found := entry.get(str(bucket_of(tokens))):
            return Tiles(Tile(*found[0]), Tile(*found[1]))
    return default_tiles(tokens)
