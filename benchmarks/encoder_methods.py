"""Ways of quantizing on an encoder: all-MiniLM-L6-v2, with a logistic probe on SST-2 behind its embeddings.

    python -m benchmarks.encoder_methods [--methods NAME ...] [--train N] [--dev N]

The probe is fitted once, to the full model's embeddings of the training sentences, and stays: what a method does to the
embeddings is what it does to the answers. The model's layers are quantized in their order; where a method calibrates,
on what the quantized ones before compute for some training sentences. Embeddings and norms stay. Methods are the first
rules of presets, without the scaling of inputs, which norms behind the residual sum leave no place for. Weights are
dequantized and inputs rounded as the format defines it, in float32. Intervals are 95 %: of accuracy Wilson's, of the
others paired bootstraps over sentences. Sentences come from ../shared/data. Methods that are not asked for stay on
record.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from torch import nn
from torch.nn import functional

from benchmarks import report
from benchmarks.plain_models import minilm_folder
from compression.measures.intervals import Estimate, ratio_of_sums, share
from compression.plan import LayerPlan, LinearLayer, plan_layer
from compression.quantize.base import LayerInputs
from compression.quantize.methods import make_quantizer
from compression.recipe import LayerRule, load_recipe
from compression.stored_formats import stored_bytes
from engines.encoder_folder import read_encoder_folder
from engines.encoder_tokens import EncoderTokenizer
from engines.kernels import QuantizedMatrix
from engines.kernels.quantized import round_activations
from engines.models.encoder import Encoder, load_encoder

SST2 = report.ROOT.parent / "shared/data/labelled"
NEAREST = "int4-g64, nearest"
"""As the preset int4-g64, without GPTQ."""
FULL = "full, 32 bits"
METHODS = ("int8", "int8-dynamic", "fp8", "fp8-block", "int4-g128", "int4-g64", NEAREST, "kmeans-4bit")
AT_ONCE = 64
"""Sentences."""
CALIBRATED_ON = 256
"""Sentences of the training part."""
PROBE_STEPS, PROBE_DECAY = 200, 1e-4


@dataclass(frozen=True, slots=True)
class Sentences:
    texts: list[str]
    labels: torch.Tensor
    """(n,) float32, 0 or 1."""


class QuantizedLinear(nn.Module):
    """A linear layer as its format defines it."""

    def __init__(self, matrix: QuantizedMatrix, bias: torch.Tensor) -> None:
        super().__init__()
        self._matrix, self._weight, self._bias = matrix, matrix.dequantize(), bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(
            round_activations(x.flatten(0, -2), self._matrix).view(x.shape), self._weight, self._bias
        )


class Embedder:
    """Sentences to embeddings, (n, hidden) float32."""

    def __init__(self, folder: Path) -> None:
        described = read_encoder_folder(folder)
        self._tokenizer = EncoderTokenizer(described)
        self.model = load_encoder(described, torch.device("cpu"), torch.float32)

    def embed(self, model: Encoder, texts: Sequence[str]) -> torch.Tensor:
        # Sentences of about one length go together, so that little is padding.
        order = sorted(range(len(texts)), key=lambda place: len(texts[place]))
        found = torch.empty(len(texts), model.config.hidden)
        with torch.inference_mode():
            for start in range(0, len(order), AT_ONCE):
                places = order[start : start + AT_ONCE]
                found[places] = model(**self._inputs([texts[place] for place in places]))
        return found

    def observe(self, model: Encoder, names: Sequence[str], texts: Sequence[str]) -> dict[str, LayerInputs]:
        """What these linear layers of the model read, padding left out."""
        seen = {name: LayerInputs(model.get_submodule(name).in_features, hessian=True) for name in names}  # type: ignore[arg-type]
        for start in range(0, len(texts), AT_ONCE):
            inputs = self._inputs(texts[start : start + AT_ONCE])
            with torch.inference_mode(), _watched(model, seen, inputs["attention_mask"].bool()):
                model(**inputs)
        return seen

    def _inputs(self, texts: Sequence[str]) -> dict[str, torch.Tensor]:
        return {name: torch.from_numpy(array) for name, array in self._tokenizer.encode(texts).items()}


@contextmanager
def _watched(model: Encoder, seen: dict[str, LayerInputs], tokens: torch.Tensor) -> Iterator[None]:
    """``tokens``: (texts, tokens) bool, which places hold one."""

    def hook(name: str) -> Any:
        return lambda module, inputs: seen[name].observe(inputs[0][tokens])

    handles = [model.get_submodule(name).register_forward_pre_hook(hook(name)) for name in seen]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def rule_of(method: str) -> LayerRule:
    if method == NEAREST:
        return msgspec.structs.replace(load_recipe("int4-g64").layers[0], method="rtn")
    return load_recipe(method).layers[0]


def quantized(embedder: Embedder, method: str, texts: Sequence[str]) -> tuple[Encoder, float]:
    """A copy of the model, and the bytes of its linear layers to those of 16 bits."""
    model, rule = copy.deepcopy(embedder.model), rule_of(method)
    taken = plain = 0
    for layer in range(model.config.layers):
        prefix = f"layers.{layer}."
        names = [name for name, one in model.named_modules() if name.startswith(prefix) and isinstance(one, nn.Linear)]
        inputs = {} if rule.method == "rtn" else embedder.observe(model, names, texts)
        for name in names:
            linear = model.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            planned = plan_layer(rule, LinearLayer(name, linear.out_features, linear.in_features), torch.bfloat16, [])
            assert isinstance(planned, LayerPlan)
            matrix = make_quantizer(planned.method).quantize(linear.weight.data, inputs.get(name), planned.scheme)
            model.set_submodule(name, QuantizedLinear(matrix, linear.bias.data))
            taken += stored_bytes(planned.scheme, linear.out_features, linear.in_features)
            plain += 2 * linear.weight.numel()
    return model, taken / plain


def read_sentences(path: Path, most: int) -> Sentences:
    """The first ``most``. A line is a label and a text. Raises FileNotFoundError."""
    lines = path.read_text(encoding="utf-8").splitlines()[:most]
    return Sentences([line[2:] for line in lines], torch.tensor([float(line[0]) for line in lines]))


def fitted_probe(embeddings: torch.Tensor, labels: torch.Tensor) -> nn.Linear:
    """Logistic regression with weight decay."""
    torch.manual_seed(0)
    probe = nn.Linear(embeddings.shape[1], 1)
    optimizer = torch.optim.LBFGS(probe.parameters(), max_iter=PROBE_STEPS, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = functional.binary_cross_entropy_with_logits(probe(embeddings)[:, 0], labels)
        loss = loss + PROBE_DECAY * probe.weight.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return probe.requires_grad_(False)


def f1(answers: np.ndarray[Any, Any], labels: np.ndarray[Any, Any]) -> Estimate:
    """Of label 1: 2 TP / (2 TP + FP + FN)."""
    both = answers * labels
    return ratio_of_sums(2 * both, answers + labels)


def scores(own: torch.Tensor, full: torch.Tensor, probe: nn.Linear, labels: torch.Tensor) -> dict[str, Estimate]:
    """Of embeddings ``own`` beside the full model's."""
    answers, wanted = ((probe(part)[:, 0] > 0).double().numpy() for part in (own, full))
    truth, ones = labels.double().numpy(), np.ones(len(labels))
    right = answers == truth
    return {
        "accuracy": share(int(right.sum()), len(right)),
        "accuracy_change": ratio_of_sums(right.astype(float) - (wanted == truth), ones),
        "f1": f1(answers, truth),
        "same_answer": share(int((answers == wanted).sum()), len(right)),
        "cosine": ratio_of_sums(functional.cosine_similarity(own, full).double().numpy(), ones),
    }


