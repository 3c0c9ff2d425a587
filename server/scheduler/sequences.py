"""Scheduling of the items of one engine that produce tokens.

One rule and no phases: in each step the computed tokens of every resident catch up with its known tokens, as far as
the step's budget goes. A prompt, a chunk of one, what a prefix hit leaves over, a recompute after preemption and a
decode differ only in how far behind they are.

What this file promises the engine, beside what ``block_pool`` does:

- A row's token may be in flight when the row is planned: it is on the device when the row runs, because steps run in
  launch order.
- An item that was preempted is admitted again only when none of its steps is in flight, because ``Admit`` carries all
  its tokens. What those steps drew is appended as ever: it was computed before its blocks changed hands.
- A slot goes to the next item at once; the engine sets its state in stream order, within the admitting step.
"""

from __future__ import annotations

import math

from engines.protocol import Admit, Capacity, End, Row, RowResult, StepPlan, StepResult
from server.scheduler.block_pool import root_hash
from server.scheduler.config import SchedulerConfig
from server.scheduler.deadlines import OldestPrompt, StepBudget, Targets
from server.scheduler.items import ItemUpdate, SequenceState, StepWork
from server.scheduler.residents import Residents
from server.scheduler.step_time import StepTimeModel, attended_pairs
from server.scheduler.waiting import WaitingQueue
from server.worker.wire import EngineLoad, Item


class _Draft:
    """The parts of a plan in the making."""

    def __init__(self) -> None:
        self.decodes: list[Row] = []
        self.chunks: list[Row] = []
        self.admits: list[Admit] = []
        self.planned: list[SequenceState] = []
        self.work = StepWork()


