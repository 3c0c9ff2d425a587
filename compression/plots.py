"""The card's pictures. matplotlib is an extra: without it the card has none, and says so."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from compression.card import Card, EngineFigures

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MISSING = "no plots: they need matplotlib (pip install 'slimserve[compress]')"
OURS, BASE = "#1f6f8b", "#b0b0b0"


def draw_plots(card: Card, folder: Path) -> list[str]:
    """Write PNG files into ``folder`` and give their names; none where matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        return []
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawn = []
    for name, draw, wanted in (
        ("card-quality.png", _quality, card.text is not None),
        ("card-speed.png", _speed, card.engine is not None and bool(card.engine.speeds)),
        ("card-size.png", _size, card.engine is not None or card.coverage is not None),
    ):
        if not wanted:
            continue
        figure = Figure(figsize=(9, 3.6), layout="constrained", dpi=110)
        FigureCanvasAgg(figure)
        left, right = figure.subplots(1, 2)
        draw(card, left, right)
        figure.savefig(folder / name)
        drawn.append(name)
    return drawn


def _quality(card: Card, left: Axes, right: Axes) -> None:
    """Loss of each window beside the base's; the histogram of the differences."""
    assert card.text is not None
    own, base = card.text.losses, card.text.base_losses
    ends = [min(*own, *base), max(*own, *base)]
    left.plot(ends, ends, color=BASE, linewidth=1)
    left.scatter(base, own, s=12, color=OURS)
    left.set(xlabel="base, nats a token", ylabel="this model", title="Loss of each window")
    differences = [mine - theirs for mine, theirs in zip(own, base, strict=True)]
    right.hist(differences, bins=min(30, max(5, len(differences) // 4)), color=OURS)
    right.axvline(0, color=BASE, linewidth=1)
    right.set(xlabel="loss less the base's, nats a token", ylabel="windows", title="Difference")


def _speed(card: Card, left: Axes, right: Axes) -> None:
    """Tokens/s and token latency over the sequences at once."""
    for figures, name, color in _engines(card):
        rows = [str(speed.rows) for speed in figures.speeds]
        left.plot(rows, [speed.tokens_per_second for speed in figures.speeds], "o-", color=color, label=name)
        halves = [1e3 * speed.token_p50 for speed in figures.speeds if speed.token_p50 is not None]
        tails = [1e3 * speed.token_p99 for speed in figures.speeds if speed.token_p99 is not None]
        right.plot(rows[: len(halves)], halves, "o-", color=color, label=f"{name}, p50")
        right.plot(rows[: len(tails)], tails, "^:", color=color, label=f"{name}, p99")
    left.set(xlabel="sequences at once", ylabel="tokens/s", title="Throughput", ylim=(0, None))
    right.set(xlabel="sequences at once", ylabel="ms", title="Time of a token", ylim=(0, None))
    left.legend()
    right.legend()


def _size(card: Card, left: Axes, right: Axes) -> None:
    """Files and memory; what is quantized of each class."""
    engines = _engines(card)
    names = ("files", "weights", "peak memory")
    for place, (figures, name, color) in enumerate(engines):
        sizes = (figures.file_bytes, figures.weight_bytes, figures.peak_bytes)
        left.barh(
            [index + 0.4 * place for index in range(3)], [size / 1e6 for size in sizes], 0.38, color=color, label=name
        )
    if engines:
        left.set_yticks([index + 0.2 * (len(engines) - 1) for index in range(3)], names)
        left.set(xlabel="MB", title="Size")
        left.legend()
    else:
        left.set_axis_off()
    if card.coverage is None:
        right.set_axis_off()
        return
    classes = list(card.coverage.classes.items())
    places = [name for name, _ in classes]
    quantized = [part.quantized_bytes / 1e6 for _, part in classes]
    rest = [(part.bytes - part.quantized_bytes) / 1e6 for _, part in classes]
    right.barh(places, quantized, color=OURS, label="quantized")
    right.barh(places, rest, left=quantized, color=BASE, label="16 or 32 bit")
    right.set(xlabel="MB on disk", title="What is quantized")
    right.legend()


def _engines(card: Card) -> list[tuple[EngineFigures, str, str]]:
    found = [(card.engine, "this model", OURS), (card.base_engine, "base", BASE)]
    return [(figures, name, color) for figures, name, color in found if figures is not None]
