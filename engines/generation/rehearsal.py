"""Which kernels a model launches on a GPU, and in which forms, found without the GPU and before its weights are read.

The very code that runs a step walks through steps of all sizes on the meta device, where launches are noted and nothing
is computed: a list made in any other way would sooner or later ask for other binaries than the step does. One layer of
each kind is enough, since all layers of a kind launch the same. Only for a process that does nothing else: what the
kernels' modules keep for a device stands on the meta device from then on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from engines.generation import kv_cache
from engines.generation.calibration import choose_scales
from engines.generation.compile_ahead import Rehearsed, Stage
from engines.generation.gpu_runner import GpuStepRunner
from engines.generation.logprobs import PROMPT_CHUNK
from engines.generation.placement import KV_DTYPES
from engines.generation.probe import largest_counts
from engines.kernels.cuda.device import rehearse_on
from engines.kernels.cuda.launch import Launcher, Specialisation
from engines.kernels.cuda.steps import scatter
from engines.kernels.cuda.truncation import Truncates
from engines.manifest import read_manifest
from engines.models.config import DeepseekConfig, ModelConfig, parse_config
from engines.models.loader import build_model, keeps_blocks
from engines.models.model import Model
from engines.models.weights import Placement, ShapeSource
from engines.protocol import Capacity, Row
from engines.quant.methods import methods_of

META = torch.device("meta")
PLAIN = Truncates(top_k=False, top_p=False, min_p=False)
TRUNCATED = Truncates(top_k=True, top_p=True, min_p=True)
SHORTEST_CONTEXT = 64
"""Tokens; contexts that no power of two between this and the longest divides are served by the same kernels."""


def rehearse(engine: Rehearsed) -> dict[Stage, list[Specialisation]]:
    """Each specialisation once, at the stage that needs it first. Raises EngineLoadError for a model that is wrong."""
    rehearse_on(engine.machine)
    walk = Walk(engine)
    stages: dict[Stage, list[Specialisation]] = {}
    known: set[Specialisation] = set()
    for stage, run in walk.stages.items():
        fresh = [one for one in launched_by(run) if one not in known]
        known.update(fresh)
        stages[stage] = fresh
    return stages


def launched_by(run: Callable[[], None]) -> list[Specialisation]:
    """What ``run`` launches, each once, in the order of the first launch. Nothing is computed."""
    found: dict[Specialisation, None] = {}
    Launcher.recorder = lambda launched: found.setdefault(launched.representative())
    try:
        run()
    finally:
        Launcher.recorder = None
    return list(found)


class Walk:
    """Runs steps of one engine on the meta device, in a process that has called ``rehearse_on``."""

    def __init__(self, engine: Rehearsed) -> None:
        self._sizes = engine.sizes
        self._dtype, self._kv_dtype = KV_DTYPES[engine.dtype], KV_DTYPES[engine.kv_dtype]
        self._model = _small_model(engine)
        self.stages: dict[Stage, Callable[[], None]] = {
            "measure": self._measure,
            "start": self._start,
            "rest": self._rest,
        }

    def run(
        self,
        runner: GpuStepRunner,
        counts: Sequence[int],
        context: int,
        truncates: Truncates = PLAIN,
    ) -> None:
        """A step without a graph: tokens of each row, and of each row's sequence, or all that a row computes."""
        rows = [
            Row(item=slot, slot=slot, start=max(context - count, 0), count=count, new_blocks=(), max_new=1)
            for slot, count in enumerate(counts)
        ]
        runner.rehearse(rows, truncates)

    def runner(self, longest: int, step_tokens: int) -> GpuStepRunner:
        """``longest``: tokens of a sequence."""
        size = kv_cache.BLOCK_SIZE
        scales: Sequence[torch.Tensor] = ()
        if self._kv_dtype is torch.float8_e4m3fn:
            scales = choose_scales(self._model, None, self._sizes.model_len, self._dtype, META)
        caches = kv_cache.allocate(self._model.kv_layout, 1, size, self._kv_dtype, META, scales)
        rows = self._sizes.max_rows
        capacity = Capacity(
            blocks=1, block_size=size, max_rows=rows, max_step_tokens=step_tokens, max_model_len=longest
        )
        return GpuStepRunner(self._model, caches, capacity, META, lambda: 0.0, graph_memory=1)

    def _measure(self) -> None:
        """The largest step, with log probabilities of its last row's prompt."""
        sizes = self._sizes
        longest = min(sizes.model_len, sizes.step_tokens)
        runner = self.runner(sizes.probe_context, longest)
        words = torch.empty(4, dtype=torch.int32, device=META)
        scatter(words, words, segments=1, longest=1)
        counts = largest_counts(sizes.max_rows, sizes.step_tokens, longest)
        self.run(runner, counts, sizes.probe_context, TRUNCATED)
        for positions in {min(counts[-1], PROMPT_CHUNK), counts[-1] % PROMPT_CHUNK} - {0}:
            shape, dtype = (positions, self._model.embedding.shape[1]), self._model.embedding.dtype
            self._model.logits(torch.empty(shape, dtype=dtype, device=META))

    def _start(self) -> None:
        runner = self.runner(self._sizes.model_len, self._sizes.step_tokens)
        for count in _powers(self._sizes.step_tokens):
            self.run(runner, [count], count)
        for context in self._contexts():
            self.run(runner, [1], context)

    def _rest(self) -> None:
        runner = self.runner(self._sizes.model_len, self._sizes.step_tokens)
        assert runner.captured is not None
        runner.captured.rehearse()
        rows, longest = self._sizes.max_rows, self._sizes.model_len
        # Each of these numbers has kernels of its own: tokens, rows that decode and their contexts, prompts.
        for tokens in _powers(self._sizes.step_tokens):
            self.run(runner, [tokens], longest)
        for decodes in _around_powers(rows):
            for context in self._contexts():
                self.run(runner, [1] * decodes, context)
                self.run(runner, [1] * (decodes - 1) + [2], context)
            self.run(runner, [1] * decodes, longest, TRUNCATED)
        for prompts in _around_powers(min(rows - 1, self._sizes.step_tokens // 2)):
            for counts in ([2] * prompts, [1] + [2] * prompts):
                self.run(runner, counts, 0)
                self.run(runner, counts, longest)

    def _contexts(self) -> Iterator[int]:
        context = SHORTEST_CONTEXT
        while context < self._sizes.model_len:
            yield context
            context *= 2
        yield self._sizes.model_len


def _powers(most: int) -> list[int]:
    """1, 2, 4 ... and ``most``."""
    return sorted({1 << power for power in range(most.bit_length())} | {most})


def _around_powers(most: int) -> list[int]:
    """The same, and what comes after each: kernels are chosen by bounds, and by how often a number goes into others."""
    return sorted({number for power in _powers(most) for number in (power, power + 1) if number <= most})


def _small_model(engine: Rehearsed) -> Model:
    spec = engine.spec
    manifest = read_manifest(Path(spec.source), spec.random_weights is not None)
    placement = Placement(device=META, dtype=KV_DTYPES[engine.dtype])
    config = _few_layers(parse_config(manifest))
    methods = methods_of(manifest.quantization if keeps_blocks(manifest, spec) else None)
    return build_model(config, ShapeSource(placement), engine.sizes.model_len, spec.uniform_routing, methods)


def _few_layers(config: ModelConfig) -> ModelConfig:
    """One layer of each kind, and one behind it: of a last layer some steps compute less."""
    if not isinstance(config, DeepseekConfig):
        return dataclasses.replace(config, layers=min(config.layers, 2))
    dense = min(config.moe.dense_layers, 1)
    layers = min(config.layers, dense + 2)
    return dataclasses.replace(config, layers=layers, moe=dataclasses.replace(config.moe, dense_layers=dense))
