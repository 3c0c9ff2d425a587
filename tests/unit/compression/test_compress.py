from __future__ import annotations

import json
from pathlib import Path

import pytest

from compression.compress import Job
from compression.errors import CompressionError
from compression.progress import Progress
from engines.engine_folder import read_engine_record
from tests.unit.compression.jobs import GPTQ, INT8, TEXT, difference, job, run, write_checkpoint_of
from tests.unit.compression.recipes import recipe
from tests.unit.models.checkpoints import write_checkpoint


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
