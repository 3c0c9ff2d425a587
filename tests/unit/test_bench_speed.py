"""The arithmetic behind the speed tables, and the offline loop over an engine that checks every plan."""

from __future__ import annotations

import math
import random
from pathlib import Path

import pytest

from benchmarks import vllm_figures
from benchmarks.decode_profile import Kernel, table
from benchmarks.engine_speed import merged
from benchmarks.engine_table import COLUMNS, Figures, cells
from benchmarks.floors import decode_bytes, decode_weights, distinct_experts
from benchmarks.http_rates import lines
from benchmarks.model_configs import CONFIGS, config_folder
from benchmarks.offline import OfflineServing
from benchmarks.report import row
from benchmarks.startup import write_model
from benchmarks.workloads import WORKLOADS, Workload
from engines.fake import FakeEngine
from engines.manifest import read_manifest
from engines.models.config import ModelConfig, parse_config
from engines.protocol import Capacity, StepPlan, StepResult
from server.bench.summary import Quantiles
from server.scheduler.config import SchedulerConfig
from tests.unit.test_bench_summary import outcome, summary_of


def config_of(model: str, folder: Path) -> ModelConfig:
    return parse_config(read_manifest(config_folder(folder, model), random_weights=True))


# --- floors


@pytest.mark.parametrize(
    ("model", "rows", "gigabytes"),
    # From the published configs: all weights but the embedding, for V2-Lite only the experts that are hit.
    [
        ("r1-1.5b", 1, 3.09),
        ("r1-1.5b", 64, 3.09),
        ("r1-7b", 1, 14.14),
        ("v2-lite", 1, 4.9),
        ("v2-lite", 8, 17.9),
        ("v2-lite", 64, 31.0),
    ],
)
def test_weights_that_a_step_reads(model: str, rows: int, gigabytes: float, tmp_path: Path) -> None:
    assert 2 * decode_weights(config_of(model, tmp_path), rows) / 1e9 == pytest.approx(gigabytes, rel=0.01)


def test_kv_is_read_for_each_row_and_token(tmp_path: Path) -> None:
    config = config_of("r1-1.5b", tmp_path)
    weights = decode_bytes(config, "bfloat16", 28672.0, [0, 0])
    assert decode_bytes(config, "bfloat16", 28672.0, [512, 100]) - weights == 612 * 28672


@pytest.mark.parametrize("rows", [1, 3, 40])
def test_distinct_experts_are_those_that_draws_give(rows: int) -> None:
    randomness = random.Random(rows)
    tokens = [[randomness.sample(range(64), 6) for _ in range(rows)] for _ in range(3000)]
    drawn = [len({expert for token in step for expert in token}) for step in tokens]
    assert distinct_experts(64, 6, rows) == pytest.approx(sum(drawn) / len(drawn), rel=0.02)


# --- workloads and vLLM's figures


def test_the_mix_is_the_one_that_the_peers_ran() -> None:
    randomness = random.Random(0)
    inputs = [randomness.randint(100, 1024) for _ in range(256)]
    outputs = [randomness.randint(100, 1024) for _ in range(256)]
    assert (list(WORKLOADS["mix"].inputs), list(WORKLOADS["mix"].outputs)) == (inputs, outputs)


def test_the_columns_have_their_lengths() -> None:
    assert (WORKLOADS["b1"].inputs, WORKLOADS["b1"].outputs) == ((128,), (256,))
    assert (WORKLOADS["b64"].inputs, WORKLOADS["b64"].outputs) == ((512,) * 64, (128,) * 64)
    assert WORKLOADS["prefill"].counted_tokens == 32 * 2049
    assert WORKLOADS["b256"].counted_tokens == 256 * 128
    assert tuple(WORKLOADS) == vllm_figures.COLUMNS


def test_prompts_are_fresh_each_time() -> None:
    randomness = random.Random(1)
    first, second = (WORKLOADS["b8"].prompts(500, randomness) for _ in range(2))
    assert [len(prompt) for prompt in first] == [512] * 8
    assert first != second
    assert all(0 <= token < 500 for prompt in first for token in prompt)


