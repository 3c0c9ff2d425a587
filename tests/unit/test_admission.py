from __future__ import annotations

import itertools

import pytest

from engines.protocol import SamplingParams
from server.admission import AdmissionLimits, Door
from server.errors import EngineUnavailable, Overloaded
from server.requests import Request
from server.worker.wire import EngineLoad, StepStats

numbers = itertools.count()


def request(prompt: int = 10, choices: int = 1, model: str = "m") -> Request:
    sampling = tuple(SamplingParams(seed=1, choice=choice) for choice in range(choices))
    return Request(id=next(numbers), model=model, prompt=[1] * prompt, max_tokens=9, sampling=sampling, arrived=0.0)


def step(tokens: int, seconds: float) -> StepStats:
    return StepStats(seconds=seconds, plan_seconds=0.0, rows=1, tokens=tokens, prompt_tokens=0)


def load(waiting_tokens: int) -> EngineLoad:
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
    )


def test_open_choices_are_bounded_until_they_end() -> None:
    door = Door(AdmissionLimits(max_queue=3))
    first = request(choices=2)
    door.check(first)
    door.filed(first)
    door.started(first)
    with pytest.raises(Overloaded, match="too many requests") as refusal:
        door.check(request(choices=2))
    assert refusal.value.retry_after == 1.0
    door.check(request(choices=1))
    door.check(request(choices=3, model="other"))
    door.ended(first)
    door.ended(first)
    door.check(request(choices=3))


def test_waiting_tokens_are_bounded_until_the_first_token() -> None:
    door = Door(AdmissionLimits(max_waiting_tokens=100))
    first = request(prompt=500)
    door.check(first)
    door.filed(first)
    with pytest.raises(Overloaded, match="tokens are waiting"):
        door.check(request(prompt=1))
    door.started(first)
    door.check(request(prompt=500))


def test_predicted_wait_refuses_and_names_the_time() -> None:
    door = Door(AdmissionLimits(max_wait=5.0))
    door.stepped("m", step(tokens=100, seconds=1.0))
    door.filed(request(prompt=450))
    door.check(request())
    door.filed(request(prompt=250))
    with pytest.raises(Overloaded, match="7 s") as refusal:
        door.check(request())
    assert refusal.value.retry_after == 7.0


def test_rate_follows_the_steps_slowly() -> None:
    door = Door(AdmissionLimits(max_wait=5.0))
    door.stepped("m", step(tokens=100, seconds=1.0))
    door.stepped("m", step(tokens=0, seconds=1.0))
    door.stepped("m", step(tokens=5, seconds=0.0))
    door.filed(request(prompt=600))
    with pytest.raises(Overloaded):
        door.check(request())
    for _ in range(100):
        door.stepped("m", step(tokens=1000, seconds=1.0))
    door.check(request())


def test_preempted_work_is_known_from_the_report_alone() -> None:
    door = Door(AdmissionLimits(max_wait=5.0))
    door.stepped("m", step(tokens=100, seconds=1.0))
    door.reported(load(waiting_tokens=600))
    with pytest.raises(Overloaded):
        door.check(request())
    door.reported(load(waiting_tokens=0))
    door.check(request())


def test_retry_after_is_bounded() -> None:
    door = Door(AdmissionLimits(max_wait=5.0))
    door.stepped("m", step(tokens=1, seconds=1.0))
    door.filed(request(prompt=10_000))
    with pytest.raises(Overloaded) as refusal:
        door.check(request())
    assert refusal.value.retry_after == 60.0


def test_shut_engine_says_why_and_forgets_the_dead_workers_report() -> None:
    door = Door(AdmissionLimits(max_wait=5.0))
    door.stepped("m", step(tokens=100, seconds=1.0))
    door.reported(load(waiting_tokens=600))
    door.shut("m", "restarting")
    with pytest.raises(EngineUnavailable, match="restarting") as refusal:
        door.check(request())
    assert refusal.value.retry_after is not None
    door.check(request(model="other"))
    door.open("m")
    door.check(request())
