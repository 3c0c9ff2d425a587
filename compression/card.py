"""The evaluation card: everything that was measured of a model beside its base, as JSON, Markdown and plots."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec

from compression.measures.engine_process import Speed
from compression.measures.intervals import LEVEL, Estimate
from engines.engine_folder import Coverage, Quality

JSON_NAME, MARKDOWN_NAME = "card.json", "card.md"
NOT_MEASURED = "not measured"


class TextScores(msgspec.Struct, frozen=True, kw_only=True):
    """Over windows that do not overlap; intervals by bootstrap over windows, those of comparisons paired."""

    name: str
    windows: int
    windows_in_text: int
    window_tokens: int
    perplexity: Estimate
    base_perplexity: Estimate
    ratio: Estimate
    divergence: Estimate
    """KL(base || model), nats a token."""
    same_best: Estimate
    """Share of tokens at which both models' likeliest token is the same."""
    exact: bool
    """The divergence is of whole distributions; else a lower bound from the base's likeliest tokens."""
    losses: list[float]
    """Mean negative log likelihood of each window, for the plots; so ``base_losses``."""
    base_losses: list[float]


class AnswerScores(msgspec.Struct, frozen=True, kw_only=True):
    """Greedy answers to questions that have a known number as their answer."""

    name: str
    questions: int
    most_tokens: int
    accuracy: Estimate
    base_accuracy: Estimate
    same_number: Estimate
    """Share of questions to which both models give the same final number, right or not."""
    same_choice: Estimate | None
    """Share of the base's answer tokens that this model chooses too after the same text before. None where the base
    answers nothing, as for ``kept``."""
    kept: Estimate | None
    """Share of the base's answers, by length, before this model's own answer first differs."""
    loss_difference: Estimate | None
    """Of the worked solutions: mean negative log likelihood of a token, this model's less the base's. None where none
    fits into the context."""


class EngineFigures(msgspec.Struct, frozen=True, kw_only=True):
    """One model in the real engine. Sizes in bytes."""

    speeds: list[Speed]
    weight_bytes: int
    peak_bytes: int
    file_bytes: int
    dtype: str
    threads: int


class Card(msgspec.Struct, frozen=True, kw_only=True):
    version: int = 1
    model: str
    base: str
    created_with: str
    machine: str
    device: str
    dtype: str
    """Of activations and unquantized weights where quality was measured."""
    text: TextScores | None = None
    answers: AnswerScores | None = None
    more: dict[str, Estimate] = {}
    """Further figures by name, such as the agreement of routers."""
    engine: EngineFigures | None = None
    base_engine: EngineFigures | None = None
    coverage: Coverage | None = None
    notes: list[str] = []
    """What was left out and why, and what the maker of the model said of single layers."""


ROUTER_AGREEMENT = "router agreement"
"""Name under ``Card.more`` that ``Quality.router_agreement`` is taken from."""


def quality_of(card: Card) -> Quality:
    """The summary that goes into the engine folder's record."""
    text, task = card.text, card.answers
    names = [part.name for part in (text, task) if part is not None]
    router = card.more.get(ROUTER_AGREEMENT)
    return Quality(
        perplexity=None if text is None else text.perplexity.value,
        base_perplexity=None if text is None else text.base_perplexity.value,
        perplexity_ratio=None if text is None else text.ratio.value,
        kl=None if text is None else max(0.0, text.divergence.value),
        top1_agreement=None if text is None else text.same_best.value,
        accuracy=None if task is None else task.accuracy.value,
        base_accuracy=None if task is None else task.base_accuracy.value,
        router_agreement=None if router is None else router.value,
        measured_on=", ".join(names),
    )


def write_card(card: Card, folder: Path, plots: Sequence[str]) -> None:
    """``card.json`` and ``card.md``; ``plots`` are names of PNG files beside them."""
    (folder / JSON_NAME).write_bytes(msgspec.json.format(msgspec.json.encode(card), indent=1) + b"\n")
    (folder / MARKDOWN_NAME).write_text(markdown(card, plots))


def read_card(folder: Path) -> Card:
    """Raises OSError and msgspec.DecodeError."""
    return msgspec.json.decode((folder / JSON_NAME).read_bytes(), type=Card)


def markdown(card: Card, plots: Sequence[str]) -> str:
    parts = [f"# {card.model}", "", f"Measured against {card.base} with {card.created_with}: {card.machine}.", ""]
    parts += [f"Brackets are {LEVEL:.0%} confidence intervals.", ""]
    for section in (_text(card), _answers(card.answers), _more(card.more)):
        parts += section
    parts += _engines(card) + _coverage(card.coverage)
    if card.notes:
        parts += ["## Notes", "", *(f"- {note}" for note in card.notes), ""]
    for plot in plots:
        parts += [f"![{Path(plot).stem.replace('-', ' ')}]({plot})", ""]
    return "\n".join(parts).rstrip() + "\n"


