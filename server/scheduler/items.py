"""What the scheduler keeps of one sequence, and what it says about an item after a step."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import msgspec

from engines.protocol import Admit, End, RowResult, TokenLogprobs
from server.scheduler.block_pool import block_hash
from server.scheduler.deadlines import Aim
from server.scheduler.fairness import Account
from server.worker.wire import Item, Priority

RANKS: dict[Priority, int] = {"high": 0, "normal": 1, "low": 2}


class ItemUpdate(msgspec.Struct, frozen=True, kw_only=True):
    """News of one item: new tokens, its end, or both."""

    item: int
    first_index: int = 0
    """Output index of the first of ``tokens``."""
    tokens: list[int] = []
    end: End = ""
    cached_tokens: int = 0
    """Prompt tokens that a prefix hit saved."""
    queue_seconds: float = 0.0
    """Time from offer to first plan, in the item's first update; 0 later."""
    logprobs: list[TokenLogprobs] = []
    prompt_logprobs: list[TokenLogprobs] = []
    """Complete, in the item's first update, where asked for."""
    output: bytes = b""
    """Of a one-shot item, as is ``error``."""
    error: str = ""


@dataclass(slots=True)
class StepWork:
    """How much one step computes."""

    rows: int = 0
    """Of sequences and of one-shot batches."""
    tokens: int = 0
    """Of prompts and outputs together."""
    prompt_tokens: int = 0
    decode_pairs: float = 0.0
    """Query-key pairs in the attention of rows that compute one token: memory traffic."""
    prompt_pairs: float = 0.0
    """Query-key pairs of longer rows: arithmetic."""
    prompt_start: int = 0
    """Most earlier tokens of a longer row: its queries go through them one after the other, however few they are."""
    seconds: float = 0.0
    """What the step-time model predicted; 0 where it knew nothing yet."""
    padding: int = 0
    """Tokens that fill a captured graph up: they cost what others do."""


@dataclass(slots=True, eq=False)
class Group:
    """Items of one request that wait until the leader's prompt blocks are findable."""

    leader: SequenceState
    shared_blocks: int
    parked: list[SequenceState]


