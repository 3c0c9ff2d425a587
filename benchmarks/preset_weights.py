"""What presets' weights are worth without the rounding of any kernel, and pairs of presets window by window.

    python -m benchmarks.preset_weights [--model smollm2-135m] [--work DIR] [--presets NAME ...] [--windows N]

The cards of ``benchmarks.preset_cards`` measure models as they are served, where a CPU rounds inputs of weight-only
formats to 8 bits; here weights are dequantized and inputs stay float32. DIR is that benchmark's: what it has not
compressed is left out. What is done is kept there. Intervals are paired bootstraps over windows of the text.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from benchmarks import report
from benchmarks.compression_peer import losses, ratio_to_base, ratio_to_peer, rounded
from benchmarks.preset_cards import BARS
from compression.measures.intervals import ratio_of_sums
from server.catalog import resolve

WEIGHT_ONLY = ("int8", "int4-g128", "int4-g64", "int4-g64-tuned", "kmeans-4bit")
"""Presets with inputs as they are."""
PAIRS = (("kmeans-4bit", "int4-g64"),)
"""Formats of 4 bits in groups of 64, of which the second, with its zero points, takes no less than the first."""


def file_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def measured(folder: Path, base: Path, windows: int) -> dict[str, Any]:
    """Sums of each window; read where they are there already."""
    kept = folder.with_name(f"{folder.name}-weights-{windows}.json")
    if kept.exists():
        found: dict[str, Any] = json.loads(kept.read_text())
        return found
    found = losses(folder, base, windows)
    kept.write_text(json.dumps(found))
    return found


def entry(found: dict[str, Any], folder: Path) -> dict[str, Any]:
    """One preset's part of the JSON."""
    ratio, bar = ratio_to_base(found), BARS[folder.name]
    return {
        "ratio": rounded(ratio),
        "divergence": rounded(ratio_of_sums(found["divergence"], found["tokens"])),
        "bar": bar,
        "met": None if bar is None else ratio.value <= bar,
        "bytes": file_bytes(folder),
    }


def pairs(found: dict[str, dict[str, Any]], work: Path) -> dict[str, Any]:
    """By ``ONE / OTHER``: the ratio of their perplexities, and of the bytes of their files."""
    parts = {}
    for one, other in PAIRS:
        if one in found and other in found:
            sizes = file_bytes(work / one) / file_bytes(work / other)
            both = ratio_to_peer(found[one], found[other])
            parts[f"{one} / {other}"] = {"perplexity": rounded(both), "bytes": round(sizes, 4)}
    return parts


def shown(estimate: dict[str, float]) -> str:
    return f"{estimate['value']:.4f} [{estimate['low']:.4f}, {estimate['high']:.4f}]"


def table(presets: dict[str, Any], of_pairs: dict[str, Any]) -> list[str]:
    lines = ["| | perplexity ratio, inputs unrounded | bar | KL, nats a token | MB |", "|---|---|---|---|---|"]
    for name, one in presets.items():
        cells = [name, shown(one["ratio"]), str(one["bar"] or ""), f"{one['divergence']['value']:.4f}"]
        lines.append("| " + " | ".join([*cells, f"{one['bytes'] / 1e6:.1f}"]) + " |")
    return lines + [f"{name}: {shown(one['perplexity'])}, bytes {one['bytes']:.4f}" for name, one in of_pairs.items()]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.preset_weights", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--work", type=Path, default=Path("build/preset-cards"))
    parser.add_argument("--presets", nargs="+", choices=WEIGHT_ONLY, default=list(WEIGHT_ONLY))
    parser.add_argument("--windows", type=int, default=24, help="of the text, 1,024 tokens each")
    parser.add_argument("--threads", type=int, default=2)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    facts = report.print_header("Presets' weights")
    folders = [chosen.work.resolve() / name for name in chosen.presets]
    base = resolve(chosen.model)
    found = {folder.name: measured(folder, base, chosen.windows) for folder in folders if folder.exists()}
    presets = {name: entry(one, chosen.work.resolve() / name) for name, one in found.items()}
    of_pairs = pairs(found, chosen.work.resolve())
    out = {"machine": facts, "model": chosen.model, "windows": chosen.windows, "presets": presets, "pairs": of_pairs}
    report.write("preset_weights", out)
    print("\n".join(table(presets, of_pairs)))


if __name__ == "__main__":
    main()
