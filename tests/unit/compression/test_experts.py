"""Expert activity and the formats that follow from it, on a random DeepSeek-V2 with two layers of experts."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file

from compression import experts as module
from compression.activity import ExpertActivity
from compression.base_model import BaseModel
from compression.compress import Job, compress
from compression.errors import CompressionError
from compression.experts import ExpertFormats, ExpertPlans, decide, watch_experts
from compression.measures.models import LoadedModel
from compression.measures.routing import RouterWatch, chosen_experts, overlap
from compression.plan import linear_layers
from compression.quantize.rounding import RoundToNearest
from compression.recipe import ExpertBudget, Recipe
from engines.generation.whole_prompts import WholePrompts
from engines.manifest import read_manifest
from engines.models.rope import cos_sin_table
from tests.unit.api.harness import write_model
from tests.unit.compression.recipes import recipe
from tests.unit.models.checkpoints import DEEPSEEK_V2, LLAMA, load, write_checkpoint

pytest.importorskip("scipy", reason="scipy is part of the extra compress")

CPU = torch.device("cpu")
WINDOWS, TOKENS = 4, 24
TEXT = "The quick brown fox jumps over the lazy dog while seven wizards brew a potion.\n" * 60
PATTERN = ["*.mlp.experts.*"]
LAYERS = (1, 2)


def mixed(budget: float = 0.5, rule: str = "loss", **hot: Any) -> Recipe:
    cold = {"match": PATTERN, "bits": 3}
    return recipe(
        {"match": ["*.self_attn.*"], "bits": 8},
        experts={"hot": {"match": PATTERN, "bits": 8, **hot}, "cold": cold, "budget": budget, "rule": rule},
        calibration={"windows": WINDOWS, "tokens": TOKENS},
    )


def budget_of(wanted: Recipe) -> ExpertBudget:
    assert wanted.experts is not None
    return wanted.experts


@dataclass
class Case:
    folder: Path
    base: BaseModel
    tokens: torch.Tensor
    plans: ExpertPlans
    activities: list[ExpertActivity]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("experts") / "base"
    write_model(folder)
    vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]
    config = {**DEEPSEEK_V2, "vocab_size": vocabulary, "max_position_embeddings": 256, "num_hidden_layers": 3}
    write_checkpoint(folder, config)
    return folder


@pytest.fixture(scope="module")
def case(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Case:
    base = BaseModel(read_manifest(folder), CPU)
    tokens = torch.randint(0, base.config.vocab, (WINDOWS, TOKENS), generator=torch.Generator().manual_seed(1))
    layers = linear_layers(base.config)
    plans = ExpertPlans(budget_of(mixed()), layers, torch.bfloat16)
    scratch = tmp_path_factory.mktemp("streams")
    with torch.no_grad():
        found = watch_experts(base, layers, plans, cos_sin_table(base.config.rope, TOKENS, CPU), tokens, scratch)
    assert not list(scratch.iterdir())
    return Case(folder, base, tokens, plans, found)


def logprobs(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    model = load(read_manifest(folder))
    return model.logits(WholePrompts(model, CPU, torch.float32).hidden(tokens.tolist())).log_softmax(-1)


def test_every_token_chooses_as_many_experts_as_the_config_says(case: Case) -> None:
    for layer in LAYERS:
        own = [each for each in case.activities if each.name.startswith(f"model.layers.{layer}.")]
        assert sum(each.tokens for each in own) == case.tokens.numel() * DEEPSEEK_V2["num_experts_per_tok"]
        assert [each.name.rpartition(".")[2] for each in own] == [str(number) for number in range(8)]
        assert all(0 < each.gate_weight < 1 and each.contribution > 0 for each in own if each.tokens)


@pytest.mark.parametrize("layer", LAYERS)
def test_losses_of_a_layer_add_up_to_what_its_rounding_really_costs(case: Case, layer: int, tmp_path: Path) -> None:
    """The engine runs a checkpoint in which the layer's experts are rounded."""
    tensors = load_file(case.folder / "model.safetensors")
    for name, plan in case.plans.cold.items():
        if name.startswith(f"model.layers.{layer}."):
            weight = tensors[f"{name}.weight"]
            tensors[f"{name}.weight"] = RoundToNearest().quantize(weight, None, plan.scheme).dequantize()
    rounded = tmp_path / "rounded"
    rounded.mkdir()
    (rounded / "config.json").write_bytes((case.folder / "config.json").read_bytes())
    save_file(tensors, rounded / "model.safetensors")
    exact = logprobs(case.folder, case.tokens)
    real = float((exact.exp() * (exact - logprobs(rounded, case.tokens))).sum(-1).mean())
    estimated = sum(each.losses[0] for each in case.activities if each.name.startswith(f"model.layers.{layer}."))
    assert real > 0
    assert estimated == pytest.approx(real, rel=1e-3)


def test_eight_bits_cost_far_less_than_three(case: Case) -> None:
    cold, hot = (sum(each.losses[place] for each in case.activities) for place in (0, 1))
    assert hot < cold / 100


@pytest.mark.parametrize("rule", ["loss", "frequency"])
def test_more_bytes_make_more_experts_hot(case: Case, rule: str) -> None:
    before: ExpertFormats | None = None
    for budget in (0.0, 0.3, 0.6, 1.0):
        found = decide(case.activities, case.plans, budget_of(mixed(budget, rule)))
        allowed = found.least_bytes + budget * (found.most_bytes - found.least_bytes)
        assert found.least_bytes <= found.bytes <= allowed
        assert before is None or (len(before.hot) < len(found.hot) and before.loss > found.loss)
        before = found
    assert before is not None
    assert len(before.hot) == len(case.activities)


