"""Figures of vLLM 0.26.0 by kind of GPU, taken with the workloads of ``workloads`` on random weights, and our bars.

Offline ``LLM.generate``, prefix cache off, temperature 0.6, EOS ignored, max_num_seqs 256, FlashAttention 3, CUDA
graphs and torch.compile; over HTTP ``/v1/completions`` with token-id prompts and SSE, Poisson arrivals, 256-768 tokens
in and 64-320 out, uniform. A figure is absolute for its kind of GPU, so each kind has its own.
"""

from __future__ import annotations

from dataclasses import dataclass

COLUMNS = ("b1", "b8", "b32", "b64", "b128", "b256", "mix", "prefill")
Key = tuple[str, str, str]
"""Kind of GPU, model, format of the weights."""

_NOT_TAKEN = float("nan")
_RATES: dict[Key, tuple[float, ...]] = {
    ("h200", "r1-1.5b", "bfloat16"): (449, 3432, 10518, 16266, 21269, 23927, 28003, 200569),
    ("h200", "r1-7b", "bfloat16"): (210, 1418, 4108, 5856, 7365, 8030, 12734, 46402),
    ("h200", "r1-7b", "fp8"): (294, 1986, 5158, 7982, 10084, 11119, 15480, 70381),
    # The better of its two kernels, Machete and Marlin, in each column.
    ("h200", "r1-7b", "int4"): (317, 1767, 4443, 5758, 7032, 7674, 12210, 44274),
    ("h200", "v2-lite", "bfloat16"): (309, 1078, 2916, 4860, 7643, 10498, 10456, 88989),
    ("h100", "r1-1.5b", "bfloat16"): (410, 2946, 9055, 12294, 18472, 21548, 25699, 191988),
    ("h100", "r1-7b", "bfloat16"): (157, 1111, 3258, 4896, 6591, 7496, 10806, 46259),
    ("h100", "r1-7b", "fp8"): (236, 1633, 4734, 7032, 8830, 10255, 13142, 68092),
    # Taken without uniform routing: random weights route to few experts, so only one stream compares.
    ("h100", "v2-lite", "bfloat16"): (248, *[_NOT_TAKEN] * 7),
}
"""Output tokens/s in the order of ``COLUMNS``; prefill: all tokens/s."""

_STEPS: dict[Key, tuple[tuple[float, float], ...]] = {
    ("h200", "r1-1.5b", "bfloat16"): ((2.19, 12), (2.04, 39), (2.39, 85), (2.62, 171), (3.39, 339), (5.74, 641)),
    ("h200", "r1-7b", "bfloat16"): ((4.74, 11), (4.99, 88), (5.17, 341), (5.63, 684), (6.59, 1387), (10.5, 2747)),
    ("h200", "r1-7b", "fp8"): ((3.39, 9), (3.61, 57), (4.45, 229), (4.52, 453), (5.70, 900), (8.89, 1818)),
    ("h200", "r1-7b", "int4"): ((3.70, 14), (3.92, 88), (4.46, 356), (5.60, 712), (6.92, 1451), (10.7, 2907)),
    ("h200", "v2-lite", "bfloat16"): ((3.18, 18), (6.58, 114), (9.45, 204), (10.0, 411), (10.9, 764), (12.6, 1517)),
}
"""Milliseconds of a decode-only step and of the prefill alone, b1 to b256; from b64 up approximate."""

Percentiles = tuple[float, float, float]


@dataclass(frozen=True, slots=True)
class HttpFigures:
    """Milliseconds at p50, p90 and p99; the longest gap of a stream at p50 and p99."""

    rate: int
    """Requests per second."""
    ttft: Percentiles
    tpot: Percentiles
    gap: tuple[float, float]


