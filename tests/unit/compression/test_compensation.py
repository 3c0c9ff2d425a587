"""Compensation: the differentiable layer against the engine's, and what tuning wins."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from compression.base_model import BaseModel
from compression.calibrated_layer import LayerWeights, build_calibrated
from compression.compensation.parameters import TunedMatrix
from compression.compensation.plain_layer import PlainLayer
from compression.compensation.tuning import relative_error, split_windows
from compression.layerwise import make_window
from compression.plan import layer_index, linear_layers
from compression.quantize.base import LayerInputs, Scheme
from compression.quantize.methods import make_quantizer
from compression.recipe import Method
from engines.kernels import Stream
from engines.manifest import read_manifest
from engines.models.rope import cos_sin_table
from tests.unit.models.checkpoints import CPU, DEEPSEEK_V2, DEEPSEEK_V3, LLAMA, QWEN2, QWEN3, write_checkpoint

TOKENS = 24


@pytest.mark.parametrize("config", [LLAMA, QWEN2, QWEN3, DEEPSEEK_V2, DEEPSEEK_V3], ids=lambda each: each["model_type"])
def test_the_plain_layer_computes_what_the_engine_does(tmp_path: Path, config: dict[str, Any]) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    write_checkpoint(folder, config)
    base = BaseModel(read_manifest(folder), CPU)
    cos_sin = cos_sin_table(base.config.rope, TOKENS, CPU)
    window = make_window(torch.zeros(TOKENS, dtype=torch.int64), base.config, CPU)
    hidden = torch.randn(TOKENS, base.config.hidden, generator=torch.Generator().manual_seed(1))
    layers = linear_layers(base.config)
    for index in range(base.config.layers):
        weights = LayerWeights(base.layer_tensors(index, [each for each in layers if layer_index(each.name) == index]))
        engine = build_calibrated(base.config, index, weights, cos_sin, CPU).layer
        stream = engine.attention(Stream(hidden.clone()), engine.attention_norm, window.batch, window.cache)
        exact = engine.feed_forward(stream, engine.feed_forward_norm, window.batch).hidden

        def product(name: str, x: torch.Tensor, weights: LayerWeights = weights) -> torch.Tensor:
            return x @ weights.tensors[f"{name}.weight"].t()

        plain = PlainLayer(base.config, index, cos_sin, product, weights.tensors.get)
        assert torch.allclose(plain(hidden.unsqueeze(0))[0], exact, rtol=1e-4, atol=1e-4)


SCHEMES: list[tuple[Scheme, Method]] = [
    (Scheme("integer", 4, group_size=8), "rtn"),
    (Scheme("integer", 4, group_size=8, symmetric=False), "gptq"),
    (Scheme("integer", 8, activations="int8"), "rtn"),
    (Scheme("float8", block=(16, 16)), "rtn"),
    (Scheme("codebook", 4, group_size=16), "kmeans"),
]


@pytest.mark.parametrize(("scheme", "method"), SCHEMES, ids=lambda each: getattr(each, "kind", each))
@pytest.mark.parametrize("codes", [False, True])
def test_parameters_begin_as_what_was_rounded_and_end_as_what_they_say(
    scheme: Scheme, method: Method, codes: bool
) -> None:
    generator = torch.Generator().manual_seed(3)
    weight, x = torch.randn(24, 32, generator=generator), torch.randn(100, 32, generator=generator)
    inputs = LayerInputs(32, hessian=True)
    inputs.observe(x)
    matrix = make_quantizer(method).quantize(weight, inputs, scheme)
    tuned = TunedMatrix(matrix, scheme.scale_dtype, weight if codes else None)
    assert torch.allclose(tuned.weight(), matrix.dequantize(), atol=1e-5)
    exact = x @ weight.t()
    parameters = [tuned.gain, *([tuned.latent] if tuned.latent is not None else [])]
    assert len(parameters) == 1 + (codes and scheme.kind == "integer")
    with torch.no_grad():
        tuned.gain.mul_(1.1)
    optimizer = torch.optim.Adam(parameters, lr=5e-3)
    rates = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=60)
    damaged = float((x @ tuned.weight().detach().t() - exact).square().mean())
    for _ in range(60):
        optimizer.zero_grad()
        (x @ tuned.weight().t() - exact).square().mean().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        rates.step()
    finished = tuned.finished()
    assert torch.allclose(finished.dequantize(), tuned.weight(), atol=1e-5)
    assert finished.scale is not None
    assert torch.equal(finished.scale, finished.scale.to(scheme.scale_dtype).float()), "what the file can hold"
    assert float((x @ finished.dequantize().t() - exact).square().mean()) < 0.6 * damaged


def test_every_eighth_window_is_held_out_where_there_are_enough() -> None:
    assert split_windows(4) == ([0, 1, 2, 3], [0, 1, 2, 3])
    tuned_on, held_out = split_windows(20)
    assert held_out == [7, 15]
    assert sorted(tuned_on + held_out) == list(range(20))


def test_tokens_with_a_large_stream_count_no_more_than_others() -> None:
    target = torch.tensor([[[1.0, 1.0], [100.0, 100.0]]])
    assert float(relative_error(target * 1.1, target)) == pytest.approx(0.01)
    assert float(relative_error(target + 1.0, target)) == pytest.approx((1 + 1e-4) / 2)
