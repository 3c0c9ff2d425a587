from __future__ import annotations

from collections.abc import Callable

import pytest

from server.errors import RateLimited
from server.quotas import Quotas
from server.tenants import NOBODY, Tenant


class Now:
    seconds = 1000.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def now() -> Now:
    return Now()


@pytest.fixture
def quotas(now: Callable[[], float]) -> Quotas:
    return Quotas(now)


def use(quotas: Quotas, tenant: Tenant, tokens: int = 0) -> None:
    quotas.enter(tenant)
    quotas.charge(tenant.name, tokens)
    quotas.leave(tenant.name)


def refusal(quotas: Quotas, tenant: Tenant) -> RateLimited:
    with pytest.raises(RateLimited) as caught:
        quotas.enter(tenant)
    return caught.value


def test_requests_per_minute_come_back_evenly(quotas: Quotas, now: Now) -> None:
    tenant = Tenant("a", requests_per_minute=6)
    for _ in range(6):
        use(quotas, tenant)
    error = refusal(quotas, tenant)
    assert (error.status, error.reason, error.retry_after) == (429, "quota_requests", 10.0)
    now.seconds += 10
    use(quotas, tenant)
    refusal(quotas, tenant)
    use(quotas, Tenant("b", requests_per_minute=6))
    now.seconds += 3600
    for _ in range(6):
        use(quotas, tenant)
    refusal(quotas, tenant)


def test_tokens_may_go_into_debt_and_are_waited_for(quotas: Quotas, now: Now) -> None:
    tenant = Tenant("a", tokens_per_minute=60)
    use(quotas, tenant, tokens=179)
    error = refusal(quotas, tenant)
    assert (error.reason, error.retry_after) == ("quota_tokens", 120.0)
    now.seconds += 119
    refusal(quotas, tenant)
    now.seconds += 1
    use(quotas, tenant)


def test_open_requests_are_bounded_until_they_leave(quotas: Quotas) -> None:
    tenant = Tenant("a", max_concurrent=2)
    quotas.enter(tenant)
    quotas.enter(tenant)
    assert refusal(quotas, tenant).reason == "quota_concurrency"
    quotas.leave("a")
    quotas.enter(tenant)


def test_a_refused_request_costs_nothing(quotas: Quotas, now: Now) -> None:
    tenant = Tenant("a", requests_per_minute=60, max_concurrent=1)
    quotas.enter(tenant)
    for _ in range(100):
        refusal(quotas, tenant)
    assert ("x-ratelimit-remaining-requests", "59") in quotas.headers("a")


def test_headers_tell_what_is_left(quotas: Quotas, now: Now) -> None:
    tenant = Tenant("a", requests_per_minute=60, tokens_per_minute=600)
    use(quotas, tenant, tokens=750)
    now.seconds += 0.5
    assert dict(quotas.headers("a")) == {
        "x-ratelimit-limit-requests": "60",
        "x-ratelimit-remaining-requests": "59",
        "x-ratelimit-reset-requests": "0.500s",
        "x-ratelimit-limit-tokens": "600",
        "x-ratelimit-remaining-tokens": "0",
        "x-ratelimit-reset-tokens": "74.500s",
    }
    use(quotas, NOBODY, tokens=10**9)
    assert quotas.headers("") == []


def test_a_clock_that_jumps_gives_no_more_than_a_minute(quotas: Quotas, now: Now) -> None:
    tenant = Tenant("a", requests_per_minute=2)
    use(quotas, tenant)
    use(quotas, tenant)
    now.seconds -= 500
    refusal(quotas, tenant)
    now.seconds += 30
    use(quotas, tenant)
    refusal(quotas, tenant)


def test_a_reload_changes_the_limits_and_keeps_what_is_open(quotas: Quotas) -> None:
    quotas.enter(Tenant("a", max_concurrent=5, requests_per_minute=1))
    changed = Tenant("a", max_concurrent=2, requests_per_minute=10)
    quotas.enter(changed)
    assert refusal(quotas, changed).reason == "quota_concurrency"
    quotas.leave("a")
    quotas.enter(changed)
    assert ("x-ratelimit-limit-requests", "10") in quotas.headers("a")
