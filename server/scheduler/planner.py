"""One step of one engine's sequences: decodes, then prompts by precedence, as far as tokens, time and blocks go."""

from __future__ import annotations

import logging
import math

from engines.protocol import Capacity, Row
from server.scheduler.aimd import AimdBudget
from server.scheduler.budget import MIN_CHUNK, SOFT_CHUNK, StepBudget
from server.scheduler.draft import Draft, Tally
from server.scheduler.fairness import TenantAccounts
from server.scheduler.items import SequenceState, StepWork
from server.scheduler.lateness import PromptPace
from server.scheduler.law import Law
from server.scheduler.preemption import Preemption
from server.scheduler.residents import Residents
from server.scheduler.step_time import StepTimeModel, add_row
from server.scheduler.survey import Survey, survey_of
from server.scheduler.waiting import WaitingQueue

AT_RISK = 0.5
"""Share of its TTFT that an item of a higher class waits for a place before it takes one from a lower class."""
log = logging.getLogger(__name__)


class Planner:
    """Turns residents and waiting items into steps. Called by ``SequenceLane`` only."""

    def __init__(
        self,
        law: Law,
        residents: Residents,
        waiting: WaitingQueue,
        accounts: TenantAccounts,
        model: StepTimeModel,
        tally: Tally,
        max_tokens: int,
    ) -> None:
        self.tally = tally
        self.aimd = AimdBudget(max_tokens)
        self.token_budget = max_tokens
        """Tokens that the last step could have taken."""
        self.slots_are_short = False
        """Somebody waited for a slot when the last step was planned."""
        self._law = law
        self._residents = residents
        self._waiting = waiting
        self._accounts = accounts
        self._model = model
        self._preemption = Preemption(residents, waiting, model, tally)
        self._max_tokens = max_tokens
        self._said: set[str] = set()

    def survey(self, start: float) -> Survey:
        """``start`` is when the next step begins on the device."""
        return survey_of(self._residents, self._waiting, self._model, start)

    def pace(self, survey: Survey, start: float) -> PromptPace:
        model = self._model
        step = survey.alone + model.added(self._max_tokens, 0.0)
        if self._law.budget == "slack":
            step = min(step, survey.outlook.usual(survey.alone, model.overhead, model.safety))
        return PromptPace(start, survey.alone, max(step, survey.alone), model.safety, model.bias)

    def plan(self, survey: Survey, now: float, tight: bool, capacity: Capacity) -> Draft | None:
        """The next step's rows; None where nothing can be computed before a step in flight is settled.

        ``capacity`` says which graphs are captured by now.
        """
        draft = Draft(survey, self._open_budget(survey, now, tight, capacity), now)
        self.slots_are_short = False
        self._continue_decodes(draft)
        self._compute_prompts(draft)
        if not draft.planned:
            return None
        return self._priced(draft, capacity)

    def _priced(self, draft: Draft, capacity: Capacity) -> Draft:
        draft.choose_graph(capacity)
        draft.work.seconds = self._model.predict(draft.work) if self._model.warm else 0.0
        return draft

    def plan_alone(self, state: SequenceState, now: float, capacity: Capacity) -> Draft | None:
        """A step of this item and no other."""
        draft = Draft(Survey(now), StepBudget(StepWork(), self._max_tokens, math.inf, 0, self._model), now)
        if state.slot < 0:
            while not self._residents.fits(state):
                # The junior of all gives way: a suspect must not wait for ever behind those that come after it.
                if not self._preemption.lower(-1, "preempted for a suspect"):
                    return None
            matched = self._residents.place(state)
            assert matched is not None
            self._placed(draft, state, matched)
            self._compute(draft, state, tuple(state.blocks[matched:]))
            return self._priced(draft, capacity)
        if state.pending == 0:
            return None
        missing = self._residents.missing_blocks(state, min(state.pending, self._max_tokens))
        new_blocks = self._preemption.room_for(state, missing) if missing > 0 else ()
        if new_blocks is None:
            return None
        self._compute(draft, state, new_blocks)
        return self._priced(draft, capacity)

    # --- how much

    def _open_budget(self, survey: Survey, now: float, tight: bool, capacity: Capacity) -> StepBudget:
        tokens = len(survey.decodes)
        most, seconds, floor = self._max_tokens, math.inf, 0
        if self._law.budget == "aimd":
            change = self.aimd.adapt(now, len(self._waiting), len(self._residents))
            if change:
                self.tally.decisions[f"step {change}"] += 1
            most = max(self.aimd.tokens, tokens)
        elif self._law.budget == "slack":
            outlook = survey.outlook
            model = self._model
            seconds, bound = outlook.seconds(survey.alone, model.overhead, model.safety, tight)
            floor = MIN_CHUNK if outlook.asked or outlook.ttft < math.inf else SOFT_CHUNK
            self.tally.decisions[f"step bound by {bound}"] += 1
            self._tell_unreachable(survey)
        budget = StepBudget(survey.work, most - tokens, seconds, floor, self._model, capacity.graph_tokens)
        if self._law.budget == "slack" and self._model.warm:
            budget.fill_graph(self._wanted(survey))
        self.token_budget = tokens + budget.limit()
        return budget

    def _wanted(self, survey: Survey) -> int:
        """Prompt tokens that the next step could take."""
        waiting = 0 if self._residents.full else self._waiting.tokens
        return waiting + sum(state.pending for state in survey.prompts)

    def _tell_unreachable(self, survey: Survey) -> None:
        outlook = survey.outlook
        if outlook.asked and self._model.sure and survey.alone > outlook.tpot:
            self.tally.decisions["tpot out of reach"] += 1
            self.say(
                "tpot",
                f"{len(survey.decodes)} streams at once take {survey.alone * 1000:.3g} ms a token here, more than "
                f"the target of {outlook.tpot * 1000:.3g} ms: they are served as fast as it goes",
            )

    def say(self, about: str, text: str) -> None:
        """Log once."""
        if about not in self._said:
            self._said.add(about)
            log.warning(text)

    # --- decodes

    def _continue_decodes(self, draft: Draft) -> None:
        """By seniority, so that a junior whose blocks are taken has no row in this plan yet."""
        for state in draft.survey.decodes:
            if state.slot < 0:
                continue
            new_blocks = () if self._residents.has_room(state) else self._preemption.room_for(state, 1)
            if new_blocks is not None:
                self._add_row(draft, state, 1, new_blocks)
            else:
                # It keeps what it has, and waits for a senior to end.
                self.tally.decisions["decode waits for blocks"] += 1

    # --- prompts

    def make_way(self, now: float) -> None:
        """Before anything is planned: a place for an item of a higher class whose deadline comes near."""
        # It would take the slot that is emptied for it.
        state = self._waiting.head(now, self._free_slots(now, 1))
        if state is None or state.tickets or state.rank >= self._residents.lowest_rank:
            return
        if state.deadline - now > AT_RISK * state.aim.ttft:
            return
        while not self._residents.fits(state):
            if not self._preemption.lower(state.rank, "preempted for a higher class"):
                return

    def _compute_prompts(self, draft: Draft) -> None:
        """Residents and newcomers, whoever has precedence."""
        now = draft.now
        precedence = self._waiting.precedence
        prompts = (state for state in draft.survey.prompts if state.slot >= 0)
        queue = sorted(((precedence(state, now), state) for state in prompts), key=lambda pair: pair[0], reverse=True)
        closed = False
        while draft.budget.open:
            newcomer = None if closed else self._newcomer(now)
            closed = newcomer is None
            if newcomer is not None and (not queue or precedence(newcomer, now) < queue[-1][0]):
                closed = not self._admit(draft, newcomer)
            elif queue:
                state = queue.pop()[1]
                # It has blocks for all of it.
                self._compute(draft, state, ())
            else:
                break
        put_off = queue or (self._waiting and not closed and not self._residents.full)
        if bound := draft.budget.closed_by if put_off else draft.budget.cut:
            self.tally.decisions[f"prompts cut by {bound}"] += 1

    def _newcomer(self, now: float) -> SequenceState | None:
        free = self._free_slots(now) if not self._residents.full else None
        state = self._waiting.head(now, free)
        if state is None and self._waiting:
            self.slots_are_short = True
            self.tally.decisions["waits for its tenant's share"] += 1
        return state

    def _free_slots(self, now: float, emptied: int = 0) -> int | None:
        """With ``emptied`` more than now; None where a tenant may take all of them."""
        shares = self._law.fairness and self._accounts.shared(now)
        return self._residents.free_slots + emptied if shares else None

    def _admit(self, draft: Draft, state: SequenceState) -> bool:
        """Give a waiting item a slot, blocks and its first tokens; False where nobody can come in now."""
        # One with a step in flight keeps its place: a later arrival must not take the blocks that it needs.
        if state.tickets:
            self.tally.decisions["waits for its step in flight"] += 1
            return False
        if self._residents.full:
            self.slots_are_short = True
            self.tally.decisions["waits for a slot"] += 1
            return False
        if self._crowded(state, draft.survey):
            self.tally.decisions["waits for pace"] += 1
            return False
        matched = self._residents.place(state)
        if matched is None:
            self.tally.decisions["waits for blocks"] += 1
            return False
        claim = self._waiting.claim(state, draft.now)
        self.tally.decisions[f"admitted by {claim}" if claim else "admitted"] += 1
        self._waiting.remove(state)
        self._placed(draft, state, matched)
        self._compute(draft, state, tuple(state.blocks[matched:]))
        return True

    def _compute(self, draft: Draft, state: SequenceState, new_blocks: tuple[int, ...]) -> None:
        """As much of a prompt as the budget allows; one that is complete then wants its first token in time."""
        count = draft.budget.take(state.computed, state.pending)
        if count == state.pending and state.aim.asked_ttft and self._law.budget == "slack":
            draft.budget.end_by((state.deadline - draft.survey.start) / self._model.safety)
        self._add_row(draft, state, count, new_blocks)

    def _crowded(self, state: SequenceState, survey: Survey) -> bool:
        """With one more stream, decodes alone would take longer than somebody's target."""
        outlook = survey.outlook
        if self._law.budget != "slack" or not outlook.asked or not self._model.warm:
            return False
        rows = len(self._residents)
        work = survey.work
        then = StepWork(rows=rows + 1, tokens=rows + 1, decode_pairs=work.decode_pairs + len(state.tokens))
        return survey.alone < outlook.tpot < self._model.predict(then) * self._model.safety

    def _placed(self, draft: Draft, state: SequenceState, matched: int) -> None:
        # What steps before a preemption reported of the prompt is reported again from its start.
        state.prompt_logprobs = []
        if state.group is not None:
            self._waiting.committed(state)
        if state.queue_seconds is None:
            state.queue_seconds = draft.now - state.offered
            state.cached_tokens = min(state.computed, state.item.prompt_length)
            state.account.charge(len(state.tokens) - state.computed)
            if self._residents.may_match(state):
                self.tally.prefix_queries += state.item.prompt_length
                self.tally.prefix_hits += state.cached_tokens
        draft.admits.append(state.admit(matched))

    def _add_row(self, draft: Draft, state: SequenceState, count: int, new_blocks: tuple[int, ...]) -> None:
        start = state.computed
        end = start + count
        max_new = 1 if end == state.known and not state.prompt_only else 0
        item = state.item
        row = Row(item=item.item, slot=state.slot, start=start, count=count, new_blocks=new_blocks, max_new=max_new)
        (draft.decodes if count == 1 and max_new else draft.chunks).append(row)
        draft.planned.append(state)
        add_row(draft.work, start, count)
        if start < item.prompt_length:
            prompt_tokens = min(end, item.prompt_length) - start
            draft.work.prompt_tokens += prompt_tokens
            self._waiting.served(state.rank, prompt_tokens)
        tally = self.tally
        tally.computed += count
        if start < state.computed_before:
            tally.recomputed += min(end, state.computed_before) - start
        state.computed = end
        state.in_flight += max_new
        state.tickets += 1
