"""Which configuration of the quantized kernel is chosen: it fits the machine, and a table goes before the model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from engines.kernels.cuda import quantized_tuning
from engines.kernels.cuda.quantized_layout import BYTES, FLOAT8, HALVES, LEVELS
from engines.kernels.cuda.quantized_tuning import (
    BUCKETS,
    MOST_ROWS,
    QuantizedConfig,
    QuantizedShape,
    candidates,
    config_for,
    fields_of,
    predicted_config,
    predicted_us,
    ranked,
    table_path,
    tile_rows,
)
from engines.kernels.cuda.tuning import MOST_TILES, PARTIAL_FLOATS, Machine, ceil_div

H200 = Machine("NVIDIA H200", (9, 0), 132, 233_472)
A100 = Machine("NVIDIA A100-SXM4-80GB", (8, 0), 108, 167_936)
SHAPES = [
    QuantizedShape(HALVES, 37888, 3584, 128, True, True),
    QuantizedShape(HALVES, 3584, 18944, 64, True, False),
    QuantizedShape(BYTES, 4608, 3584, 128, False, False),
    QuantizedShape(BYTES, 576, 576, 16, True, False),
    QuantizedShape(FLOAT8, 152064, 3584, 128, True, False),
    QuantizedShape(LEVELS, 64, 64, 32, False, True),
]


@pytest.mark.parametrize("machine", [H200, A100])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_number_of_rows_has_a_kernel_that_fits(shape: QuantizedShape, machine: Machine) -> None:
    for rows in BUCKETS:
        config = predicted_config(shape, rows, machine)
        assert config is not None
        assert config.early == (machine is H200)
        tiles, block_m = ceil_div(shape.lines, config.block_n), tile_rows(rows)
        if config.splits > 1:
            assert rows <= block_m
            assert tiles <= MOST_TILES
            assert tiles * config.splits * block_m * (config.block_n + 1) <= PARTIAL_FLOATS
        assert (config.splits - 1) * config.block_k(shape.unit) < shape.depth
        assert config.block_n % config.warps == 0
        assert config.prefetch % 16 == 0


def test_candidates_to_measure_are_of_both_forms() -> None:
    found = ranked(SHAPES[0], 8, H200, 6)
    assert len(found) == 6
    assert {config.parts > 0 for config in found} == {True, False}
    times = [predicted_us(config, SHAPES[0], 8, H200) for config in found]
    assert times == sorted(times)
    assert min(times) == min(predicted_us(config, SHAPES[0], 8, H200) for config in candidates(SHAPES[0], 8, H200))


def test_a_table_goes_before_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = replace(H200, name="NVIDIA H200 for a test")
    config = QuantizedConfig(32, 8, 2, 8, 3, 256, True)
    shape = SHAPES[0]
    table_path(machine, tmp_path).write_text(
        json.dumps({"gpu": machine.name, "entries": {shape.key(): {"8": fields_of(config), "64": None}}})
    )
    monkeypatch.setattr(quantized_tuning, "table_path", lambda machine: table_path(machine, tmp_path))
    assert config_for(shape, 5, machine) == config
    assert config_for(shape, 40, machine) is None, "cuBLAS was faster"
    assert config_for(shape, 1, machine) == predicted_config(shape, 1, machine), "not measured"
    assert config_for(shape, MOST_ROWS + 1, machine) is None
