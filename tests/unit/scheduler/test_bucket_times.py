"""Step times of one-shot items: by shape bucket, and by rows with the blank ones that fill a step up."""

from __future__ import annotations

import random

import msgspec
import pytest

from engines.protocol import StepPlan, StepSample
from server.scheduler.bucket_times import WARM, BucketTimes
from server.scheduler.config import SchedulerConfig
from server.scheduler.core import DynamicBatchScheduler
from server.scheduler.least_squares import REACH
from server.scheduler.outliers import PATIENCE
from server.scheduler.prediction_errors import PredictionErrors
from tests.unit.scheduler.rig import SMALL, Rig

SIZES = (1, 4, 16)


def bucket(sizes: tuple[int, ...] = SIZES) -> BucketTimes:
    return BucketTimes(sizes, PredictionErrors())


def padded_seconds(rows: int) -> float:
    """2 ms a step and 1 ms a row, blank or not."""
    return 2e-3 + 1e-3 * next(size for size in SIZES if size >= rows)


def samples(machine_bucket: int, factor: float = 1.0) -> list[StepSample]:
    return [StepSample(rows=size, bucket=machine_bucket, seconds=factor * padded_seconds(size)) for size in SIZES]


class TestBucketTimes:
    def test_rows_count_with_the_blank_ones(self) -> None:
        times = bucket()
        randomness = random.Random(1)
        for _ in range(100):
            rows = randomness.randint(1, 16)
            times.observe(rows, padded_seconds(rows) * randomness.uniform(0.98, 1.02))
        for rows in (1, 2, 3, 4, 5, 11, 16):
            assert times.seconds(rows) == pytest.approx(padded_seconds(rows), rel=0.03)
        assert times.seconds(2) == times.seconds(4) < times.seconds(5) == times.seconds(16)

    def test_without_sizes_or_beyond_them_each_row_counts(self) -> None:
        assert [bucket(()).padded(rows) for rows in (1, 5, 100)] == [1, 5, 100]
        assert [bucket().padded(rows) for rows in (1, 2, 5, 17)] == [1, 4, 16, 17]

    def test_knows_nothing_before_some_steps_or_a_profile(self) -> None:
        times = bucket()
        for _ in range(WARM):
            assert times.seconds(4) == times.per_row == 0.0
            times.observe(4, 0.006)
        assert times.seconds(4) > 0
        seeded = bucket()
        seeded.seed(samples(0))
        assert seeded.seconds(3) == pytest.approx(padded_seconds(3), rel=0.05)
        assert seeded.per_row == pytest.approx(1e-3, rel=0.05)

    def test_coefficients_stay_near_the_profile(self) -> None:
        times = bucket()
        times.seed(samples(0))
        before = times.seconds(16)
        for _ in range(20 * PATIENCE):
            for size in SIZES:
                times.observe(size, 4.9 * padded_seconds(size))
        assert before < times.seconds(16) <= REACH[1] * before

    def test_a_step_far_off_is_ignored_but_not_many_in_a_row(self) -> None:
        times = bucket()
        for _ in range(30):
            assert [times.observe(size, padded_seconds(size)) for size in SIZES] == ["", "", ""]
        before = times.seconds(4)
        assert times.observe(4, 20 * before) == "far off"
        assert times.seconds(4) == before
        assert times.observe(4, before) == ""
        verdicts = [times.observe(4, 20 * before) for _ in range(PATIENCE + 1)]
        assert verdicts == ["far off"] * PATIENCE + [""]
        for _ in range(20):
            times.observe(4, 20 * before)
        assert times.seconds(4) == pytest.approx(20 * before, rel=0.1)


def machine(plan: StepPlan) -> float:
    return 0.0 if plan.rows else 2e-3 + 1e-3 * plan.padded_rows * (1 + plan.one_shot[0].bucket)


class TestInTheScheduler:
    def rig(self, config: SchedulerConfig | None = None) -> Rig:
        capacity = msgspec.structs.replace(SMALL, max_rows=16, one_shot_rows=SIZES)
        return Rig(config, {"m": capacity}, machine)

    def test_a_plan_says_to_what_its_rows_are_padded(self) -> None:
        rig = self.rig()
        for rows in (1, 3, 5):
            rig.offer(rig.one_shot(0, rows))
            assert rig.must_launch().padded_rows == {1: 1, 3: 4, 5: 16}[rows]
            rig.run()
        rig.check_all()
        plain = Rig()
        plain.offer(plain.one_shot(0, 3))
        assert plain.must_launch().padded_rows == 3
        plain.offer(plain.item([1]))
        assert plain.must_launch().padded_rows == 0

    def test_each_bucket_has_times_of_its_own(self) -> None:
        rig = self.rig()
        for shape in (0, 3):
            for rows in (1, 2, 4, 9, 16, 3):
                rig.offer(rig.one_shot(shape, rows))
                rig.run()
        rig.offer(rig.one_shot(0, 3))
        rig.run()
        assert rig.scheduler.settled_work.seconds == pytest.approx(2e-3 + 4e-3, rel=0.1)
        rig.offer(rig.one_shot(3, 3))
        rig.run()
        assert rig.scheduler.settled_work.seconds == pytest.approx(2e-3 + 16e-3, rel=0.1)
        assert 0 < rig.load().step_error_p50 <= rig.load().step_error_p95 < 0.5

    def test_rows_that_take_the_place_of_blank_ones_cost_no_deadline(self) -> None:
        rig = self.rig()
        for rows in (1, 4, 16, 2, 3, 9):
            rig.offer(rig.one_shot(0, rows))
            rig.run()
        # 6 ms allow four rows and not sixteen.
        for _ in range(7):
            rig.offer(rig.item([], 0, rows=1, ttft=0.0085, firm=True))
        assert len(rig.must_launch().one_shot) == 4

    def test_a_profile_seeds_the_buckets_and_the_sequences_apart(self) -> None:
        capacity = msgspec.structs.replace(SMALL, one_shot_rows=SIZES)
        scheduler = DynamicBatchScheduler(SchedulerConfig())
        tokens = [StepSample(rows=1, tokens=size, prompt_pairs=0.0, seconds=0.01 + 1e-4 * size) for size in (1, 9, 60)]
        scheduler.add_engine("m", capacity, "fingerprint", [*samples(0), *tokens, *samples(2, factor=3.0)])
        rig = self.rig()
        first, second = rig.one_shot(0, 2), rig.one_shot(2, 2)
        for item in (first, second):
            assert scheduler.offer([item], 1.0) is None
        for factor in (1.0, 3.0):
            plan = scheduler.plan(1.0, {"m": capacity})
            assert plan is not None
            work = scheduler._in_flight[-1].work
            assert work.seconds == pytest.approx(factor * padded_seconds(2), rel=0.05)
        sequences = scheduler._engines["m"].sequences
        assert sequences.step_time.largest == 60