class SequenceLane:
    """Queue, residents and step-time model of one engine. Only the worker's step loop calls it."""

    def __init__(self, name: str, capacity: Capacity, fingerprint: str, config: SchedulerConfig) -> None:
        self.name = name
        self.step_time = StepTimeModel()
        self._capacity = capacity
        self._fingerprint = fingerprint
        self._targets = Targets(config.target_ttft, config.target_tpot)
        self._max_tokens = min(capacity.max_step_tokens, config.token_budget or capacity.max_step_tokens)
        # Each resident must find room for one token in every step, or decodes would starve each other.
        max_rows = min(capacity.max_rows, config.max_batch or capacity.max_rows, self._max_tokens)
        self._residents = Residents(capacity, max_rows, config.prefix_cache)
        self._waiting = WaitingQueue()
        self._items: dict[int, SequenceState] = {}
        self._token_budget = self._max_tokens
        self._preemptions = 0
        self._prefix_queries = 0
        self._prefix_hits = 0

    def __contains__(self, item: int) -> bool:
        return item in self._items

    # --- items come and go

    def refusal(self, item: Item) -> str | None:
        """Why this item can never run here, in words for the client; None where it can."""
        if not 0 < item.prompt_length <= len(item.tokens):
            return "the prompt is empty"
        most = self._capacity.max_model_len
        if max(item.prompt_length + min(item.max_tokens, 1), len(item.tokens)) > most:
            return f"the prompt has {item.prompt_length} tokens, too many for a context of {most} with its answer"
        room = self._residents.pool.total * self._capacity.block_size
        if len(item.tokens) > room:
            return f"the prompt has {len(item.tokens)} tokens, and the KV cache holds {room}"
        return None

    def offer(self, items: list[Item], arrival: int, now: float) -> None:
        """Take all items of one request, none of which ``refusal`` refuses, at the places from ``arrival`` on."""
        states = [self._state_of(item, arrival + index, now) for index, item in enumerate(items)]
        self._items.update((state.item.item, state) for state in states)
        leader, *siblings = states
        shared_blocks = (leader.item.prompt_length - 1) // self._capacity.block_size
        if siblings and shared_blocks and self._residents.may_match(leader):
            self._waiting.park(leader, siblings, shared_blocks)
        else:
            for state in states:
                self._waiting.push(state)

    def _state_of(self, item: Item, arrival: int, now: float) -> SequenceState:
        asked = item.prompt_length + item.max_tokens
        limit = min(asked, self._capacity.max_model_len)
        # An item alone in the pool can compute this many tokens and draw one more. Known at the start, so that it ends
        # like any other and is never stuck for blocks that do not exist.
        room = self._residents.pool.total * self._capacity.block_size + 1
        end: End = "length" if limit <= room else "error"
        root = root_hash(self._fingerprint, item.cache_salt)
        return SequenceState(item, arrival, now, min(limit, room), end, root, self._capacity.block_size)

    def cancel(self, item: int) -> None:
        """Forget an item, if it is here; steps in flight may still compute it, and nobody hears of that."""
        state = self._items.get(item)
        if state is not None:
            self._forget(state)

    def _forget(self, state: SequenceState) -> None:
        state.gone = True
        del self._items[state.item.item]
        if state.slot >= 0:
            self._residents.vacate(state)
        self._waiting.forget(state)

    def drain(self) -> list[int]:
        """Forget all items and return their ids."""
        items = list(self._items)
        for item in items:
            self.cancel(item)
        return items

    # --- plan

    def plan(self, step: int, now: float, capacity: Capacity) -> tuple[StepPlan, StepWork] | None:
        """The next step, or None where nothing can be computed before a step in flight is settled."""
        if not self._items:
            return None
        draft = _Draft()
        budget = self._open_budget(now)
        self._continue_residents(draft, budget)
        self._admit_waiting(draft, budget, now)
        if not draft.planned:
            return None
        # Only after all were placed, so that no row of this very step matches what the step itself writes.
        for state in draft.planned:
            self._commit(state)
        rows = (*draft.decodes, *draft.chunks)
        graph_rows = 0 if draft.chunks else next((size for size in capacity.graph_rows if size >= len(rows)), 0)
        plan = StepPlan(step=step, engine=self.name, admits=tuple(draft.admits), rows=rows, graph_rows=graph_rows)
        return plan, draft.work

    def _open_budget(self, now: float) -> StepBudget:
        """Decodes come first; what they leave of tokens and time is for prompts."""
        decodes = 0
        pairs = 0.0
        prompt: SequenceState | None = None
        for state in self._residents:
            pending = state.pending
            if pending == 1:
                decodes += 1
                pairs += state.computed + 1
            elif pending and prompt is None:
                prompt = state
        seconds = math.inf
        if self._targets.bounded:
            base = self.step_time.predict(decodes, pairs)
            oldest = _oldest_prompt(prompt or self._waiting.head())
            seconds = self._targets.step_seconds(
                decodes=decodes, base=base, prompt=oldest, now=now, model=self.step_time
            )
            seconds -= base
        budget = StepBudget(self._max_tokens - decodes, seconds, self.step_time)
        self._token_budget = decodes + budget.limit()
        return budget

    def _continue_residents(self, draft: _Draft, budget: StepBudget) -> None:
        """Plan rows of residents by arrival."""
        for state in self._residents:
            pending = state.pending
            count = 1 if pending == 1 else budget.take(state.computed, pending) if pending else 0
            if count == 0:
                continue
            missing = self._residents.missing_blocks(state, count)
            new_blocks = self._make_room(state, missing) if missing > 0 else ()
            # None: it is the latest itself, keeps what it has, and waits for an earlier one to end.
            if new_blocks is not None:
                self._add_row(draft, state, count, new_blocks)

    def _make_room(self, state: SequenceState, missing: int) -> tuple[int, ...] | None:
        """Blocks for a resident, taken from later arrivals if need be, the latest first; None where that is not enough.

        Residents are planned by arrival, so a later one has no row in this plan yet: its blocks change hands between
        steps. The earliest can take from all others, so at least one resident gets on, whatever the shortage.
        """
        new_blocks = self._residents.grow(state, missing)
        while new_blocks is None and (victim := self._residents.latest()) is not state:
            self._preempt(victim)
            new_blocks = self._residents.grow(state, missing)
        return new_blocks

    def _preempt(self, state: SequenceState) -> None:
        """Take slot and blocks; all is computed again later, but for blocks that can still be found then."""
        self._residents.vacate(state)
        state.computed = 0
        self._preemptions += 1
        self._waiting.push(state)

    def _admit_waiting(self, draft: _Draft, budget: StepBudget, now: float) -> None:
        """Give slots and blocks to waiting items, strictly by arrival."""
        while budget.open and not self._residents.full:
            state = self._waiting.head()
            # One with a step in flight keeps its place: a later arrival must not take the blocks that it needs.
            if state is None or state.tickets:
                return
            matched = self._residents.place(state)
            if matched is None:
                return
            self._waiting.pop()
            # What steps before a preemption reported of the prompt is reported again from its start.
            state.prompt_logprobs = []
            if state.group is not None:
                self._waiting.committed(state)
            if state.queue_seconds is None:
                self._first_placed(state, now)
            draft.admits.append(state.admit(matched))
            count = budget.take(state.computed, state.pending)
            self._add_row(draft, state, count, tuple(state.blocks[matched:]))

    def _first_placed(self, state: SequenceState, now: float) -> None:
        state.queue_seconds = now - state.offered
        state.cached_tokens = min(state.computed, state.item.prompt_length)
        if self._residents.may_match(state):
            self._prefix_queries += state.item.prompt_length
            self._prefix_hits += state.cached_tokens

    def _add_row(self, draft: _Draft, state: SequenceState, count: int, new_blocks: tuple[int, ...]) -> None:
        start = state.computed
        end = start + count
        max_new = 1 if end == state.known and not state.prompt_only else 0
        item = state.item
        row = Row(item=item.item, slot=state.slot, start=start, count=count, new_blocks=new_blocks, max_new=max_new)
        (draft.decodes if count == 1 and max_new else draft.chunks).append(row)
        draft.planned.append(state)
        work = draft.work
        work.rows += 1
        work.tokens += count
        work.prompt_tokens += max(0, min(end, item.prompt_length) - start)
        work.pairs += attended_pairs(start, count)
        state.computed = end
        state.in_flight += max_new
        state.tickets += 1

    # --- settle

    def settle(self, plan: StepPlan, work: StepWork, result: StepResult) -> list[ItemUpdate]:
        """Append what the step drew, end what is complete, and learn how long such a step takes.

        Raises ValueError where a row drew more than it may.
        """
        updates = []
        for row, given in zip(plan.rows, result.rows, strict=True):
            if len(given.tokens) > row.max_new:
                raise ValueError(f"step {plan.step} drew {len(given.tokens)} tokens for item {row.item}")
            state = self._items.get(row.item)
            if state is not None:
                update = self._settle_row(state, row, given)
                if update is not None:
                    updates.append(update)
        self.step_time.observe(work.tokens, work.pairs, result.seconds)
        return updates

    def _settle_row(self, state: SequenceState, row: Row, given: RowResult) -> ItemUpdate | None:
        state.tickets -= 1
        state.in_flight -= row.max_new
        if state.wants_prompt_logprobs:
            state.prompt_logprobs += given.prompt_logprobs
        first_index = len(state.tokens) - state.item.prompt_length
        end = state.settle(given.tokens)
        if state.prompt_only and row.start + row.count == len(state.tokens):
            end = state.limit_end
        taken = len(state.tokens) - state.item.prompt_length - first_index
        if state.slot >= 0:
            self._commit(state)
            # The engine drew less than it might have: only the last token's logits can draw the missing one.
            if not state.tickets and not end and state.computed >= len(state.tokens):
                state.computed = len(state.tokens) - 1
        update = state.update(first_index, given, taken, end) if taken or end else None
        if end:
            self._forget(state)
        return update

    def _commit(self, state: SequenceState) -> None:
        self._residents.commit(state)
        if state.group is not None:
            self._waiting.committed(state)

    # --- gauges

    def load(self) -> EngineLoad:
        waiting = [state for state in self._items.values() if state.slot < 0]
        pool = self._residents.pool
        return EngineLoad(
            name=self.name,
            running=len(self._residents),
            waiting=len(waiting),
            waiting_tokens=sum(len(state.tokens) for state in waiting),
            blocks_used=pool.used,
            blocks_cached=pool.cached,
            blocks_total=pool.total,
            token_budget=self._token_budget,
            preemptions=self._preemptions,
            prefix_queries=self._prefix_queries,
            prefix_hits=self._prefix_hits,
            integrity_errors=0,
        )

    def integrity(self, in_flight: list[StepPlan]) -> list[str]:
        """Recount blocks, slots and tokens in flight; one text for each contradiction."""
        errors = self._residents.integrity()
        tickets = dict.fromkeys(self._items, 0)
        drawn = dict.fromkeys(self._items, 0)
        for row in (row for plan in in_flight for row in plan.rows if row.item in tickets):
            tickets[row.item] += 1
            drawn[row.item] += row.max_new
        for item, state in self._items.items():
            if (state.tickets, state.in_flight) != (tickets[item], drawn[item]):
                errors.append(f"item {item} counts {state.tickets} steps and {state.in_flight} tokens in flight")
        if sum(1 for state in self._items.values() if state.slot >= 0) != len(self._residents):
            errors.append("residents differ from the items that hold a slot")
        return errors


def _oldest_prompt(state: SequenceState | None) -> OldestPrompt | None:
    if state is None:
        return None
    return OldestPrompt(state.computed, state.pending, state.offered - state.item.waited)
