"""Uploads through pinned buffers give the tensors that were sent."""

from __future__ import annotations

import pytest
import torch

from engines.models.staging import BUFFER_BYTES, Uploader


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_tensors_arrive_whole(dtype: torch.dtype) -> None:
    uploader = Uploader(torch.device("cuda", 0))
    itemsize = torch.empty(0, dtype=dtype).element_size()
    sizes = [1, 7, BUFFER_BYTES // itemsize, BUFFER_BYTES // itemsize + 3, 5 * BUFFER_BYTES // itemsize // 2]
    sent = [torch.randint(0, 256, (size, itemsize), dtype=torch.uint8).view(dtype).view(size) for size in sizes]
    arrived = [uploader.upload(tensor) for tensor in sent]
    for tensor, result in zip(sent, arrived, strict=True):
        assert torch.equal(result.cpu().view(torch.uint8), tensor.view(torch.uint8))
    turned = torch.arange(24, dtype=torch.float32).view(4, 6).t()
    assert torch.equal(uploader.upload(turned).cpu(), turned)
