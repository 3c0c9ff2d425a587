"""Resident state of the slots: sequences and block tables on the device, what an admit fixed on the host.

Written in full by ``admit``; a step then adds its new blocks and its drawn tokens. Drawn tokens go into the token
buffer on the device, where the next step reads them, so the host never sees a token between two steps. What the
host does know without them, positions and lengths, comes with each plan.

Where the device has a ``DeviceState``, that holds what is on the device, sampling parameters too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from engines.generation.sampler import (
    GREEDY,
    MIN_P,
    PLAIN,
    TOP_K,
    TOP_K_TOP_P,
    TOP_P,
)
from engines.generation.transfer import to_device
from engines.kernels import row_parameters
from engines.protocol import Admit, Capacity, Row, SamplingParams

if TYPE_CHECKING:
    from engines.generation.device_state import DeviceState


def draw_kind(sampling: SamplingParams) -> int:
    """Which of the sampler's kinds a row is."""
    if sampling.temperature < row_parameters.GREEDY_BELOW:
        return GREEDY
    if sampling.top_p < 1:
        return TOP_K_TOP_P if sampling.top_k > 0 else TOP_P
    if sampling.top_k > 0:
        return TOP_K
    return MIN_P if sampling.min_p > 0 else PLAIN


def parameter_line(admit: Admit) -> np.ndarray[tuple[int, ...], np.dtype[np.int32]]:
    """A slot's sampling parameters as ``engines.kernels.row_parameters`` lays them out."""
    sampling = admit.sampling
    line = np.zeros(row_parameters.FIELDS, np.int32)
    line[row_parameters.SEED : row_parameters.SEED + 2] = np.array([sampling.seed], np.uint64).view(np.int32)
    line[row_parameters.CHOICE] = sampling.choice
    line[row_parameters.PROMPT_LENGTH] = admit.prompt_length
    line[row_parameters.TOP_K] = sampling.top_k
    floats = line.view(np.float32)
    floats[row_parameters.TEMPERATURE] = sampling.temperature
    floats[row_parameters.TOP_P] = sampling.top_p
    floats[row_parameters.MIN_P] = sampling.min_p
    return line