def shown(name: str, size: float, found: dict[str, Estimate]) -> str:
    def cell(key: str) -> str:
        one = found[key]
        return f"{one.value:.4f} [{one.low:.4f}, {one.high:.4f}]"

    cells = [name, f"{size:.3f}", *(cell(key) for key in ("accuracy", "accuracy_change", "f1"))]
    return "| " + " | ".join([*cells, f"{found['same_answer'].value:.3f}", f"{found['cosine'].value:.4f}"]) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.encoder_methods", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--train", type=int, default=6920, help="sentences that the probe is fitted to (%(default)s)")
    parser.add_argument("--dev", type=int, default=872, help="sentences that are scored (%(default)s)")
    parser.add_argument("--threads", type=int, default=1)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    facts = report.print_header("Quantizing an encoder")
    train, dev = (read_sentences(SST2 / f"sst2-{part}.txt", getattr(chosen, part)) for part in ("train", "dev"))
    embedder = Embedder(minilm_folder())
    probe = fitted_probe(embedder.embed(embedder.model, train.texts), train.labels)
    full = embedder.embed(embedder.model, dev.texts)
    print("| | bytes to 16 bits | accuracy | change | F1 | same answer | cosine |\n|---|---|---|---|---|---|---|")
    sentences = {"train": len(train.texts), "dev": len(dev.texts), "calibration": CALIBRATED_ON}
    for method in [FULL, *chosen.methods]:
        model, size = (
            (embedder.model, 2.0) if method == FULL else quantized(embedder, method, train.texts[:CALIBRATED_ON])
        )
        scored = scores(full if method == FULL else embedder.embed(model, dev.texts), full, probe, dev.labels)
        print(shown(method, size, scored), flush=True)
        kept = report.read("encoder_methods").get("methods", {})
        kept[method] = {"bytes_to_16_bits": round(size, 4), **msgspec.to_builtins(scored)}
        report.write("encoder_methods", {"machine": facts, "sentences": sentences, "methods": kept})


if __name__ == "__main__":
    main()