@dataclass(slots=True, eq=False)
class SequenceState:
    """One item that produces tokens. ``known = len(tokens) + in_flight``; computed tokens catch up with known ones."""

    item: Item
    arrival: int
    """Place in the queue; kept through preemption, so an early item is never overtaken for good."""
    offered: float
    limit: int
    """The sequence ends when this many tokens are known."""
    limit_end: End
    root: bytes
    """Parent of the first block's hash."""
    block_size: int
    aim: Aim
    account: Account
    """Of its tenant."""
    rank: int = 1
    """0 for the highest class."""
    request: list[SequenceState] = field(default_factory=list)
    """All items of its request, itself among them: they are refused together or not at all."""
    tokens: list[int] = field(init=False)
    """Prompt, then settled output tokens."""
    prompt_only: bool = field(init=False)
    goal: int = field(init=False)
    """Tokens to compute before the item ends: the last one drawn is never computed."""
    stop_ids: frozenset[int] = field(init=False)
    arrived: float = field(init=False)
    """At the API process, on the scheduler's clock."""
    deadline: float = field(init=False)
    """Of the first token."""
    firm: bool = field(init=False)
    """It is refused where it must miss its deadline."""
    suspect: bool = field(init=False)
    """Its steps are its own, until one of them has given a token."""
    started: bool = field(init=False)
    """Its first token has left: it is never dropped."""
    known_hit: int = 0
    """Leading tokens that could be found in the cache when it was offered."""
    paced_from: float = 0.0
    """The time from which later tokens are due, one every ``aim.pace``, beginning with token ``paced_tokens``."""
    paced_tokens: int = 0
    """Known tokens at ``paced_from``; 0 before a first token was settled here."""
    preempted: int = 0
    """How often."""
    computed_before: int = 0
    """Most tokens that had been computed when it was preempted."""
    in_flight: int = 0
    """Tokens that launched steps will draw at most."""
    tickets: int = 0
    """Launched steps with a row of this item."""
    computed: int = 0
    """Tokens whose KV a launched step writes."""
    slot: int = -1
    """-1: not resident, holds no blocks."""
    blocks: list[int] = field(default_factory=list)
    committed: int = 0
    """Leading blocks that were given to the prefix cache, or came from it."""
    group: Group | None = None
    """Where it leads parked items, or is parked itself."""
    gone: bool = False
    """Ended or cancelled."""
    cached_tokens: int = 0
    queue_seconds: float | None = None
    """None before the first plan."""
    reported: bool = False
    """An update has left; it carried the prompt's logprobs."""
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    _hashes: list[bytes] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.tokens = list(self.item.tokens)
        # A replay comes with output tokens; the first of them left together with the prompt's logprobs.
        self.reported = len(self.tokens) > self.item.prompt_length
        self.prompt_only = len(self.tokens) >= self.limit
        self.goal = len(self.tokens) if self.prompt_only else self.limit - 1
        self.arrived = self.offered - self.item.waited
        self.deadline = self.arrived + self.aim.ttft
        self.firm = self.aim.firm
        self.suspect = self.item.suspect
        self.started = self.reported
        self.stop_ids = frozenset(self.item.sampling.stop_token_ids)

    @property
    def known(self) -> int:
        return len(self.tokens) + self.in_flight

    @property
    def known_to_compute(self) -> int:
        return min(len(self.tokens) + self.in_flight, self.goal)

    @property
    def pending(self) -> int:
        """Known tokens that are still to be computed."""
        return self.known_to_compute - self.computed

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Still owes them: every prompt position has to be computed, so a prefix hit is of no use."""
        return self.item.prompt_logprobs is not None and not self.reported

    def hashes(self, blocks: int) -> Iterator[bytes]:
        """Hashes of the first ``blocks`` full blocks, each computed when first asked for."""
        return map(self.hash_at, range(blocks))

    def hash_at(self, index: int) -> bytes:
        """Hash of a full block whose tokens are all settled."""
        while len(self._hashes) <= index:
            parent = self._hashes[-1] if self._hashes else self.root
            start = len(self._hashes) * self.block_size
            self._hashes.append(block_hash(parent, self.tokens[start : start + self.block_size]))
        return self._hashes[index]

    def admit(self, matched: int) -> Admit:
        """Full state of a resident for the engine; its first ``matched`` blocks are computed."""
        return Admit(
            item=self.item.item,
            slot=self.slot,
            tokens=list(self.tokens),
            prompt_length=self.item.prompt_length,
            blocks=tuple(self.blocks[:matched]),
            sampling=self.item.sampling,
            prompt_logprobs=self.item.prompt_logprobs if self.wants_prompt_logprobs else None,
        )

    def due(self) -> float:
        """When the next token that a step may draw should be there; of one without a settled token, ``math.inf``."""
        if not self.paced_tokens:
            return math.inf
        return self.paced_from + (len(self.tokens) + self.in_flight + 1 - self.paced_tokens) * self.aim.pace

    def lag(self, now: float) -> float:
        """How late the last settled token came; negative for one that came early."""
        return now - self.paced_from - (len(self.tokens) - self.paced_tokens) * self.aim.pace

    def pace_from(self, now: float) -> None:
        """Later tokens are due from the one settled now on."""
        self.paced_from = now
        self.paced_tokens = len(self.tokens)

    def settle(self, drawn: list[int]) -> End:
        """Append drawn tokens up to the one that ends the item."""
        earliest_stop = self.item.prompt_length + self.item.sampling.min_tokens
        for token in drawn:
            self.tokens.append(token)
            if token in self.stop_ids and len(self.tokens) > earliest_stop:
                return "stop"
            if len(self.tokens) >= self.limit:
                return self.limit_end
        return ""

    def update(self, first_index: int, given: RowResult, taken: int, end: End) -> ItemUpdate:
        """News of a row of which the first ``taken`` tokens count; what is told once is told now."""
        update = ItemUpdate(
            item=self.item.item,
            first_index=first_index,
            tokens=given.tokens[:taken],
            end=end,
            cached_tokens=self.cached_tokens,
            queue_seconds=self.queue_seconds or 0.0,
            logprobs=given.logprobs[:taken],
            prompt_logprobs=self.prompt_logprobs,
        )
        self.reported = True
        self.queue_seconds = 0.0
        self.prompt_logprobs = []
        return update