HTTP: dict[tuple[str, str], tuple[HttpFigures, ...]] = {
    ("h200", "r1-7b"): (
        HttpFigures(8, (26.9, 48.5, 99.3), (5.19, 5.59, 6.20), (24.1, 43.8)),
        HttpFigures(16, (32.3, 56.8, 100.1), (5.95, 6.48, 7.05), (29.1, 36.4)),
        HttpFigures(24, (42.4, 74.6, 106.1), (6.97, 8.32, 9.62), (30.1, 41.4)),
        HttpFigures(32, (52.3, 79.1, 123.9), (8.11, 9.11, 10.07), (32.4, 37.9)),
        HttpFigures(48, (85.5, 154.5, 393.8), (12.34, 17.09, 21.33), (52.0, 94.7)),
    ),
    # At 16 and 32 it was taken on two machines; the better of both stands here.
    ("h200", "r1-1.5b"): (
        HttpFigures(16, (26.4, 44.5, 63.3), (2.66, 3.18, 4.27), (20.6, 36.1)),
        HttpFigures(32, (36.0, 64.2, 86.6), (3.60, 5.76, 6.67), (22.7, 37.8)),
        HttpFigures(64, (50.3, 87.4, 159.8), (4.45, 7.06, 9.26), (22.6, 32.4)),
        HttpFigures(96, (356, 1820, 2369), (13.7, 19.8, 20.9), (56.5, 233)),
    ),
    ("h100", "r1-7b"): (
        HttpFigures(8, (31.9, 53.7, 95.3), (6.80, 7.18, 7.90), (26.7, 39.7)),
        HttpFigures(16, (38.2, 61.8, 101.0), (7.81, 8.34, 8.94), (30.2, 36.9)),
        HttpFigures(24, (42.1, 66.6, 104.8), (8.68, 9.56, 10.22), (29.9, 37.7)),
        HttpFigures(32, (45.8, 74.2, 97.6), (9.64, 11.46, 13.19), (30.2, 45.1)),
    ),
    ("h100", "r1-1.5b"): (
        HttpFigures(16, (25.5, 51.2, 66.6), (2.80, 3.48, 4.17), (20.3, 50.7)),
        HttpFigures(32, (48.0, 78.4, 103.6), (4.60, 6.13, 7.66), (28.5, 38.8)),
        HttpFigures(64, (86.2, 178.5, 252.7), (6.56, 8.40, 9.65), (30.4, 43.0)),
    ),
}

P50_BAR = {"r1-1.5b": 0.7, "r1-7b": 0.9}
"""Over HTTP: our TTFT and TPOT at p50 over vLLM's, at most."""
P99_BAR = 1.1
HTTP_OVER_OFFLINE_BAR = 0.93

_BARS: dict[tuple[str, str], tuple[float, ...]] = {
    ("r1-1.5b", "bfloat16"): (1.6, 1.5, 1.4, 1.25, 1.2, 1.2, 1.25, 1.0),
    ("r1-7b", "bfloat16"): (1.12, 1.10, 1.06, 1.04, 1.04, 1.06, 1.06, 1.0),
    ("v2-lite", "bfloat16"): (1.5, 1.2, 1.08, 1.07, 1.07, 1.1, 1.12, 1.1),
}
"""Our rate over vLLM's, at least, in the order of ``COLUMNS``."""
FLOOR_BARS = {("r1-1.5b", "bfloat16"): 0.50, ("r1-7b", "bfloat16"): 0.78, ("v2-lite", "bfloat16"): 0.52}
"""At one stream: share of the rate that reading every needed byte once would allow, at least."""
SHARE_ALONE = ("h100",)
"""Kinds of GPU on which the share alone decides about one stream."""


def gpu_kind(device: str) -> str:
    """``h200``, ``h100`` or another short name that fits into a file name, from the driver's name of a device."""
    words = device.lower().replace("nvidia", " ").split()
    return next((word for word in words if word in ("h100", "h200")), "-".join(words[:2]) or "unknown")


def rate(kind: str, model: str, weights: str, column: str) -> float | None:
    """vLLM's tokens/s; None where it was not taken."""
    figures = _RATES.get((kind, model, weights))
    value = figures[COLUMNS.index(column)] if figures else _NOT_TAKEN
    return value if value == value else None


def step_ms(kind: str, model: str, weights: str, column: str) -> tuple[float, float] | None:
    """vLLM's milliseconds of a decode-only step and of the prefill; None where they were not taken."""
    figures = _STEPS.get((kind, model, weights), ())
    index = COLUMNS.index(column)
    return figures[index] if index < len(figures) else None


def ratio_bar(kind: str, model: str, weights: str, column: str) -> float | None:
    """What our rate over vLLM's must reach; None where there is no such bar."""
    bars = _BARS.get((model, weights))
    if bars is None or (column == "b1" and kind in SHARE_ALONE):
        return None
    return bars[COLUMNS.index(column)]
