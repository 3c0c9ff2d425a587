"""What mixed expert formats win over one format for all, and over the frequency rule, at equal bytes.

    python -m benchmarks.moe_budgets MODEL --calibration TEXT --text TEXT

MODEL is a folder with routed experts, such as the one that ``python -m compression.train export`` writes. The preset
``moe-hot-cold`` is run with all experts cold, all hot, and three budgets between them, by estimated loss and by
frequency. Each result's divergence from MODEL is compared, window by window, with the straight line between the two
ends at the same bytes of experts; intervals are paired bootstraps over windows. The last line is ``deepseek-mixed``.
Both sides compute with dequantized weights, so that what kernels round of activations does not blur the comparison.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from msgspec.structs import replace

from benchmarks import report
from compression.compress import Job, compress
from compression.measures.agreement import LiveModel, Passage, compare
from compression.measures.intervals import Estimate, Values, ratio_of_sums
from compression.measures.models import LoadedModel, Subject, load_reference, open_subject, spec_of
from compression.measures.routing import Choices, chosen_experts, overlap
from compression.measures.texts import Windows, read_text, token_windows
from compression.recipe import Recipe, load_recipe
from engines.protocol import EngineSpec
from engines.safetensors_header import ITEM_BYTES, read_safetensors_header

BUDGETS = (0.25, 0.5, 0.75)
WINDOWS = 64


@dataclass(frozen=True, slots=True)
class Measured:
    """One compressed model against its base; the arrays have one entry a window."""

    name: str
    expert_bytes: int
    divergence: Values
    loss_difference: Values
    """From the base's loss of the same window."""
    routers: Estimate


class Bench:
    """The base model, loaded once, and the text that every result is measured on."""

    def __init__(self, model: Path, calibration: Path, text: Path, scratch: Path, windows: int) -> None:
        self.model, self.calibration, self.scratch = model, calibration, scratch
        subject = open_subject(model)
        with closing(subject.text):
            length = min(1024, subject.manifest.max_context)
            self.windows, _ = token_windows(subject.text, read_text(text), length, windows, text.name)
        self.passages = [Passage(window.tolist()) for window in self.windows]
        self.base = load_reference(subject, _spec(subject, length))
        self.base_choices = _choices(self.base, self.windows)
        self.vocab = subject.manifest.vocab_size

    @property
    def scored(self) -> Values:
        return np.array([passage.scored for passage in self.passages], np.float64)

    def measure(self, name: str, recipe: Recipe) -> Measured:
        """Compress and compare."""
        out = self.scratch / name
        if not out.exists():
            compress(Job(self.model, self.model.name, recipe, out, self.calibration), lambda step: None, time.monotonic)
        subject = open_subject(out)
        with closing(subject.text):
            own = load_reference(subject, _spec(subject, self.windows.shape[1]))
        scores = compare(_live(own), _live(self.base), self.passages, self.vocab, name, lambda what, done, total: None)
        routers = overlap(_choices(own, self.windows), self.base_choices)
        differences = scores.own_loss - scores.base_loss
        return Measured(name, _expert_bytes(subject), scores.divergence, differences, routers)


def _spec(subject: Subject, length: int) -> EngineSpec:
    return spec_of(subject, "cpu", "float32", length)


def _live(loaded: LoadedModel) -> LiveModel:
    return LiveModel(loaded.model, loaded.device, loaded.dtype)


def _choices(loaded: LoadedModel, windows: Windows) -> list[Choices]:
    return chosen_experts(loaded, [window.tolist() for window in windows])


def _expert_bytes(subject: Subject) -> int:
    headers = [read_safetensors_header(path) for path in subject.manifest.files]
    tensors = [item for header in headers for item in header.tensors.items()]
    return sum(math.prod(part.shape) * ITEM_BYTES[part.dtype] for name, part in tensors if ".mlp.experts." in name)


def above_line(one: Measured, cold: Measured, hot: Measured, scored: Values) -> Estimate:
    """Nats a token above the straight line between the ends; below it where negative."""
    share = (one.expert_bytes - cold.expert_bytes) / (hot.expert_bytes - cold.expert_bytes)
    line = (1 - share) * np.asarray(cold.divergence) + share * np.asarray(hot.divergence)
    return ratio_of_sums(np.asarray(one.divergence) - line, scored)


def print_table(rows: Sequence[Measured], bench: Bench) -> None:
    by_name, scored = {row.name: row for row in rows}, bench.scored
    cold, hot = by_name["cold"], by_name["hot"]
    print("| | expert MB | KL, nats a token | above the line | less the frequency rule | perplexity | routers agree |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        divergence = ratio_of_sums(row.divergence, scored)
        line = "" if row.name in ("cold", "hot", "deepseek-mixed") else _interval(above_line(row, cold, hot, scored))
        usual = by_name.get(row.name.replace("loss", "frequency")) if row.name.startswith("loss") else None
        less = ""
        if usual is not None:
            less = _interval(ratio_of_sums(np.asarray(row.divergence) - np.asarray(usual.divergence), scored))
        perplexity = f"x {math.exp(ratio_of_sums(row.loss_difference, scored).value):.4f}"
        cells = (row.name, f"{row.expert_bytes / 1e6:.3f}", _interval(divergence), line, less, perplexity)
        print("| " + " | ".join(cells) + f" | {100 * row.routers.value:.2f} % |", flush=True)


def _interval(estimate: Estimate) -> str:
    return f"{estimate.value:.5f} [{estimate.low:.5f}, {estimate.high:.5f}]"


def recipes() -> dict[str, Recipe]:
    """By the names of the table's rows."""
    preset = load_recipe("moe-hot-cold")
    assert preset.experts is not None
    ends = {"cold": 0.0, "hot": 1.0}
    found = {name: replace(preset, experts=replace(preset.experts, budget=share)) for name, share in ends.items()}
    for share in BUDGETS:
        for rule in ("loss", "frequency"):
            experts = replace(preset.experts, budget=share, rule=rule)
            found[f"{rule}-{share:.2f}"] = replace(preset, experts=experts)
    return {**found, "deepseek-mixed": load_recipe("deepseek-mixed")}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.moe_budgets", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True, help="to measure on; none of it in the calibration")
    parser.add_argument("--windows", type=int, default=WINDOWS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--keep", type=Path, help="folder of the compressed models; those that are there are not made")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    report.print_header("Expert formats at equal bytes")
    with tempfile.TemporaryDirectory(prefix="moe-budgets-") as scratch:
        kept = chosen.keep or Path(scratch)
        bench = Bench(chosen.model, chosen.calibration, chosen.text, kept, chosen.windows)
        print_table([bench.measure(name, recipe) for name, recipe in recipes().items()], bench)


if __name__ == "__main__":
    main()