@pytest.mark.parametrize(
    ("device", "kind"),
    [("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA H200", "h200"), ("cpu", "cpu"), ("NVIDIA L4", "l4"), ("", "unknown")],
)
def test_kinds_of_gpu(device: str, kind: str) -> None:
    assert vllm_figures.gpu_kind(device) == kind


def test_a_figure_counts_only_for_its_own_kind_of_gpu() -> None:
    assert vllm_figures.rate("h200", "r1-1.5b", "bfloat16", "b64") == 16266
    assert vllm_figures.rate("h100", "r1-1.5b", "bfloat16", "b64") == 12294
    assert vllm_figures.rate("l4", "r1-1.5b", "bfloat16", "b64") is None
    assert vllm_figures.rate("h100", "v2-lite", "bfloat16", "b64") is None
    assert vllm_figures.ratio_bar("h200", "r1-7b", "bfloat16", "b1") == 1.12
    assert vllm_figures.ratio_bar("h100", "r1-7b", "bfloat16", "b1") is None
    assert vllm_figures.step_ms("h200", "r1-7b", "bfloat16", "b256") == (10.5, 2747)
    assert vllm_figures.step_ms("h200", "r1-7b", "bfloat16", "mix") is None


# --- the offline loop


class CountingClock:
    """Each look at it takes a millisecond."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 0.001
        return self.now


def test_the_offline_loop_serves_everything_and_tells_decodes_apart() -> None:
    capacity = Capacity(blocks=400, block_size=16, max_rows=8, max_step_tokens=64, max_model_len=256)
    engine = FakeEngine("tiny", capacity, step_seconds=0.5, sleep=lambda seconds: None)
    serving = OfflineServing(engine, SchedulerConfig(), CountingClock())
    workload = Workload("b4", (40,) * 4, (20,) * 4, repeats=1)
    settled = []
    run = serving.run(workload.prompts(200, random.Random(3)), workload.outputs, lambda: settled.append(1))
    assert run.output_tokens == 80
    assert run.cached_tokens == 0
    assert len(settled) == len(run.steps)
    assert 0 < run.prefill < run.seconds
    assert sum(len(step.contexts) for step in run.decodes) <= 4 * 19
    assert max(context for step in run.decodes for context in step.contexts) == 40 + 19
    assert all(step.device == 0.5 for step in run.steps)
    assert run.steps[0].interval is None
    assert all(step.interval is not None and step.interval > 0 for step in run.decodes[1:])
    assert all(step.plan > 0 and step.launch > 0 and step.settle > 0 for step in run.steps)
    again = serving.run([[7] * 40], [3])
    assert again.output_tokens == 3


def test_the_offline_loop_tells_of_prefix_hits() -> None:
    capacity = Capacity(blocks=400, block_size=16, max_rows=8, max_step_tokens=64, max_model_len=256)
    serving = OfflineServing(FakeEngine("tiny", capacity), SchedulerConfig(), CountingClock())
    prompt = list(range(48))
    assert serving.run([prompt], [2]).cached_tokens == 0
    assert serving.run([prompt], [2]).cached_tokens == 32


def test_the_offline_loop_keeps_two_steps_in_flight() -> None:
    class Watched(FakeEngine):
        deepest = open_steps = 0

        def launch(self, plan: StepPlan) -> int:
            self.open_steps += 1
            self.deepest = max(self.deepest, self.open_steps)
            return super().launch(plan)

        def collect(self, ticket: int) -> StepResult:
            self.open_steps -= 1
            return super().collect(ticket)

    capacity = Capacity(blocks=100, block_size=16, max_rows=8, max_step_tokens=64, max_model_len=256)
    engine = Watched("tiny", capacity)
    OfflineServing(engine, SchedulerConfig(), CountingClock()).run([[1, 2, 3]], [10])
    assert (engine.deepest, engine.open_steps) == (2, 0)


# --- tables


def figures(rate: float, floor_ms: float | None = 1.0) -> Figures:
    return Figures(
        tokens_per_second=rate,
        slowest=rate - 1,
        fastest=rate + 1,
        prefill_ms=12.0,
        decode_ms=2.0 if floor_ms else None,
        decode_device_ms=1.8 if floor_ms else None,
        floor_ms=floor_ms,
        bytes_per_second=2e12 if floor_ms else None,
        plan_ms=0.1,
        launch_ms=0.1,
        settle_ms=0.1,
        steps=256,
        graphed=0.9,
        runs=[rate],
    )


@pytest.mark.parametrize(
    ("kind", "column", "rate", "ratio", "verdict"),
    [
        ("h200", "b64", 1.25 * 16266, "1.25x", "met"),
        ("h200", "b64", 1.24 * 16266, "1.24x", "MISSED"),
        ("h200", "b1", 1.6 * 449, "1.60x", "met"),
        ("h200", "b1", 1.59 * 449, "1.59x", "MISSED"),
        ("h100", "b1", 501, "1.22x", "met"),
        ("h100", "b1", 499, "1.22x", "MISSED"),
        ("l4", "b64", 5000, "-", "-"),
        ("cpu", "b1", 5000, "-", "-"),
    ],
)
def test_the_verdict_follows_the_bars(kind: str, column: str, rate: float, ratio: str, verdict: str) -> None:
    found = dict(zip(COLUMNS, cells(kind, "r1-1.5b", "bfloat16", column, figures(rate)), strict=True))
    assert (found["ratio"], found["verdict"]) == (ratio, verdict)
    assert found["floor"].startswith("50%")
    assert len(row(list(found.values()), list(COLUMNS.values()))) == sum(COLUMNS.values()) + 2 * (len(COLUMNS) - 1)


def test_a_column_without_decodes_has_no_floor() -> None:
    found = dict(zip(COLUMNS, cells("h200", "r1-1.5b", "bfloat16", "prefill", figures(2e5, None)), strict=True))
    assert (found["decode ms"], found["floor"], found["verdict"]) == ("-", "-", "MISSED")


def test_results_are_merged_by_model_and_column() -> None:
    first = merged({}, "m", {"weights": "bfloat16", "columns": {"b1": 1, "b8": 2}, "start": {"warm": 3}})
    second = merged(first, "m", {"weights": "bfloat16", "columns": {"b8": 5}})
    third = merged(second, "m", {"weights": "fp8", "columns": {"b8": 7}})
    assert second["models"]["m bfloat16"]["columns"] == {"b1": 1, "b8": 5}
    assert third["models"]["m bfloat16"]["start"] == {"warm": 3}
    assert third["models"]["m fp8"]["columns"] == {"b8": 7}


def test_the_profile_covers_the_step() -> None:
    text = table([Kernel("norm", 80, 400.0), Kernel("gemm", 40, 6000.0)], steps=40, step_ms=0.2)
    assert text[1].startswith("gemm")
    assert text[1].split()[1:] == ["1.0", "150.0", "75.0%"]
    assert text[-2].split()[-3:] == ["3.0", "160.0", "80.0%"]
    assert text[-1].split()[-2:] == ["40.0", "20.0%"]


def test_http_lines_hold_ours_against_the_peer() -> None:
    (peer, *_) = vllm_figures.HTTP["h200", "r1-7b"]
    summary = summary_of([outcome(due=float(second)) for second in range(600)])
    found = {line.name: line.cells() for line in lines([summary], peer, "r1-7b")}
    assert list(found) == ["ttft p50", "ttft p90", "ttft p99", "tpot p50", "tpot p90", "tpot p99", "gap p50", "gap p99"]
    assert found["ttft p50"][1:] == ["100.00", "26.90", "3.72x", "<= 0.90x", "MISSED"]
    assert found["gap p99"][1:] == ["20.00", "43.80", "0.46x", "<= 1.10x", "met"]
    assert found["tpot p90"][4:] == ["-", "-"]
    few = summary_of([outcome()])
    assert next(line for line in lines([few], None, "tiny") if line.name == "tpot p99").cells()[1:] == ["-"] * 5
    assert Quantiles.median([few.metrics["ttft"]]).p99 is None


# --- start-up


def test_the_written_folder_is_a_whole_model(tmp_path: Path) -> None:
    folder = write_model(tmp_path, "tiny")
    manifest = read_manifest(folder)
    assert manifest.files
    assert manifest.dtype == "bfloat16"
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    config = CONFIGS["tiny"]
    assert size >= 2 * 2 * math.prod((config["vocab_size"], config["hidden_size"]))