def test_the_programme_estimates_less_loss_than_the_frequency_rule(case: Case) -> None:
    ours, usual = (decide(case.activities, case.plans, budget_of(mixed(0.5, rule))) for rule in ("loss", "frequency"))
    assert ours.loss < usual.loss
    assert ours.bytes <= usual.bytes * 1.01


def test_patterns_that_miss_experts_are_refused(case: Case) -> None:
    layers = linear_layers(case.base.config)
    budget = budget_of(mixed(match=["*.mlp.experts.0.*"]))
    with pytest.raises(CompressionError, match="must match all routed experts"):
        ExpertPlans(budget, layers, torch.bfloat16)


def job(folder: Path, out: Path, wanted: Recipe) -> Job:
    text = out.parent / "text.txt"
    text.write_text(TEXT)
    return Job(model=folder, name="base", recipe=wanted, out=out, calibration=text)


def test_a_mixed_model_is_written_and_the_engine_computes_it(folder: Path, tmp_path: Path) -> None:
    notes = compress(job(folder, tmp_path / "mixed", mixed()), lambda progress: None, lambda: 0.0)
    assert any("16 routed experts have the larger format, chosen by loss" in note for note in notes)
    assert any("which only slimserve loads" in note for note in notes)
    config = json.loads((tmp_path / "mixed" / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "slimserve"
    kept = msgspec.json.decode((tmp_path / "mixed" / module.DECISION).read_bytes(), type=ExpertFormats)
    assert 0 < len(kept.hot) < len(kept.activities) == 16
    compress(job(folder, tmp_path / "cold", mixed(0.0)), lambda progress: None, lambda: 0.0)
    tokens = torch.arange(60).view(2, 30)
    exact = logprobs(folder, tokens)
    errors = [float((logprobs(tmp_path / name, tokens) - exact).square().mean()) for name in ("mixed", "cold")]
    assert 0 < errors[0] < errors[1]


@pytest.mark.parametrize("budget", [0.0, 1.0])
def test_one_format_for_all_experts_is_for_other_servers_too(folder: Path, tmp_path: Path, budget: float) -> None:
    notes = compress(job(folder, tmp_path / "out", mixed(budget)), lambda progress: None, lambda: 0.0)
    assert not any("only slimserve" in note for note in notes)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "compressed-tensors"


def test_what_was_decided_is_not_decided_again(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = tmp_path / "out.partial"
    killed = RuntimeError("killed")

    def die(*given: object) -> None:
        raise killed

    monkeypatch.setattr("compression.compress._Run._one_layer", die)
    with pytest.raises(RuntimeError, match="killed"):
        compress(job(folder, tmp_path / "out", mixed()), lambda progress: None, lambda: 0.0)
    decided = msgspec.json.decode((work / module.DECISION).read_bytes(), type=ExpertFormats)
    assert 0 < len(decided.hot) < 16
    monkeypatch.undo()
    monkeypatch.setattr(module, "watch_experts", die)
    compress(job(folder, tmp_path / "out", mixed()), lambda progress: None, lambda: 0.0)
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_a_budget_for_experts_needs_experts(tmp_path: Path) -> None:
    folder = tmp_path / "dense"
    write_model(folder)
    vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]
    write_checkpoint(folder, {**LLAMA, "vocab_size": vocabulary})
    with pytest.raises(CompressionError, match="no routed experts"):
        compress(job(folder, tmp_path / "out", mixed()), lambda progress: None, lambda: 0.0)


def test_routers_agree_with_themselves_and_less_with_others(case: Case, tmp_path: Path) -> None:
    sequences = case.tokens.tolist()
    model = LoadedModel(load(read_manifest(case.folder)), CPU, torch.float32)
    base = chosen_experts(model, sequences)
    assert base[0].shape == (len(LAYERS), TOKENS, DEEPSEEK_V2["num_experts_per_tok"])
    tensors = load_file(case.folder / "model.safetensors")
    generator = torch.Generator().manual_seed(4)
    for name, tensor in tensors.items():
        if "experts" in name:
            tensors[name] = tensor + 0.3 * tensor.std() * torch.randn(tensor.shape, generator=generator)
    noisy = tmp_path / "noisy"
    noisy.mkdir()
    (noisy / "config.json").write_bytes((case.folder / "config.json").read_bytes())
    save_file(tensors, noisy / "model.safetensors")
    own = chosen_experts(LoadedModel(load(read_manifest(noisy)), CPU, torch.float32), sequences)
    assert overlap(base, base).value == 1.0
    agreement = overlap(own, base)
    assert 0.3 < agreement.low <= agreement.value < 1.0
    # The first layer of experts sees no noise.
    assert (own[0][0] == base[0][0]).all()


def test_the_order_of_the_chosen_does_not_count() -> None:
    import numpy as np

    one, other = (np.array([[[1, 4], [2, 3]]], np.int16), np.array([[[4, 1], [3, 0]]], np.int16))
    assert overlap([one], [other]).value == 0.75


def test_dense_models_have_no_routers(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, LLAMA)
    watch = RouterWatch()
    for _ in range(2):
        watch.watch(LoadedModel(load(read_manifest(tmp_path)), CPU, torch.float32), torch.zeros(1, 8).long().numpy())
    assert watch.figures() == {}
