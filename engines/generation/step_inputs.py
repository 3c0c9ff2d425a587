"""From the integers of a plan to the tensors of a step. The host work is a few numpy calls, whatever the batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from engines.generation.logit_edits import LogitEdits, PenaltyRows
from engines.generation.rows import RowStates
from engines.generation.sampler import TOP_P, Draws, Noise
from engines.generation.transfer import HostArray, to_device
from engines.models.batch import FEWEST_SPARED, Batch, LastTokens
from engines.protocol import Row

Integers = np.ndarray[tuple[int, ...], np.dtype[np.int64]]


@dataclass(frozen=True, slots=True)
class Drawing:
    """The S rows of a step that draw a token, in the sampler's order; tensors are (S,) int64 on the device."""

    rows: Integers
    """(S,) on the host: which rows of the plan."""
    last_tokens: torch.Tensor
    """Flat token of the batch whose hidden state predicts the row's next token."""
    slots: torch.Tensor
    places: torch.Tensor
    """Where in the sequence the drawn token stands."""
    draws: Draws
    edits: LogitEdits
    scored: torch.Tensor | None
    """(L,) rows of the logits whose log probabilities are asked for."""
    scored_rows: Integers
    """(L,) on the host, the same."""
    scored_widths: list[int]
    """Alternatives that each of them wants."""


@dataclass(frozen=True, slots=True)
class PromptScoring:
    """A row's share of the prompt whose log probabilities are asked for."""

    row: int
    first: int
    """Flat token of the batch whose state predicts the first scored token."""
    count: int
    slot: int
    place: int
    """Where in the sequence the first scored token stands."""
    width: int


@dataclass(frozen=True, slots=True)
class StepInputs:
    batch: Batch
    drawing: Drawing | None
    prompts: list[PromptScoring]
    last: LastTokens | None
    """Of the rows that draw, in their order, or of one row; None where all tokens are read, or many of them."""


