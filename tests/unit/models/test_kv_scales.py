"""Scales of an fp8 KV cache that a checkpoint brings along."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from engines.manifest import read_manifest
from engines.models.kv_scales import round_up
from engines.protocol import EngineLoadError
from tests.unit.models.checkpoints import DEEPSEEK_V2, LLAMA, load, write_checkpoint

LAYERS, KV_HEADS = LLAMA["num_hidden_layers"], LLAMA["num_key_value_heads"]
PER_HEAD = torch.arange(1, KV_HEADS + 1).float() * 0.011


def with_scales(folder: Path, config: dict[str, Any], scales: dict[str, torch.Tensor]) -> None:
    """A checkpoint with these tensors beside its own; ``{}`` in a name stands for each layer."""
    tensors = write_checkpoint(folder, config)
    for name, value in scales.items():
        for layer in range(LAYERS):
            tensors[f"model.layers.{layer}.{name}"] = value.clone()
    save_file(tensors, folder / "model.safetensors")


def test_scales_are_the_next_powers_of_two() -> None:
    assert round_up(torch.tensor([0.25, 0.26, 1.0, 1e-9, 1e9])).tolist() == [0.25, 0.5, 1.0, 2.0**-14, 2.0**15]


@pytest.mark.parametrize(
    ("names", "key", "value"),
    [
        ("self_attn.{}_scale", torch.tensor(0.03), torch.tensor([0.5])),
        ("self_attn.{0}_proj.{0}_scale", torch.tensor([0.03]), torch.tensor(0.5)),
        ("self_attn.{}_scale", PER_HEAD, PER_HEAD.view(KV_HEADS, 1, 1)),
    ],
)
def test_one_scale_for_all_heads_or_one_for_each(
    names: str, key: torch.Tensor, value: torch.Tensor, tmp_path: Path
) -> None:
    with_scales(tmp_path, LLAMA, {names.format("k"): key, names.format("v"): value})
    scales = load(read_manifest(tmp_path)).kv_scales
    expected = torch.stack([round_up(part.flatten()).expand(KV_HEADS) for part in (key, value)])
    assert len(scales) == LAYERS
    assert all(torch.equal(layer, expected) for layer in scales)


def test_each_rank_takes_its_heads(tmp_path: Path) -> None:
    with_scales(tmp_path, LLAMA, {"self_attn.k_scale": PER_HEAD, "self_attn.v_scale": PER_HEAD * 64})
    manifest = read_manifest(tmp_path)
    ranks = [load(manifest, rank=rank, world=2).kv_scales[0] for rank in range(2)]
    assert torch.equal(torch.cat(ranks, 1), load(manifest).kv_scales[0])


def test_a_latent_has_one_scale_of_its_keys(tmp_path: Path) -> None:
    with_scales(tmp_path, DEEPSEEK_V2, {"self_attn.k_scale": torch.tensor(0.2), "self_attn.v_scale": torch.tensor(9.0)})
    (first, *_) = load(read_manifest(tmp_path)).kv_scales
    assert first.tolist() == [0.25] * (DEEPSEEK_V2["kv_lora_rank"] + DEEPSEEK_V2["qk_rope_head_dim"])


def test_a_checkpoint_without_scales_has_none(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, LLAMA)
    assert load(read_manifest(tmp_path)).kv_scales == ()


@pytest.mark.parametrize(
    ("scales", "message"),
    [
        ({"self_attn.k_scale": torch.tensor(0.1)}, "not for each layer"),
        ({"self_attn.k_scale": torch.tensor(0.1), "self_attn.v_scale": torch.ones(7)}, r"v_scale of shape \(7,\)"),
        ({"self_attn.k_scale": torch.tensor(0.0), "self_attn.v_scale": torch.tensor(1.0)}, "k_scale holds numbers"),
        ({"self_attn.k_scale": torch.tensor(1.0), "self_attn.v_scale": torch.tensor(torch.nan)}, "v_scale holds num"),
    ],
)
def test_what_cannot_be_a_scale_is_named(scales: dict[str, torch.Tensor], message: str, tmp_path: Path) -> None:
    with_scales(tmp_path, LLAMA, scales)
    with pytest.raises(EngineLoadError, match=message):
        load(read_manifest(tmp_path))
