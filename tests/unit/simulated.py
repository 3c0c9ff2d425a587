"""A small device without noise and a small grid, for the tests of the simulator."""

from __future__ import annotations

import msgspec

from benchmarks.simulation.capacity import demand, requests_per_second
from benchmarks.simulation.coefficients import Coefficients, HostCosts, StepCosts
from benchmarks.simulation.grid import Grid, GridRow, Part, Targets
from benchmarks.simulation.workload import SimulatedRequest
from engines.protocol import Capacity

CAPACITY = Capacity(blocks=4096, block_size=16, max_rows=16, max_step_tokens=256, max_model_len=2048)
COSTS = StepCosts(base=0.004, token=1e-4, row=1e-5, decode_pair=1e-8, prompt_pair=1e-9)
CHAT = Targets(ttft=1.0, tpot=0.05)


def steady(costs: StepCosts = COSTS, gap: float = 0.0) -> Coefficients:
    """A device without noise."""
    return Coefficients(
        model="m",
        origin="estimated",
        note="",
        machine={},
        capacity=CAPACITY,
        costs=costs,
        host=HostCosts(),
        gap=gap,
        deviations=[1.0],
        residuals=[1.0],
    )


def small_grid(**fields: object) -> Grid:
    row = GridRow(
        name="r", arrivals="poisson", capacity=0.0, length_scale=0.1, parts=[Part(lengths="azure-code", targets="chat")]
    )
    grid = Grid(
        coefficients="",
        loads=[1.0],
        seeds=[1, 2],
        seconds=10.0,
        training_loads=[1.0],
        training_seconds=5.0,
        max_output=256,
        static_budgets=[128],
        queue_caps=[0],
        targets={"chat": CHAT},
        rows=[msgspec.structs.replace(row, **fields)],
    )
    rate = requests_per_second(steady(), demand(COSTS, row, "training"), CHAT.tpot)
    return msgspec.structs.replace(grid, rows=[msgspec.structs.replace(grid.rows[0], capacity=rate)])


def request(number: int, arrival: float, prompt: int = 100, output: int = 5) -> SimulatedRequest:
    return SimulatedRequest(number=number, arrival=arrival, prompt=prompt, output=output, targets=CHAT)