def build_inputs(rows: Sequence[Row], states: RowStates) -> StepInputs:
    """Inputs of a step over ``rows``, whose admits and new blocks are already in ``states``."""
    slots = np.array([row.slot for row in rows], np.int64)
    starts = np.array([row.start for row in rows], np.int64)
    counts = np.array([row.count for row in rows], np.int64)
    ends = starts + counts
    query_starts = np.zeros(len(rows) + 1, np.int64)
    np.cumsum(counts, out=query_starts[1:])
    total = int(query_starts[-1])
    positions = np.arange(total) + np.repeat(starts - query_starts[:-1], counts)
    token_slots = np.repeat(slots, counts)
    block, offset = np.divmod(positions, states.block_size)
    cache_slots = states.tables[token_slots, block].astype(np.int64) * states.block_size + offset
    longest_context = int(ends.max())
    host: list[HostArray] = [
        positions,
        token_slots,
        cache_slots,
        query_starts.astype(np.int32),
        ends.astype(np.int32),
        slots,
    ]
    drawing_rows = np.array([index for index, row in enumerate(rows) if row.max_new], np.int64)
    if drawing_rows.size:
        drawing_rows = drawing_rows[states.kinds[slots[drawing_rows]].argsort(kind="stable")]
        host += _drawing_arrays(states, slots[drawing_rows], ends[drawing_rows], query_starts[1:][drawing_rows] - 1)
    moved = to_device(host, states.device)
    batch = Batch(
        token_ids=states.tokens[moved[1], moved[0]].long(),
        positions=moved[0],
        cache_slots=moved[2],
        query_starts=moved[3],
        context_lengths=moved[4],
        block_tables=states.device_tables[moved[5], : -(-longest_context // states.block_size)],
        decode_rows=leading_ones(counts),
        longest_query=int(counts.max()),
        longest_context=longest_context,
    )
    drawing = None
    if drawing_rows.size:
        drawing = _drawing(states, drawing_rows, slots[drawing_rows], ends[drawing_rows], moved[6:])
    prompts = prompt_scorings(rows, states, slots, query_starts)
    last = None if prompts else _last_tokens(batch, drawing, len(rows), total)
    return StepInputs(batch, drawing, prompts, last)


def _last_tokens(batch: Batch, drawing: Drawing | None, rows: int, tokens: int) -> LastTokens | None:
    ending = np.array([rows - 1], np.int64) if drawing is None else drawing.rows
    if len(ending) * FEWEST_SPARED > tokens:
        return None
    (lines,) = to_device((ending,), batch.positions.device)
    last = batch.query_starts.index_select(0, lines + 1).long() - 1
    lengths, tables = batch.context_lengths.index_select(0, lines), batch.block_tables.index_select(0, lines)
    return LastTokens.of(batch, last, lengths, tables)


def leading_ones(counts: Integers) -> int:
    """How many of the first rows have exactly one token each."""
    single = counts == 1
    return len(counts) if single.all() else int(single.argmin())


def _drawing_arrays(states: RowStates, slots: Integers, places: Integers, last: Integers) -> list[HostArray]:
    return [
        last,
        slots,
        places,
        places - states.prompt_lengths[slots],
        states.seeds[slots],
        states.choices[slots],
        states.top_k[slots],
        states.temperature[slots],
        states.top_p[slots],
        states.min_p[slots],
    ]


def _drawing(
    states: RowStates, rows: Integers, slots: Integers, places: Integers, moved: list[torch.Tensor]
) -> Drawing:
    last, device_slots, device_places, positions, seeds, choices, top_k, temperature, top_p, min_p = moved
    draws = Draws(
        kind_starts=tuple(np.searchsorted(states.kinds[slots], range(TOP_P + 2)).tolist()),
        noise=Noise(seeds, choices, positions),
        temperature=temperature,
        top_p=top_p,
        min_p=min_p,
        top_k=top_k,
        largest_top_k=int(states.top_k[slots].max()),
        any_min_p=bool(states.min_p[slots].any()),
    )
    scored_rows = np.flatnonzero(states.logprobs[slots] >= 0)
    return Drawing(
        rows=rows,
        last_tokens=last,
        slots=device_slots,
        places=device_places,
        draws=draws,
        edits=edits_of(states, slots, places),
        scored=to_device((scored_rows,), states.device)[0] if scored_rows.size else None,
        scored_rows=scored_rows,
        scored_widths=states.logprobs[slots[scored_rows]].tolist(),
    )


def edits_of(states: RowStates, slots: Integers, places: Integers) -> LogitEdits:
    """Of rows that draw, each the slot ``slots[i]`` for place ``places[i]`` of its sequence."""
    penalized = np.flatnonzero(states.penalized[slots])
    waiting = places - states.prompt_lengths[slots] < states.min_tokens[slots]
    if not (penalized.size or states.biases or waiting.any()):
        return LogitEdits()
    return LogitEdits(
        biases=tuple((row, *states.biases[slot]) for row, slot in enumerate(slots.tolist()) if slot in states.biases),
        penalties=_penalties(states, penalized, slots[penalized], places[penalized]) if penalized.size else None,
        masked=tuple((int(row), states.stop_ids[int(slots[row])]) for row in np.flatnonzero(waiting)),
    )


def _penalties(states: RowStates, rows: Integers, slots: Integers, known: Integers) -> PenaltyRows:
    fixed = (states.prompt_lengths, states.repetition, states.frequency, states.presence)
    moved = to_device((rows, slots, known, *(values[slots] for values in fixed)), states.device)
    device_rows, device_slots, device_known, prompt_lengths, repetition, frequency, presence = moved
    return PenaltyRows(
        rows=device_rows,
        slots=device_slots,
        known=device_known,
        prompt_lengths=prompt_lengths,
        repetition=repetition,
        frequency=frequency,
        presence=presence,
        longest=int(known.max()),
    )


def prompt_scorings(
    rows: Sequence[Row], states: RowStates, slots: Integers, query_starts: Integers
) -> list[PromptScoring]:
    """What the rows owe of their prompts' log probabilities; ``slots`` are theirs, ``query_starts`` (R+1,)."""
    found = []
    for index in np.flatnonzero(states.prompt_logprobs[slots] >= 0).tolist():
        row, slot = rows[index], int(slots[index])
        count = min(row.count, int(states.prompt_lengths[slot]) - 1 - row.start)
        if count > 0:
            width = int(states.prompt_logprobs[slot])
            found.append(PromptScoring(index, int(query_starts[index]), count, slot, row.start + 1, width))
    return found
