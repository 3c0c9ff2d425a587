"""Our GPTQ and AWQ beside llm-compressor's: the same model, calibration windows and group size.

    python -m benchmarks.compression_peer --peer-python ENV/bin/python [--model smollm2-135m] [--work DIR]

ENV is an environment of its own with llmcompressor, whose requirements exclude ours. Both sides read one folder of
float32 weights (a GGUF file is dequantized into it) and the same windows of tokens, and round the same layers to 4 bits
with zero points; all else is each side's default. Perplexity is taken of the weights that each folder means,
dequantized, so that no kernel's rounding of activations blurs it. What is done is kept in DIR, and a second call goes
on behind it. Intervals are paired bootstraps over windows of the text.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import time
from contextlib import closing
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from benchmarks import report
from compression.base_model import FINAL_NORM, BaseModel
from compression.calibrate import DEFAULT_TEXT as CALIBRATION
from compression.calibrate import text_tokens
from compression.compress import Job, compress
from compression.evaluate import DEFAULT_TEXT as TEXT
from compression.export import save_tensors, write_config, write_shards, write_text
from compression.measures.agreement import LiveModel, Passage, compare
from compression.measures.intervals import Estimate, ratio_of_sums
from compression.measures.models import load_reference, open_subject, spec_of
from compression.measures.texts import read_text, token_windows
from compression.plan import layer_index, linear_layers
from compression.recipe import parse_recipe
from engines.manifest import read_manifest
from server.catalog import resolve

METHODS = ("gptq", "awq")
WORKER = Path(__file__).with_name("llm_compressor_run.py")
EVALUATED_TOKENS = 1024


@dataclass(frozen=True, slots=True)
class Settings:
    """Of both sides."""

    work: Path
    peer_python: Path
    group_size: int
    windows: int
    """Of calibration, and how many tokens each has."""
    tokens: int
    text_windows: int
    """To measure on."""
    threads: int


def write_dequantized(model: Path, folder: Path) -> None:
    """A plain Hugging Face folder of float32 weights, whatever ``model`` holds."""
    manifest = read_manifest(model)
    base = BaseModel(manifest, torch.device("cpu"))
    partial = folder.with_name(f"{folder.name}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    outer = {f"{layer.name}.weight": base.linear(layer) for layer in base.outer_layers()}
    parts = [{FINAL_NORM: base.tensor(FINAL_NORM), **outer}]
    layers = linear_layers(base.config)
    for index in range(base.config.layers):
        parts.append(base.layer_tensors(index, [layer for layer in layers if layer_index(layer.name) == index]))
    files = [partial / f"part-{place:05}.safetensors" for place in range(len(parts))]
    for path, tensors in zip(files, parts, strict=True):
        save_tensors(path, {name: tensor.contiguous() for name, tensor in tensors.items()}, [])
    write_shards(files, partial)
    for path in files:
        path.unlink()
    write_config(manifest, {}, torch.float32, partial)
    config = json.loads((partial / "config.json").read_text())
    del config["quantization_config"]
    (partial / "config.json").write_text(json.dumps(config, indent=2))
    write_text(manifest, partial)
    partial.rename(folder)


def our_recipe(method: str, settings: Settings) -> str:
    """Of ``compress``."""
    rule = {"match": ["*"], "bits": 4, "group_size": settings.group_size, "symmetric": False}
    rule["method"] = "gptq" if method == "gptq" else "rtn"
    values: dict[str, Any] = {"layers": [rule]}
    values["calibration"] = {"windows": settings.windows, "tokens": settings.tokens}
    if method == "awq":
        values["scaling"] = {"rule": "awq"}
    return json.dumps(values)


def run_ours(method: str, base: Path, out: Path, settings: Settings) -> dict[str, Any]:
    """Seconds and version."""
    begun = time.monotonic()
    recipe = parse_recipe(our_recipe(method, settings), f"our-{method}")
    compress(Job(base, base.name, recipe, out, CALIBRATION), lambda step: None, time.monotonic)
    return {"seconds": time.monotonic() - begun, "versions": {"slimserve": metadata.version("slimserve")}}


def run_peer(method: str, base: Path, out: Path, settings: Settings) -> dict[str, Any]:
    """As ``run_ours``. Raises CalledProcessError; what the library says goes to a file beside ``out``."""
    windows = settings.work / "windows.safetensors"
    if not windows.exists():
        tokens = text_tokens(CALIBRATION, read_manifest(base), settings.windows, settings.tokens)
        save_file({"tokens": tokens}, windows)
    job = settings.work / f"{out.name}.json"
    facts = {"model": str(base), "windows": str(windows), "method": method, "out": str(out)}
    job.write_text(json.dumps({**facts, "group_size": settings.group_size, "threads": settings.threads}))
    with (settings.work / f"{out.name}.log").open("w") as log:
        command = [str(settings.peer_python), str(WORKER), str(job)]
        answer = subprocess.run(command, stdout=subprocess.PIPE, stderr=log, text=True, check=True)
    found: dict[str, Any] = json.loads(answer.stdout.strip().splitlines()[-1])
    return found


def _live(folder: Path) -> LiveModel:
    subject = open_subject(folder)
    with closing(subject.text):
        loaded = load_reference(subject, spec_of(subject, "cpu", "float32", EVALUATED_TOKENS))
    return LiveModel(loaded.model, loaded.device, loaded.dtype)


def losses(folder: Path, base: Path, windows: int) -> dict[str, list[float]]:
    """Summed over each window of the text: tokens, both models' losses, divergence."""
    subject = open_subject(base)
    with closing(subject.text):
        chosen, _ = token_windows(subject.text, read_text(TEXT), EVALUATED_TOKENS, windows, TEXT.name)
    passages = [Passage(window.tolist()) for window in chosen]
    vocab = subject.manifest.vocab_size
    scores = compare(_live(folder), _live(base), passages, vocab, folder.name, lambda what, done, total: None)
    return {
        "tokens": scores.tokens.tolist(),
        "loss": scores.own_loss.tolist(),
        "base_loss": scores.base_loss.tolist(),
        "divergence": scores.divergence.tolist(),
    }


