"""What the operator sets; everything else is derived from the engine's capacity and from measured steps."""

from __future__ import annotations

import math

import msgspec

from server.scheduler.law import Policy


class SchedulerConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Bounds and targets of one worker's scheduler. Times in seconds. Raises ValueError for a value out of range."""

    max_batch: int | None = None
    """Most rows in one step; None takes what the engine can do."""
    max_delay: float = 0.0
    """Longest that a one-shot item waits for others to share its step."""
    token_budget: int | None = None
    """Most tokens computed in one step; None takes what the engine can do."""
    target_ttft: float | None = None
    """Wanted time from arrival to the first token."""
    target_tpot: float | None = None
    """Wanted mean time of each later token."""
    prefix_cache: bool = True
    policy: Policy = "adaptive"
    """What bounds and orders steps: deadlines and measured step times, a rule of thumb, or ``token_budget`` alone."""

    def __post_init__(self) -> None:
        for name in ("max_batch", "token_budget"):
            count = getattr(self, name)
            if count is not None and count < 1:
                raise ValueError(f"{name} must be at least 1, not {count}")
        for name in ("target_ttft", "target_tpot"):
            seconds = getattr(self, name)
            if seconds is not None and not (math.isfinite(seconds) and seconds > 0):
                raise ValueError(f"{name} must be a positive number of seconds, not {seconds}")
        if not (math.isfinite(self.max_delay) and self.max_delay >= 0):
            raise ValueError(f"max_delay must be 0 or a positive number of seconds, not {self.max_delay}")
