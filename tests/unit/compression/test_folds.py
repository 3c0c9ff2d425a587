from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from compression.base_model import BaseModel
from compression.calibrated_layer import LayerWeights, build_calibrated
from compression.folds import apply_fold, attention_folds, feed_forward_folds
from compression.layerwise import make_window
from compression.plan import layer_index, linear_layers
from engines.kernels import Stream
from engines.manifest import read_manifest
from engines.models.rope import cos_sin_table
from tests.unit.models.checkpoints import FAMILIES, write_checkpoint

CPU = torch.device("cpu")


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("index", [0, 1])
def test_folding_scales_changes_no_output(tmp_path: Path, family: str, index: int) -> None:
    config: dict[str, Any] = FAMILIES[family]
    folder = tmp_path / "model"
    write_checkpoint(folder, config)
    base = BaseModel(read_manifest(folder), CPU)
    layers = [layer for layer in linear_layers(base.config) if layer_index(layer.name) == index]
    weights = LayerWeights(base.layer_tensors(index, layers))
    before = {name: tensor.clone() for name, tensor in weights.tensors.items()}
    table = cos_sin_table(base.config.rope, 12, CPU)
    window = make_window(torch.arange(12) % 61, base.config, CPU)
    hidden = torch.randn(12, 32, generator=torch.Generator().manual_seed(1))

    def output() -> torch.Tensor:
        layer = build_calibrated(base.config, index, weights, table, CPU).layer
        after = layer.attention(Stream(hidden), layer.attention_norm, window.batch, window.cache)
        return layer.feed_forward(after, layer.feed_forward_norm, window.batch).hidden

    expected = output()
    folds = attention_folds(base.config, index) + feed_forward_folds(base.config, index)
    assert {name for fold in folds for name in fold.readers} == {layer.name for layer in layers}
    for place, fold in enumerate(folds):
        width = weights.tensors[f"{fold.readers[0]}.weight"].shape[1]
        scale = torch.rand(width, generator=torch.Generator().manual_seed(place)) + 0.5
        if fold.rows is not None:
            scale = (torch.rand(int(fold.rows.max()) + 1) + 0.5)[fold.rows]
        apply_fold(fold, weights, scale)
    assert sum(not torch.equal(weights.tensors[name], tensor) for name, tensor in before.items()) > len(layers)
    torch.testing.assert_close(output(), expected, atol=2e-5, rtol=2e-4)
