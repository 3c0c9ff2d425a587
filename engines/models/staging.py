"""Uploads at the speed of the bus: through two pinned buffers, one being filled while the other is on its way."""

from __future__ import annotations

import torch

BUFFER_BYTES = 32 << 20


class Uploader:
    """Copies host tensors, such as parts of mapped files, to one GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers = [torch.empty(BUFFER_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        self._sent = [torch.cuda.Event() for _ in range(2)]  # type: ignore[no-untyped-call]
        self._turn = 0

    def upload(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor on the device, in its own type; complete for whatever the current stream does afterwards."""
        source = tensor.contiguous().view(-1).view(torch.uint8)
        target = torch.empty(tensor.shape, dtype=tensor.dtype, device=self._device)
        raw = target.view(-1).view(torch.uint8)
        for first in range(0, source.numel(), BUFFER_BYTES):
            part = source[first : first + BUFFER_BYTES]
            buffer, sent = self._buffers[self._turn], self._sent[self._turn]
            sent.synchronize()
            # Many threads fill the buffer, and fault in the file's pages while they do.
            buffer[: part.numel()].copy_(part)
            raw[first : first + part.numel()].copy_(buffer[: part.numel()], non_blocking=True)
            sent.record()
            self._turn = 1 - self._turn
        return target
