"""The operations that models and the sampler call: one signature each, the fastest implementation that fits.

The native C library serves CPU tensors in float32 and bfloat16 where it was built, Triton kernels serve CUDA tensors
where Triton is installed; everything else runs ``reference``. In float32 on the CPU a row's result is the same bits
whatever other rows are in the step.
"""

from engines.kernels.attention import (
    GroupedQueries,
    grouped_query_attention,
    last_query_attention,
    mla_attention,
    paged_attention,
)
from engines.kernels.cuda import TritonStatus, triton_status
from engines.kernels.elementwise import rms_norm, rope_, rope_write_kv, silu_mul, write_kv, write_latent
from engines.kernels.embedding import embed, embed_quantized
from engines.kernels.experts import (
    PackedExperts,
    RoutedBatch,
    Router,
    RoutingRule,
    mixture,
    pack_experts,
)
from engines.kernels.latent_attention import (
    LatentQueries,
    LatentUp,
    last_latent_attention,
    latent_attention,
    pack_latent_up,
)
from engines.kernels.linear import (
    PLAIN,
    Fusion,
    RmsNorm,
    Stream,
    add_linear,
    compose_output,
    linear,
)
from engines.kernels.matrices import (
    Activations,
    CodebookMatrix,
    Float8Matrix,
    IntegerMatrix,
    Matrix,
    QuantizedMatrix,
    dense,
    matrix_bytes,
    stack_rows,
    take_rows,
)
from engines.kernels.native import NativeStatus, native_status
from engines.kernels.packing import PackedLinear, PackedParts, PackedWeight, pack_dense, pack_linear
from engines.kernels.quantized import QuantizedLinear, pack_quantized, quantized_product
from engines.kernels.reference import AttentionBatch
from engines.kernels.sampling import argmax, gumbel_noise

__all__ = [
    "PLAIN",
    "Activations",
    "AttentionBatch",
    "CodebookMatrix",
    "Float8Matrix",
    "Fusion",
    "GroupedQueries",
    "IntegerMatrix",
    "LatentQueries",
    "LatentUp",
    "Matrix",
    "NativeStatus",
    "PackedExperts",
    "PackedLinear",
    "PackedParts",
    "PackedWeight",
    "QuantizedLinear",
    "QuantizedMatrix",
    "RmsNorm",
    "RoutedBatch",
    "Router",
    "RoutingRule",
    "Stream",
    "TritonStatus",
    "add_linear",
    "argmax",
    "compose_output",
    "dense",
    "embed",
    "embed_quantized",
    "grouped_query_attention",
    "gumbel_noise",
    "last_latent_attention",
    "last_query_attention",
    "latent_attention",
    "linear",
    "matrix_bytes",
    "mixture",
    "mla_attention",
    "native_status",
    "pack_dense",
    "pack_experts",
    "pack_latent_up",
    "pack_linear",
    "pack_quantized",
    "paged_attention",
    "quantized_product",
    "rms_norm",
    "rope_",
    "rope_write_kv",
    "silu_mul",
    "stack_rows",
    "take_rows",
    "triton_status",
    "write_kv",
    "write_latent",
]
