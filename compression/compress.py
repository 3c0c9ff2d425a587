"""``slimserve compress``: from a model and a recipe to an engine folder.

What is done is kept layer by layer in a folder beside the result, so that a run that was killed goes on where it was.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch

from compression.base_model import FINAL_NORM, BaseModel
from compression.calibrate import text_source, text_tokens
from compression.calibrated_layer import LayerWeights
from compression.compensation.biases import compensated_config, has_mlp_bias
from compression.compensation.distillation import Distiller, distilling_passes, write_scales
from compression.compensation.tuning import BlockTuner, tuning_passes
from compression.errors import CompressionError
from compression.experts import DECISION, plan_experts
from compression.export import layer_tensors, read_notes, save_tensors, write_config, write_shards, write_text
from compression.hidden_states import HiddenStates
from compression.layerwise import LayerQuantizer, Window, make_window
from compression.plan import LinearLayer, Plan, layer_index, linear_layers, make_plan
from compression.progress import Estimate, PartReport, Parts, Report
from compression.quantization_config import quantization_config
from compression.recipe import Calibration, Distillation, Recipe
from compression.record import write_record
from compression.run_folder import STREAM, TARGET, RunFolder
from compression.self_generated import kept_windows
from engines.manifest import read_manifest
from engines.models.rope import cos_sin_table

PASSES = 4
"""Over the calibration windows in each layer: two parts, each watched and then run quantized."""
TARGET_PASSES, COMPENSATED_PASSES = 2, 2
"""More: two parts of the full layer, and of the tuned one."""
DEFAULT_HESSIAN_BYTES = 4 << 30


@dataclass(frozen=True, slots=True)
class Job:
    """One call of the command."""

    model: Path
    """A folder or a ``.gguf`` file."""
    name: str
    """Of the model, for the record."""
    recipe: Recipe
    out: Path
    calibration: Path | None = None
    device: str = "cpu"
    hessian_bytes: int = DEFAULT_HESSIAN_BYTES


def compress(job: Job, report: Report, clock: Callable[[], float]) -> list[str]:
    """Write the engine folder ``job.out``; returns what there is to say about single layers.

    Raises CompressionError and EngineLoadError, whose texts tell the user what to do.
    """
    if job.out.exists():
        raise CompressionError(f"{job.out.name} exists already; choose another folder, or remove it")
    try:
        with torch.no_grad():
            run = _Run(job, report, clock)
            return run.finish(run.layers())
    except OSError as error:
        raise CompressionError(f"{job.out.name} cannot be written: {error.strerror or error}") from error


class _Run:
    def __init__(self, job: Job, report: Report, clock: Callable[[], float]) -> None:
        self.job = job
        self.device = torch.device(job.device)
        self.manifest = read_manifest(job.model)
        self.base = BaseModel(self.manifest, self.device)
        self.dtype = torch.float16 if self.manifest.dtype == "float16" else torch.bfloat16
        self.all_layers = linear_layers(self.base.config)
        self.plan: Plan = make_plan(job.recipe, self.all_layers, self.base.outer_layers(), self.dtype)
        self.config = compensated_config(self.manifest, self.base.config, job.recipe.compensation)
        self.work = RunFolder(job.out)
        self.tokens = self._calibration_tokens(Parts(report, clock))
        self.count = self.config.layers
        self.first = self.work.first_missing(self.count)
        self.ticks = self._ticks()
        total = self.ticks * (self.count + 1) + self._distilling_ticks()
        self.estimate = Estimate(report, clock, total, self.ticks * self.first)

    def _calibration_tokens(self, report: PartReport) -> torch.Tensor | None:
        """(windows, tokens) int64; None where the recipe needs none. Starts the run, or goes on with it: text that the
        model writes is part of it."""
        recipe, wanted = self.job.recipe, self.job.recipe.calibration
        if wanted is None or not recipe.calibrates:
            self._start(b"")
            return None
        width = min(wanted.tokens, self.manifest.max_context)
        if wanted.source == "model":
            self._start(b"")
            tokens, source = self._written(wanted, width, report), "what the model wrote"
        else:
            path = text_source(self.job.calibration, recipe.name)
            tokens, source = text_tokens(path, self.manifest, wanted.windows, width), path.name
            self._start(tokens.numpy().tobytes())
        self.plan.notes.append(f"calibrated on {tokens.shape[0]} windows of {width} tokens from {source}")
        return tokens

    def _start(self, calibration: bytes) -> None:
        self.work.start_or_go_on(msgspec.to_builtins(self.job.recipe), self.manifest.fingerprint, calibration)

    def _written(self, wanted: Calibration, width: int, report: PartReport) -> torch.Tensor:
        if self.job.calibration is not None:
            raise CompressionError("the recipe is calibrated on what the model writes; leave --calibration out")
        return kept_windows(self.work.path, self.job.model, self.manifest, wanted, width, str(self.device), report)

    def _ticks(self) -> float:
        """Units of work in a layer: passes of a window through half of it."""
        if self.tokens is None:
            return 1
        windows = self.tokens.shape[0]
        passes = PASSES + (TARGET_PASSES if self.follows_full_model else 0)
        if self.job.recipe.compensation is None:
            return passes * windows
        return (passes + COMPENSATED_PASSES) * windows + 2 * tuning_passes(self.job.recipe.compensation, windows)

    @property
    def follows_full_model(self) -> bool:
        """Whether the full model's residual stream is wanted beside the compressed one's."""
        return self.job.recipe.compensation is not None or self.job.recipe.distillation is not None

    def _distilling_ticks(self) -> float:
        settings = self.job.recipe.distillation
        if settings is None or self.tokens is None:
            return 0
        return 2 * self.count * distilling_passes(settings, self.tokens.shape[0])

    def layers(self) -> list[Path]:
        """Quantize all layers that are not there yet. Returns the files of all."""
        limit = 1 if self.tokens is None else self.tokens.shape[1]
        cos_sin = cos_sin_table(self.base.config.rope, limit, self.device)
        if self.job.recipe.experts is not None and self.tokens is not None:
            self.estimate.begin("watching the experts")
            plan_experts(
                self.base,
                self.all_layers,
                self.job.recipe.experts,
                self.plan,
                self.dtype,
                cos_sin,
                self.tokens,
                self.work.path,
            )
        quantizer = LayerQuantizer(
            self.base.config,
            self.job.recipe,
            self.plan,
            cos_sin,
            self.device,
            self.job.hessian_bytes,
            self.estimate.advance,
        )
        tuner = None
        if self.job.recipe.compensation is not None:
            tuner = BlockTuner(
                self.config,
                self.job.recipe.compensation,
                self.plan.layers,
                cos_sin,
                self.device,
                lambda amount: self.estimate.advance(2 * amount),
            )
        self._save_outer(quantizer)
        windows: list[Window] = []
        if self.tokens is not None and self.first < self.count:
            windows = [make_window(row, self.base.config, self.device) for row in self.tokens]
            self._embed(windows)
        for index in range(self.first, self.count):
            self.estimate.begin(f"layer {index + 1} of {self.count}")
            self._one_layer(index, quantizer, tuner, windows)
            self.estimate.reach(self.ticks * (index + 1))
        return [self.work.outer, *(self.work.layer(index) for index in range(self.count))]

    def _one_layer(
        self, index: int, quantizer: LayerQuantizer, tuner: BlockTuner | None, windows: list[Window]
    ) -> None:
        tensors = self.base.layer_tensors(index, self._layers_of(index))
        weights = LayerWeights(tensors, keeps_exact=tuner is not None and tuner.needs_exact)
        notes: list[str] = []
        try:
            if windows:
                stream, following = self._stream(index), self._stream(index + 1)
                if self.follows_full_model:
                    target = self._stream(index + 1, TARGET)
                    quantizer.run(index, weights, windows, self._stream(index, TARGET), target)
                notes = quantizer.quantize(index, weights, windows, stream, following)
                if tuner is not None:
                    notes.append(tuner.compensate(index, weights, stream, target).note(index))
                    quantizer.run(index, weights, windows, stream, following, self.config)
            else:
                quantizer.without_calibration(weights)
        except ValueError as error:
            raise CompressionError(f"{error}; the model cannot be compressed by this recipe") from error
        save_tensors(self.work.layer(index), layer_tensors(weights, self.plan.layers, self.dtype), notes)
        if windows:
            self.work.drop_streams(index)

    def _layers_of(self, index: int) -> list[LinearLayer]:
        return [layer for layer in self.all_layers if layer_index(layer.name) == index]

    def _stream(self, index: int, kind: str = STREAM) -> HiddenStates:
        """The residual stream before layer ``index``."""
        assert self.tokens is not None
        windows, width = self.tokens.shape
        return self.work.stream(index, kind, windows, width, self.base.config.hidden)

    def _embed(self, windows: list[Window]) -> None:
        """The stream before the first layer. A later one was kept when the layer before it was done."""
        if self.first > 0:
            return
        embedding = self.base.linear(self.base.outer_layers()[0])
        kinds = (STREAM, TARGET) if self.follows_full_model else (STREAM,)
        for stream in [self._stream(0, kind) for kind in kinds]:
            for place, window in enumerate(windows):
                stream.write(place, embedding[window.batch.token_ids])

    def _save_outer(self, quantizer: LayerQuantizer) -> None:
        """What stands around the layers: embedding, norm and head."""
        path = self.work.outer
        if path.exists():
            return
        weights = LayerWeights({FINAL_NORM: self.base.tensor(FINAL_NORM)})
        for layer in self.base.outer_layers():
            weights.tensors[f"{layer.name}.weight"] = self.base.linear(layer)
        quantizer.without_calibration(weights)
        save_tensors(path, layer_tensors(weights, self.plan.layers, self.dtype), [])

    def finish(self, files: list[Path]) -> list[str]:
        """Make the engine folder of the layers' files and move it to its place."""
        self.estimate.begin("writing the folder")
        folder = self._folder(files)
        notes = self.plan.notes + [note for path in files for note in read_notes(path)]
        if self.job.recipe.distillation is not None and self.tokens is not None:
            self.estimate.begin("distillation")
            notes.append(self._distil(self.job.recipe.distillation, self.tokens, folder))
        write_record(
            folder,
            recipe=msgspec.to_builtins(self.job.recipe),
            base=self.job.name,
            base_manifest=self.manifest,
            notes=notes,
            promised=self.job.recipe.promise,
            device=self.device,
        )
        folder.rename(self.job.out)
        shutil.rmtree(self.work.path)
        return notes

    def _folder(self, files: list[Path]) -> Path:
        """Of model, tokenizer and config."""
        folder = self.work.path / "folder"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        write_shards(files, folder)
        config = quantization_config([*self.all_layers, *self.base.outer_layers()], self.plan.layers)
        write_config(self.manifest, config, self.dtype, folder, has_mlp_bias(self.config))
        write_text(self.manifest, folder)
        decision = self.work.path / DECISION
        if decision.exists():
            shutil.copyfile(decision, folder / DECISION)
        return folder

    def _distil(self, settings: Distillation, tokens: torch.Tensor, folder: Path) -> str:
        """Tune the folder's scales; returns a note for the card."""
        compressed = BaseModel(read_manifest(folder), self.device)
        distiller = Distiller(
            self.base,
            compressed,
            self.plan.layers,
            settings,
            tokens,
            self._stream(self.count, TARGET),
            cos_sin_table(self.base.config.rope, tokens.shape[1], self.device),
            lambda amount: self.estimate.advance(2 * self.count * amount),
        )
        found = distiller.run(self.work.distilling)
        if found.won:
            write_scales(compressed.manifest.files, distiller.scales())
        return found.note()
