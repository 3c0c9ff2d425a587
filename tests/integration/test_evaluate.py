"""The whole evaluation of two tiny checkpoints."""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import httpx
import msgspec
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.servers import free_port, running, slimserve
from compression import evaluate as evaluation
from compression.card import NOT_MEASURED, Card, interval, markdown, quality_of, read_card
from compression.errors import CompressionError
from compression.evaluate import Settings, evaluate
from compression.fingerprint import make_fingerprint
from compression.measures import models
from compression.measures.agreement import LiveModel, Passage, Scores
from compression.measures.answers import score_answers
from compression.measures.engine_process import speed_lengths
from compression.measures.intervals import Estimate
from compression.measures.texts import WINDOW, Question, read_text, token_windows
from compression.plots import draw_plots
from compression.progress import Progress
from compression.record import write_record
from engines.engine_folder import Quality, read_engine_record, write_engine_record
from engines.manifest import read_manifest
from server.quality import read_quality, score
from tests.smollm2_reference import reference_model
from tests.unit.api.harness import write_model
from tests.unit.compression.tiny_pair import write_pair
from tests.unit.models.checkpoints import CPU, write_checkpoint

TEXT = " ".join(f"the {word} number {index} is here ." for index in range(60) for word in ("small", "large"))


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    return write_pair(tmp_path)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    (tmp_path / "text.txt").write_text(TEXT)
    lines = [{"question": f"What is {index} and {index}?", "answer": f"#### {2 * index}"} for index in range(6)]
    (tmp_path / "questions.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    return Settings(
        text=tmp_path / "text.txt",
        questions=tmp_path / "questions.jsonl",
        window_tokens=64,
        question_count=0,
        answer_tokens=8,
        speed=False,
        threads=1,
    )


def measured(own: Path, base: Path, out: Path, settings: Settings, steps: list[Progress] | None = None) -> Card:
    """With a clock that goes on a second a look."""
    return evaluate(own, base, out, settings, (steps if steps is not None else []).append, count(0.0).__next__)


def finish(folder: Path, base: Path) -> None:
    write_record(
        folder,
        recipe={"name": "noise"},
        base="base",
        base_manifest=read_manifest(base),
        notes=["layer 0 was skipped"],
        promised={},
        device=CPU,
    )


def test_a_card_is_written_and_summed_up_in_the_record(pair: tuple[Path, Path], settings: Settings) -> None:
    own, base = pair
    finish(own, base)
    assert read_quality(own) is None
    card = measured(own, base, own, replace(settings, question_count=3))
    assert read_card(own) == card
    text = (own / "card.md").read_text()
    assert card.text is not None
    assert card.answers is not None
    assert card.text.windows == card.text.windows_in_text == len(TEXT) // 64
    assert card.text.divergence.low > 0
    assert 0 < card.text.same_best.value < 1
    assert card.text.ratio.value == pytest.approx(card.text.perplexity.value / card.text.base_perplexity.value)
    assert card.text.exact
    assert card.answers.questions == 3
    assert interval(card.text.ratio) in text
    assert "all " in text
    assert "layer 0 was skipped" in text
    record = read_engine_record(own)
    assert record is not None
    assert record.quality == quality_of(card)
    assert score(record.quality) == pytest.approx(1 / card.text.ratio.value)
    if importlib.util.find_spec("matplotlib") is not None:
        assert (own / "card-quality.png").read_bytes().startswith(b"\x89PNG")


def test_a_model_is_as_good_as_itself(pair: tuple[Path, Path], settings: Settings, tmp_path: Path) -> None:
    card = measured(pair[1], pair[1], tmp_path / "card", replace(settings, question_count=3))
    assert card.text is not None
    assert card.text.ratio == Estimate(1.0, 1.0, 1.0)
    assert card.text.divergence.value == 0
    assert card.text.same_best.value == 1
    assert card.answers is not None
    same = Estimate(1.0, 1.0, 1.0)
    assert card.answers.same_choice == card.answers.kept == same
    assert card.answers.same_number.value == 1


