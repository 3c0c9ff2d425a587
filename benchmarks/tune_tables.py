"""Writing tables of configurations: what was found goes in, what was not looked at stays."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from pathlib import Path

from engines.kernels.cuda.tuning import (
    BUCKETS,
    Machine,
    SkinnyConfig,
    SkinnyShape,
    config_for,
    fields_of,
    table_name,
)

Entry = dict[str, list[int] | None]
Found = Mapping[SkinnyShape, Mapping[int, SkinnyConfig | None]]
"""By rows; None stands for cuBLAS."""


def whole_entry(shape: SkinnyShape, machine: Machine) -> Entry:
    """What ``config_for`` says today, written out: of a shape that has no entry of its own too."""
    return {str(rows): _written(config_for(shape, rows, machine)) for rows in BUCKETS}


def merged(entries: Mapping[str, Entry], found: Found, machine: Machine) -> dict[str, Entry]:
    """``entries`` of a table with what was found in place of what they said; rows in ascending order.

    Numbers of rows that are no bucket are kept apart only where they differ from the next larger one.
    """
    result = {key: dict(entry) for key, entry in entries.items()}
    for shape, configs in found.items():
        entry = result.get(shape.key()) or whole_entry(shape, machine)
        entry |= {str(rows): _written(config) for rows, config in configs.items()}
        ordered = sorted(entry, key=int)
        following = dict(itertools.pairwise(ordered))
        result[shape.key()] = {
            rows: entry[rows] for rows in ordered if int(rows) in BUCKETS or entry[rows] != entry[following[rows]]
        }
    return result


def _written(config: SkinnyConfig | None) -> list[int] | None:
    return None if config is None else fields_of(config)


def write_table(folder: Path, machine: Machine, entries: Mapping[str, Entry]) -> Path:
    """One line a shape."""
    chip = {"gpu": machine.name, "capability": machine.capability, "multiprocessors": machine.multiprocessors}
    lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(entry)}" for key, entry in entries.items())
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / table_name(machine.name)
    draft = path.with_suffix(".draft")
    draft.write_text(json.dumps(chip)[:-1] + ', "entries": {\n' + lines + "\n}}\n")
    draft.replace(path)
    return path
