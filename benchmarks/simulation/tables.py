"""The comparison as text: the bars that were set, and goodput of every policy in every row."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.simulation.experiment import Comparison, Scores
from benchmarks.simulation.scoring import Score, mean_interval


def goodput(score: Score) -> float:
    return score.goodput


@dataclass(frozen=True, slots=True)
class Bar:
    """One number that was promised, and what came out."""

    name: str
    figure: float
    interval: float
    """Half the width of the 95 % interval; 0 where there is none."""
    least: float | None = None
    most: float | None = None

    @property
    def held(self) -> bool:
        return (self.least is None or self.figure >= self.least) and (self.most is None or self.figure <= self.most)

    def line(self) -> str:
        bound = f">= {self.least}" if self.least is not None else f"<= {self.most}" if self.most is not None else ""
        spread = f" ± {self.interval:.3f}" if self.interval else ""
        verdict = ("held" if self.held else "MISSED") if bound else "for comparison"
        return f"| {self.name} | {bound} | {self.figure:.4g}{spread} | {verdict} |"


def bars(comparison: Comparison) -> Iterator[Bar]:
    ours, static = comparison.ours, comparison.best_static
    yield _ratio(f"goodput of the mix against the best static ({static.policy.name})", ours, static, least=1.2)
    ratios = {row.name: _against_oracle(comparison, row.name) for row in comparison.grid.rows}
    worst = min(ratios, key=lambda name: ratios[name])
    yield Bar(f"the worst row ({worst}) against its oracle static with deadlines", ratios[worst], 0.0, least=0.98)
    yield Bar("all rows against their oracles, mean", sum(ratios.values()) / len(ratios), 0.0)
    single = max(comparison.fixed, key=lambda scores: scores.mean(goodput))
    yield _ratio(
        f"against the best single static with deadlines, chosen in hindsight ({single.policy.name})", ours, single
    )
    most = max(comparison.grid.loads)
    yield Bar(f"goodput at {most} of capacity over its peak", *_kept(comparison, ours, most), least=0.9)
    yield Bar(f"the same of {comparison.uncapped.policy.name}", *_kept(comparison, comparison.uncapped, most))
    yield Bar("admitted requests that met TTFT and TPOT", *mean_interval(ours.by_seed(_admitted)), least=0.99)
    yield Bar("of these, TTFT", *mean_interval(ours.by_seed(lambda score: score.admitted_ttft)))
    yield Bar("of these, TPOT", *mean_interval(ours.by_seed(lambda score: score.admitted_tpot)))
    yield Bar("recompute tax, worst run", max(run.recomputed for run in ours.runs.values()), 0.0, most=0.02)
    yield Bar("step-time error, median of the runs' medians", ours.mean(lambda score: score.step_error_p50), 0.0)
    yield Bar("step-time error, mean of the runs' p95", ours.mean(lambda score: score.step_error_p95), 0.0)


def _admitted(score: Score) -> float:
    return score.admitted_met


def _ratio(name: str, ours: Scores, other: Scores, least: float | None = None) -> Bar:
    """Both saw the same requests under each seed, so the ratios of seeds give the interval."""
    pairs = zip(ours.by_seed(goodput), other.by_seed(goodput), strict=True)
    return Bar(name, *mean_interval([mine / theirs if theirs else 1e9 for mine, theirs in pairs]), least=least)


def _against_oracle(comparison: Comparison, row: str) -> float:
    """Ours over the fixed budget that is best in hindsight for this row."""
    return comparison.ours.mean(goodput, row=row) / max(scores.mean(goodput, row=row) for scores in comparison.fixed)


def _kept(comparison: Comparison, scores: Scores, load: float) -> tuple[float, float]:
    peak = max(scores.mean(goodput, load=other) for other in comparison.grid.loads)
    return mean_interval([value / peak for value in scores.by_seed(goodput, load=load)])


def markdown(comparison: Comparison, notes: list[str]) -> str:
    """Everything, for a file."""
    lines = ["# Batching policies in the simulator", "", *notes, "", "| bar | wanted | figure | |", "|---|---|---|---|"]
    lines += [bar.line() for bar in bars(comparison)]
    lines += ["", "Goodput over capacity, mean over loads and seeds with its 95 % interval:", ""]
    lines += _goodput_table(comparison)
    for load in comparison.grid.loads:
        lines += ["", f"At {load} of capacity:", "", *_load_table(comparison, load)]
    return "\n".join(lines) + "\n"


def _goodput_table(comparison: Comparison) -> list[str]:
    names = [row.name for row in comparison.grid.rows]
    lines = ["| policy | mix | " + " | ".join(names) + " |", "|---" * (len(names) + 2) + "|"]
    for scores in comparison.all():
        cells = [_cell(scores, None), *(_cell(scores, name) for name in names)]
        lines.append(f"| {scores.policy.name} | " + " | ".join(cells) + " |")
    return lines


def _cell(scores: Scores, row: str | None) -> str:
    mean, half = mean_interval(scores.by_seed(goodput, row=row))
    return f"{mean:.3f} ± {half:.3f}"


def _load_table(comparison: Comparison, load: float) -> list[str]:
    lines = [
        "| policy | goodput | refused | admitted that met all | worst tenant or class | TTFT p99 (s) | TPOT p99 (ms) |",
        "|---|---|---|---|---|---|---|",
    ]
    for scores in comparison.all():
        mean = [
            scores.mean(of, load=load) for of in (goodput, _refused, _admitted, _worst_tenant, _ttft_p99, _tpot_p99)
        ]
        lines.append(
            f"| {scores.policy.name} | {mean[0]:.3f} | {mean[1]:.1%} | {mean[2]:.1%} | {mean[3]:.3f} "
            f"| {mean[4]:.2f} | {mean[5] * 1000:.1f} |"
        )
    return lines


def _refused(score: Score) -> float:
    return score.refused


def _worst_tenant(score: Score) -> float:
    return score.worst_tenant


def _ttft_p99(score: Score) -> float:
    return score.ttft_p99


def _tpot_p99(score: Score) -> float:
    return score.tpot_p99
