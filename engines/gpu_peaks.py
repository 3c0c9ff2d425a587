"""What GPUs can do at most, by the name that the driver gives: dense 16-bit arithmetic, and reading their memory.

From NVIDIA's data sheets, with accumulation in float32 and without sparsity. A GPU that is not here has no known peak.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Peak:
    flops: float
    """Operations per second in bfloat16 or float16."""
    bytes: float
    """Per second."""


PEAKS = {
    "NVIDIA H200": Peak(989.4e12, 4.8e12),
    "NVIDIA H100 80GB HBM3": Peak(989.4e12, 3.35e12),
    "NVIDIA H100 PCIe": Peak(756.5e12, 2.0e12),
    "NVIDIA A100-SXM4-80GB": Peak(312e12, 2.039e12),
    "NVIDIA A100 80GB PCIe": Peak(312e12, 1.935e12),
    "NVIDIA A100-SXM4-40GB": Peak(312e12, 1.555e12),
    "NVIDIA A100-PCIE-40GB": Peak(312e12, 1.555e12),
    "NVIDIA L40S": Peak(362e12, 0.864e12),
    "NVIDIA L4": Peak(121e12, 0.3e12),
    "NVIDIA GeForce RTX 4090": Peak(165.2e12, 1.008e12),
}
