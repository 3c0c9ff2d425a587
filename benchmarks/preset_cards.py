"""Every preset for dense models from one command to an answer: compressed, served, asked, evaluated; cards for docs.

    python -m benchmarks.preset_cards [--model smollm2-135m] [--work DIR] [--presets NAME ...] [--windows N]

For each preset: ``slimserve compress``, ``slimserve serve`` with one chat, ``slimserve evaluate`` without speeds, which
are worth taking on a quiet machine alone. Cards go to docs/cards, figures beside those of other presets into the
results. What is done is kept in DIR: a call that was stopped goes on when it is given again.
"""

from __future__ import annotations

import argparse
import subprocess
from pathlib import Path
from typing import Any

import httpx
import msgspec
import torch

from benchmarks import report
from benchmarks.servers import free_port, running, slimserve
from compression.base_model import BaseModel
from compression.card import Card, markdown, read_card
from compression.measures.intervals import Estimate
from compression.plan import linear_layers, make_plan
from compression.recipe import load_recipe
from compression.stored_formats import stored_bytes
from engines.manifest import read_manifest
from server.catalog import resolve

BARS: dict[str, float | None] = {
    "int8": 1.005,
    "int8-cpu": None,
    "int8-dynamic": 1.015,
    "w8a8": None,
    "fp8": None,
    "fp8-block": None,
    "int4-g128": None,
    "int4-g64": 1.12,
    "int4-g64-tuned": 1.08,
    "kmeans-4bit": None,
}
"""Largest ratio of perplexities that is accepted on SmolLM2-135M; presets in the order of the table."""
QUESTION = "What is the capital of France? Answer in one sentence."
ANSWER_TOKENS = 32
CARDS = report.ROOT / "docs" / "cards"


def compressed(preset: str, model: str, folder: Path, threads: int) -> None:
    """Raises CalledProcessError; the command says itself what is wrong. A run that was stopped goes on."""
    if folder.exists():
        return
    command = slimserve("compress", model, "--recipe", preset, "--out", str(folder), "--no-card")
    subprocess.run([*command, "--threads", str(threads)], check=True)


def chatted(folder: Path, kept: Path) -> str:
    """What the served folder answers."""
    if kept.exists():
        return kept.read_text()
    port = free_port()
    command = slimserve("serve", str(folder), "--port", str(port))
    with running(folder.name, command, port, "/health/ready", log=kept.with_suffix(".log")) as server:
        models = httpx.get(f"{server.url}/v1/models", timeout=60).raise_for_status().json()
        body = {"model": models["data"][0]["id"], "max_tokens": ANSWER_TOKENS, "temperature": 0}
        body["messages"] = [{"role": "user", "content": QUESTION}]
        answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=300).raise_for_status().json()
    text: str = answer["choices"][0]["message"]["content"]
    kept.write_text(text)
    return text


def evaluated(folder: Path, model: str, windows: int, out: Path, threads: int) -> Card:
    """By ``slimserve evaluate``. Raises CalledProcessError."""
    if not (out / "card.json").exists():
        command = slimserve("evaluate", str(folder), "--against", model, "--out", str(out), "--windows", str(windows))
        subprocess.run([*command, "--question-count", "0", "--no-speed", "--threads", str(threads)], check=True)
    return read_card(out)


def arithmetic(preset: str, model: str) -> int:
    """Bytes of all tensors that the preset's text implies."""
    base = BaseModel(read_manifest(resolve(model)), torch.device("cpu"))
    layers, outer = linear_layers(base.config), base.outer_layers()
    plan = make_plan(load_recipe(preset), layers, outer, torch.bfloat16).layers
    total = 4 * base.config.hidden * (2 * base.config.layers + 1)  # norms
    for layer in (*layers, *outer):
        rows, columns = layer.out_features, layer.in_features
        total += stored_bytes(plan[layer.name].scheme, rows, columns) if layer.name in plan else 2 * rows * columns
    return total


def entry(card: Card, folder: Path, preset: str, model: str, answer: str) -> dict[str, Any]:
    """One preset's part of the JSON."""
    assert card.text is not None
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    bar = BARS[preset]
    return {
        "ratio": rounded(card.text.ratio),
        "divergence": rounded(card.text.divergence),
        "same_best": rounded(card.text.same_best),
        "windows": card.text.windows,
        "bar": bar,
        "met": None if bar is None else card.text.ratio.value <= bar,
        "bytes": size,
        "to_arithmetic": round(size / arithmetic(preset, model), 4),
        "answer": answer,
    }


def rounded(estimate: Estimate) -> dict[str, float]:
    return {name: round(getattr(estimate, name), 5) for name in ("value", "low", "high")}


def write_card(preset: str, card: Card, command: str) -> None:
    """docs/cards/PRESET.md: the card, and the command that makes the folder."""
    CARDS.mkdir(exist_ok=True)
    named = msgspec.structs.replace(card, model=preset)
    title, rest = markdown(named, ()).split("\n", 1)
    (CARDS / f"{preset}.md").write_text(f"{title}\n\n```sh\n{command}\n```\n{rest}")


def table(presets: dict[str, Any]) -> list[str]:
    """For docs/compressing.md."""
    lines = ["| preset | perplexity ratio | bar | KL, nats a token | MB | to arithmetic |", "|---|---|---|---|---|---|"]
    for name in [name for name in BARS if name in presets]:
        one = presets[name]
        ratio, bar = one["ratio"], "" if one["bar"] is None else str(one["bar"])
        short = "" if one["met"] in (None, True) else f" (missed by {ratio['value'] - one['bar']:.3f})"
        cells = [f"[{name}](cards/{name}.md)", f"{ratio['value']:.4f} [{ratio['low']:.4f}, {ratio['high']:.4f}]"]
        cells += [bar + short, f"{one['divergence']['value']:.4f}", f"{one['bytes'] / 1e6:.1f}"]
        lines.append("| " + " | ".join([*cells, f"{one['to_arithmetic']:.3f}"]) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.preset_cards", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--work", type=Path, default=Path("build/preset-cards"))
    parser.add_argument("--presets", nargs="+", choices=list(BARS), default=list(BARS))
    parser.add_argument("--windows", type=int, default=64, help="of the text, 1,024 tokens each")
    parser.add_argument("--threads", type=int, default=2)
    chosen = parser.parse_args()
    facts = report.print_header("Presets")
    chosen.work.mkdir(parents=True, exist_ok=True)
    for preset in chosen.presets:
        folder = chosen.work.resolve() / preset
        compressed(preset, chosen.model, folder, chosen.threads)
        answer = chatted(folder, folder.with_name(f"{preset}-answer.txt"))
        cards = folder.with_name(f"{preset}-card")
        card = evaluated(folder, chosen.model, chosen.windows, cards, chosen.threads)
        write_card(preset, card, f"slimserve compress {chosen.model} --recipe {preset} --out {preset}")
        kept = report.read("preset_cards").get("presets", {})
        kept[preset] = entry(card, folder, preset, chosen.model, answer)
        report.write("preset_cards", {"machine": facts, "model": chosen.model, "presets": kept})
    print("\n".join(table(report.read("preset_cards")["presets"])))


if __name__ == "__main__":
    main()