def measure(side: str, method: str, base: Path, settings: Settings) -> dict[str, Any]:
    """Compress, evaluate, and keep the result: it is read where it is there already."""
    out = settings.work / f"{side}-{method}"
    kept = settings.work / f"{out.name}-result.json"
    if kept.exists():
        found: dict[str, Any] = json.loads(kept.read_text())
        return found
    made = settings.work / f"{out.name}-made.json"
    if not made.exists():
        facts = (run_ours if side == "ours" else run_peer)(method, base, out, settings)
        made.write_text(json.dumps(facts))
    found = {**json.loads(made.read_text()), **losses(out, base, settings.text_windows)}
    kept.write_text(json.dumps(found))
    return found


def ratio_to_base(found: dict[str, Any]) -> Estimate:
    """Of the perplexities."""
    difference = np.asarray(found["loss"]) - np.asarray(found["base_loss"])
    return ratio_of_sums(difference, found["tokens"], math.exp)


def ratio_to_peer(ours: dict[str, Any], peer: dict[str, Any]) -> Estimate:
    """Of our perplexity to the peer's, over the same windows."""
    return ratio_of_sums(np.asarray(ours["loss"]) - np.asarray(peer["loss"]), ours["tokens"], math.exp)


def rounded(estimate: Estimate) -> dict[str, float]:
    return {name: round(getattr(estimate, name), 5) for name in ("value", "low", "high")}


def entry(results: dict[str, dict[str, Any]], settings: Settings) -> dict[str, Any]:
    """One method's part of the JSON."""
    sides = {
        side: {
            "perplexity_ratio": rounded(ratio_to_base(found)),
            "divergence": rounded(ratio_of_sums(found["divergence"], found["tokens"])),
            "seconds": round(found["seconds"], 1),
            "versions": found["versions"],
        }
        for side, found in results.items()
    }
    both = {name: getattr(settings, name) for name in ("group_size", "windows", "tokens", "text_windows")}
    return {**both, **sides, "ours_to_peer": rounded(ratio_to_peer(results["ours"], results["peer"]))}


def print_table(methods: dict[str, dict[str, Any]]) -> None:
    print("| | calibration | ours | llm-compressor | ours to theirs | KL, ours | KL, theirs |")
    print("|---|---|---|---|---|---|---|")
    for method, one in methods.items():
        ratios = [one[side]["perplexity_ratio"]["value"] for side in ("ours", "peer")]
        to_peer = one["ours_to_peer"]
        cells = [method.upper(), f"{one['windows']} x {one['tokens']}", *(f"{ratio:.4f}" for ratio in ratios)]
        cells.append(f"{to_peer['value']:.4f} [{to_peer['low']:.4f}, {to_peer['high']:.4f}]")
        cells += [f"{one[side]['divergence']['value']:.4f}" for side in ("ours", "peer")]
        print("| " + " | ".join(cells) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compression_peer", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--peer-python", type=Path, required=True)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--work", type=Path, default=Path("build/compression-peer"))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--text-windows", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    facts = report.print_header("GPTQ and AWQ beside llm-compressor's")
    settings = Settings(
        work=chosen.work.resolve(),
        peer_python=chosen.peer_python.absolute(),
        group_size=chosen.group_size,
        windows=chosen.windows,
        tokens=chosen.tokens,
        text_windows=chosen.text_windows,
        threads=chosen.threads,
    )
    settings.work.mkdir(parents=True, exist_ok=True)
    base = settings.work / "base"
    if not base.exists():
        write_dequantized(resolve(chosen.model), base)
    kept = report.read("compression_peer").get("methods", {})
    for method in chosen.methods:
        kept[method] = entry({side: measure(side, method, base, settings) for side in ("peer", "ours")}, settings)
        out = {"machine": facts, "model": chosen.model, "calibration": CALIBRATION.name, "methods": kept}
        report.write("compression_peer", out)
    print_table(kept)


if __name__ == "__main__":
    main()