def test_all_windows_are_taken_with_the_time_left(pair: tuple[Path, Path], settings: Settings, tmp_path: Path) -> None:
    steps: list[Progress] = []
    measured(*pair, tmp_path / "card", settings, steps)
    compared = [step for step in steps if step.what == "comparing with the base"]
    assert compared[0].total == compared[-1].done == len(TEXT) // 64
    # Each look at the clock takes a second, and each window is one look.
    left = [step.seconds_left for step in compared]
    assert left[0] is None
    assert left[1:] == pytest.approx([float(len(TEXT) // 64 - done) for done in range(1, len(left))], rel=0.1)


def test_a_short_context_gives_a_whole_card(tmp_path: Path, settings: Settings) -> None:
    """Of 24 tokens: 12 in and 12 out are measured, and no question fits."""
    pair = write_pair(tmp_path, context=24)
    card = measured(*pair, tmp_path / "card", replace(settings, question_count=3, speed=True))
    assert card.text is not None
    assert card.text.window_tokens == 24
    assert card.answers is None
    assert card.engine is not None
    assert [(speed.prompt, speed.output) for speed in card.engine.speeds] == [(12, 12)] * 3
    text = (tmp_path / "card" / "card.md").read_text()
    assert "12 tokens in and 12 out" in text
    assert "nan" not in text


def test_what_had_nothing_to_count_is_not_measured(pair: tuple[Path, Path], settings: Settings, tmp_path: Path) -> None:
    """A base that answers nothing, and a context in which a sequence has one token."""
    assert speed_lengths(1) is None
    scores = Scores(*(np.zeros(0) for _ in range(5)))
    questions = [Question("?", "4", "#### 4")]
    answers = score_answers("q", questions, [""], [""], ([[]], [[]]), scores, scores, 8)
    assert (answers.same_choice, answers.kept, answers.loss_difference) == (None, None, None)
    card = measured(*pair, tmp_path / "card", replace(settings, speed=True))
    assert card.engine is not None
    slow = msgspec.structs.replace(card.engine.speeds[0], token_p50=None, token_p99=None)
    card = msgspec.structs.replace(
        card, answers=answers, engine=msgspec.structs.replace(card.engine, speeds=[slow]), base_engine=None
    )
    text = markdown(card, [])
    assert text.count(NOT_MEASURED) == 5
    assert "nan" not in text
    if importlib.util.find_spec("matplotlib") is not None:
        assert "card-speed.png" in draw_plots(card, tmp_path)


def test_a_model_that_computes_no_numbers_is_said_to_be_broken(
    pair: tuple[Path, Path], settings: Settings, tmp_path: Path
) -> None:
    tensors = load_file(pair[0] / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, pair[0] / "model.safetensors")
    with pytest.raises(CompressionError, match="not numbers"):
        measured(*pair, tmp_path / "card", settings)


def test_models_that_do_not_fit_together_are_compared_through_files(
    pair: tuple[Path, Path], settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = measured(*pair, tmp_path / "card", settings)
    monkeypatch.setattr(models, "_SECOND_MODEL", 1e12)
    monkeypatch.setattr(evaluation, "room_for_another", models.room_for_another)
    card = measured(*pair, tmp_path / "card", settings)
    assert whole.text is not None
    assert card.text is not None
    assert not card.text.exact
    assert "lower bound" in (tmp_path / "card" / "card.md").read_text()
    assert card.text.ratio.value == pytest.approx(whole.text.ratio.value, rel=1e-6)
    assert card.text.same_best == whole.text.same_best
    assert card.text.divergence.value < whole.text.divergence.value


def test_without_matplotlib_the_card_says_what_to_install(
    pair: tuple[Path, Path], settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find_spec(name))
    measured(*pair, tmp_path / "card", settings)
    assert "pip install 'slimserve[compress]'" in (tmp_path / "card" / "card.md").read_text()
    assert not list((tmp_path / "card").glob("*.png"))


def test_another_tokenizer_is_refused(pair: tuple[Path, Path], settings: Settings, tmp_path: Path) -> None:
    other = tmp_path / "other"
    write_model(other)
    config: dict[str, Any] = json.loads((other / "config.json").read_text()) | {"vocab_size": 300}
    write_checkpoint(other, config)
    with pytest.raises(CompressionError, match="different tokenizers"):
        measured(pair[0], other, tmp_path / "card", settings)


def test_a_record_holds_every_file_that_is_served(pair: tuple[Path, Path]) -> None:
    own, base = pair
    finish(own, base)
    (own / "card.md").write_text("later")
    record = read_engine_record(own)
    assert record is not None
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= record.hashes.keys()
    assert record.fingerprint == make_fingerprint(own, CPU)
    assert record.base_fingerprint == read_manifest(base).fingerprint


def test_an_empty_card_is_one(pair: tuple[Path, Path], settings: Settings, tmp_path: Path) -> None:
    card = measured(*pair, tmp_path / "card", settings)
    assert card.answers is None
    assert card.engine is None
    bare = msgspec.structs.replace(card, text=None, coverage=None)
    assert markdown(bare, []).startswith("# own\n")
    assert score(quality_of(bare)) is None


# --- served


@pytest.fixture
def served(pair: tuple[Path, Path]) -> Path:
    """An engine folder with a card's summary that says: 5 % above its base's perplexity."""
    own, base = pair
    finish(own, base)
    record = read_engine_record(own)
    assert record is not None
    write_engine_record(own, msgspec.structs.replace(record, quality=Quality(perplexity_ratio=1.05, kl=0.01)))
    return own


def command(folder: Path, port: int, *options: str) -> list[str]:
    return slimserve("serve", str(folder), "--port", str(port), "--device", "cpu", "--threads", "1", *options)


def test_the_api_tells_the_quality(served: Path, tmp_path: Path) -> None:
    port = free_port()
    start = command(served, port, "--min-quality", "0.95")
    with running("slimserve", start, port, "/health/ready", log=tmp_path / "log"):
        card = httpx.get(f"http://127.0.0.1:{port}/v1/models/own").json()
    assert card["quality"]["perplexity_ratio"] == 1.05
    assert card["quality"]["top1_agreement"] is None


def test_what_falls_below_the_least_quality_is_not_served(served: Path) -> None:
    answer = refused(command(served, 0, "--min-quality", "0.96"))
    assert "its quality is 0.9524 of its base's" in answer
    assert "min_quality is 0.96" in answer


def test_a_folder_edited_by_one_byte_is_not_served(served: Path) -> None:
    path = served / "tokenizer.json"
    path.write_text(path.read_text().replace("<|im_end|>", "<|im_eNd|>", 1))
    assert "tokenizer.json is not what slimserve.json says" in refused(command(served, 0))


def refused(start: list[str]) -> str:
    """What a server that does not start says."""
    answer = subprocess.run(start, capture_output=True, text=True, timeout=120, check=False)
    assert answer.returncode == 1
    assert "Traceback" not in answer.stderr
    return answer.stderr


def test_the_command_shows_the_quality_and_lists_the_folder(pair: tuple[Path, Path], settings: Settings) -> None:
    own, base = pair
    finish(own, base)
    arguments = ["evaluate", str(own), "--against", str(base), "--text", str(settings.text), "--windows", "2"]
    arguments += ["--question-count", "0", "--no-speed", "--threads", "1"]
    # A window is at most as long as the context.
    answer = subprocess.run(slimserve(*arguments), capture_output=True, text=True, timeout=120, check=False)
    assert answer.returncode == 0, answer.stderr
    assert "own against base: perplexity x" in answer.stdout
    listed = subprocess.run(slimserve("list", str(own)), capture_output=True, text=True, timeout=60, check=False)
    assert "made of base" in listed.stdout
    assert "perplexity x" in listed.stdout


def test_perplexity_is_that_of_transformers(smollm2_path: Path) -> None:
    """On one window of 1,024 tokens, whose mean loss over 1,023 predictions is what ``labels=`` gives there."""
    manifest = read_manifest(smollm2_path)
    if not evaluation.DEFAULT_TEXT.is_file():
        pytest.skip("the shared WikiText-2 is not here")
    torch.set_num_threads(1)
    subject = models.open_subject(smollm2_path)
    subject.text.close()
    windows, count = token_windows(subject.text, read_text(evaluation.DEFAULT_TEXT), WINDOW, 3, "text")
    assert count > 250
    spec = models.spec_of(subject, "cpu", "float32", WINDOW)
    exact, served = (window_loss(load(subject, spec), windows[1]) for load in (models.load_reference, models.load))
    ids = torch.from_numpy(windows[1])[None]
    with torch.inference_mode():
        theirs = float(reference_model(manifest)(input_ids=ids, labels=ids).loss)
    assert math.exp(exact) == pytest.approx(math.exp(theirs), rel=1e-4)
    # The kernels of quantized weights round activations to 8 bits.
    assert math.exp(served) == pytest.approx(math.exp(theirs), rel=1e-2)


def window_loss(loaded: models.LoadedModel, window: np.ndarray[tuple[int], np.dtype[np.int64]]) -> float:
    live = LiveModel(loaded.model, loaded.device, loaded.dtype)
    live.begin(0, Passage(window.tolist()))
    return -float(live.rows(0, len(window) - 1).following.mean())