def interval(estimate: Estimate | None, digits: int = 4) -> str:
    """``1.0123 [1.0101, 1.0144]``"""
    if estimate is None:
        return NOT_MEASURED
    low, high = f"{estimate.low:.{digits}f}", f"{estimate.high:.{digits}f}"
    return f"{estimate.value:.{digits}f} [{low}, {high}]"


def _percent(estimate: Estimate | None) -> str:
    if estimate is None:
        return NOT_MEASURED
    return f"{100 * estimate.value:.2f} % [{100 * estimate.low:.2f}, {100 * estimate.high:.2f}]"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    rule = "|" + "---|" * len(header)
    return ["| " + " | ".join(header) + " |", rule, *("| " + " | ".join(row) + " |" for row in rows), ""]


def _text(card: Card) -> list[str]:
    text = card.text
    if text is None:
        return []
    rows = [
        ("perplexity", interval(text.perplexity, 3)),
        ("perplexity of the base", interval(text.base_perplexity, 3)),
        ("ratio", interval(text.ratio)),
        ("KL divergence from the base, nats a token", interval(text.divergence, 5)),
        ("same likeliest token as the base", _percent(text.same_best)),
    ]
    every = text.windows == text.windows_in_text
    which = f"all {text.windows}" if every else f"{text.windows} of {text.windows_in_text} (evenly spread)"
    how = f"{text.name}, {which} windows of {text.window_tokens:,} tokens that do not overlap"
    bound = "" if text.exact else " The divergence is a lower bound: tokens beyond the base's likeliest count as one."
    return [
        "## Language modelling",
        "",
        f"On {how}; the text is tokenized as a whole and the first token of a window is not scored. "
        f"Computed in {card.dtype} on {card.device}: this model as it is served, its base from dequantized weights."
        f"{bound}",
        "",
        *_table(("", "value"), rows),
    ]


def _answers(scores: AnswerScores | None) -> list[str]:
    if scores is None:
        return []
    rows = [
        ("right answers", _percent(scores.accuracy)),
        ("right answers of the base", _percent(scores.base_accuracy)),
        ("same final number as the base, right or not", _percent(scores.same_number)),
        ("same token as the base, after the base's text before it", _percent(scores.same_choice)),
        ("part of the base's answer before the first difference", _percent(scores.kept)),
        ("loss on the worked solutions, less the base's, nats a token", interval(scores.loss_difference)),
    ]
    head = f"{scores.questions} questions of {scores.name}, greedy answers of at most {scores.most_tokens} tokens."
    return ["## Answers", "", head, "", *_table(("", "value"), rows)]


def _more(figures: dict[str, Estimate]) -> list[str]:
    if not figures:
        return []
    return ["## More", "", *_table(("", "value"), [(name, interval(value)) for name, value in figures.items()])]


def _engines(card: Card) -> list[str]:
    if card.engine is None:
        return []
    pairs = [("this model", card.engine), *([("base", card.base_engine)] if card.base_engine is not None else [])]
    sizes = [
        (name, _megabytes(figures.file_bytes), _megabytes(figures.weight_bytes), _megabytes(figures.peak_bytes))
        for name, figures in pairs
    ]
    rows = [
        (
            name,
            str(speed.rows),
            f"{speed.tokens_per_second:,.0f}",
            f"{1e3 * speed.first_token:,.0f}",
            _milliseconds(speed.token_p50),
            _milliseconds(speed.token_p99),
            "not known" if speed.joules_per_token is None else f"{speed.joules_per_token:.3f}",
        )
        for name, figures in pairs
        for speed in figures.speeds
    ]
    threads = f", {card.engine.threads} threads" if card.device == "cpu" else ""
    settings = f"{card.engine.dtype} on {card.device}{threads}"
    header = ("", "at once", "tokens/s", "first token, ms", "token p50, ms", "token p99, ms", "J/token")
    sections = ["## Size and speed", "", *_table(("", "files", "weights in memory", "peak memory"), sizes)]
    if not card.engine.speeds:
        return [*sections, f"Speed: {NOT_MEASURED}.", ""]
    first = card.engine.speeds[0]
    how = (
        f"In the serving engine ({settings}), {first.prompt} tokens in and {first.output} out, all prompts at once; "
        "tokens/s counts the prefill's time in."
    )
    return [*sections, how, "", *_table(header, rows)]


def _milliseconds(seconds: float | None) -> str:
    return NOT_MEASURED if seconds is None else f"{1e3 * seconds:.2f}"


def _coverage(coverage: Coverage | None) -> list[str]:
    if coverage is None:
        return []
    rows = []
    for name, part in coverage.classes.items():
        promised = coverage.promised.get(name)
        rows.append(
            (
                name,
                f"{part.parameters:,}",
                _fraction(part.quantized_parameters, part.parameters),
                "" if promised is None else f"{100 * promised:.1f} %",
                _megabytes(part.bytes),
                _fraction(part.quantized_bytes, part.bytes),
            )
        )
    header = ("class", "parameters", "quantized", "promised", "bytes", "of them quantized")
    return ["## What is quantized", "", "Counted from the files.", "", *_table(header, rows)]


def _fraction(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else ""


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"
