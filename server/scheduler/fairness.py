"""Who has had how much: the virtual token counter of each tenant (Sheng et al., OSDI 2024, arXiv 2401.00588)."""

from __future__ import annotations

import math
from dataclasses import dataclass

INPUT = 1.0
OUTPUT = 2.0
"""Cost of a computed prompt token and of an output token. Cached tokens are free."""
MAX_IDLE = 1024
"""Accounts of tenants without items that are remembered."""
RECENT = 60.0
"""Seconds since its last item for which slots are left free for a tenant that has none here."""
SHARE = 8
"""A tenant beside others takes a slot only while it then has at most this many times the free ones: it fills 8/9 of
all, and no two take the rest. Without that, whoever comes beside a flood waits for a stream to end. Dynamic thresholds
of Choudhury and Hahne, "Dynamic queue length thresholds for shared-memory packet switches", 1998."""


@dataclass(slots=True, eq=False)
class Account:
    """One tenant's counter."""

    tenant: str
    weight: float = 1.0
    served: float = 0.0
    """Weighted tokens."""
    items: int = 0
    """Here now, waiting or running."""
    slots: int = 0
    """That its items hold."""

    def takes_more_than_its_share(self, free: int) -> bool:
        """With one more of ``free`` slots. The nameless tenant is everybody, and has no share."""
        return bool(self.tenant) and self.slots + 1 > SHARE * free

    def charge(self, prompt: float, output: int = 0) -> None:
        self.served += (INPUT * prompt + OUTPUT * output) / self.weight


class TenantAccounts:
    """Counters of all tenants of one engine. Counts only differences: nothing is lost when an idle one is forgotten."""

    def __init__(self) -> None:
        self._accounts: dict[str, Account] = {}
        self._level = 0.0
        self._present = 0  # accounts with items
        self._latest: Account | None = None
        # When it sent its last item, and when the latest other one did.
        self._latest_seen = self._other_seen = -math.inf

    def enter(self, tenant: str, weight: float, now: float) -> Account:
        """One more item of the tenant. Whoever comes back has no credit for the time that it was away."""
        account = self._accounts.pop(tenant, None) or Account(tenant)
        if account.items == 0:
            level = min((other.served for other in self._accounts.values() if other.items), default=self._level)
            account.served = max(account.served, level)
            self._present += 1
            self._forget_idle()
        self._accounts[tenant] = account  # the latest comes last
        account.weight = max(weight, 1e-6)
        account.items += 1
        if account is not self._latest:
            self._other_seen = self._latest_seen
            self._latest = account
        self._latest_seen = now
        return account

    def leave(self, account: Account) -> None:
        """One item less."""
        account.items -= 1
        if account.items == 0:
            self._present -= 1
            self._level = max(self._level, account.served)

    def shared(self, now: float) -> bool:
        """More than one tenant has items, or sent some of late."""
        return self._present > 1 or now - self._other_seen < RECENT

    def _forget_idle(self) -> None:
        if len(self._accounts) > MAX_IDLE:
            idle = next((tenant for tenant, account in self._accounts.items() if not account.items), None)
            if idle is not None:
                del self._accounts[idle]
