"""A rule of thumb to be compared with: halve the step when answers are slow, double it when they are fast.

It reads latencies that include queueing, so it cannot tell a step that is too large from a queue that is too long; that
is why it halves only while the queue is short.
"""

from __future__ import annotations

from typing import Literal

from server.scheduler.items import SequenceState

HIGH = 1.2
LOW = 0.8
"""Latency over target beyond which the size changes."""
INTERVAL = 0.5
"""Seconds between two changes."""
LEAST = 32
"""Tokens."""


Change = Literal["", "halved", "doubled", "held at its least", "held at its most"]
"""What became of a step's size."""


class AimdBudget:
    """Tokens of a step, between ``LEAST`` and ``most``."""

    def __init__(self, most: int) -> None:
        self.tokens = most
        self._least = min(LEAST, most)
        self._most = most
        self._ratios: list[float] = []
        self._changed_at: float | None = None

    def observe_stream(self, state: SequenceState, now: float) -> None:
        """A stream has ended: its time to the first token and its mean time for later ones, over what was wanted."""
        if state.paced_tokens:
            ttft = state.paced_from - state.arrived
            tpot = (now - state.paced_from) / max(1, len(state.tokens) - state.paced_tokens)
            self.observe(max(ttft / state.aim.ttft, tpot / state.aim.tpot))

    def observe(self, ratio: float) -> None:
        """Latency over target of one answer."""
        self._ratios.append(ratio)

    def adapt(self, now: float, waiting: int, running: int) -> Change:
        """A queue is short where fewer wait than run."""
        if self._changed_at is not None and 0 <= now - self._changed_at < INTERVAL:
            return ""
        self._changed_at = now
        if not self._ratios:
            return ""
        ratio = sum(self._ratios) / len(self._ratios)
        self._ratios.clear()
        if ratio > HIGH and waiting <= running:
            return self._resize(max(self._least, self.tokens // 2), "halved", "held at its least")
        if ratio < LOW and waiting > running:
            return self._resize(min(self._most, self.tokens * 2), "doubled", "held at its most")
        return ""

    def _resize(self, tokens: int, changed: Change, held: Change) -> Change:
        moves = tokens != self.tokens
        self.tokens = tokens
        return changed if moves else held
