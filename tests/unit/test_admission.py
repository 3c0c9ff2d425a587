from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass
from typing import Any

import pytest

from engines.protocol import SamplingParams
from server.admission import AdmissionLimits, Door
from server.errors import EngineUnavailable, Overloaded
from server.requests import Request
from server.worker.wire import EngineLoad, Refused

numbers = itertools.count()


@dataclass
class Now:
    seconds: float = 100.0

    def __call__(self) -> float:
        return self.seconds


def request(prompt: int = 10, choices: int = 1, model: str = "m", **fields: Any) -> Request:
    sampling = tuple(SamplingParams(seed=1, choice=choice) for choice in range(choices))
    made = Request(id=next(numbers), model=model, prompt=[1] * prompt, max_tokens=9, sampling=sampling, arrived=100.0)
    return dataclasses.replace(made, **fields)


def firm(prompt: int = 10, ttft: float = 1.0, **fields: Any) -> Request:
    return request(prompt, ttft=ttft, firm=True, **fields)


def make(now: Now | None = None, chance: float = 0.5, **limits: Any) -> Door:
    return Door(AdmissionLimits(**limits), clock=now or Now(), chance=lambda: chance)


def busy(wait: float, **options: Any) -> Door:
    """A door behind which one stream runs and a worker predicts this wait."""
    door = make(**options)
    stream = request()
    door.filed(stream)
    door.started(stream)
    door.reported(load(wait=wait))
    return door


def load(wait: float = 0.0, token_seconds: float = 0.001, waiting_tokens: int = 0) -> EngineLoad:
    return EngineLoad(
        name="m",
        running=0,
        waiting=0,
        waiting_tokens=waiting_tokens,
        blocks_used=0,
        blocks_cached=0,
        blocks_total=0,
        token_budget=0,
        preemptions=0,
        prefix_queries=0,
        prefix_hits=0,
        integrity_errors=0,
        predicted_wait=wait,
        prompt_token_seconds=token_seconds,
    )


def refusal(door: Door, asked: Request) -> Overloaded:
    with pytest.raises(Overloaded) as caught:
        door.check(asked)
    return caught.value


def test_open_choices_are_bounded_until_they_end() -> None:
    door = make(max_queue=3)
    first = request(choices=2)
    door.check(first)
    door.filed(first)
    door.started(first)
    error = refusal(door, request(choices=2))
    assert (error.reason, error.retry_after) == ("queue_full", 1.0)
    door.check(request(choices=1))
    door.check(request(choices=3, model="other"))
    door.ended(first)
    door.ended(first)
    door.check(request(choices=3))


def test_waiting_tokens_are_bounded_until_the_first_token() -> None:
    door = make(max_waiting_tokens=100)
    first = request(prompt=500)
    door.check(first)
    door.filed(first)
    assert refusal(door, request(prompt=1)).reason == "tokens_waiting"
    door.started(first)
    door.check(request(prompt=500))


def test_preempted_work_is_known_from_the_reports_of_all_workers() -> None:
    door = make(max_waiting_tokens=100)
    door.reported(load(waiting_tokens=60), worker=0)
    door.reported(load(waiting_tokens=60), worker=1)
    door.filed(request(prompt=1))
    assert refusal(door, request()).reason == "tokens_waiting"
    door.lost("m", 1)
    door.check(request())


def test_the_longest_wait_holds_for_requests_without_a_target() -> None:
    door = busy(4.0, max_wait=5.0)
    door.check(request())
    door.reported(load(wait=7.0))
    error = refusal(door, request())
    assert (error.reason, error.queue_seconds, error.retry_after) == ("predicted_wait", 7.0, 7.0)


def test_a_report_from_before_the_queue_was_empty_refuses_nobody() -> None:
    door = make()
    door.reported(load(wait=60.0))
    door.check(firm())


def test_a_firm_request_that_must_miss_is_refused_with_the_prediction() -> None:
    door = busy(2.5)
    error = refusal(door, firm(prompt=100, ttft=1.0))
    assert (error.reason, error.queue_seconds) == ("target", 2.5)
    assert error.predicted_ttft == pytest.approx(2.6)
    assert error.retry_after == pytest.approx(1.0)
    door.check(request(prompt=100, ttft=1.0))
    door.check(firm(prompt=100, ttft=2.0))


def test_what_may_still_be_served_is_left_to_the_scheduler() -> None:
    door = busy(1.8)
    door.check(firm(prompt=100, ttft=1.0))
    door.reported(load(wait=2.0))
    refusal(door, firm(prompt=100, ttft=1.0))


def test_a_client_s_patience_is_a_deadline_too() -> None:
    door = busy(2.1)
    assert refusal(door, request(timeout=1.0)).reason == "target"
    assert refusal(door, firm(ttft=100.0, timeout=1.0)).reason == "target"
    door.check(request(timeout=2.0))


def test_what_the_worker_has_not_seen_counts_and_time_that_passes_drains() -> None:
    door = make(now := Now())
    door.reported(load(wait=0.5))
    now.seconds += 0.1
    door.filed(request(prompt=2000))
    error = refusal(door, firm(arrived=now()))
    assert error.queue_seconds == pytest.approx(2.4)
    now.seconds += 0.4
    door.reported(load(wait=1.8))
    now.seconds += 0.1
    refusal(door, firm(arrived=now()))
    now.seconds += 0.3
    door.check(firm(arrived=now()))


def test_a_target_that_an_idle_machine_would_miss_refuses_nobody() -> None:
    door = busy(5.0)
    door.check(firm(prompt=2000, ttft=1.0))
    refusal(door, firm(prompt=500, ttft=1.0))


