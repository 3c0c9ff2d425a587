from __future__ import annotations

import math

import msgspec
import pytest

from server.scheduler.config import SchedulerConfig


def test_travels_as_json() -> None:
    config = SchedulerConfig(max_batch=8, target_tpot=0.05, prefix_cache=False)
    assert msgspec.json.decode(msgspec.json.encode(config), type=SchedulerConfig) == config


def test_an_unknown_key_is_an_error() -> None:
    with pytest.raises(msgspec.ValidationError, match="max_bach"):
        msgspec.json.decode(b'{"max_bach": 8}', type=SchedulerConfig)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_batch", 0),
        ("token_budget", 0),
        ("max_delay", -0.1),
        ("max_delay", math.nan),
        ("target_ttft", 0.0),
        ("target_tpot", -1.0),
        ("target_tpot", math.inf),
    ],
)
def test_a_value_out_of_range_is_named(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=name):
        SchedulerConfig(**{name: value})  # type: ignore[arg-type]
