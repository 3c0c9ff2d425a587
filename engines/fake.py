"""An engine without a model: its tokens are a function of (seed, choice, position), and it checks every plan.

It stands in for a real engine wherever only the way of a request matters, and it is the oracle of the scheduler's
tests: it keeps for each KV block which tokens were really written there, and refuses a plan under which a real engine
would compute something twice, out of order, or from another item's bytes.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Self

from engines.protocol import (
    Admit,
    Capacity,
    EngineInfo,
    EngineSpec,
    LoadProgress,
    ReportProgress,
    Row,
    RowResult,
    StepPlan,
    StepResult,
    TokenLogprobs,
)

FAKE_VOCAB = 256
BLOCK_SIZE = 16
BYTES_PER_TOKEN = 64
"""What a token costs of ``EngineSpec.memory_limit``; a fake engine really keeps about as much."""


class BrokenPlanError(Exception):
    """A plan that breaks the contract between scheduler and engine."""


def fake_token(seed: int, choice: int, position: int, vocab: int = FAKE_VOCAB) -> int:
    """The token at output position ``position``: the first 8 bytes of blake2b("seed/choice/position"), modulo vocab."""
    digest = blake2b(f"{seed}/{choice}/{position}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % vocab


def fake_output(item: int, bucket: int, rows: int) -> bytes:
    """What a one-shot item gives."""
    return f"item {item}: {rows} rows of bucket {bucket}".encode()


def fake_logprobs(token: int, best: int, vocab: int = FAKE_VOCAB) -> TokenLogprobs:
    """Log probabilities under which ``token`` is the likeliest, followed by the ids above it."""
    ids = [(token + rank) % vocab for rank in range(best)]
    return TokenLogprobs(-0.5, ids, [-0.5 - rank for rank in range(best)])


@dataclass(slots=True, eq=False)
class _Sequence:
    """State of a slot, as a device would hold it."""

    admit: Admit
    tokens: list[int]
    history: list[int]
    """For each token a hash of it and all before it: what its KV depends on."""
    table: list[int]
    computed: int

    def append(self, token: int) -> None:
        self.tokens.append(token)
        self.history.append(hash((self.history[-1] if self.history else 0, token)))


class FakeEngine:
    """Implements ``Engine``. Raises BrokenPlanError from ``launch``; sleeps, if at all, in ``collect`` only."""

    def __init__(
        self,
        name: str,
        capacity: Capacity,
        *,
        vocab: int = FAKE_VOCAB,
        step_seconds: float = 0.0,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._info = EngineInfo(
            name=name,
            fingerprint="fake",
            device="cpu",
            dtype="none",
            kv_dtype="none",
            weight_bytes=0,
            kv_bytes=capacity.blocks * capacity.block_size * BYTES_PER_TOKEN,
            threads=1,
            load_seconds=0.0,
            vocab_size=vocab,
        )
        self._capacity = capacity
        self._step_seconds = step_seconds
        self._sleep = sleep
        self._slots: dict[int, _Sequence] = {}
        self._written: list[list[int]] = [[] for _ in range(capacity.blocks)]
        self._writer: list[_Sequence | None] = [None] * capacity.blocks
        self._in_flight: deque[StepResult] = deque()
        self._last_step = -1

    @classmethod
    def load(cls, spec: EngineSpec, report: ReportProgress) -> Self:
        """Build from a spec, of which it honours the lengths, ``memory_limit`` and ``fake_step_seconds``."""
        report(LoadProgress(phase="allocate"))
        max_model_len = spec.max_model_len or 2048
        max_rows = spec.max_batch or 64
        blocks = max_rows * -(-max_model_len // BLOCK_SIZE)
        if spec.memory_limit is not None:
            blocks = max(1, spec.memory_limit // (BLOCK_SIZE * BYTES_PER_TOKEN))
        capacity = Capacity(
            blocks=blocks,
            block_size=BLOCK_SIZE,
            max_rows=max_rows,
            max_step_tokens=spec.max_step_tokens or 512,
            max_model_len=max_model_len,
        )
        return cls(spec.name, capacity, step_seconds=spec.fake_step_seconds)

    @property
    def info(self) -> EngineInfo:
        return self._info

    @property
    def capacity(self) -> Capacity:
        return self._capacity

    def launch(self, plan: StepPlan) -> int:
        _require(len(self._in_flight) < 2, f"step {plan.step} is the third in flight")
        _require(plan.step > self._last_step, f"step {plan.step} comes after step {self._last_step}")
        _require(plan.engine == self._info.name, f"step {plan.step} is for the engine {plan.engine}")
        self._last_step = plan.step
        self._check_shape(plan)
        for admit in plan.admits:
            self._admit(admit)
        sequences = [self._sequence_of(row) for row in plan.rows]
        for row, sequence in zip(plan.rows, sequences, strict=True):
            self._write(row, sequence)
        # After all writes: a row that writes to a block which another one reads in this very step is found too.
        for row, sequence in zip(plan.rows, sequences, strict=True):
            self._check_context(sequence, row.start + row.count)
        results = [self._draw(row, sequence) for row, sequence in zip(plan.rows, sequences, strict=True)]
        results += [
            RowResult(item=row.item, output=fake_output(row.item, row.bucket, row.rows)) for row in plan.one_shot
        ]
        self._in_flight.append(StepResult(step=plan.step, rows=results, seconds=self._step_seconds))
        return plan.step

    def collect(self, ticket: int) -> StepResult:
        _require(bool(self._in_flight) and self._in_flight[0].step == ticket, f"step {ticket} is not the oldest")
        if self._step_seconds:
            self._sleep(self._step_seconds)
        return self._in_flight.popleft()

    def close(self) -> None:
        _require(not self._in_flight, "closed with steps in flight")
        self._slots.clear()
        self._written.clear()
        self._writer.clear()

    def _check_shape(self, plan: StepPlan) -> None:
        rows, capacity = plan.rows, self._capacity
        batch = len(rows) + sum(row.rows for row in plan.one_shot)
        _require(0 < batch <= capacity.max_rows, f"{batch} rows in a step")
        _require(sum(row.count for row in rows) <= capacity.max_step_tokens, "too many tokens in a step")
        _require(len({row.item for row in rows}) == len(rows), "an item has two rows in a step")
        decodes = [row.count == 1 and row.max_new == 1 for row in rows]
        _require(decodes == sorted(decodes, reverse=True), "decodes do not come first")
        if plan.graph_rows:
            fits = plan.graph_rows in capacity.graph_rows and plan.graph_rows >= len(rows)
            _require(fits and all(decodes) and not plan.one_shot, f"no graph of {plan.graph_rows} rows for this step")
        if plan.graph_tokens:
            tokens = sum(row.count for row in rows)
            fits = plan.graph_tokens in capacity.graph_tokens and plan.graph_tokens >= tokens
            _require(fits and not all(decodes), f"no graph of {plan.graph_tokens} tokens for this step")
        _check_one_shot(plan, capacity.one_shot_rows)

    def _admit(self, admit: Admit) -> None:
        _require(0 <= admit.slot < self._capacity.max_rows, f"there is no slot {admit.slot}")
        _require(0 < admit.prompt_length <= len(admit.tokens), f"item {admit.item} has no prompt")
        computed = len(admit.blocks) * self._capacity.block_size
        _require(computed < len(admit.tokens), f"item {admit.item} has no token left to compute")
        sequence = _Sequence(admit, [], [], list(admit.blocks), computed)
        for token in admit.tokens:
            sequence.append(token)
        self._check_context(sequence, computed)
        self._slots[admit.slot] = sequence

    def _sequence_of(self, row: Row) -> _Sequence:
        sequence = self._slots.get(row.slot)
        if sequence is None or sequence.admit.item != row.item:
            raise BrokenPlanError(f"item {row.item} is not in slot {row.slot}")
        return sequence

    def _write(self, row: Row, sequence: _Sequence) -> None:
        """Put the row's tokens into its blocks, each position exactly once and in order."""
        for block in row.new_blocks:
            _require(0 <= block < self._capacity.blocks, f"there is no block {block}")
            self._writer[block] = sequence
            self._written[block] = []
        sequence.table.extend(row.new_blocks)
        end = row.start + row.count
        known, block_size = len(sequence.tokens), self._capacity.block_size
        _require(row.start == sequence.computed and row.count > 0, f"item {row.item} skips or repeats at {row.start}")
        _require(end <= known, f"item {row.item} has {known} tokens and computes {end}")
        _require(end <= len(sequence.table) * block_size, f"item {row.item} has no block for position {end - 1}")
        _require(row.max_new in (0, 1) and not (row.max_new and end < known), f"item {row.item} draws in mid-prompt")
        _require(known + row.max_new <= self._capacity.max_model_len, f"item {row.item} grows past the context")
        for position in range(row.start, end):
            block = sequence.table[position // block_size]
            _require(self._writer[block] is sequence, f"item {row.item} writes to block {block}, which is not its own")
            _require(len(self._written[block]) == position % block_size, f"block {block} is not written in order")
            self._written[block].append(sequence.history[position])
        sequence.computed = end

    def _check_context(self, sequence: _Sequence, end: int) -> None:
        """The blocks of the first ``end`` tokens hold exactly these tokens after exactly this history."""
        size = self._capacity.block_size
        for index in range(-(-end // size)):
            expected = sequence.history[index * size : min(end, (index + 1) * size)]
            block = sequence.table[index]
            if self._written[block][: len(expected)] != expected:
                raise BrokenPlanError(f"block {block} does not hold the tokens of item {sequence.admit.item}")

    def _draw(self, row: Row, sequence: _Sequence) -> RowResult:
        admit = sequence.admit
        prompt_logprobs: list[TokenLogprobs] = []
        if admit.prompt_logprobs is not None:
            scored = sequence.tokens[row.start + 1 : min(row.start + row.count + 1, admit.prompt_length)]
            prompt_logprobs = [fake_logprobs(token, admit.prompt_logprobs, self._info.vocab_size) for token in scored]
        if not row.max_new:
            return RowResult(item=row.item, prompt_logprobs=prompt_logprobs)
        sampling, position = admit.sampling, len(sequence.tokens) - admit.prompt_length
        token = fake_token(sampling.seed, sampling.choice, position, self._info.vocab_size)
        sequence.append(token)
        logprobs: list[TokenLogprobs] = []
        if sampling.logprobs is not None:
            logprobs = [fake_logprobs(token, sampling.logprobs, self._info.vocab_size)]
        return RowResult(item=row.item, tokens=[token], logprobs=logprobs, prompt_logprobs=prompt_logprobs)


def _check_one_shot(plan: StepPlan, sizes: Sequence[int]) -> None:
    rows = plan.one_shot
    _require(len({row.bucket for row in rows}) <= 1, "a step mixes shape buckets")
    _require(len({row.item for row in rows}) == len(rows), "an item has two rows in a step")
    _require(all(row.rows > 0 for row in rows), "a one-shot item has no rows")
    total = sum(row.rows for row in rows)
    padded = next((size for size in sizes if size >= total > 0), total)
    _require(plan.padded_rows == padded, f"{total} rows are padded to {plan.padded_rows} and not to {padded}")


def _require(condition: bool, text: str) -> None:
    if not condition:
        raise BrokenPlanError(text)
