from __future__ import annotations

import json
import lzma
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from compression.errors import CompressionError
from compression.student import corpus, tokens
from compression.student.checkpoint import Progress, load_checkpoint, save_checkpoint
from compression.student.debian_text import html_text, markup_of
from compression.student.folder import write_folder
from compression.student.model import Student, initialise
from compression.student.shape import SMOKE, Shape
from compression.student.tokenizer import END, train_tokenizer
from compression.student.training import Schedule, train
from engines.generation.whole_prompts import WholePrompts
from engines.manifest import read_manifest
from engines.models.loader import load_model
from engines.protocol import EngineSpec
from server.text import load_text

CPU = torch.device("cpu")
TINY = Shape(
    vocab=300,
    hidden=32,
    layers=2,
    dense_intermediate=48,
    heads=2,
    latent=24,
    nope=8,
    rope=8,
    value=16,
    experts=8,
    intermediate=16,
    context=64,
)
SCHEDULE = Schedule(
    steps=30, sequences=4, length=16, parts=2, peak=1e-2, warmup=3, rewarm=3, log_every=10, validate_every=15
)
TEXTS = [f"The {animal} reads page {number} of the manual.\n" * 8 for number in range(30) for animal in ("cat", "dog")]


def clock(step: float = 1.0) -> Iterator[float]:
    now = 0.0
    while True:
        now += step
        yield now


def training(run: Path, seconds: float) -> tuple[bool, int]:
    ids = np.tile(np.arange(40, dtype=np.uint16), 50)
    times = clock()
    batches = tokens.Batches(ids, SCHEDULE.sequences, SCHEDULE.length, SCHEDULE.seed, CPU)
    validation = tokens.windows_of(ids, SCHEDULE.length, 4)
    outcome = train(
        run, TINY, SCHEDULE, batches, validation, CPU, seconds, lambda: next(times), lambda line: None, save_every=5
    )
    return outcome.finished, outcome.progress.step


def test_a_page_reads_as_a_reader_sees_it() -> None:
    page = """<html><head><title>T</title><style>p{}</style></head><body><nav><a>Up</a></nav><h1>Files</h1>
    <p>One &amp;  two<br>lines.<ul><li>a<li>b</ul><pre>x  =  1
  y</pre><script>var a = "<p>";</script><p>End</body></html>"""
    assert html_text(page) == "Files\n\nOne & two\nlines.\n\n- a\n- b\n\nx  =  1\n  y\n\nEnd"


@pytest.mark.parametrize(
    ("path", "markup"),
    [("a/b.html", "html"), ("a/b.en", "html"), ("a/b.txt.gz", "text"), ("a/b.pod", "text"), ("a/b.png", None)],
)
def test_markup_by_name(path: str, markup: str | None) -> None:
    assert markup_of(path) == markup


def test_pinned_packages_are_complete() -> None:
    packages = corpus.pinned_packages()
    assert len(packages) > 10
    assert all(len(package.sha256) == 64 and package.version for package in packages)


def test_a_package_that_is_not_as_pinned_is_refused(tmp_path: Path) -> None:
    (tmp_path / "one_1%3a2_all.deb").write_bytes(b"other")
    with pytest.raises(CompressionError, match="one 1:2 did not come as pinned"):
        corpus.fetch([corpus.Package("one", "1:2", "0" * 64, "")], tmp_path, lambda line: None)


def test_parts_do_not_overlap(tmp_path: Path) -> None:
    (tmp_path / corpus.TEXTS).mkdir()
    texts = [f"document {number}" for number in range(500)]
    with lzma.open(tmp_path / corpus.TEXTS / "p.jsonl.xz", "wt") as file:
        file.writelines(json.dumps(text) + "\n" for text in texts)
    parts = [set(corpus.texts_of(tmp_path, part)) for part in (corpus.TRAIN, corpus.VALID, corpus.CALIBRATION)]
    assert sum(map(len, parts)) == 500
    assert set.union(*parts) == set(texts)
    assert all(parts)