class RowStates:
    """State of slots 0 .. max_rows-1. All memory is taken at construction, but for the ids of the few rows with a
    logit bias or stop ids to mask."""

    def __init__(self, capacity: Capacity, vocab: int, device: torch.device, remote: DeviceState | None = None) -> None:
        rows, self.block_size = capacity.max_rows, capacity.block_size
        self._vocab = vocab
        self.device = device
        self._remote = remote
        self.tokens = (
            torch.zeros((rows, capacity.max_model_len + 1), dtype=torch.int32, device=device)
            if remote is None
            else remote.tokens
        )
        """Sequences, prompt and output."""
        widest = -(-capacity.max_model_len // self.block_size) + 1
        self.tables = np.zeros((rows, widest), np.int32)
        """Block ids on the host; on the CPU ``device_tables`` is the same memory."""
        self.device_tables = torch.from_numpy(self.tables).to(device) if remote is None else remote.tables
        self.table_lengths = [0] * rows
        self.kinds = np.zeros(rows, np.int64)
        self.seeds = np.zeros(rows, np.int64)
        self.choices = np.zeros(rows, np.int64)
        self.top_k = np.zeros(rows, np.int64)
        self.prompt_lengths = np.zeros(rows, np.int64)
        self.min_tokens = np.zeros(rows, np.int64)
        self.temperature = np.ones(rows, np.float32)
        self.top_p = np.ones(rows, np.float32)
        self.min_p = np.zeros(rows, np.float32)
        self.repetition = np.ones(rows, np.float32)
        self.frequency = np.zeros(rows, np.float32)
        self.presence = np.zeros(rows, np.float32)
        self.penalized = np.zeros(rows, np.bool_)
        self.particular = np.zeros(rows, np.bool_)
        """Asks for more than a draw: edits of its logits, or log probabilities."""
        self.logprobs = np.full(rows, -1, np.int64)
        """Alternatives to report, -1 where nothing is reported; so is ``prompt_logprobs``."""
        self.prompt_logprobs = np.full(rows, -1, np.int64)
        self.biases: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.stop_ids: dict[int, torch.Tensor] = {}
        """Of slots with ``min_tokens``."""

    def admit(self, admit: Admit) -> None:
        """Write all of a slot; nothing of its former row is left."""
        slot, sampling = admit.slot, admit.sampling
        blocks = len(admit.blocks)
        self.tables[slot] = 0
        self.tables[slot, :blocks] = admit.blocks
        self.table_lengths[slot] = blocks
        self._send(slot, admit)
        self.prompt_lengths[slot] = admit.prompt_length
        self.prompt_logprobs[slot] = -1 if admit.prompt_logprobs is None else admit.prompt_logprobs
        self._write_sampling(slot, sampling)

    def _send(self, slot: int, admit: Admit) -> None:
        if self._remote is not None:
            self._remote.write_tokens(slot, admit.tokens)
            self._remote.write_blocks(slot, 0, admit.blocks)
            self._remote.write_parameters(slot, parameter_line(admit))
            return
        tokens, table = to_device((np.array(admit.tokens, np.int32), self.tables[slot]), self.device)
        self.tokens[slot, : len(admit.tokens)] = tokens
        if self.device.type != "cpu":
            self.device_tables[slot] = table

    def _write_sampling(self, slot: int, sampling: SamplingParams) -> None:
        self.kinds[slot] = draw_kind(sampling)
        self.seeds[slot] = sampling.seed if sampling.seed < 1 << 63 else sampling.seed - (1 << 64)
        self.choices[slot] = sampling.choice
        self.temperature[slot] = sampling.temperature
        self.top_k[slot], self.top_p[slot], self.min_p[slot] = sampling.top_k, sampling.top_p, sampling.min_p
        self.repetition[slot] = sampling.repetition_penalty
        self.frequency[slot], self.presence[slot] = sampling.frequency_penalty, sampling.presence_penalty
        self.penalized[slot] = (
            sampling.repetition_penalty != 1 or sampling.frequency_penalty != 0 or sampling.presence_penalty != 0
        )
        self.logprobs[slot] = -1 if sampling.logprobs is None else sampling.logprobs
        self.biases.pop(slot, None)
        bias = {token: value for token, value in sampling.logit_bias if token < self._vocab}
        if bias:
            ids, values = np.fromiter(bias, np.int64, len(bias)), np.fromiter(bias.values(), np.float32, len(bias))
            bias_ids, bias_values = to_device((ids, values), self.device)
            self.biases[slot] = (bias_ids, bias_values)
        self.stop_ids.pop(slot, None)
        self.min_tokens[slot] = 0
        stop_ids = [token for token in sampling.stop_token_ids if token < self._vocab]
        if sampling.min_tokens > 0 and stop_ids:
            self.min_tokens[slot] = sampling.min_tokens
            (self.stop_ids[slot],) = to_device((np.array(stop_ids, np.int64),), self.device)
        waits, reports = bool(self.min_tokens[slot]), sampling.logprobs is not None
        self.particular[slot] = self.penalized[slot] or bool(bias) or waits or reports

    def extend(self, rows: Sequence[Row]) -> None:
        """Append each row's new blocks to its table."""
        slots: list[int] = []
        places: list[int] = []
        blocks: list[int] = []
        for row in rows:
            if row.new_blocks:
                length, new = self.table_lengths[row.slot], len(row.new_blocks)
                self.tables[row.slot, length : length + new] = row.new_blocks
                self.table_lengths[row.slot] = length + new
                if self._remote is not None:
                    self._remote.write_blocks(row.slot, length, row.new_blocks)
                    continue
                slots += [row.slot] * new
                places += range(length, length + new)
                blocks += row.new_blocks
        if slots and self.device.type != "cpu":
            moved = to_device(
                (np.array(slots, np.int64), np.array(places, np.int64), np.array(blocks, np.int32)), self.device
            )
            self.device_tables[moved[0], moved[1]] = moved[2]
