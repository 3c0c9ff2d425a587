"""An encoder as a graph: ``torch.export`` with free numbers of texts and tokens, and ONNX files made of that."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.export import Dim, ExportedProgram, export

from engines.models.encoder import Encoder
from engines.protocol import EngineLoadError

ENCODER_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
MOST_TEXTS = 1024
"""In one call of a compiled or exported encoder."""
OPSET = 18


def export_encoder(model: Encoder, most_texts: int = MOST_TEXTS) -> ExportedProgram:
    """The model's graph for 1 to ``most_texts`` texts of 1 to all of its positions; weights stay where they are."""
    with torch.no_grad(), quiet_compiler():
        return export(model, _example(model), dynamic_shapes=_free_axes(model, most_texts))


def write_onnx(model: Encoder, path: Path) -> None:
    """One ``.onnx`` file with its weights inside, inputs and output by name, both axes free.

    Raises EngineLoadError if onnxscript, which torch's exporter needs, is not installed.
    """
    try:
        import onnxscript  # noqa: F401
    except ModuleNotFoundError as error:
        raise EngineLoadError(
            'writing ONNX files needs the package onnxscript: pip install "slimserve[onnx]"'
        ) from error
    with torch.no_grad(), quiet_compiler():
        exported = torch.onnx.export(
            model,
            _example(model),
            dynamic_shapes=_free_axes(model, MOST_TEXTS),
            input_names=list(ENCODER_INPUTS),
            output_names=[model.output_name],
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    if exported is None:
        raise EngineLoadError("torch.onnx.export returned no model")
    exported.save(path, external_data=False)


def _example(model: Encoder) -> tuple[torch.Tensor, ...]:
    device = next(model.parameters()).device
    return tuple(torch.ones((2, 8), dtype=torch.int64, device=device) for _ in ENCODER_INPUTS)


def _free_axes(model: Encoder, most_texts: int) -> tuple[dict[int, Dim], ...]:
    axes = {0: Dim("texts", min=1, max=most_texts), 1: Dim("tokens", min=1, max=model.config.positions)}
    return tuple(axes for _ in ENCODER_INPUTS)


@contextmanager
def quiet_compiler() -> Iterator[None]:
    """Without the warnings of torch's own compilers, which are about torch's code and tell a user nothing."""
    logger = logging.getLogger("torch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
