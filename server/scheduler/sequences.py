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

from engines.protocol import Capacity, Row, RowResult, StepPlan, StepResult
from server.scheduler.config import SchedulerConfig
from server.scheduler.draft import Tally
from server.scheduler.drops import Dropped
from server.scheduler.fairness import TenantAccounts
from server.scheduler.intake import Intake
from server.scheduler.items import ItemUpdate, SequenceState, StepWork
from server.scheduler.late_drop import LateDrop
from server.scheduler.lateness import PromptPace
from server.scheduler.law import Law
from server.scheduler.planner import Planner
from server.scheduler.predicted_wait import predicted_wait
from server.scheduler.residents import Residents
from server.scheduler.step_time import StepTimeModel
from server.scheduler.waiting import WaitingQueue
from server.worker.wire import EngineLoad, Item

FORGIVEN = 20
"""A stream that is this many tokens behind its pace, or a second, has lost its target: it is served on, but no longer
held up against those that have not. One that may fall behind is so only beyond that."""


class SequenceLane:
    """Queue, residents and step-time model of one engine. Only the worker's step loop calls it."""

    def __init__(
        self,
        name: str,
        capacity: Capacity,
        fingerprint: str,
        config: SchedulerConfig,
        law: Law,
        step_time: StepTimeModel,
        tally: Tally,
    ) -> None:
        """``step_time`` and ``tally`` may be of a lane that this one takes over from."""
        self.name = name
        self.step_time = step_time
        self._capacity = capacity
        self._fingerprint = fingerprint
        self._config = config
        self._law = law
        max_tokens = min(capacity.max_step_tokens, config.token_budget or capacity.max_step_tokens)
        # Each resident must find room for one token in every step, or decodes would starve each other.
        max_rows = min(capacity.max_rows, config.max_batch or capacity.max_rows, max_tokens)
        self._residents = Residents(capacity, max_rows, config.prefix_cache)
        self._intake = Intake(capacity, fingerprint, config, law)
        self._waiting = WaitingQueue(law)
        self._suspects: list[SequenceState] = []  # the first of them runs, alone
        self._accounts = TenantAccounts()
        self._planner = Planner(law, self._residents, self._waiting, self._accounts, self.step_time, tally, max_tokens)
        self._drops = LateDrop(self._waiting, self.step_time, self._planner, self._forget)
        self._items: dict[int, SequenceState] = {}
        self._pace = PromptPace(0.0, 0.0, 1.0)
        self._lag = 0.0

    def __contains__(self, item: int) -> bool:
        return item in self._items

    def reconfigured(self, config: SchedulerConfig, law: Law) -> SequenceLane:
        """An empty lane to go on in this one's place, with other settings and what this one has learned and counted."""
        tally = self._planner.tally
        return SequenceLane(self.name, self._capacity, self._fingerprint, config, law, self.step_time, tally)

    # --- items come and go

    def refusal(self, item: Item) -> str | None:
        """Why this item can never run here, in words for the client; None where it can."""
        return self._intake.refusal(item)

    def offer(self, items: list[Item], arrival: int, now: float) -> None:
        """Take all items of one request, none of which ``refusal`` refuses, at the places from ``arrival`` on."""
        states = [self._state_of(item, arrival + index, now) for index, item in enumerate(items)]
        for state in states:
            state.request = states
            self._items[state.item.item] = state
            self._drops.watch(state)
        leader, *siblings = states
        shared_blocks = (leader.item.prompt_length - 1) // self._capacity.block_size
        if any(item.suspect for item in items):
            for state in states:
                if state.suspect:
                    self._suspects.append(state)
                else:
                    self._waiting.push(state)
        elif siblings and shared_blocks and self._residents.may_match(leader):
            self._waiting.park(leader, siblings, shared_blocks)
            self._planner.tally.decisions["parked behind a sibling"] += len(siblings)
        else:
            for state in states:
                self._waiting.push(state)

    def _state_of(self, item: Item, arrival: int, now: float) -> SequenceState:
        state = self._intake.state_of(item, arrival, now, self._accounts.enter(item.tenant, item.weight, now))
        state.known_hit = self._residents.findable(state)
        return state

    def cancel(self, item: int) -> None:
        """Forget an item, if it is here; steps in flight may still compute it, and nobody hears of that."""
        state = self._items.get(item)
        if state is not None:
            self._forget(state)

    def _forget(self, state: SequenceState) -> None:
        state.gone = True
        del self._items[state.item.item]
        self._accounts.leave(state.account)
        if state.slot >= 0:
            self._residents.vacate(state)
        if state.suspect:
            self._suspects.remove(state)
        self._waiting.forget(state)

    def drain(self) -> list[int]:
        """Forget all items and return their ids."""
        items = list(self._items)
        for item in items:
            self.cancel(item)
        return items

    def dropped(self) -> list[Dropped]:
        """Items that ``plan`` dropped since the last call."""
        return self._drops.told()

    # --- plan

    @property
    def has_suspect(self) -> bool:
        """Somebody waits for a step alone."""
        return bool(self._suspects)

    def plan(self, step: int, now: float, start: float, capacity: Capacity) -> tuple[StepPlan, StepWork] | None:
        """The next step, or None where nothing can be computed before a step in flight is settled.

        ``start`` is when the step will begin on the device.
        """
        if not self._items:
            return None
        self._drops.expire(now)
        self._planner.make_way(now)
        survey = self._planner.survey(start)
        self._pace, self._lag = self._planner.pace(survey, start), survey.outlook.lag
        tight = self._law.late_drop and self._drops.look_ahead(survey.prompts, self._pace)
        survey.prompts = [state for state in survey.prompts if not state.gone]
        draft = self._planner.plan(survey, now, tight, capacity)
        return None if draft is None else self._finish(draft.planned, draft.plan(step, self.name), draft.work)

    def plan_alone(self, step: int, now: float, capacity: Capacity) -> tuple[StepPlan, StepWork] | None:
        """A step of the first suspect and of no other item."""
        state = self._suspects[0] if self._suspects else None
        draft = None if state is None else self._planner.plan_alone(state, now, capacity)
        if draft is None:
            return None
        self._planner.tally.decisions["suspect alone"] += 1
        return self._finish(draft.planned, draft.plan(step, self.name), draft.work)

    def _finish(self, planned: list[SequenceState], plan: StepPlan, work: StepWork) -> tuple[StepPlan, StepWork]:
        # Only after all were placed, so that no row of this very step matches what the step itself writes.
        for state in planned:
            self._commit(state)
        return plan, work

    # --- settle

    def settle(self, plan: StepPlan, work: StepWork, result: StepResult, now: float) -> list[ItemUpdate]:
        """Append what the step drew, end what is complete, and learn how long such a step takes.

        Raises ValueError where a row drew more than it may.
        """
        updates = []
        for row, given in zip(plan.rows, result.rows, strict=True):
            if len(given.tokens) > row.max_new:
                raise ValueError(f"step {plan.step} drew {len(given.tokens)} tokens for item {row.item}")
            state = self._items.get(row.item)
            if state is not None:
                update = self._settle_row(state, row, given, now)
                if update is not None:
                    updates.append(update)
        if ignored := result.irregular or self.step_time.observe(work, result.seconds):
            self._planner.tally.decisions[f"step not learned: {ignored}"] += 1
        return updates

    def _settle_row(self, state: SequenceState, row: Row, given: RowResult, now: float) -> ItemUpdate | None:
        state.tickets -= 1
        state.in_flight -= row.max_new
        if state.wants_prompt_logprobs:
            state.prompt_logprobs += given.prompt_logprobs
        first_index = len(state.tokens) - state.item.prompt_length
        end = state.settle(given.tokens)
        if state.prompt_only and row.start + row.count == len(state.tokens):
            end = state.limit_end
        taken = len(state.tokens) - state.item.prompt_length - first_index
        if taken:
            self._settle_pace(state, taken, now)
        if state.slot >= 0:
            self._commit(state)
            # The engine drew less than it might have: only the last token's logits can draw the missing one.
            if not state.tickets and not end and state.computed >= len(state.tokens):
                state.computed = len(state.tokens) - 1
        update = state.update(first_index, given, taken, end) if taken or end else None
        if end:
            self._residents.ended(len(state.tokens) - state.item.prompt_length)
            if self._law.budget == "aimd":
                self._planner.aimd.observe_stream(state, now)
            self._forget(state)
        return update

    def _settle_pace(self, state: SequenceState, taken: int, now: float) -> None:
        """Tokens came: are they in time, and from when are later ones due?"""
        state.account.charge(0, taken)
        if not state.paced_tokens:
            state.pace_from(now)
            self._first_token(state, now)
        elif state.lag(now) > max(1.0, FORGIVEN * state.aim.pace) + (0.0 if state.aim.asked_tpot else self._lag):
            self._planner.tally.decisions["pace forgiven"] += 1
            state.pace_from(now)

    def _first_token(self, state: SequenceState, now: float) -> None:
        if state.suspect:
            # Nothing died of it: from here on it is like any other.
            state.suspect = False
            self._suspects.remove(state)
        if not state.started:
            state.started = True
            if state.aim.asked_ttft:
                late = now > state.arrived + state.aim.ttft
                self._planner.tally.decisions["first token late" if late else "first token in time"] += 1

    def _commit(self, state: SequenceState) -> None:
        self._residents.commit(state)
        if state.group is not None:
            self._waiting.committed(state)

    # --- gauges

    def load(self) -> EngineLoad:
        waiting = [state for state in self._items.values() if state.slot < 0]
        pool = self._residents.pool
        tally = self._planner.tally
        p50, p95 = self.step_time.errors.quantiles()
        return EngineLoad(
            name=self.name,
            running=len(self._residents),
            waiting=len(waiting),
            waiting_tokens=sum(len(state.tokens) for state in waiting),
            blocks_used=pool.used,
            blocks_cached=pool.cached,
            blocks_total=pool.total,
            token_budget=self._planner.token_budget,
            preemptions=tally.preemptions,
            prefix_queries=tally.prefix_queries,
            prefix_hits=tally.prefix_hits,
            integrity_errors=0,
            predicted_wait=predicted_wait(
                waiting, self._residents, self._planner.slots_are_short, self._pace, self.step_time
            ),
            prompt_token_seconds=self.step_time.added(1, 0.0) / self._pace.share,
            recomputed_tokens=tally.recomputed,
            computed_tokens=tally.computed,
            decisions=dict(tally.decisions),
            step_error_p50=p50,
            step_error_p95=p95,
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
