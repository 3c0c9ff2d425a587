from __future__ import annotations

from dataclasses import dataclass, field

from engines.generation import profile
from server.scheduler.items import StepWork
from server.scheduler.step_time import StepTimeModel, attended_pairs


@dataclass
class Machine:
    """A step takes 4 ms and ``per_token`` seconds a token, a small one that is the first of its size twice as long."""

    per_token: float
    now: float = 0.0
    sizes: list[int] = field(default_factory=list)

    def __call__(self) -> float:
        return self.now

    def seconds(self, rows: list[tuple[int, int]]) -> float:
        tokens = sum(count for _, count in rows)
        taken = 0.004 + self.per_token * tokens
        if tokens < 64 and tokens not in self.sizes:
            taken *= 2
        self.sizes.append(tokens)
        self.now += taken
        return taken


def test_the_scheduler_predicts_prompts_and_decodes_from_it() -> None:
    machine = Machine(per_token=0.0002)
    model = StepTimeModel()
    model.seed(profile.measure(machine, 64, 512, machine))
    assert model.sure
    prompt = StepWork(rows=1, tokens=256, prompt_pairs=attended_pairs(0, 256))
    assert abs(model.predict(prompt) / 0.0552 - 1) < 0.1
    decodes = StepWork(rows=32, tokens=32, decode_pairs=32 * 200)
    assert abs(model.predict(decodes) / 0.0104 - 1) < 0.2


def test_it_ends_in_time_on_a_slow_machine() -> None:
    machine = Machine(per_token=0.001)
    samples = profile.measure(machine, 64, 512, machine)
    assert len(samples) >= profile.LEAST
    assert machine.now < 1.2 * profile.SECONDS


def test_too_few_samples_are_none() -> None:
    machine = Machine(per_token=0.05)
    assert profile.measure(machine, 64, 512, machine) == ()
    assert len(machine.sizes) < 2 * profile.LEAST


def test_sizes_stay_within_a_small_engine() -> None:
    machine = Machine(per_token=0.0001)
    samples = profile.measure(machine, 2, 8, machine)
    assert max(sample.tokens for sample in samples) == 8
    assert max(sample.rows for sample in samples) == 2