def test_tokens_of_documents_end_with_the_end_token(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(TEXTS, 300, tmp_path)
    ids = tokens.cached_ids(tmp_path / "ids.npy", TEXTS, tokenizer)
    assert tokenizer.token_to_id(END) == 0
    assert int((ids == 0).sum()) == len(TEXTS)
    assert tokenizer.decode(ids[: int(np.argmax(ids == 0))].tolist()) == TEXTS[0]


def test_batches_follow_from_the_step() -> None:
    ids = np.arange(1000, dtype=np.uint16)
    one, two = (tokens.Batches(ids, 3, 8, 0, CPU) for _ in range(2))
    inputs, targets = one.step(7)
    assert torch.equal(inputs, two.step(7)[0])
    assert torch.equal(inputs + 1, targets)
    assert not torch.equal(inputs, one.step(8)[0])


def test_the_engine_computes_what_was_trained(tmp_path: Path) -> None:
    model = Student(TINY)
    initialise(model, 1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(8 if name.endswith(("gate", "weight")) and parameter.dim() > 1 else 1)
    train_tokenizer(TEXTS, 300, tmp_path / "text")
    write_folder(model, tmp_path / "text", tmp_path / "out")
    manifest = read_manifest(tmp_path / "out")
    loaded = load_model(manifest, EngineSpec(name="s", source=""), CPU, torch.float32, lambda progress: None)
    ids = torch.randint(0, 300, (20,), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = model(ids.unsqueeze(0))[0][0]
    found = loaded.logits(WholePrompts(loaded, CPU, torch.float32).hidden([ids.tolist()]))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_the_folder_has_its_terms_and_a_template_that_writes_on(tmp_path: Path) -> None:
    train_tokenizer(TEXTS, 300, tmp_path / "text")
    write_folder(Student(TINY), tmp_path / "text", tmp_path / "out")
    terms = (tmp_path / "out" / "LICENSE").read_text()
    assert all(package.package in terms for package in corpus.pinned_packages())
    with closing(load_text(read_manifest(tmp_path / "out"))) as text:
        messages = [{"role": "user", "content": content} for content in ("One.", "Two.")]
        assert text.render_chat(messages) == "One.\n\nTwo."


def test_a_run_goes_on_where_it_stopped_and_learns(tmp_path: Path) -> None:
    finished, step = training(tmp_path, seconds=12)
    assert not finished
    assert 0 < step < SCHEDULE.steps
    while not finished:
        before = step
        finished, step = training(tmp_path, seconds=20)
        assert step > before
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    losses = [line["validation"] for line in lines if "validation" in line]
    assert losses[-1] < 2.0 < losses[0]
    assert training(tmp_path, seconds=20) == (True, SCHEDULE.steps)


def test_a_run_that_diverges_keeps_its_checkpoint(tmp_path: Path) -> None:
    training(tmp_path, seconds=12)
    path = next((tmp_path / "checkpoint").glob("weights-*.safetensors"))
    tensors = load_file(path)
    save_file({name: torch.full_like(tensor, torch.nan) for name, tensor in tensors.items()}, path)
    before = path.read_bytes()
    with pytest.raises(CompressionError, match="has diverged at step"):
        training(tmp_path, seconds=100)
    assert path.read_bytes() == before


def test_a_kill_while_saving_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    model = Student(TINY)
    initialise(model, 1)
    save_checkpoint(tmp_path, model, Progress(5, 1.0))
    (tmp_path / "checkpoint").rename(tmp_path / "checkpoint.old")
    loaded = load_checkpoint(tmp_path, CPU)
    assert loaded is not None
    assert loaded[1] == Progress(5, 1.0)


def test_a_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    model = Student(TINY)
    initialise(model, 1)
    save_checkpoint(tmp_path, model, Progress(5, 1.0))
    (tmp_path / "checkpoint" / "weights-0.safetensors").write_bytes(b"no")
    with pytest.raises(CompressionError, match="is damaged"):
        load_checkpoint(tmp_path, CPU)


def test_the_rate_rises_falls_and_rises_again_after_a_break() -> None:
    schedule = Schedule(steps=100, seconds=1000.0, warmup=10, rewarm=5, peak=1.0)

    def rate(step: int, first: int = 0, seconds: float = 0.0) -> float:
        return schedule.rate(Progress(step, seconds), first)

    assert rate(0) == pytest.approx(0.1)
    assert rate(20) == pytest.approx(0.8)
    assert rate(20, seconds=600.0) == pytest.approx(0.4)
    assert rate(50, first=50) == pytest.approx(0.1)
    assert rate(60, first=50) == rate(60)


def test_a_run_ends_with_its_time_or_its_steps() -> None:
    schedule = Schedule(steps=100, seconds=1000.0, peak=1.0)
    assert schedule.share(Progress(50, 999.0)) < 1 <= schedule.share(Progress(50, 1000.0))
    assert schedule.share(Progress(100, 10.0)) == 1
    assert schedule.rate(Progress(50, 1001.0), 0) == 0


def test_the_student_is_as_large_as_promised() -> None:
    count = sum(parameter.numel() for parameter in Student(Shape()).parameters())
    assert 12e6 < count < 18e6
    assert sum(parameter.numel() for parameter in Student(SMOKE).parameters()) < 1e6
