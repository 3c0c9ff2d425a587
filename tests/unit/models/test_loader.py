"""Strict loading: every parameter filled, every tensor used, each rank its part."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from engines.kernels import Stream
from engines.manifest import read_manifest
from engines.models.config import parse_config
from engines.models.loader import build_model, load_model
from engines.models.safetensors_reader import SafetensorsReader
from engines.models.weights import FileSource, Placement
from engines.protocol import EngineLoadError, EngineSpec, LoadProgress
from engines.quant.base import Split
from engines.quant.methods import methods_of
from tests.paged_rows import PagedRows
from tests.unit.models.checkpoints import (
    CPU,
    DEEPSEEK_V2,
    DEEPSEEK_V3,
    FAMILIES,
    LLAMA,
    QWEN2,
    RecordingSource,
    load,
    write_checkpoint,
    write_config,
)

PROMPT = [3, 17, 59, 4, 4, 20]


@pytest.mark.parametrize("family", FAMILIES)
def test_shards_load_as_one_file_does(family: str, tmp_path: Path) -> None:
    results = []
    for shards in (1, 3):
        folder = tmp_path / str(shards)
        write_checkpoint(folder, FAMILIES[family], shards)
        model = load(read_manifest(folder))
        results.append(PagedRows(model, 1, 8).step({0: PROMPT})[0])
    assert torch.equal(results[0], results[1])


@pytest.mark.parametrize("family", FAMILIES)
def test_each_missing_tensor_is_named(family: str, tmp_path: Path) -> None:
    tensors = write_checkpoint(tmp_path, FAMILIES[family])
    for name in list(tensors)[:: max(1, len(tensors) // 12)]:
        rest = {other: tensor for other, tensor in tensors.items() if other != name}
        save_file(rest, tmp_path / "model.safetensors")
        with pytest.raises(EngineLoadError, match=rf"tensor {name} is missing"):
            load(read_manifest(tmp_path))


def test_unused_tensors_are_named(tmp_path: Path) -> None:
    tensors = write_checkpoint(tmp_path, LLAMA)
    extra = {f"model.layers.{layer}.mlp.extra.weight": torch.zeros(2) for layer in range(5)}
    save_file({**tensors, **extra}, tmp_path / "model.safetensors")
    with pytest.raises(EngineLoadError, match=r"model\.layers\.0\.mlp\.extra\.weight.* and 2 more"):
        load(read_manifest(tmp_path))


def test_wrong_shape_is_named(tmp_path: Path) -> None:
    tensors = write_checkpoint(tmp_path, LLAMA)
    save_file({**tensors, "model.norm.weight": torch.zeros(31)}, tmp_path / "model.safetensors")
    with pytest.raises(EngineLoadError, match=r"model\.norm\.weight has shape \(31,\) .* asks for \(32,\)"):
        load(read_manifest(tmp_path))


def test_known_unused_tensors_pass(tmp_path: Path) -> None:
    tensors = write_checkpoint(tmp_path, DEEPSEEK_V3)
    known = {
        "model.layers.1.self_attn.rotary_emb.inv_freq": torch.zeros(4),
        "model.layers.2.eh_proj.weight": torch.zeros(4, 8),
    }
    save_file({**tensors, **known}, tmp_path / "model.safetensors")
    load(read_manifest(tmp_path))
    save_file({**tensors, "model.layers.3.eh_proj.weight": torch.zeros(4, 8)}, tmp_path / "model.safetensors")
    with pytest.raises(EngineLoadError, match=r"model\.layers\.3\.eh_proj\.weight"):
        load(read_manifest(tmp_path))


def test_tied_head_may_be_stored_twice_but_not_differ(tmp_path: Path) -> None:
    tensors = write_checkpoint(tmp_path, QWEN2)
    head = tensors["model.embed_tokens.weight"].clone()
    save_file({**tensors, "lm_head.weight": head}, tmp_path / "model.safetensors")
    load(read_manifest(tmp_path))
    head[0, 0] += 1
    save_file({**tensors, "lm_head.weight": head}, tmp_path / "model.safetensors")
    with pytest.raises(EngineLoadError, match=r"lm_head\.weight differs"):
        load(read_manifest(tmp_path))


class _WholeSource(FileSource):
    """Notes what a rank takes."""

    def __init__(self, files: tuple[Path, ...], rank: int, world: int) -> None:
        placement = Placement(device=CPU, dtype=torch.float32, rank=rank, world=world)
        super().__init__(placement, SafetensorsReader(files), lambda progress: None, total=1)
        self.taken: dict[str, torch.Tensor] = {}
        self.splits: dict[str, Split] = {}

    def take(
        self,
        name: str,
        shape: tuple[int, ...],
        split: Split,
        dtype: torch.dtype | None = None,
        invented: torch.Tensor | None = None,
    ) -> torch.Tensor:
        self.taken[name] = super().take(name, shape, split, dtype, invented)
        self.splits[name] = split
        return self.taken[name]


@pytest.mark.parametrize("family", FAMILIES)
def test_two_ranks_hold_the_whole(family: str, tmp_path: Path) -> None:
    """Concatenated along the split axis, or taken from the one rank that has it, the parts are the checkpoint."""
    config = FAMILIES[family]
    tensors = write_checkpoint(tmp_path, config)
    manifest = read_manifest(tmp_path)
    ranks, splits = [], {}
    for rank in range(2):
        source = _WholeSource(manifest.files, rank, world=2)
        build_model(parse_config(manifest), source, positions=1)
        source.finish(lambda name: False)
        ranks.append(source.taken)
        splits.update(source.splits)
    assert any(split == "in" for split in splits.values())
    for name, whole in tensors.items():
        parts = [taken[name] for taken in ranks if name in taken]
        if splits[name] == "none":
            assert all(torch.equal(part, whole) for part in parts), name
            assert len(parts) == (1 if ".experts." in name else 2), name
        else:
            assert torch.equal(torch.cat(parts, dim=0 if splits[name] == "out" else whole.dim() - 1), whole), name


@pytest.mark.parametrize("config", [{**LLAMA, "attention_bias": True, "mlp_bias": True}, DEEPSEEK_V3])
def test_ranks_add_up(config: dict[str, Any], tmp_path: Path) -> None:
    """What two ranks add to the residual stream sums to what one adds that has everything."""
    write_checkpoint(tmp_path, config)
    manifest = read_manifest(tmp_path)
    models = [load(manifest), load(manifest, rank=0, world=2), load(manifest, rank=1, world=2)]
    x = torch.randn(len(PROMPT), LLAMA["hidden_size"], generator=torch.Generator().manual_seed(0))
    attended, mixed = [], []
    for model in models:
        rows = PagedRows(model, 1, 8)
        batch = rows.batch({0: PROMPT})
        layer = model.layers[0]
        stream = Stream(x)
        attended.append(layer.attention(stream, layer.attention_norm, batch, rows.caches[0]).hidden - x)
        mixed.append(layer.feed_forward(stream, layer.feed_forward_norm, batch).hidden - x)
    for whole, first, second in (attended, mixed):
        torch.testing.assert_close(first + second, whole, rtol=1e-4, atol=1e-5)


def test_uneven_share_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, LLAMA)
    with pytest.raises(EngineLoadError, match="4 attention heads cannot be shared by 3 devices"):
        load(read_manifest(tmp_path), world=3)


def test_progress_ends_at_the_total(tmp_path: Path) -> None:
    tensors = write_checkpoint(tmp_path, LLAMA)
    seen: list[LoadProgress] = []
    model = load_model(read_manifest(tmp_path), EngineSpec(name="tiny"), CPU, torch.float32, seen.append)
    assert [report.done for report in seen] == sorted(report.done for report in seen)
    weights = sum(tensor.nbytes for tensor in tensors.values())
    assert seen[-1].done == seen[-1].total == weights
    assert model.weight_bytes == weights + model.max_context * 8 * 4  # cosines and sines of heads of width 8


def test_larger_than_memory_is_refused_with_both_numbers(tmp_path: Path) -> None:
    manifest = read_manifest(write_config(tmp_path, {**LLAMA, "num_hidden_layers": 256, "hidden_size": 1 << 15}), True)
    with pytest.raises(EngineLoadError, match=r"need \d+\.\d\d GB as float32.* only \d+\.\d\d GB"):
        load(manifest, random_weights=1, memory_limit=1 << 30)
    write_checkpoint(tmp_path, LLAMA)
    with pytest.raises(EngineLoadError, match=r"only 0\.00 GB the memory limit allows"):
        load(read_manifest(tmp_path), memory_limit=1000)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_random_weights_stay_finite_and_follow_the_seed(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    manifest = read_manifest(write_config(tmp_path, {**FAMILIES[family], "num_hidden_layers": 6}), random_weights=True)

    def logits(seed: int) -> torch.Tensor:
        spec = EngineSpec(name="random", random_weights=seed)
        model = load_model(manifest, spec, CPU, dtype, lambda progress: None)
        return PagedRows(model, 1, 8).step({0: PROMPT})[0]

    first = logits(1)
    assert first.dtype is torch.float32
    assert first.isfinite().all()
    assert 0.01 < first.std() < 10
    assert torch.equal(first, logits(1))
    assert not torch.equal(first, logits(2))


def test_uniform_routing_is_for_random_weights_only(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, DEEPSEEK_V2)
    manifest = read_manifest(tmp_path)
    with pytest.raises(EngineLoadError, match="random weights only"):
        load(manifest, uniform_routing=True)
    routed, drawn = (load(manifest, random_weights=1, uniform_routing=uniform) for uniform in (False, True))
    results = [PagedRows(model, 1, 8).step({0: PROMPT})[0] for model in (routed, drawn, drawn)]
    assert torch.equal(results[1], results[2])
    assert not torch.equal(results[0], results[1])


def test_16_bit_weights_are_close_to_float32(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, LLAMA)
    manifest = read_manifest(tmp_path)
    exact = PagedRows(load(manifest), 1, 8).step({0: PROMPT})[0]
    model = load_model(manifest, EngineSpec(name="tiny"), CPU, torch.bfloat16, lambda progress: None)
    table = model.max_context * 8 * 4
    assert (model.weight_bytes - table) * 2 == load(manifest).weight_bytes - table
    rounded = PagedRows(model, 1, 8).step({0: PROMPT})[0]
    assert (rounded - exact).abs().max() < 0.05 * exact.abs().max()


@pytest.mark.parametrize("family", FAMILIES)
def test_quantized_weights_of_every_family(family: str, tmp_path: Path) -> None:
    """Attention in 8 bits, experts by number in 4 and 8: the file that random weights make loads to the same model."""
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 4}
    channel = {"num_bits": 8, "type": "int", "strategy": "channel"}
    quantization = {
        "quant_method": "slimserve",
        "config_groups": {
            "cold": {"targets": ["Linear"], "weights": weights, "format": "pack-quantized"},
            "hot": {"targets": [r"re:.*mlp\.experts\.[0-3]\."], "weights": channel, "format": "int-quantized"},
            "attention": {"targets": ["re:.*self_attn"], "weights": {"num_bits": 4}, "format": "codebook"},
        },
        "ignore": ["lm_head"],
    }
    config = {**FAMILIES[family], "quantization_config": quantization}
    manifest = read_manifest(write_config(tmp_path, config), random_weights=True)
    source = RecordingSource()
    build_model(parse_config(manifest), source, positions=1, methods=methods_of(manifest.quantization))
    save_file(source.tensors, tmp_path / "model.safetensors")
    model = load(read_manifest(tmp_path))
    assert PagedRows(model, 1, 8).step({0: [3, 17, 39]})[0].isfinite().all()
    assert any(name.endswith("weight_codebook") for name in source.tensors)
    if "n_routed_experts" in config:
        assert source.tensors["model.layers.1.mlp.experts.3.up_proj.weight"].dtype is torch.int8
        assert source.tensors["model.layers.1.mlp.experts.4.up_proj.weight_packed"].dtype is torch.int32
