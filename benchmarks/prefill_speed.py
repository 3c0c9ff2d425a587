"""Attention of prompts on a GPU: every kernel that there is for it, checked, and timed side by side.

    python -m benchmarks.prefill_speed [--models r1-1.5b r1-7b] [--shapes ...] [--kernels ...] [--seconds 70]

Each kernel is first run in a process of its own (``--check NAME``) over random rows, with NaN in all that it must not
read, against float64: one that is wrong, fails or hangs is left out of the table and said so. Times are of one layer,
inside a CUDA graph that rotates over caches; operations are those of the causal half. ``hopper`` is
``engines.kernels.cuda.hopper_attention`` (keys at once, stages), ``triton`` is ``prefill_attention`` (pairs, keys,
warps, stages); ``flash2`` and ``cudnn`` are those of PyTorch, over contiguous keys and values, prompts without earlier
tokens only. The last line says, as the exit status does, whether ``hopper`` is right and no ``triton`` faster in any
shape.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks import kernel_checks, report
from benchmarks.attention_speed import BLOCK_SIZE, Cache, Case, Facts, Heads, make_case, queries_of, timed
from benchmarks.model_configs import CONFIGS
from engines.kernels.cuda import elementwise, hopper_attention, prefill_attention
from engines.kernels.cuda.prefill_attention import PrefillTile
from engines.kernels.reference import row_tables

Run = Callable[[Case, Heads, Cache], torch.Tensor]

SHAPES: dict[str, list[tuple[int, int]]] = {
    "4x2048": [(2048, 0)] * 4,
    "16x512": [(512, 0)] * 16,
    "1x8192": [(8192, 0)],
    "1x2048": [(2048, 0)],
    "8x1024+1024": [(1024, 1024)] * 8,
    "mixed": [(17, 0), (2048, 0), (600, 900), (1, 700), (1500, 0), (3, 4000), (130, 64), (2900, 0), (993, 31)],
}
"""New tokens and cached ones of each row."""
CHECKS = [
    [(2, 0)],
    [(128, 0), (127, 0), (129, 0), (1, 0), (16, 5)],
    [(40, 1000), (700, 0), (3, 129), (257, 255), (1, 1), (21, 107), (22, 106)],
    [(5, 0)] * 250,
    [(1300, 700), (64, 64)],
]
CHECK_SECONDS = 25
TOLERANCE = 1e-2
"""Of ||result - definition|| / ||definition|| in bfloat16."""
STEP_TOKENS = 8192
NORM_WARPS = (1, 2, 4, 8)
HOPPER_TILES = [(64, 3), (64, 4)]
TRITON_TILES = [(128, 64, 8, 5), (128, 64, 8, 2), (64, 64, 4, 3), (64, 128, 4, 3)]


def hopper(at_once: int, stages: int, case: Case, heads: Heads, cache: Cache) -> torch.Tensor:
    queries, batch = queries_of(case, heads), case.batch
    output = torch.empty(queries.shape, dtype=queries.dtype, device=queries.device)
    rows, group = batch.context_lengths.shape[0], heads.queries // heads.keys
    tiles = queries.shape[0] * group // hopper_attention.LINES + rows
    hopper_attention.attend_chunks(queries, cache, batch, case.shape.scale, output, tiles, at_once, stages)
    return output


def triton(sizes: tuple[int, int, int, int], case: Case, heads: Heads, cache: Cache) -> torch.Tensor:
    queries = queries_of(case, heads)
    output = torch.empty(queries.shape, dtype=queries.dtype, device=queries.device)
    tile = PrefillTile(*sizes)
    prefill_attention.attend_chunks(queries, cache, case.batch, case.shape.scale, output, tile)
    return output


def flash2(case: Case, heads: Heads, cache: Cache) -> torch.Tensor:
    parts = case.qkv.view(case.qkv.shape[0], -1, heads.width)
    queries, keys, values = parts.split_with_sizes((heads.queries, heads.keys, heads.keys), dim=1)
    starts, longest = case.batch.query_starts, case.batch.longest_query
    forward = torch.ops.aten._flash_attention_forward
    result: torch.Tensor = forward(queries, keys, values, starts, starts, longest, longest, 0.0, True, False)[0]
    return result


def cudnn(case: Case, heads: Heads, cache: Cache) -> torch.Tensor:
    rows = case.batch.context_lengths.shape[0]
    parts = case.qkv.view(rows, -1, heads.queries + 2 * heads.keys, heads.width).transpose(1, 2)
    queries, keys, values = parts.split_with_sizes((heads.queries, heads.keys, heads.keys), dim=1)
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return scaled_dot_product_attention(queries, keys, values, is_causal=True, enable_gqa=True)


def kernels() -> dict[str, Run]:
    found: dict[str, Run] = {f"hopper {keys} {stages}": partial(hopper, keys, stages) for keys, stages in HOPPER_TILES}
    return found | {"triton " + " ".join(map(str, sizes)): partial(triton, sizes) for sizes in TRITON_TILES}


def case_of(heads: Heads, rows: list[tuple[int, int]], captured: bool = False) -> Case:
    """All rows as prompts; if ``captured`` those of one token are left to another kernel, as the device finds them."""
    counts = [count for count, _ in rows]
    case = make_case(heads, counts, [count + cached for count, cached in rows], captured)
    return case if captured else dataclasses.replace(case, batch=dataclasses.replace(case.batch, decode_rows=0))


def poison(case: Case, cache: Cache) -> None:
    """NaN in all places of the cache that belong to no token."""
    batch, blocks = case.batch, cache[0].shape[0]
    place = torch.arange(batch.block_tables.shape[1] * BLOCK_SIZE, device="cuda")
    slots = batch.block_tables.long()[:, place // BLOCK_SIZE] * BLOCK_SIZE + place % BLOCK_SIZE
    unknown = torch.ones(blocks * BLOCK_SIZE, dtype=torch.bool, device="cuda")
    unknown[slots[place[None, :] < batch.context_lengths[:, None]]] = False
    for tensor in cache:
        tensor.view(-1, *tensor.shape[2:])[unknown] = torch.nan


def defined(case: Case, heads: Heads, cache: Cache, row: int) -> torch.Tensor:
    """(count, Hq, D) float64: the row's results."""
    batch = case.batch
    start, behind = (int(batch.query_starts[row + offset]) for offset in (0, 1))
    context = int(batch.context_lengths[row])
    place = torch.arange(context, device="cuda")
    slots = row_tables(batch)[row].long()[place // BLOCK_SIZE] * BLOCK_SIZE + place % BLOCK_SIZE
    group = heads.queries // heads.keys
    keys, values = (one.flatten(0, 1)[slots].double().repeat_interleave(group, 1) for one in cache)
    queries = queries_of(case, heads)[start:behind].double()
    scores = torch.einsum("qhd,khd->hqk", queries, keys) * case.shape.scale
    last = context - (behind - start) + torch.arange(behind - start, device="cuda")
    weights = scores.masked_fill(place[None, :] > last[:, None], -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, values)


def check(name: str) -> None:
    """Raises AssertionError where the kernel's result is not that of float64, with the distance."""
    run = kernels()[name]
    for heads in (Heads("1.5b", 12, 2), Heads("7b", 28, 4)):
        for rows in CHECKS:
            for captured in (False, True):
                case = case_of(heads, rows, captured)
                cache = case.caches[0]
                poison(case, cache)
                found = run(case, heads, cache).double()
                for row, (count, _) in enumerate(rows):
                    start = int(case.batch.query_starts[row])
                    ours, theirs = found[start : start + count], defined(case, heads, cache, row)
                    distance = float((ours - theirs).norm() / theirs.norm())
                    left_out = captured and count == 1
                    assert left_out or distance < TOLERANCE, (
                        f"{heads.model} {rows[row]}, captured {captured}: {distance}"
                    )


def lines(heads: Heads, names: list[str], shapes: list[str]) -> Iterator[Facts]:
    for shape in shapes:
        rows = SHAPES[shape]
        case = case_of(heads, rows)
        pairs = sum(count * cached + count * count / 2 for count, cached in rows)
        runs: dict[str, Run] = {name: kernels()[name] for name in names}
        if not any(cached for _, cached in rows):
            runs["flash2"] = flash2
            if len({count for count, _ in rows}) == 1:
                runs["cudnn"] = cudnn
        for name, run in runs.items():
            facts: Facts = {"model": heads.model, "shape": shape}
            started = time.perf_counter()
            yield timed(case, partial(run, case, heads), facts, name, work=4 * heads.queries * heads.width * pairs) | {
                "seconds": round(time.perf_counter() - started, 2)
            }


def norm_lines(heads: Heads) -> Iterator[Facts]:
    """The norm before each linear layer of a prompt step, with different numbers of warps for a row."""
    width, case = heads.queries * heads.width, case_of(heads, [(2, 0)])
    inputs: list[Cache] = [(torch.randn(STEP_TOKENS, width, device="cuda", dtype=torch.bfloat16),) for _ in range(8)]
    gain = torch.rand(width, device="cuda").bfloat16()
    rotated = dataclasses.replace(case, caches=inputs)
    for warps in NORM_WARPS:
        facts: Facts = {"model": heads.model, "shape": f"norm of {STEP_TOKENS} x {width}"}

        def run(inputs: Cache, warps: int = warps) -> None:
            elementwise.rms_norm(inputs[0], gain, 1e-6, warps)

        yield timed(rotated, run, facts, f"warps {warps}", moved=4 * STEP_TOKENS * width)


def new_length_milliseconds(heads: Heads, run: Run) -> float:
    """Of the first call with a length that no call had before: what a server's steps would wait for."""
    run(first := case_of(heads, [(1000, 0)]), heads, first.caches[0])
    cases = [case_of(heads, [(1000 + more, 0)]) for more in range(1, 5)]
    torch.cuda.synchronize()
    started = time.perf_counter()
    for case in cases:
        run(case, heads, case.caches[0])
    torch.cuda.synchronize()
    return (time.perf_counter() - started) * 1000 / len(cases)


def told(line: Facts) -> str:
    if "error" in line:
        return f"{line['how']}: {str(line['error'])[:50]}"
    return f"{line['how']}: {line['us']} us {line.get('tflop_s') or line.get('tb_s', '')}"


def measure(models: list[str], names: list[str], shapes: list[str], seconds: float) -> list[Facts]:
    """Of every shape the norms too. Prints one line for each shape, the fastest kernel first."""
    started, found = time.perf_counter(), []
    for model in models:
        config = CONFIGS[model]
        heads = Heads(model, config["num_attention_heads"], config["num_key_value_heads"])
        of_shape: dict[object, list[Facts]] = {}
        norms = norm_lines(heads) if len(shapes) == len(SHAPES) else iter(())
        for line in itertools.chain(norms, lines(heads, names, shapes)):
            found.append(line)
            of_shape.setdefault(line["shape"], []).append(line)
            if time.perf_counter() - started > seconds:
                print(f"# stopped after {seconds:.0f} s")
                break
        for shape, of_one in of_shape.items():
            best = sorted(of_one, key=lambda line: line.get("us", float("inf")))  # type: ignore[arg-type, return-value]
            print(f"{model} {shape}: " + " | ".join(map(told, best)), flush=True)
    return found


def fastest_is_hopper(found: list[Facts]) -> bool:
    """In every shape, of the kernels of this project."""
    times: dict[tuple[object, object], dict[bool, float]] = {}
    for line in found:
        how, us = str(line["how"]), line.get("us")
        if isinstance(us, float) and how.startswith(("hopper", "triton")):
            of_shape = times.setdefault((line["model"], line["shape"]), {})
            of_shape[how.startswith("hopper")] = min(us, of_shape.get(how.startswith("hopper"), us))
    return bool(times) and all(one.get(True, 1e9) < one.get(False, 1e9) for one in times.values())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=["r1-1.5b", "r1-7b"], default=["r1-1.5b", "r1-7b"])
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--kernels", nargs="+", choices=list(kernels()), default=list(kernels()))
    parser.add_argument("--seconds", type=float, default=70, help="nothing is begun later than this after the checks")
    parser.add_argument("--check", metavar="NAME", help="check this kernel alone")
    arguments = parser.parse_args()
    if arguments.check:
        check(arguments.check)
        return 0
    print(f"# attention of one layer, bf16: {torch.cuda.get_device_name()}, commit {report.commit()}", flush=True)
    named = {name: name for name in arguments.kernels}
    names = kernel_checks.passing("benchmarks.prefill_speed", named, CHECK_SECONDS)
    found = measure(arguments.models, names, arguments.shapes, arguments.seconds)
    for peer in (flash2, cudnn) if arguments.kernels == list(kernels()) else ():
        try:
            print(
                f"# {peer.__name__}: {new_length_milliseconds(Heads('1.5b', 12, 2), peer):.1f} ms for each new length"
            )
        except RuntimeError as error:
            print(f"# {peer.__name__}: {str(error)[:200]}")
    facts = {"device": torch.cuda.get_device_name(), "commit": report.commit(), "right": names, "lines": found}
    report.write("prefill_speed", facts, report.folder_out())
    chosen = f"hopper {hopper_attention.KEYS} {hopper_attention.STAGES}"
    good = chosen in names and fastest_is_hopper(found)
    print(f"# hopper is {'right and the fastest' if good else 'NOT right or not the fastest everywhere'}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