def test_a_class_that_refuses_opens_again_below_four_fifths() -> None:
    door = busy(1.9)
    door.check(firm())
    door.reported(load(wait=2.4))
    refusal(door, firm())
    door.reported(load(wait=1.9))
    refusal(door, firm())
    door.check(firm(priority="low"))
    door.reported(load(wait=1.5))
    door.check(firm())
    door.reported(load(wait=1.9))
    door.check(firm())


def test_higher_classes_and_earlier_deadlines_do_not_wait_for_others() -> None:
    door = make(now := Now())
    door.filed(request(prompt=1000, ttft=10.0))
    now.seconds += 0.1
    door.reported(load(wait=4.0))
    refusal(door, firm(ttft=1.5, arrived=now(), priority="low"))
    door.check(firm(ttft=1.5, arrived=now()))
    door.check(firm(ttft=1.5, arrived=now(), priority="high"))
    door.filed(firm(prompt=3000, ttft=0.5))
    refusal(door, firm(ttft=1.5, arrived=now()))
    door.check(firm(ttft=1.5, arrived=now(), priority="high"))


def test_another_tenant_s_flood_is_not_one_s_own_queue() -> None:
    door = make(now := Now())
    for _ in range(100):
        door.filed(firm(prompt=100, ttft=0.5, tenant="flood"))
    now.seconds += 0.1
    door.reported(load(wait=10.0))
    refusal(door, firm(prompt=100, arrived=now(), tenant="flood"))
    door.check(firm(prompt=100, arrived=now(), tenant="other"))
    heavy = dataclasses.replace(firm(prompt=100, arrived=now(), tenant="other"), weight=0.01)
    refusal(door, heavy)


def test_a_tenant_leaves_room_for_others() -> None:
    door = make(max_queue=100)
    filed = [request(tenant="flood") for _ in range(80)]
    for each in filed:
        door.check(each)
        door.filed(each)
    assert refusal(door, request(tenant="flood")).reason == "tenant_share"
    other = request(tenant="other", choices=10)
    door.check(other)
    door.filed(other)
    for each in filed[:40]:
        door.ended(each)
    door.check(request(tenant="flood"))


def test_waiting_tokens_of_a_tenant_leave_room_for_others() -> None:
    door = make(max_waiting_tokens=1000)
    first = request(prompt=700, tenant="flood")
    door.filed(first)
    door.check(request(prompt=100, tenant="flood"))
    door.filed(request(prompt=120, tenant="flood"))
    assert refusal(door, request(prompt=10, tenant="flood")).reason == "tenant_share"
    door.check(request(prompt=100, tenant="other"))
    door.started(first)
    door.check(request(prompt=10, tenant="flood"))


@pytest.mark.parametrize(("chance", "seconds"), [(0.0, 8.0), (0.5, 10.0), (1.0, 12.0)])
def test_retry_after_is_spread(chance: float, seconds: float) -> None:
    door = busy(10.0, chance=chance, max_wait=5.0)
    assert refusal(door, request()).retry_after == pytest.approx(seconds)


@pytest.mark.parametrize("chance", [0.0, 1.0])
@pytest.mark.parametrize(("wait", "seconds"), [(0.0, 1.0), (1e4, 30.0)])
def test_retry_after_is_bounded(wait: float, seconds: float, chance: float) -> None:
    door = make(chance=chance, max_queue=1)
    door.filed(request())
    door.reported(load(wait=wait))
    retry_after = refusal(door, request()).retry_after
    assert retry_after is not None
    assert 1.0 <= retry_after <= 30.0
    assert retry_after == pytest.approx(seconds, rel=0.21)


def test_a_late_refusal_of_the_worker_carries_its_drain_time() -> None:
    door = make()
    error = door.refusal(Refused(1, [1], "late", "overload", 4.0))
    assert (error.status, error.reason, error.retry_after) == (503, "late", 4.0)


def test_a_clock_that_goes_back_breaks_nothing() -> None:
    door = make(now := Now())
    door.reported(load(wait=0.5))
    door.filed(request(prompt=100))
    now.seconds -= 50
    door.check(firm())
    door.check(firm(arrived=now()))
    now.seconds += 5000
    door.check(firm(arrived=now()))


def test_shut_engine_says_why_and_forgets_the_dead_workers_report() -> None:
    door = make(max_wait=5.0)
    door.reported(load(wait=6.0))
    door.shut("m", "failed")
    with pytest.raises(EngineUnavailable, match="failed") as refusal:
        door.check(request())
    assert refusal.value.retry_after is not None
    door.check(request(model="other"))
    door.open("m")
    door.check(request())


def test_nothing_of_a_tenant_stays_behind() -> None:
    door = make(max_queue=10)
    for _ in range(1000):
        asked = request(choices=8, tenant="a")
        door.check(asked)
        door.filed(asked)
        door.started(asked)
        door.ended(asked)
    door.check(request(choices=10, tenant="b"))


def test_bytes_of_tensors_are_bounded_until_their_request_ends() -> None:
    door = make(max_input_bytes=100)
    large = request(0, rows=1, inputs=bytes(1000))
    door.check(large)
    door.filed(large)
    door.started(large)
    assert refusal(door, request(0, rows=1, inputs=bytes(1))).reason == "queue_full"
    door.ended(large)
    small = request(0, rows=1, inputs=bytes(60))
    door.filed(small)
    door.check(request(0, rows=1, inputs=bytes(40)))
    assert refusal(door, request(0, rows=1, inputs=bytes(41))).reason == "queue_full"
