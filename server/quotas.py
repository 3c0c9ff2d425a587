"""What a tenant may use: requests and tokens per minute, and requests at once. Time is injected."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from server.errors import RateLimited
from server.tenants import Tenant

_BUSY_RETRY = 1.0
"""Seconds after which a tenant whose requests are all open may find one ended."""


class _Bucket:
    """Fills up to ``per_minute`` within a minute. What is taken may bring it below 0; then nobody is let in."""

    def __init__(self, per_minute: int, now: float) -> None:
        self.per_minute = per_minute
        self._level = float(per_minute)
        self._at = now

    def level(self, now: float) -> float:
        # A clock that went back fills nothing.
        grown = max(0.0, now - self._at) * self.per_minute / 60
        self._at = now
        self._level = min(float(self.per_minute), self._level + grown)
        return self._level

    def take(self, amount: int, now: float) -> None:
        self._level = self.level(now) - amount

    def seconds_to(self, level: float, now: float) -> float:
        """Until at least ``level`` is there; a level above the brim counts as the brim."""
        return max(0.0, min(level, self.per_minute) - self.level(now)) * 60 / self.per_minute


@dataclass(slots=True)
class _Account:
    tenant: Tenant
    requests: _Bucket | None
    tokens: _Bucket | None
    open: int = 0


class Quotas:
    """Counts for each tenant what it has used.

    The price of a request is known at its end, so the token quota is a debt: a request is let in while something is
    left, its prompt is charged when it is filed and its output when it has ended, and what went below 0 is waited for.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._accounts: dict[str, _Account] = {}

    def enter(self, tenant: Tenant) -> None:
        """A request came. Raises RateLimited with ``retry_after``; otherwise ``leave`` must follow."""
        account, now = self._current(tenant), self._clock()
        most = tenant.max_concurrent
        if most is not None and account.open >= most:
            raise _limited(f"{most} requests are open, which is the most at once", "concurrency", _BUSY_RETRY)
        for name, bucket in (("requests", account.requests), ("tokens", account.tokens)):
            if bucket is not None and bucket.level(now) < 1:
                reason = f"{bucket.per_minute} {name} per minute are used up"
                raise _limited(reason, name, bucket.seconds_to(1, now))
        if account.requests is not None:
            account.requests.take(1, now)
        account.open += 1

    def leave(self, name: str) -> None:
        """A request of this tenant is over."""
        self._accounts[name].open -= 1

    def charge(self, name: str, tokens: int) -> None:
        """Prompt or output tokens were used by a tenant that has entered."""
        bucket = self._accounts[name].tokens
        if bucket is not None:
            bucket.take(tokens, self._clock())

    def headers(self, name: str) -> list[tuple[str, str]]:
        """The x-ratelimit-* headers that OpenAI's clients read; none for a tenant without a quota."""
        account, now = self._accounts[name], self._clock()
        found = []
        for kind, bucket in (("requests", account.requests), ("tokens", account.tokens)):
            if bucket is not None:
                found += [
                    (f"x-ratelimit-limit-{kind}", str(bucket.per_minute)),
                    (f"x-ratelimit-remaining-{kind}", str(max(0, math.floor(bucket.level(now))))),
                    (f"x-ratelimit-reset-{kind}", f"{bucket.seconds_to(bucket.per_minute, now):.3f}s"),
                ]
        return found

    def _current(self, tenant: Tenant) -> _Account:
        """Quotas that a reload changed start full; what is open stays counted."""
        account = self._accounts.get(tenant.name)
        if account is None or account.tenant != tenant:
            now, was_open = self._clock(), 0 if account is None else account.open
            requests, tokens = tenant.requests_per_minute, tenant.tokens_per_minute
            account = _Account(
                tenant,
                None if requests is None else _Bucket(requests, now),
                None if tokens is None else _Bucket(tokens, now),
                was_open,
            )
            self._accounts[tenant.name] = account
        return account


def _limited(why: str, reason: str, retry_after: float) -> RateLimited:
    return RateLimited(
        f"The quota is used up: {why}. Try again later.", reason=f"quota_{reason}", retry_after=retry_after
    )
