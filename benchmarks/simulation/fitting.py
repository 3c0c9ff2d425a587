"""From measured steps to ``StepCosts``: non-negative least squares of the relative error, in two branches."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Sequence

import numpy as np

from benchmarks.simulation.coefficients import StepCosts, StepSample, StepShape, quantiles

Matrix = np.ndarray[tuple[int, ...], np.dtype[np.float64]]

_ROUNDS = 50
"""Most re-assignments of the samples to the two branches; a handful is enough."""
_WORTH = 0.95
"""A floor must make the squared errors this much smaller to be believed."""
_WORK = ("base", "token", "row", "decode_pair", "prompt_pair", "prompt_base", "prompt_start")
_FLOOR = ("floor", "floor_row")


def fit(samples: Sequence[StepSample]) -> StepCosts:
    """The costs that predict the medians of the samples with the least squares of relative errors.

    Which samples lie on the floor is not known, so it is tried from several starts: the steps with the fewest tokens,
    up to a cut, are first taken to be there; then both branches are fitted and the samples move to the larger one.
    Raises ValueError where there are fewer samples than coefficients.
    """
    if len(samples) < len(_WORK):
        raise ValueError(f"{len(_WORK)} coefficients cannot be fitted to {len(samples)} samples")
    cuts = sorted({sample.shape.tokens for sample in samples})
    flat = _fit_from(samples, 0)
    floored = min((_fit_from(samples, cut) for cut in cuts[:-1]), key=lambda costs: _loss(costs, samples), default=flat)
    return floored if _loss(floored, samples) < _WORTH * _loss(flat, samples) - 1e-9 else flat


def _loss(costs: StepCosts, samples: Sequence[StepSample]) -> float:
    return sum(error * error for error in errors(costs, samples))


def errors(costs: StepCosts, samples: Sequence[StepSample]) -> list[float]:
    """Relative error of the prediction for each sample's median."""
    return [abs(costs.seconds(sample.shape) / statistics.median(sample.seconds) - 1) for sample in samples]


def error_summary(costs: StepCosts, samples: Sequence[StepSample]) -> dict[str, float]:
    ordered = sorted(errors(costs, samples))
    return {"p50": ordered[len(ordered) // 2], "p95": ordered[int(0.95 * (len(ordered) - 1))]}


def deviations(samples: Sequence[StepSample], count: int = 41) -> list[float]:
    """Quantiles of single steps over the median of their identical repeats."""
    ratios = [seconds / statistics.median(sample.seconds) for sample in samples for seconds in sample.seconds]
    return quantiles(ratios, count)


def residuals(costs: StepCosts, samples: Sequence[StepSample], count: int = 41) -> list[float]:
    """Quantiles of the samples' medians over the fitted times."""
    return quantiles([statistics.median(sample.seconds) / costs.seconds(sample.shape) for sample in samples], count)


def _fit_from(samples: Sequence[StepSample], cut: int) -> StepCosts:
    on_floor = [sample.shape.tokens <= cut for sample in samples]
    costs = StepCosts()
    for _ in range(_ROUNDS):
        costs = _fit_branches(samples, on_floor)
        moved = [costs.seconds(sample.shape) <= _floor(costs, sample.shape) for sample in samples]
        if moved == on_floor:
            break
        on_floor = moved
    return costs


def _floor(costs: StepCosts, shape: StepShape) -> float:
    return costs.floor + costs.floor_row * shape.rows


def _fit_branches(samples: Sequence[StepSample], on_floor: Sequence[bool]) -> StepCosts:
    floor = [sample for sample, low in zip(samples, on_floor, strict=True) if low]
    work = [sample for sample, low in zip(samples, on_floor, strict=True) if not low]
    figures = dict(zip(_WORK, _least_squares(work, _work_features), strict=True)) if work else {}
    if floor:
        figures |= dict(zip(_FLOOR, _least_squares(floor, _floor_features), strict=True))
    return StepCosts(**figures)


def _work_features(shape: StepShape) -> list[float]:
    prompts = [1.0, shape.prompt_start] if shape.prompt_pairs else [0.0, 0.0]
    return [1.0, shape.tokens, shape.rows, shape.decode_pairs, shape.prompt_pairs, *prompts]


def _floor_features(shape: StepShape) -> list[float]:
    return [1.0, shape.rows]


def _least_squares(samples: Sequence[StepSample], features: Callable[[StepShape], list[float]]) -> list[float]:
    medians = np.array([statistics.median(sample.seconds) for sample in samples])
    matrix: Matrix = np.array([features(sample.shape) for sample in samples], np.float64) / medians[:, None]
    scale = np.maximum(np.abs(matrix).max(axis=0), 1e-300)
    return [float(value) for value in non_negative(matrix / scale, np.ones(len(samples))) / scale]


def non_negative(matrix: Matrix, wanted: Matrix) -> Matrix:
    """x >= 0 with the least |matrix x - wanted|^2, found by trying which columns are in use: there are a handful."""
    products, target = matrix.T @ matrix, matrix.T @ wanted
    best, least = np.zeros(matrix.shape[1]), 0.0
    for count in range(1, len(target) + 1):
        for columns in map(list, itertools.combinations(range(len(target)), count)):
            solution = np.linalg.lstsq(products[np.ix_(columns, columns)], target[columns])[0]
            error = float(solution @ products[np.ix_(columns, columns)] @ solution - 2 * solution @ target[columns])
            if (solution >= 0).all() and error < least:
                best, least = np.zeros(matrix.shape[1]), error
                best[columns] = solution
    return best
