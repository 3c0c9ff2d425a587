"""Evaluates a model beside its base and writes the card."""

from __future__ import annotations

import gc
import math
import os
import platform
import tempfile
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import msgspec
import torch

from compression import card as cards
from compression.card import Card, EngineFigures, TextScores
from compression.coverage import count_coverage
from compression.errors import CompressionError
from compression.measures import answers as answering
from compression.measures.agreement import LiveModel, Passage, Scores, StoredModel, compare, store
from compression.measures.engine_process import OUTPUT, PROMPT, ROWS, Request, Result, measure_engine
from compression.measures.intervals import ratio_of_sums
from compression.measures.models import (
    LoadedModel,
    Subject,
    check_comparable,
    load,
    load_reference,
    open_subject,
    room_for_another,
    set_threads,
    spec_of,
)
from compression.measures.routing import RouterWatch
from compression.measures.texts import WINDOW, Question, Windows, read_questions, read_text, token_windows
from compression.plots import MISSING, draw_plots
from compression.progress import PartReport, Parts, Report
from engines.engine_folder import read_engine_record, write_engine_record
from engines.generation.placement import choose_placement, dtype_name
from engines.protocol import EngineSpec

SHORTEST_WINDOW = 2
"""Tokens: the first is not scored."""
SAMPLE = 20_000
"""Characters by which two tokenizers are compared."""
SHARED = Path(__file__).resolve().parents[1].parent / "shared/data/text"
DEFAULT_TEXT, DEFAULT_QUESTIONS = SHARED / "wikitext-2-valid.txt", SHARED / "gsm8k-train-2000.jsonl"


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What is measured, and with what."""

    text: Path | None = None
    """None: WikiText-2's validation part, where it is here. So ``questions``: GSM8K's."""
    questions: Path | None = None
    windows: int | None = None
    """So many of the text's, evenly spread. None: all."""
    window_tokens: int = WINDOW
    question_count: int = 48
    """0 leaves the answers out."""
    answer_tokens: int = 128
    speed: bool = True
    device: str = "auto"
    dtype: str = "auto"
    threads: int | None = None


@dataclass(slots=True)
class _Run:
    """One evaluation: what its parts share."""

    own: Subject
    base: Subject
    settings: Settings
    report: PartReport
    device: torch.device
    dtype: torch.dtype
    windows: Windows
    windows_in_text: int
    text_name: str
    questions: list[Question]
    prompts: list[list[int]] = field(default_factory=list)
    routers: RouterWatch = field(default_factory=RouterWatch)
    notes: list[str] = field(default_factory=list)


def evaluate(
    folder: Path, against: Path, out: Path, settings: Settings, report: Report, clock: Callable[[], float]
) -> Card:
    """Measure the model in ``folder`` (an engine folder, a checkpoint or a .gguf file) beside its base.

    Writes card.json, card.md and plots into ``out``, and the summary into the engine folder's record, if it has one.
    Raises CompressionError and EngineLoadError.
    """
    own = open_subject(folder)
    with closing(own.text):
        base = open_subject(against)
        with closing(base.text):
            card = _measure(_prepare(own, base, settings, Parts(report, clock)))
    out.mkdir(parents=True, exist_ok=True)
    plots = draw_plots(card, out)
    if not plots:
        card = msgspec.structs.replace(card, notes=[*card.notes, MISSING])
    cards.write_card(card, out, plots)
    record = None if own.manifest.format == "gguf" else read_engine_record(folder)
    if record is not None:
        write_engine_record(folder, msgspec.structs.replace(record, quality=cards.quality_of(card)))
    return card


def _prepare(own: Subject, base: Subject, settings: Settings, report: PartReport) -> _Run:
    path = settings.text or DEFAULT_TEXT
    if settings.text is None and not path.is_file():
        raise CompressionError("there is no text to measure perplexity on: give one with --text FILE (UTF-8)")
    content = read_text(path)
    check_comparable(own, base, content[:SAMPLE])
    length = min(settings.window_tokens, own.manifest.max_context, base.manifest.max_context)
    if length < SHORTEST_WINDOW:
        raise CompressionError(f"a window of {length} token has none to score; {own.name} cannot be evaluated")
    placement = choose_placement(spec_of(own, settings.device, settings.dtype, length), own.manifest.dtype)
    windows, count = token_windows(own.text, content, length, settings.windows, path.name)
    questions, notes = _questions(settings)
    run = _Run(
        own,
        base,
        settings,
        report,
        placement.device,
        placement.dtype,
        windows,
        count,
        path.stem,
        questions,
        notes=notes,
    )
    longest = min(own.manifest.max_context, base.manifest.max_context) - settings.answer_tokens
    pairs = list(zip(questions, answering.prompts_of(own.text, questions), strict=True))
    fitting = [(question, prompt) for question, prompt in pairs if len(prompt) <= longest]
    run.questions, run.prompts = [question for question, _ in fitting], [prompt for _, prompt in fitting]
    if questions and not fitting:
        run.notes.append("no answers to questions: none fits into the model's context")
    return run


def _questions(settings: Settings) -> tuple[list[Question], list[str]]:
    path = settings.questions or DEFAULT_QUESTIONS
    if not settings.question_count:
        return [], []
    if settings.questions is None and not path.is_file():
        return [], ["no answers to questions: there is no file of them here (--questions FILE)"]
    return read_questions(path, settings.question_count), []


