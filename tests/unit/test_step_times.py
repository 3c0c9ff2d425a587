"""The measuring of step times, on a real engine that is small."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.model_configs import config_folder
from benchmarks.simulation import fitting
from benchmarks.step_times import REPEATS, GridPoint, grid, measure
from engines.generation.engine import GenerationEngine
from engines.protocol import Capacity, EngineSpec

CAPACITY = Capacity(blocks=100, block_size=16, max_rows=8, max_step_tokens=64, max_model_len=512)


@pytest.mark.parametrize(
    ("point", "fits"),
    [
        (GridPoint(decodes=8, context=32), True),
        (GridPoint(decodes=9, context=32), False),  # rows
        (GridPoint(chunk=64), True),
        (GridPoint(chunk=65), False),  # tokens
        (GridPoint(decodes=8, context=256), False),  # blocks
        (GridPoint(decodes=1, context=512), False),  # length
    ],
)
def test_points_that_no_step_could_be_are_left_out(point: GridPoint, fits: bool) -> None:
    assert point.fits(CAPACITY) is fits


def test_a_point_says_what_its_rows_compute() -> None:
    point = GridPoint(decodes=2, context=10, chunk=12, start=4, chunk_rows=3)
    assert point.rows() == [(9, 1), (9, 1), (4, 4), (4, 4), (4, 4)]


def test_measured_steps_of_a_real_engine_can_be_fitted(tmp_path: Path) -> None:
    spec = EngineSpec(
        name="tiny",
        source=str(config_folder(tmp_path, "tiny")),
        random_weights=0,
        threads=1,
        max_batch=16,
        max_step_tokens=256,
        max_model_len=1024,
        memory_limit=64 << 20,
    )
    engine = GenerationEngine.load(spec, lambda progress: None)
    try:
        measured = measure(engine, 0.0)
        expected = {point for point in grid() if point.fits(engine.capacity)}
    finally:
        engine.close()
    assert set(measured.seconds) == expected
    assert all(len(seconds) == REPEATS and min(seconds) > 0 for seconds in measured.seconds.values())
    costs = fitting.fit(measured.samples())
    largest = max(measured.samples(), key=lambda sample: sample.shape.tokens)
    assert costs.seconds(largest.shape) > 0
