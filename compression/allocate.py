"""Which of several formats each item of a model gets, so that all fit into a number of bytes."""

from __future__ import annotations

import numpy as np

from compression.errors import CompressionError

RELATIVE_GAP = 1e-4
"""Of the estimated loss: how far from the best choice a proven one may be."""
MOST_SECONDS = 120.0

Floats = np.ndarray[tuple[int, ...], np.dtype[np.float64]]
Integers = np.ndarray[tuple[int, ...], np.dtype[np.int64]]


def least_loss(losses: Floats, sizes: Integers, budget: int) -> Integers:
    """(items, formats) losses and bytes -> (items,) chosen formats: the least sum of losses within ``budget`` bytes.

    An integer programme: one variable for each item and format, one choice an item, one bound on the bytes. Raises
    CompressionError if even the smallest formats take more, and where scipy is missing.
    """
    _require_room(sizes, budget)
    try:
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import coo_array
    except ImportError as error:
        raise CompressionError("choosing formats needs scipy; run: pip install 'slimserve[compress]'") from error
    items, formats = losses.shape
    columns = np.arange(items * formats)
    one_each = coo_array((np.ones(items * formats), (columns // formats, columns)))
    # In units of the budget and of the whole loss, so that the solver's absolute tolerances mean something.
    room = LinearConstraint(sizes.reshape(1, -1) / budget, ub=1.0)
    scale = float(np.abs(losses).sum()) or 1.0
    result = milp(
        losses.ravel() / scale * items,
        integrality=np.ones(items * formats),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(one_each, lb=1, ub=1), room],
        options={"mip_rel_gap": RELATIVE_GAP, "time_limit": MOST_SECONDS},
    )
    if result.x is None:
        raise CompressionError(f"no choice of formats was found: {result.message}")
    chosen: Integers = result.x.reshape(items, formats).argmax(axis=1)
    return chosen


def most_frequent(counts: Integers, sizes: Integers, budget: int) -> Integers:
    """The usual rule: of two formats (columns of ``sizes``, the smaller one first), items get the larger one in the
    order of ``counts``, most first, as far as the bytes reach. Raises CompressionError as ``least_loss``."""
    _require_room(sizes, budget)
    chosen = np.zeros(len(counts), np.int64)
    left = budget - int(sizes[:, 0].sum())
    for item in np.argsort(-counts, kind="stable"):
        more = int(sizes[item, 1] - sizes[item, 0])
        if more <= left:
            chosen[item] = 1
            left -= more
    return chosen


def _require_room(sizes: Integers, budget: int) -> None:
    least = int(sizes.min(axis=1).sum())
    if least > budget:
        raise CompressionError(f"the smallest formats take {least} bytes, more than the {budget} that are allowed")
