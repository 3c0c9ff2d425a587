"""Resident state of all slots on a GPU: one flat tensor, brought up to date by one copy and one launch a step.

The host sends what changed since the last step and nothing else: a new row's tokens, blocks and parameters, the
blocks that rows have grown by, and which rows the step has.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from engines.kernels import row_parameters
from engines.kernels.cuda import steps
from engines.protocol import Capacity

Words = np.ndarray[tuple[int, ...], np.dtype[np.int32]]

_ALIGNMENT = 4
"""Words: kernels load 16 bytes at once from where a region begins."""


class DeviceState:
    """Regions of one int32 tensor. ``write_*`` only note a change; ``flush`` sends all that was noted."""

    def __init__(self, capacity: Capacity, device: torch.device) -> None:
        rows = capacity.max_rows
        self._lengths = capacity.max_model_len + 1
        self._widest = -(-capacity.max_model_len // capacity.block_size) + 1
        shapes = {
            "tokens": (rows, self._lengths),
            "tables": (rows, self._widest),
            "parameters": (rows, row_parameters.FIELDS),
            "query_starts": (rows + 1,),
            "context_lengths": (rows,),
            "slots": (rows,),
            "draw_slots": (rows,),
            "draw_places": (rows,),
            "draw_tokens": (rows,),
        }
        self._starts: dict[str, int] = {}
        end = 0
        for name, shape in shapes.items():
            self._starts[name] = end
            end += -(-int(np.prod(shape)) // _ALIGNMENT) * _ALIGNMENT
        self._flat = torch.zeros(end, dtype=torch.int32, device=device)
        views = {
            name: self._flat[self._starts[name] : self._starts[name] + int(np.prod(shape))].view(shape)
            for name, shape in shapes.items()
        }
        self.tokens = views["tokens"]
        """(slots, max_model_len + 1): sequences, prompt and output."""
        self.tables = views["tables"]
        """(slots, widest): KV blocks in sequence order."""
        self.parameters = views["parameters"]
        """(slots, FIELDS), as ``engines.kernels.row_parameters`` lays a line out."""
        self.query_starts = views["query_starts"]
        """(rows + 1,) of the step; so are the next two, (rows,)."""
        self.context_lengths = views["context_lengths"]
        self.slots = views["slots"]
        self.draw_slots = views["draw_slots"]
        """(rows,): slot of each row that draws, where not every row does; so are the next two."""
        self.draw_places = views["draw_places"]
        self.draw_tokens = views["draw_tokens"]
        """Flat token whose hidden state predicts what is drawn."""
        self._targets: list[int] = []
        self._words: list[Words] = []

    @staticmethod
    def bytes(max_rows: int, max_model_len: int, block_size: int) -> int:
        """Roughly what it takes on the device."""
        return 4 * max_rows * (max_model_len + -(-max_model_len // block_size) + 32)

    def write_tokens(self, slot: int, tokens: Sequence[int]) -> None:
        """A sequence from its beginning."""
        self._note(self._starts["tokens"] + slot * self._lengths, np.array(tokens, np.int32))

    def write_blocks(self, slot: int, place: int, blocks: Sequence[int]) -> None:
        """Block ids from place ``place`` of a slot's table on."""
        if blocks:
            self._note(self._starts["tables"] + slot * self._widest + place, np.array(blocks, np.int32))

    def write_parameters(self, slot: int, line: Words) -> None:
        """(FIELDS,) of a slot."""
        self._note(self._starts["parameters"] + slot * row_parameters.FIELDS, line)

    def write_rows(self, query_starts: Words, context_lengths: Words, slots: Words) -> None:
        """Rows of the next step: (R+1,), (R,), (R,). Padding rows have context 0 and begin where the last row ends."""
        self._note(self._starts["query_starts"], query_starts)
        self._note(self._starts["context_lengths"], context_lengths)
        self._note(self._starts["slots"], slots)

    def clear_rows(self) -> None:
        """The next step has padding only. Enqueues at once."""
        self.query_starts.zero_()
        self.context_lengths.zero_()
        self.slots.zero_()

    def write_draws(self, slots: Words, places: Words, tokens: Words) -> None:
        """(S,) each: the rows of the next step that draw."""
        self._note(self._starts["draw_slots"], slots)
        self._note(self._starts["draw_places"], places)
        self._note(self._starts["draw_tokens"], tokens)

    def _note(self, target: int, words: Words) -> None:
        self._targets.append(target)
        self._words.append(words)

    def flush(self) -> None:
        """Enqueue all noted changes, in one copy and one launch. No place may have been noted twice."""
        if not self._targets:
            return
        lengths = [len(words) for words in self._words]
        count = len(lengths)
        header = np.empty((count, 3), np.int32)
        header[:, 0], header[:, 1] = self._targets, lengths
        header[:, 2] = 3 * count
        header[1:, 2] += np.cumsum(lengths[:-1], dtype=np.int32)
        packed = torch.empty(3 * count + sum(lengths), dtype=torch.int32, pin_memory=self._flat.is_cuda)
        np.concatenate([header.reshape(-1), *self._words], out=packed.numpy())
        steps.scatter(packed.to(self._flat.device, non_blocking=True), self._flat, count, max(lengths))
        self._targets.clear()
        self._words.clear()
