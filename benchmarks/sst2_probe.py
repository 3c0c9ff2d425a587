"""Accuracy of a logistic probe on SST-2 over an encoder's embeddings: the same probe for each way of running it.

The probe is fitted on the embeddings that the model computes in float32 without a compiler, of the training sentences,
and read on the development sentences as each engine embeds them.

    python -m benchmarks.sst2_probe [--model DIR] [--engines eager onnx compiled-fp32 compiled-bf16] [--train 6920]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.plain_models import minilm_folder
from benchmarks.report import ROOT, print_header, row, write
from engines.compiled.cache import Dtype
from engines.compiled.engine import CompiledEngine
from engines.compiled.exported import write_onnx
from engines.encoder_folder import read_encoder_folder
from engines.encoder_tokens import Arrays, EncoderTokenizer
from engines.models.encoder import Encoder, load_encoder

LABELLED = ROOT.parent / "shared" / "data" / "labelled"
BATCH = 32
PENALTY = 1.0
"""Of the squared weights over two, beside the sum of the sentences' losses."""

Floats = NDArray[np.float32]
Run = Callable[[Arrays], Floats]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="default: all-MiniLM-L6-v2 from the package index")
    parser.add_argument("--engines", nargs="+", default=["eager", "onnx", "compiled-fp32", "compiled-bf16"])
    parser.add_argument("--train", type=int, default=6920, help="sentences that the probe is fitted on")
    given = parser.parse_args()
    result: dict[str, Any] = {"machine": print_header("SST-2 probe"), "threads": torch.get_num_threads()}
    source = given.model or minilm_folder()
    folder = read_encoder_folder(source)
    model, tokenizer = load_encoder(folder, torch.device("cpu"), torch.float32), EncoderTokenizer(folder)
    (train, train_labels), (dev, dev_labels) = (read_sst2(name) for name in ("sst2-train.txt", "sst2-dev.txt"))
    embedded, _ = embed(eager(model), tokenizer, train[: given.train])
    weights = fit(embedded, train_labels[: given.train])
    widths = (16, 9, 14, 12)
    print(row(("engine", "accuracy", "sentences/s", "difference"), widths))
    reference: Floats | None = None
    with tempfile.TemporaryDirectory() as scratch:
        for name in given.engines:
            found, seconds = embed(make_engine(name, model, source, Path(scratch)), tokenizer, dev)
            reference = found if reference is None else reference
            figures = {
                "accuracy": round(accuracy(weights, found, dev_labels), 4),
                "sentences_per_second": round(len(dev) / seconds, 1),
                "largest_difference": float(np.abs(found - reference).max()),
            }
            result[name] = figures
            cells = (f"{figures['accuracy']:.4f}", f"{figures['sentences_per_second']:.1f}")
            print(row((name, *cells, f"{figures['largest_difference']:.1e}"), widths), flush=True)
    print(f"wrote {write('sst2_probe', result)}")


def read_sst2(name: str) -> tuple[list[str], NDArray[np.int64]]:
    """Sentences, and 1 for the positive ones."""
    lines = (LABELLED / name).read_text(encoding="latin-1").splitlines()
    return [line[2:] for line in lines], np.array([int(line[0]) for line in lines])


def embed(run: Run, tokenizer: EncoderTokenizer, texts: list[str]) -> tuple[Floats, float]:
    """[texts, width], and the seconds that the model took. Sentences of like lengths go together."""
    order = sorted(range(len(texts)), key=lambda at: len(texts[at]))
    parts, seconds = [], 0.0
    for start in range(0, len(order), BATCH):
        arrays = tokenizer.encode([texts[at] for at in order[start : start + BATCH]])
        begun = time.perf_counter()
        parts.append(run(arrays))
        seconds += time.perf_counter() - begun
    joined = np.concatenate(parts)
    embedded = np.empty_like(joined)
    embedded[order] = joined
    return embedded, seconds


def fit(embedded: Floats, labels: NDArray[np.int64]) -> torch.Tensor:
    """Weights and a bias of the logistic regression, [width + 1]."""
    inputs, wanted = _with_bias(embedded), torch.from_numpy(labels).double()
    weights = torch.zeros(inputs.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=500, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        logits = inputs @ weights
        total = torch.nn.functional.binary_cross_entropy_with_logits(logits, wanted, reduction="sum")
        total = total + PENALTY / 2 * weights[:-1].square().sum()
        total.backward()  # type: ignore[no-untyped-call]
        return total

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    return weights.detach()


def accuracy(weights: torch.Tensor, embedded: Floats, labels: NDArray[np.int64]) -> float:
    found = (_with_bias(embedded) @ weights > 0).numpy()
    return float((found == labels).mean())


def _with_bias(embedded: Floats) -> torch.Tensor:
    return torch.cat([torch.from_numpy(embedded).double(), torch.ones(len(embedded), 1, dtype=torch.float64)], 1)


def eager(model: Encoder) -> Run:
    def run(arrays: Arrays) -> Floats:
        with torch.inference_mode():
            found: Floats = model(**{name: torch.from_numpy(array) for name, array in arrays.items()}).numpy()
        return found

    return run


def make_engine(name: str, model: Encoder, source: Path, scratch: Path) -> Run:
    if name == "eager":
        return eager(model)
    if name == "onnx":
        return _onnx(model, scratch / "model.onnx")
    dtypes: dict[str, Dtype] = {"compiled-fp32": "fp32", "compiled-bf16": "bf16", "compiled-fp16": "fp16"}
    engine = CompiledEngine.load(source, "cpu", dtypes[name], report=lambda what: None)
    return lambda arrays: np.asarray(engine.run(dict(arrays))[model.output_name], np.float32)


def _onnx(model: Encoder, path: Path) -> Run:
    import onnxruntime

    write_onnx(model, path)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options)
    return lambda arrays: np.asarray(session.run(None, arrays)[0], np.float32)


if __name__ == "__main__":
    main()
