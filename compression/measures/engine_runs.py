"""Answers and step times of an engine, driven through its own launch and collect with two steps in flight."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field

from engines.protocol import Admit, Engine, Row, SamplingParams, StepPlan

MAX_IN_FLIGHT = 2
GREEDY = SamplingParams(seed=0, temperature=0)
Sampling = Callable[[int], SamplingParams]
"""How the sequence of this number draws its tokens."""


@dataclass(slots=True)
class _Sequence:
    number: int
    slot: int
    prompt: list[int]
    most: int
    sampling: SamplingParams
    computed: int = 0
    planned: int = 0
    """Output tokens that steps launched so far give."""
    answer: list[int] = field(default_factory=list)
    ended: bool = False


@dataclass(slots=True)
class Trace:
    """Times in seconds."""

    seconds: float = 0.0
    output_tokens: int = 0
    first_tokens: list[float] = field(default_factory=list)
    """From the start to each sequence's first token."""
    intervals: list[float] = field(default_factory=list)
    """Between the results of two steps in which every sequence got a token: what a client sees between two tokens."""


class EngineRuns:
    """Runs batches one after the other. Nothing else may use the engine meanwhile.

    Every slot has blocks of its own, no prefix is shared, and a slot that ends is taken by the next sequence.
    """

    def __init__(self, engine: Engine, clock: Callable[[], float]) -> None:
        self._engine = engine
        self._clock = clock
        self._steps = 0
        capacity = engine.capacity
        self._block_size = capacity.block_size
        self._blocks_each = -(-capacity.max_model_len // capacity.block_size)
        self._slots = min(capacity.max_rows, capacity.blocks // self._blocks_each)
        self._step_tokens = capacity.max_step_tokens

    @property
    def slots(self) -> int:
        """Sequences of full length that run at once."""
        return self._slots

    def run(
        self,
        prompts: Sequence[Sequence[int]],
        most: int,
        ends: Collection[int] = (),
        ended: Callable[[int], None] = lambda count: None,
        sampling: Sampling = lambda number: GREEDY,
    ) -> tuple[Trace, list[list[int]]]:
        """All prompts at once, as far as there are slots: at most ``most`` tokens after each, without the one of
        ``ends`` that ended it. ``ended`` is told how many are done.

        Prompt and answer together must fit into the engine's longest sequence.
        """
        waiting = deque(enumerate(prompts))
        running: dict[int, _Sequence] = {}
        answers: list[list[int]] = [[] for _ in prompts]
        tickets: deque[tuple[int, list[_Sequence], bool]] = deque()
        trace, started = Trace(), self._clock()
        previous: float | None = None
        free = list(range(self._slots))
        while waiting or running or tickets:
            places = min(len(waiting), len(free))
            admitted = [
                _Sequence(number, free.pop(), list(prompt), most, sampling(number))
                for number, prompt in (waiting.popleft() for _ in range(places))
            ]
            running |= {sequence.number: sequence for sequence in admitted}
            launched = self._launch(admitted, list(running.values()))
            if launched is not None:
                tickets.append(launched)
            if not tickets or (launched is not None and len(tickets) < MAX_IN_FLIGHT):
                continue
            step, parts, only_decodes = tickets.popleft()
            result = self._engine.collect(step)
            now = self._clock()
            if only_decodes and previous is not None:
                trace.intervals.append(now - previous)
            previous = now if only_decodes else None
            for sequence, row in zip(parts, result.rows, strict=True):
                if sequence.ended:
                    continue
                if self._take(sequence, row.tokens, ends, trace, now - started):
                    answers[sequence.number] = sequence.answer
                    del running[sequence.number]
                    free.append(sequence.slot)
                    ended(len(prompts) - len(waiting) - len(running))
        trace.seconds = self._clock() - started
        return trace, answers

    def _take(self, sequence: _Sequence, tokens: list[int], ends: Collection[int], trace: Trace, since: float) -> bool:
        """Whether the sequence has ended."""
        for token in tokens:
            if not sequence.answer:
                trace.first_tokens.append(since)
            trace.output_tokens += 1
            if token in ends:
                sequence.ended = True
                break
            sequence.answer.append(token)
            sequence.ended = len(sequence.answer) == sequence.most
        return sequence.ended

    def _launch(self, admitted: list[_Sequence], running: list[_Sequence]) -> tuple[int, list[_Sequence], bool] | None:
        """The step's number, its sequences, and whether all its rows only decode."""
        parts = list(self._rows(running))
        if not parts:
            return None
        self._steps += 1
        admits = tuple(
            Admit(
                item=sequence.number,
                slot=sequence.slot,
                tokens=sequence.prompt,
                prompt_length=len(sequence.prompt),
                blocks=(),
                sampling=sequence.sampling,
            )
            for sequence in admitted
        )
        decodes = not admits and all(row.count == 1 and row.max_new for _, row in parts)
        rows = tuple(row for _, row in parts)
        fits = next((size for size in self._engine.capacity.graph_rows if size >= len(rows)), 0) if decodes else 0
        plan = StepPlan(step=self._steps, engine=self._engine.info.name, admits=admits, rows=rows, graph_rows=fits)
        self._engine.launch(plan)
        return self._steps, [sequence for sequence, _ in parts], decodes

    def _rows(self, running: list[_Sequence]) -> Iterator[tuple[_Sequence, Row]]:
        """Decodes first; then as much of the prompts as the step has room for."""
        room = self._step_tokens
        for prefill in (False, True):
            for sequence in running:
                left = len(sequence.prompt) - sequence.computed
                if (left > 1 or not sequence.planned) != prefill or sequence.planned == sequence.most or not room:
                    continue
                count = min(left, room) if prefill else 1
                draws = int(count == left or not prefill)
                yield sequence, self._row(sequence, count, draws)
                sequence.computed += count
                sequence.planned += draws
                room -= count

    def _row(self, sequence: _Sequence, count: int, draws: int) -> Row:
        held = -(-sequence.computed // self._block_size)
        wanted = -(-(sequence.computed + count) // self._block_size)
        first = sequence.slot * self._blocks_each
        return Row(
            item=sequence.number,
            slot=sequence.slot,
            start=sequence.computed,
            count=count,
            new_blocks=tuple(range(first + held, first + wanted)),
            max_new=draws,
        )