def _measure(run: _Run) -> Card:
    own, base, settings = run.own, run.base, run.settings
    base_result = _run_engine(run, base)
    passages = [Passage(window.tolist()) for window in run.windows]
    base_answers = [] if base_result is None else base_result.answers
    forced = answering.answer_passages(run.prompts, base_answers) if base_answers else []
    solutions = answering.solution_passages(own.text, run.prompts, run.questions)
    scores, exact = _compare(run, [*passages, *forced, *solutions])
    result = _run_engine(run, own)
    record = None if own.manifest.format == "gguf" else read_engine_record(own.path)
    answer_scores = None
    if run.questions and result is not None:
        answer_scores = answering.score_answers(
            (settings.questions or DEFAULT_QUESTIONS).stem,
            run.questions,
            [own.text.decode(answer, skip_special_tokens=True) for answer in result.answers],
            [own.text.decode(answer, skip_special_tokens=True) for answer in base_answers],
            (result.answers, base_answers),
            _part(scores, len(passages), len(passages) + len(forced)),
            _part(scores, len(passages) + len(forced), len(scores.tokens)),
            settings.answer_tokens,
        )
    return Card(
        model=own.name,
        base=base.name,
        created_with=f"slimserve {version('slimserve')}",
        machine=_machine(run.device),
        device=str(run.device),
        dtype=dtype_name(run.dtype),
        text=_text_scores(run, _part(scores, 0, len(passages)), exact),
        answers=answer_scores,
        more=run.routers.figures(),
        engine=None if result is None else _figures(own, result),
        base_engine=None if base_result is None else _figures(base, base_result),
        coverage=record.coverage if record is not None else count_coverage(own.manifest),
        notes=[*run.notes, *(record.notes if record is not None else [])],
    )


def _run_engine(run: _Run, subject: Subject) -> Result | None:
    """Answers and speeds in a process of its own; None where neither is wanted."""
    settings = run.settings
    if not run.prompts and not settings.speed:
        return None
    longest = max(PROMPT + OUTPUT, *(len(prompt) + settings.answer_tokens for prompt in run.prompts), 0)
    spec = EngineSpec(
        name=subject.name,
        source=str(subject.path),
        device=str(run.device),
        dtype=dtype_name(run.dtype),
        max_model_len=min(longest, subject.manifest.max_context),
        max_batch=ROWS[run.device.type][-1],
        threads=settings.threads,
    )
    request = Request(
        spec=spec,
        prompts=run.prompts,
        most=settings.answer_tokens,
        ends=list(subject.manifest.eos_token_ids),
        speed=settings.speed,
    )
    return measure_engine(request, lambda what, done, total: run.report(f"{subject.name}: {what}", done, total))


def _compare(run: _Run, passages: Sequence[Passage]) -> tuple[Scores, bool]:
    """Both models' scores of all passages, and whether whole distributions were compared: both models are in memory
    together where they fit, else the base's likeliest tokens go through files."""
    vocab = run.own.manifest.vocab_size
    longest = max(len(passage.tokens) for passage in passages)
    run.report("loading", 0, 0)
    base = load_reference(run.base, _spec(run, run.base, longest))
    set_threads(base, run.settings.threads)
    if room_for_another(base):
        own = load(run.own, _spec(run, run.own, longest))
        return compare(_live(run, own), _live(run, base), passages, vocab, "comparing with the base", run.report), True
    with tempfile.TemporaryDirectory(prefix="slimserve-evaluate-") as folder:
        store(_live(run, base), passages, vocab, Path(folder), "scoring with the base", run.report)
        del base
        _give_back(run.device)
        own = load(run.own, _spec(run, run.own, longest))
        stored = StoredModel(Path(folder), run.device)
        return compare(_live(run, own), stored, passages, vocab, "comparing with the base", run.report), False


def _spec(run: _Run, subject: Subject, longest: int) -> EngineSpec:
    return spec_of(subject, str(run.device), dtype_name(run.dtype), longest)


def _live(run: _Run, loaded: LoadedModel) -> LiveModel:
    run.routers.watch(loaded, run.windows)
    return LiveModel(loaded.model, loaded.device, loaded.dtype)


def _give_back(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _part(scores: Scores, start: int, stop: int) -> Scores:
    part = slice(start, stop)
    return Scores(
        scores.tokens[part],
        scores.own_loss[part],
        scores.base_loss[part],
        scores.divergence[part],
        scores.same_best[part],
    )


def _text_scores(run: _Run, scores: Scores, exact: bool) -> TextScores:
    return TextScores(
        name=run.text_name,
        windows=len(run.windows),
        windows_in_text=run.windows_in_text,
        window_tokens=run.windows.shape[1],
        perplexity=ratio_of_sums(scores.own_loss, scores.tokens, math.exp),
        base_perplexity=ratio_of_sums(scores.base_loss, scores.tokens, math.exp),
        ratio=ratio_of_sums(scores.own_loss - scores.base_loss, scores.tokens, math.exp),
        divergence=ratio_of_sums(scores.divergence, scores.tokens),
        same_best=ratio_of_sums(scores.same_best, scores.tokens),
        exact=exact,
        losses=(scores.own_loss / scores.tokens).tolist(),
        base_losses=(scores.base_loss / scores.tokens).tolist(),
    )


def _figures(subject: Subject, result: Result) -> EngineFigures:
    return EngineFigures(
        speeds=result.speeds,
        weight_bytes=result.weight_bytes,
        peak_bytes=result.peak_bytes,
        file_bytes=sum(path.stat().st_size for path in subject.manifest.files),
        dtype=result.dtype,
        threads=result.threads,
    )


def _machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    name = names[0].partition(":")[2].strip() if names else platform.machine()
    return f"{name}, {len(os.sched_getaffinity(0))} cores"
