"""What only a process that rehearses can check: what a GPU would be asked to run, and what was compiled for it.

    python -m tests.unit.generation.rehearsal_checks MODEL KV_DTYPE WEIGHTS

Prints one line of JSON. Runs no kernel and needs no GPU.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from triton import knobs

from benchmarks.model_configs import config_folder
from engines.generation.compile_ahead import STAGES, Rehearsed, Sizes
from engines.generation.rehearsal import PLAIN, TRUNCATED, Walk, launched_by, rehearse
from engines.kernels.cuda.compile_pool import compile_for
from engines.kernels.cuda.launch import Launcher, Specialisation, Tiled
from engines.kernels.cuda.tuning import Machine
from engines.protocol import EngineSpec

H200 = Machine("NVIDIA H200", (9, 0), 132, 233_472)
SIZES = Sizes(max_rows=256, step_tokens=8192, model_len=4096, probe_context=4096)


def raw_launches(run: Callable[[], None]) -> dict[Specialisation, None]:
    """As ``launched_by``, with all numbers as they were given."""
    found: dict[Specialisation, None] = {}
    Launcher.recorder = lambda launched: found.setdefault(launched)
    run()
    Launcher.recorder = None
    return found


def key_of(call: Callable[[], object]) -> str:
    """By what Triton would look for the kernel, had the call not been stopped there."""
    keys: list[str] = []

    def stop(*, key: str, fn: Any, **_: object) -> bool:
        keys.append(f"{fn.jit_function.cache_key} {key}")
        return True

    knobs.runtime.jit_cache_hook = stop
    call()
    knobs.runtime.jit_cache_hook = None
    (key,) = keys
    return key


def launch(one: Specialisation) -> None:
    """As a step does, with tensors in memory of the same types that begin at places of the same kind."""
    tensors = tuple(torch.empty(64, dtype=dtype)[0 if aligned else 1 :] for dtype, aligned in one.types)
    tiled = tuple(Tiled(torch.empty(kind.tile, dtype=kind.dtype), kind.tile) for kind in one.tiled)
    one.launcher((1, 1, 1), tensors, one.fixed, one.free, one.constants, one.warps, one.stages, one.early, tiled)


def specialised_free(one: Specialisation) -> list[str]:
    """Free integers that the kernel does not name as such: each value of theirs would be compiled apart."""
    before = len(one.tiled) + len(one.types) + len(one.fixed)
    parameters = one.launcher.kernel.params[before:][: len(one.free)]
    return [
        f"{one.name}.{parameter.name}"
        for parameter, value in zip(parameters, one.free, strict=True)
        if isinstance(value, int) and not parameter.do_not_specialize
    ]


def random_steps(walk: Walk, count: int) -> Callable[[], None]:
    """Steps of any sizes, as a scheduler could plan them."""
    draw = random.Random(3)

    def run() -> None:
        runner = walk.runner(SIZES.model_len, SIZES.step_tokens)
        for _ in range(count):
            tokens = int(2 ** draw.uniform(0, 13))
            rows = min(int(2 ** draw.uniform(0, 8.01)), tokens, SIZES.max_rows)
            decodes = draw.choice((0, rows, draw.randrange(rows + 1)))
            left, prompts = tokens - decodes, rows - decodes
            counts = [1] * decodes
            if prompts:
                share = min(max(left // prompts, 2), SIZES.model_len)
                counts += [share] * (min(prompts, SIZES.step_tokens // share - decodes // share))
            context = draw.randrange(max(counts, default=1), SIZES.model_len + 1)
            walk.run(runner, counts or [1], context, draw.choice((TRUNCATED, PLAIN)))

    return run


def main() -> None:
    model, kv_dtype, weights = sys.argv[1:]
    torch.set_num_threads(1)
    compile_for(H200.capability)
    with tempfile.TemporaryDirectory() as parent:
        spec = EngineSpec(name=model, source=str(config_folder(Path(parent), model, weights)), random_weights=0)
        engine = Rehearsed(spec=spec, machine=H200, dtype="bfloat16", kv_dtype=kv_dtype, sizes=SIZES)
        stages = rehearse(engine)
        walk = Walk(engine)
    wanted = {one for found in stages.values() for one in found}
    launches = {one for run in walk.stages.values() for one in raw_launches(run)}
    keys = {one: key_of(one.compile) for one in wanted}
    unequal = sorted({one.name for one in launches if key_of(partial(launch, one)) != keys[one.representative()]})
    steps = launched_by(random_steps(walk, 400))
    result = {
        "stages": {stage: len(stages[stage]) for stage in STAGES},
        "launches": len(launches),
        "keys": len(set(keys.values())),
        "unequal": unequal,
        "specialised": sorted({name for one in launches for name in specialised_free(one)}),
        "drawn": len(steps),
        "missing": sorted(f"{one.name} {one.constants}" for one in steps if one not in wanted),
    }
    sys.stdout.write(json.dumps(result))


if __name__ == "__main__":
    main()
