"""Scales of input channels are those with which rounding costs the outputs least."""

from __future__ import annotations

from typing import Literal

import pytest
import torch

from compression.calibrated_layer import LayerWeights
from compression.folds import Fold
from compression.plan import LayerPlan
from compression.quantize.base import LayerInputs, Scheme
from compression.scaling import find_scale, output_error
from tests.unit.compression.test_quantizers import weight

WIDTH, LOUD = 64, 5
SCHEMES = {
    "awq": Scheme("integer", bits=4, group_size=32, symmetric=False),
    "smoothquant": Scheme("integer", bits=8, activations="int8"),
}
Rule = Literal["awq", "smoothquant"]


def inputs(tokens: int = 256) -> torch.Tensor:
    """(tokens, WIDTH), one channel much larger than the others."""
    x = torch.randn(tokens, WIDTH, generator=torch.Generator().manual_seed(3))
    x[:, LOUD] *= 30
    return x


def found(w: torch.Tensor, x: torch.Tensor, rule: Rule, rows: torch.Tensor | None = None) -> torch.Tensor | None:
    weights = LayerWeights({"reader.weight": w})
    weights.observers["reader"] = LayerInputs(WIDTH, samples=256)
    weights.observers["reader"].observe(x)
    fold = Fold(
        ("reader",), rows_of=None if rows is None else "producer", rows=rows, norm="norm" if rows is None else None
    )
    return find_scale(fold, weights, {"reader": LayerPlan(SCHEMES[rule], "rtn")}, rule)


@pytest.mark.parametrize("rule", ["awq", "smoothquant"])
def test_an_input_much_larger_than_the_others_costs_less(rule: Rule) -> None:
    w, x = weight(48, WIDTH), inputs()
    scale = found(w, x, rule)
    assert scale is not None
    assert int(scale.argmax()) == LOUD
    without = output_error(w, x, torch.ones(WIDTH), SCHEMES[rule])
    assert output_error(w, x, scale, SCHEMES[rule]) < 0.6 * without


def test_weights_that_are_large_already_are_not_made_larger() -> None:
    w, x = weight(48, WIDTH), inputs()
    plain = found(w, x, "awq")
    w[:, 7] *= 4
    heavy = found(w, x, "awq")
    assert plain is not None
    assert heavy is not None
    assert heavy[7] / heavy[8] < 0.9 * plain[7] / plain[8]


def test_without_inputs_there_is_no_scale() -> None:
    assert found(weight(48, WIDTH), inputs(0), "awq") is None


def test_channels_of_one_row_have_one_scale() -> None:
    rows = torch.arange(WIDTH // 2).repeat_interleave(2)
    scale = found(weight(48, WIDTH), inputs(), "awq", rows)
    assert scale is not None
    torch.testing.assert_close(scale[0::2], scale[1::2])
