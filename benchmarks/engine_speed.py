"""Tokens/s, step times and share of the memory floor of our engine, beside vLLM's figures for the same kind of GPU.

    python -m benchmarks.engine_speed                                   # all models and columns, offline
    python -m benchmarks.engine_speed --models r1-1.5b --columns b1 b64 --http --start
    python -m benchmarks.engine_speed --models r1-7b --profile b1
    python -m benchmarks.engine_speed --models r1-7b --dtype int4 --columns b1 b8 b64

Columns: bN is N requests at once, 512 tokens in and 128 out (b1: 128 in, 256 out); mix is 256 requests of 100-1024 in
and 100-1024 out; prefill is 32 prompts of 2048 tokens, where all tokens count. Random weights, fresh random prompts,
temperature 0.6, EOS ignored, no prefix hit (asserted), prefill counted into the time. Offline runs the real scheduler
and engine in one process, two steps in flight; --http runs b64 as 64 closed-loop SSE streams over the real server.
Medians of five runs (mix, prefill: three) after one warm-up run. Each model has a process of its own; results are
merged by model and column into benchmarks/results/engine_speed_GPU.json. Without a GPU it runs too (--models
smollm2-135m or tiny).

The columns of the table: decode ms is the time of steps that only decode, from one result to the next on the host's
clock, device ms the same on the device's; plan, launch and settle are the host's milliseconds a step. floor is the
share of the time that reading every needed byte once would take, at the read bandwidth measured in the same run; in
brackets, at one stream, the share of the rate that this would allow, with the prefill in the time.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import report, vllm_figures
from benchmarks.http_streams import b64_streams
from benchmarks.model_configs import CONFIGS
from benchmarks.workloads import WORKLOADS

PUBLISHED = ("r1-1.5b", "r1-7b", "v2-lite")


def run_alone(module: str, *arguments: str) -> None:
    """A benchmark in a process of its own. Ends this one where it failed; it has said why."""
    status = subprocess.run([sys.executable, "-m", module, *arguments], check=False, cwd=report.ROOT).returncode
    if status:
        sys.exit(status)


def offline(model: str, device: str, arguments: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "figures.json"
        command = [model, "--output", str(output), "--device", device, "--dtype", arguments.dtype]
        command += ["--columns", *arguments.columns]
        command += ["--repeats", str(arguments.repeats)] if arguments.repeats else []
        command += ["--no-prefix-cache"] if arguments.no_prefix_cache else []
        run_alone("benchmarks.engine_columns", *command)
        result: dict[str, Any] = json.loads(output.read_text())
        return result


def start(model: str) -> dict[str, Any]:
    """Start-up by phase."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "phases.json"
        run_alone("benchmarks.startup", model, "--output", str(output))
        return {"commit": report.commit(), **json.loads(output.read_text())}


def over_http(model: str, arguments: argparse.Namespace, result: dict[str, Any]) -> dict[str, Any]:
    """b64 once more, as 64 streams over the server. The ratio is to the offline figure, where that was taken too."""
    column = b64_streams(model, arguments.dtype, arguments.repeats or WORKLOADS["b64"].repeats)
    offline_rate = result["columns"].get("b64", {}).get("tokens_per_second")
    line = f"b64 over HTTP: {column.tokens_per_second:,.0f} tok/s ({min(column.runs):,.0f}-{max(column.runs):,.0f})"
    if offline_rate and result["device"] != "cpu":
        ratio = column.tokens_per_second / offline_rate
        met = "met" if ratio >= vllm_figures.HTTP_OVER_OFFLINE_BAR else "MISSED"
        line += f", {ratio:.1%} of offline, bar >= {vllm_figures.HTTP_OVER_OFFLINE_BAR:.0%}: {met}"
    print(line, flush=True)
    return {"commit": report.commit(), **asdict(column), "offline_tokens_per_second": offline_rate}


def merged(old: dict[str, Any], model: str, new: dict[str, Any]) -> dict[str, Any]:
    """The results on record with this run's columns in place of older ones."""
    models = dict(old.get("models", {}))
    key = f"{model} {new['weights']}"
    entry = {**models.get(key, {}), **new}
    entry["columns"] = {**models.get(key, {}).get("columns", {}), **new["columns"]}
    return {**old, "models": models | {key: entry}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(CONFIGS), default=list(PUBLISHED))
    parser.add_argument("--columns", nargs="+", choices=list(WORKLOADS), default=list(WORKLOADS))
    parser.add_argument("--dtype", default="bfloat16", help="of the weights; int4, int8 and fp8 are quantized")
    parser.add_argument("--repeats", type=int, help="runs that count, for every column")
    parser.add_argument("--http", action="store_true", help="b64 also as 64 streams over the real server")
    parser.add_argument("--start", action="store_true", help="also start-up by phase, on a folder written for it")
    parser.add_argument("--profile", choices=("b1", "b64"), help="instead: kernels of a decode step by time")
    parser.add_argument("--no-prefix-cache", action="store_true", help="do not look for shared prefixes")
    parser.add_argument("--output", type=Path, help="folder of the JSON; default benchmarks/results")
    arguments = parser.parse_args()
    device = "cpu" if report.device_name() == "cpu" else "cuda"
    if arguments.profile and device == "cpu":
        parser.error("--profile is about the kernels of a GPU, and there is none here")
    facts = report.print_header("Engine speed")
    for model in arguments.models:
        if arguments.profile:
            run_alone("benchmarks.decode_profile", model, arguments.profile, "--dtype", arguments.dtype)
            continue
        result = offline(model, device, arguments)
        if arguments.http:
            result["columns"]["b64 http"] = over_http(model, arguments, result)
        if arguments.start:
            result["start"] = start(model)
        name = f"engine_speed_{vllm_figures.gpu_kind(result['device'])}"
        old = report.read(name, arguments.output)
        path = report.write(name, merged(old, model, result) | {"machine": facts}, arguments.output)
        print(f"written to {path}")


if __name__ == "__main__":
    main()
