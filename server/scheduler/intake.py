"""What an engine can take, and what an item becomes when it is taken."""

from __future__ import annotations

from engines.protocol import Capacity, End
from server.scheduler.block_pool import root_hash
from server.scheduler.config import SchedulerConfig
from server.scheduler.deadlines import aim_of
from server.scheduler.fairness import Account
from server.scheduler.items import RANKS, SequenceState
from server.scheduler.law import Law
from server.worker.wire import Item


class Intake:
    """Bounds of one engine's sequences, and the settings that hold where an item says nothing."""

    def __init__(self, capacity: Capacity, fingerprint: str, config: SchedulerConfig, law: Law) -> None:
        self._capacity = capacity
        self._fingerprint = fingerprint
        self._config = config
        self._law = law

    @property
    def _room(self) -> int:
        """Tokens that the KV cache holds."""
        return self._capacity.blocks * self._capacity.block_size

    def refusal(self, item: Item) -> str | None:
        """Why this item can never run here, in words for the client; None where it can."""
        if not 0 < item.prompt_length <= len(item.tokens):
            return "the prompt is empty"
        most = self._capacity.max_model_len
        if max(item.prompt_length + min(item.max_tokens, 1), len(item.tokens)) > most:
            return f"the prompt has {item.prompt_length} tokens, too many for a context of {most} with its answer"
        if len(item.tokens) > self._room:
            return f"the prompt has {len(item.tokens)} tokens, and the KV cache holds {self._room}"
        return None

    def state_of(self, item: Item, arrival: int, now: float, account: Account) -> SequenceState:
        """The start of an item that ``refusal`` does not refuse. Times in seconds of the scheduler's clock."""
        asked = item.prompt_length + item.max_tokens
        limit = min(asked, self._capacity.max_model_len)
        # An item alone in the pool can compute this many tokens and draw one more. Known at the start, so that it ends
        # like any other and is never stuck for blocks that do not exist.
        most = self._room + 1
        end: End = "length" if limit <= most else "error"
        return SequenceState(
            item,
            arrival,
            now,
            min(limit, most),
            end,
            root_hash(self._fingerprint, item.cache_salt),
            self._capacity.block_size,
            aim_of(item, self._config),
            account,
            RANKS[item.priority] if self._law.priorities else 1,
        )
