from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from compression import compress as module
from compression.compress import Job, compress
from compression.errors import CompressionError
from compression.export import save_tensors
from compression.progress import Progress
from compression.recipe import Recipe
from engines.engine_folder import read_engine_record
from engines.manifest import read_manifest
from tests.unit.api.harness import write_model
from tests.unit.compression.recipes import recipe
from tests.unit.models.checkpoints import DEEPSEEK_V2, load, write_checkpoint

TEXT = "The quick brown fox jumps over the lazy dog while seven wizards brew a potion.\n" * 60
INT8 = recipe({"bits": 8})
GPTQ = recipe(
    {"bits": 4, "group_size": 16, "method": "gptq"}, scaling={"rule": "awq"}, calibration={"windows": 4, "tokens": 32}
)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    write_model(folder)
    config = json.loads((folder / "config.json").read_text())
    write_checkpoint(folder, {**config, "num_hidden_layers": 2, "tie_word_embeddings": False})
    return folder


@pytest.fixture
def experts(base: Path) -> Path:
    """A model with eight routed experts."""
    vocabulary = json.loads((base / "config.json").read_text())["vocab_size"]
    config = {**DEEPSEEK_V2, "vocab_size": vocabulary, "max_position_embeddings": 256}
    write_checkpoint_of(base, config)
    return base


def write_checkpoint_of(folder: Path, config: dict[str, Any]) -> None:
    (folder / "model.safetensors").unlink()
    write_checkpoint(folder, config)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def ticks() -> Iterator[float]:
    now = 0.0
    while True:
        now += 1.0
        yield now


def run(job: Job, steps: list[Progress] | None = None) -> list[str]:
    times = ticks()
    return compress(job, (steps if steps is not None else []).append, lambda: next(times))


def job(base: Path, wanted: Recipe, text: Path | None = None, name: str = "out") -> Job:
    return Job(model=base, name="base", recipe=wanted, out=base.parent / name, calibration=text)


def logits(folder: Path) -> torch.Tensor:
    """Of the beginning of the text, whose tokens are its bytes, as the engine computes them."""
    from compression.layerwise import make_window
    from engines.models.config import parse_config

    manifest = read_manifest(folder)
    model, config = load(manifest), parse_config(manifest)
    window = make_window(torch.tensor(list(TEXT[:48].encode())), config, torch.device("cpu"))
    return model.logits(model.forward(window.batch, [window.cache] * config.layers))


def difference(folder: Path, base: Path) -> float:
    ours, exact = logits(folder), logits(base)
    return float((ours - exact).norm() / exact.norm())


