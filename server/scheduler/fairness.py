"""Who has had how much: the virtual token counter of each tenant (Sheng et al., OSDI 2024, arXiv 2401.00588)."""

from __future__ import annotations

from dataclasses import dataclass

INPUT = 1.0
OUTPUT = 2.0
"""Cost of a computed prompt token and of an output token. Cached tokens are free."""
MAX_IDLE = 1024
"""Accounts of tenants without items that are remembered."""


@dataclass(slots=True, eq=False)
class Account:
    """One tenant's counter."""

    tenant: str
    weight: float = 1.0
    served: float = 0.0
    """Weighted tokens."""
    items: int = 0
    """Here now, waiting or running."""

    def charge(self, prompt: int, output: int = 0) -> None:
        self.served += (INPUT * prompt + OUTPUT * output) / self.weight


class TenantAccounts:
    """Counters of all tenants of one engine. Counts only differences: nothing is lost when an idle one is forgotten."""

    def __init__(self) -> None:
        self._accounts: dict[str, Account] = {}
        self._level = 0.0

    def enter(self, tenant: str, weight: float) -> Account:
        """One more item of the tenant. Whoever comes back has no credit for the time that it was away."""
        account = self._accounts.pop(tenant, None) or Account(tenant)
        if account.items == 0:
            level = min((other.served for other in self._accounts.values() if other.items), default=self._level)
            account.served = max(account.served, level)
            self._forget_idle()
        self._accounts[tenant] = account  # the latest comes last
        account.weight = max(weight, 1e-6)
        account.items += 1
        return account

    def leave(self, account: Account) -> None:
        """One item less."""
        account.items -= 1
        if account.items == 0:
            self._level = max(self._level, account.served)

    def _forget_idle(self) -> None:
        if len(self._accounts) > MAX_IDLE:
            idle = next((tenant for tenant, account in self._accounts.items() if not account.items), None)
            if idle is not None:
                del self._accounts[idle]
