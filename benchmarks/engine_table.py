"""One column of ``engine_speed`` as a row of its table: figures, vLLM's beside them, the bar and the verdict."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks import vllm_figures

COLUMNS = {
    "column": 8,
    "tok/s": 9,
    "spread": 15,
    "prefill ms": 10,
    "decode ms": 9,
    "device ms": 9,
    "plan": 6,
    "launch": 6,
    "settle": 6,
    "graphs": 6,
    "TB/s": 6,
    "floor": 10,
    "vLLM": 7,
    "vLLM ms": 11,
    "ratio": 6,
    "bar": 15,
    "verdict": 7,
}
"""Headings of the table and how wide they are. ``vLLM ms``: its decode-only step and its prefill."""


@dataclass(frozen=True, slots=True)
class Figures:
    """One column: medians over its runs. Milliseconds a step unless the name says otherwise."""

    tokens_per_second: float
    slowest: float
    fastest: float
    prefill_ms: float
    decode_ms: float | None
    """Of steps that only decode, from one result to the next on the host's clock; None where there are none."""
    decode_device_ms: float | None
    """The same steps on the device's clock."""
    floor_ms: float | None
    """What reading every needed byte once takes, at the bandwidth measured in this run."""
    bytes_per_second: float | None
    """Needed bytes over ``decode_ms``."""
    plan_ms: float
    launch_ms: float
    settle_ms: float
    steps: int
    graphed: float
    """Share of all steps that ran as captured graphs."""
    runs: list[float]
    """Tokens/s of each run."""

    @property
    def floor_share(self) -> float | None:
        return self.floor_ms / self.decode_ms if self.floor_ms and self.decode_ms else None


def verdict(kind: str, model: str, weights: str, column: str, figures: Figures) -> tuple[str, ...]:
    """Cells: vLLM's figures, our ratio to its rate, what that must reach, and whether it does."""
    peer = vllm_figures.rate(kind, model, weights, column)
    ratio = figures.tokens_per_second / peer if peer else None
    wanted = vllm_figures.ratio_bar(kind, model, weights, column) if peer else None
    share_wanted = vllm_figures.FLOOR_BARS.get((model, weights)) if column == "b1" else None
    bars = [f">= {wanted:.2f}x"] if wanted else []
    good = [ratio >= wanted] if ratio and wanted else []
    share = rate_share(figures)
    if share_wanted and share and kind != "cpu":
        bars.append(f">= {share_wanted:.0%}")
        good.append(share >= share_wanted)
    steps = vllm_figures.step_ms(kind, model, weights, column)
    return (
        f"{peer:,.0f}" if peer else "-",
        f"{steps[0]:g} / {steps[1]:g}" if steps else "-",
        f"{ratio:.2f}x" if ratio else "-",
        " ".join(bars) or "-",
        "-" if not good else "met" if all(good) else "MISSED",
    )


def rate_share(figures: Figures) -> float | None:
    """At one stream: our rate over the one at which every step takes its floor, prefill counted against us."""
    return figures.tokens_per_second * figures.floor_ms / 1000 if figures.floor_ms else None


def cells(kind: str, model: str, weights: str, column: str, figures: Figures) -> list[str]:
    def number(value: float | None, digits: int) -> str:
        return "-" if value is None else f"{value:,.{digits}f}"

    share = figures.floor_share
    rate = f"{rate_share(figures):.0%}" if column == "b1" and figures.floor_ms else ""
    return [
        column,
        number(figures.tokens_per_second, 0),
        f"{figures.slowest:,.0f}-{figures.fastest:,.0f}",
        number(figures.prefill_ms, 1),
        number(figures.decode_ms, 3),
        number(figures.decode_device_ms, 3),
        number(figures.plan_ms, 3),
        number(figures.launch_ms, 3),
        number(figures.settle_ms, 3),
        f"{figures.graphed:.0%}",
        number(figures.bytes_per_second and figures.bytes_per_second / 1e12, 3),
        "-" if share is None else f"{share:.0%}" + (f" ({rate})" if rate else ""),
        *verdict(kind, model, weights, column, figures),
    ]