def test_eight_bits_give_nearly_the_same_logits_and_a_record(base: Path) -> None:
    steps: list[Progress] = []
    assert run(job(base, INT8), steps) == []
    out = base.parent / "out"
    assert difference(out, base) < 0.05
    record = read_engine_record(out)
    assert record is not None
    assert record.base == "base"
    assert record.coverage.classes["attention"].quantized_parameters > 0
    assert steps[-1].done <= steps[-1].total
    assert steps[-1].seconds_left is not None
    assert not (base.parent / "out.partial").exists()
    assert (out / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()


def test_gptq_with_scaling_is_nearer_than_rounding(base: Path, text: Path) -> None:
    run(job(base, GPTQ, text))
    run(job(base, recipe({"bits": 4, "group_size": 16}), name="rounded"))
    assert difference(base.parent / "out", base) < difference(base.parent / "rounded", base)


def test_a_codebook_is_nearer_than_an_even_grid_and_nearer_yet_with_inputs(base: Path, text: Path) -> None:
    rule = {"kind": "codebook", "bits": 4, "group_size": 16, "method": "kmeans"}
    run(job(base, recipe(rule, calibration={"windows": 4, "tokens": 32}), text, "calibrated"))
    run(job(base, recipe(rule), name="plain"))
    run(job(base, recipe({"bits": 4, "group_size": 16}), name="rounded"))
    calibrated, plain, rounded = (difference(base.parent / name, base) for name in ("calibrated", "plain", "rounded"))
    assert calibrated < plain < rounded


SCALES = {"method": "scales", "steps": 40}
ROUNDING = {"method": "rounding", "steps": 40, "bias": "existing"}


def compensated(compensation: dict[str, Any], **fields: Any) -> Recipe:
    """GPTQ at 3 bits, without and with what comes after it."""
    rule = {"bits": 3, "group_size": 16, "symmetric": False, "method": "gptq"}
    return recipe(rule, calibration={"windows": 8, "tokens": 32}, compensation=compensation, **fields)


@pytest.mark.parametrize("compensation", [SCALES, ROUNDING, {**SCALES, "bias": "new"}], ids=str)
def test_compensation_brings_the_logits_nearer(base: Path, text: Path, compensation: dict[str, Any]) -> None:
    rule = {"bits": 3, "group_size": 16, "symmetric": False, "method": "gptq"}
    run(job(base, recipe(rule, calibration={"windows": 8, "tokens": 32}), text, "plain"))
    steps: list[Progress] = []
    notes = run(job(base, compensated(compensation), text), steps)
    assert difference(base.parent / "out", base) < difference(base.parent / "plain", base)
    errors = [note for note in notes if "relative error of its output" in note]
    assert len(errors) == 2
    assert errors[0].startswith("layer 0: ")
    assert ("with its bias" in errors[0]) == (compensation.get("bias") == "new")
    assert [step.done for step in steps if step.what.startswith("layer ")][-1] == pytest.approx(2 / 3 * steps[-1].total)
    config = json.loads((base.parent / "out" / "config.json").read_text())
    assert config.get("mlp_bias", False) == (compensation.get("bias") == "new")


def test_experts_are_compensated_too(experts: Path, text: Path) -> None:
    notes = run(job(experts, compensated(ROUNDING), text))
    assert any("layer 1: relative error" in note for note in notes)
    assert difference(experts.parent / "out", experts) < 0.5


DISTILLATION = {"steps": 16, "windows_per_step": 2, "learning_rate": 0.002}


def distilled(distillation: dict[str, Any]) -> Recipe:
    rule = {"bits": 3, "group_size": 16, "symmetric": False, "method": "gptq"}
    return recipe(rule, calibration={"windows": 9, "tokens": 32}, distillation=distillation)


@pytest.mark.parametrize("model", ["base", "experts"])
def test_distillation_brings_the_logits_nearer(
    model: str, request: pytest.FixtureRequest, base: Path, text: Path
) -> None:
    request.getfixturevalue(model)
    rule = {"bits": 3, "group_size": 16, "symmetric": False, "method": "gptq"}
    run(job(base, recipe(rule, calibration={"windows": 9, "tokens": 32}), text, "plain"))
    steps: list[Progress] = []
    notes = run(job(base, distilled(DISTILLATION), text), steps)
    assert notes[-1].startswith("distillation: divergence ")
    assert "dropped" not in notes[-1]
    assert difference(base.parent / "out", base) < difference(base.parent / "plain", base)
    assert steps[-1].what == "distillation"
    assert steps[-1].done == pytest.approx(steps[-1].total, rel=0.4)


def test_distillation_that_wins_nothing_leaves_the_weights(base: Path, text: Path) -> None:
    notes = run(job(base, distilled({**DISTILLATION, "learning_rate": 1.0}), text))
    assert notes[-1].endswith("won nothing and was dropped")
    rule = {"bits": 3, "group_size": 16, "symmetric": False, "method": "gptq"}
    run(job(base, recipe(rule, calibration={"windows": 9, "tokens": 32}), text, "plain"))
    one, two = (base.parent / name / "model.safetensors" for name in ("out", "plain"))
    assert one.read_bytes() == two.read_bytes()


def test_a_distillation_that_was_killed_goes_on_where_it_was(base: Path, text: Path) -> None:
    wanted = distilled(DISTILLATION)
    run(job(base, wanted, text, "whole"))
    seen: list[Progress] = []

    def die(step: Progress) -> None:
        seen.append(step)
        if sum(step.what == "distillation" for step in seen) == 13:
            raise Killed

    times = ticks()
    with pytest.raises(Killed):
        compress(job(base, wanted, text), die, lambda: next(times))
    steps: list[Progress] = []
    run(job(base, wanted, text), steps)
    assert sum(step.what == "distillation" for step in steps) < 13
    one, two = (base.parent / name / "model.safetensors" for name in ("whole", "out"))
    assert one.read_bytes() == two.read_bytes()


def test_new_biases_are_for_configs_that_can_say_so(experts: Path, text: Path) -> None:
    with pytest.raises(CompressionError, match=r"bias: new is for Llama's architecture alone.*deepseek_v2"):
        run(job(experts, compensated({**SCALES, "bias": "new"}), text))


def test_a_model_calibrates_on_what_it_writes(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = json.loads((base / "config.json").read_text()) | {"bos_token_id": 257}
    (base / "config.json").write_text(json.dumps(config))
    wanted = recipe(
        {"bits": 4, "group_size": 16, "method": "gptq"},
        calibration={"source": "model", "windows": 3, "tokens": 32, "seed": 5},
    )
    notes = run(job(base, wanted, name="one"))
    assert any("3 windows of 32 tokens from what the model wrote" in note for note in notes)
    monkeypatch.setattr("compression.self_generated.windows_at_once", lambda device: 2)
    run(job(base, wanted, name="two"))
    one, two = (base.parent / name / "model.safetensors" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
    with pytest.raises(CompressionError, match="leave --calibration out"):
        run(job(base, wanted, base / "config.json", "three"))


@pytest.mark.parametrize("scaling", [None, {"rule": "smoothquant"}])
def test_memory_for_one_hessian_alone_makes_more_passes(base: Path, text: Path, scaling: dict[str, str] | None) -> None:
    rule = {"bits": 4, "group_size": 16, "method": "gptq"}
    plain = recipe(rule, calibration={"windows": 4, "tokens": 32}, scaling=scaling)
    small = Job(base, "base", plain, base.parent / "one", text, hessian_bytes=1)
    run(small)
    run(job(base, recipe({"bits": 4, "group_size": 16}), name="rounded"))
    assert difference(base.parent / "one", base) < difference(base.parent / "rounded", base)


def test_experts_are_calibrated_or_said_to_be_starved(experts: Path, text: Path) -> None:
    notes = run(job(experts, GPTQ, text))
    assert any("tokens in calibration and was rounded by its weights alone" in note for note in notes)
    out = experts.parent / "out"
    assert difference(out, experts) < 0.5
    record = read_engine_record(out)
    assert record is not None
    assert record.coverage.classes["routed"].quantized_parameters == record.coverage.classes["routed"].parameters
    assert record.coverage.classes["router"].quantized_parameters == 0


def test_static_inputs_of_starved_experts_get_the_scale_of_others(experts: Path, text: Path) -> None:
    rule = {"bits": 8, "activations": "int8", "static_input": True}
    run(job(experts, recipe(rule, calibration={"windows": 1, "tokens": 16}), text))
    assert difference(experts.parent / "out", experts) < 0.5


def test_experts_share_a_budget_of_bytes(experts: Path, text: Path) -> None:
    four, eight = ({"match": ["*.mlp.experts.*"], "bits": bits, "group_size": 16} for bits in (4, 8))
    wanted = recipe(
        {"bits": 8},
        experts={"hot": eight, "cold": four, "budget": 0.5},
        calibration={"windows": 4, "tokens": 32},
    )
    notes = run(job(experts, wanted, text))
    assert any("routed experts have the larger format" in note for note in notes)
    out = experts.parent / "out"
    assert json.loads((out / "config.json").read_text())["quantization_config"]["quant_method"] == "slimserve"
    assert difference(out, experts) < 0.5


def test_a_quantized_embedding_serves_as_head_too(base: Path) -> None:
    config = json.loads((base / "config.json").read_text())
    write_checkpoint_of(base, {**config, "tie_word_embeddings": True})
    run(job(base, recipe({"match": ["*", "model.embed_tokens"], "bits": 8})))
    assert difference(base.parent / "out", base) < 0.06


class Killed(BaseException):
    """Stands for a signal."""


@pytest.mark.parametrize("wanted", [INT8, GPTQ, compensated({"method": "rounding", "steps": 5})])
def test_a_run_that_was_killed_goes_on_where_it_was(
    base: Path, text: Path, wanted: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(job(base, wanted, text, "whole"))
    quantized: list[int] = []

    def save_and_count(path: Path, tensors: dict[str, torch.Tensor], notes: list[str]) -> None:
        quantized.append(1)
        save_tensors(path, tensors, notes)

    def save_and_die(path: Path, tensors: dict[str, torch.Tensor], notes: list[str]) -> None:
        save_and_count(path, tensors, notes)
        if path.name == "layer-00000.safetensors":
            raise Killed

    monkeypatch.setattr(module, "save_tensors", save_and_die)
    with pytest.raises(Killed):
        run(job(base, wanted, text))
    before = len(quantized)
    monkeypatch.setattr(module, "save_tensors", save_and_count)
    other = recipe({"bits": 4, "group_size": 32})
    with pytest.raises(CompressionError, match="unfinished run"):
        run(job(base, other, text))
    run(job(base, wanted, text))
    assert len(quantized) - before == 1
    one, two = (base.parent / name / "model.safetensors" for name in ("whole", "out"))
    assert one.read_bytes() == two.read_bytes()


def test_an_output_folder_that_exists_is_left_alone(base: Path) -> None:
    (base.parent / "out").mkdir()
    with pytest.raises(CompressionError, match="out exists already"):
        run(job(base, INT8))


def test_a_promise_that_is_not_kept_leaves_no_folder(base: Path) -> None:
    wanted = recipe({"match": ["*.self_attn.*"], "bits": 8}, promise={"mlp": 0.9})
    with pytest.raises(CompressionError, match=r"mlp: 0.0% of the parameters, 90.0% promised"):
        run(job(base, wanted))
    assert not (base.parent / "out").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\x00\x01\x02 text", "binary"),
        (b"\xff\xfe\xfa", "no UTF-8"),
        (b"short", "one window takes 32"),
    ],
)
def test_text_that_cannot_calibrate_is_refused(base: Path, text: Path, content: bytes, message: str) -> None:
    text.write_bytes(content)
    with pytest.raises(CompressionError, match=message):
        run(job(base, GPTQ, text))


def test_a_folder_of_texts_and_lines_of_json_calibrate_too(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.md").write_text(TEXT)
    (folder / "b.jsonl").write_text("\n".join(json.dumps({"question": TEXT, "answer": "7"}) for _ in range(3)))
    (folder / "c.png").write_bytes(b"\x89PNG")
    notes = run(job(base, GPTQ, folder))
    assert any("4 windows of 32 tokens from texts" in note for note in notes)
    (folder / "b.jsonl").write_text("{")
    with pytest.raises(CompressionError, match=r"b.jsonl: line 1 is not JSON"):
        run(job(base, GPTQ, folder, "again"))


def test_a_weight_with_nan_is_named(base: Path) -> None:
    config = json.loads((base / "config.json").read_text())
    tensors = write_checkpoint(base, config)
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    from safetensors.torch import save_file

    save_file(tensors, base / "model.safetensors")
    with pytest.raises(CompressionError, match=r"model.layers.1.mlp.up_proj: .*NaN"):
        run(job(base, INT8))
