"""Which configuration a linear layer gets: by table, by the model of the machine, or cuBLAS. Needs no GPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from engines.kernels.cuda import tuning
from engines.kernels.cuda.binary_cache import compiled_folder
from engines.kernels.cuda.tuning import (
    BUCKETS,
    MOST_ROWS,
    Machine,
    SkinnyConfig,
    SkinnyShape,
    Table,
    block_rows,
    candidates,
    config_for,
    fields_of,
    overlap,
    predicted_config,
    predicted_us,
    ranked,
    resident_programs,
    shared_bytes,
    table_name,
)

HOPPER = Machine("Some Hopper", (9, 0), 132, 233_472)
AMPERE = Machine("Some Ampere", (8, 0), 108, 167_936)
CONFIG = SkinnyConfig(16, 256, 4, 1, 4, 4, 512, True)
SHAPES = [
    SkinnyShape(2048, 1536, False, True),
    SkinnyShape(17920, 1536, True, True),
    SkinnyShape(1536, 8960, False, False),
    SkinnyShape(152064, 3584, False, True),
    SkinnyShape(48, 16, False, False),
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of tables, in place of the shipped ones."""
    monkeypatch.setattr(tuning, "TABLES", tmp_path)
    config_for.cache_clear()
    return tmp_path


def write_table(folder: Path, machine: Machine, entries: dict[str, dict[str, list[int] | None]]) -> None:
    chip = {"gpu": machine.name, "capability": machine.capability, "multiprocessors": machine.multiprocessors}
    (folder / table_name(machine.name)).write_text(json.dumps(chip | {"entries": entries}))


@pytest.mark.parametrize("machine", [HOPPER, AMPERE])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", BUCKETS)
def test_every_layer_gets_a_configuration_that_fits(shape: SkinnyShape, rows: int, machine: Machine) -> None:
    config = predicted_config(shape, rows, machine)
    if rows == MOST_ROWS and machine is AMPERE and config is None:
        return  # without the wide instructions, cuBLAS
    assert config is not None
    assert shared_bytes(config, block_rows(rows)) < machine.shared_memory
    assert resident_programs(config, shape, block_rows(rows), machine) >= machine.multiprocessors
    if machine is AMPERE:
        assert not config.early
        assert config.parts > 0


def test_the_model_never_promises_more_than_memory_gives() -> None:
    for shape in SHAPES:
        floor = 2 * shape.lines * shape.depth / tuning.BYTES_PER_US / HOPPER.multiprocessors
        for config in candidates(shape, 1, HOPPER):
            assert predicted_us(config, shape, 1, HOPPER) > floor


def test_candidates_differ() -> None:
    found = ranked(SHAPES[1], 16, HOPPER, 12)
    assert len(set(found)) == 12
    assert len({(config.parts == 0, config.block_n, config.splits) for config in found}) >= 5
    assert 2 <= sum(overlap(config, SHAPES[1], 16, HOPPER) >= 0.5 for config in found) <= 8


def test_no_split_is_without_work() -> None:
    for config in candidates(SkinnyShape(1024, 640, False, False), 1, HOPPER):
        steps = tuning.steps_of_split(config, 640)
        assert (config.splits - 1) * steps * config.block_k < 640


def test_a_table_goes_before_the_model(folder: Path) -> None:
    shape = SHAPES[0]
    write_table(folder, HOPPER, {shape.key(): {"4": fields_of(CONFIG), "16": None}})
    assert config_for(shape, 3, HOPPER) == CONFIG
    assert config_for(shape, 4, HOPPER) == CONFIG
    assert config_for(shape, 1, HOPPER) == CONFIG
    assert config_for(shape, 9, HOPPER) is None
    assert config_for(shape, 17, HOPPER) is None
    assert config_for(SHAPES[1], 1, HOPPER) == predicted_config(SHAPES[1], 1, HOPPER)


def test_a_table_may_have_other_numbers_of_rows(folder: Path) -> None:
    other = SkinnyConfig(32, 256, 4, 1, 4, 4, 512, True)
    write_table(folder, HOPPER, {SHAPES[0].key(): {"24": fields_of(CONFIG), "32": fields_of(other)}})
    assert [config_for(SHAPES[0], rows, HOPPER) for rows in (17, 24, 25, 32, 33)] == [
        CONFIG,
        CONFIG,
        other,
        other,
        None,
    ]


def test_another_table_can_be_preferred_for_a_while(folder: Path) -> None:
    write_table(folder, HOPPER, {SHAPES[0].key(): {"4": fields_of(CONFIG)}})
    assert config_for(SHAPES[0], 4, HOPPER) == CONFIG
    try:
        tuning.prefer_table(Table({SHAPES[0].key(): {"4": None}}))
        assert config_for(SHAPES[0], 4, HOPPER) is None
    finally:
        tuning.prefer_table(None)
    assert config_for(SHAPES[0], 4, HOPPER) == CONFIG


def test_a_gpu_with_the_same_chip_shares_its_table(folder: Path) -> None:
    write_table(folder, Machine("Another Hopper", (9, 0), 132, 233_472), {SHAPES[0].key(): {"1": fields_of(CONFIG)}})
    assert config_for(SHAPES[0], 1, HOPPER) == CONFIG
    assert config_for(SHAPES[0], 1, AMPERE) == predicted_config(SHAPES[0], 1, AMPERE)


def test_a_layer_is_found_with_and_without_its_norm() -> None:
    table = Table({"64x32-gated-norm": {"1": fields_of(CONFIG)}})
    assert table.find(SkinnyShape(64, 32, True, False), 1) == (True, CONFIG)
    assert table.find(SkinnyShape(64, 32, False, True), 1) == (False, None)


def test_more_rows_than_the_kernel_has_go_to_cublas() -> None:
    assert config_for(SHAPES[0], MOST_ROWS + 1, HOPPER) is None
    assert config_for(SkinnyShape(640, 512, False, False), MOST_ROWS, HOPPER) is None


def test_shipped_tables_are_whole() -> None:
    for path in sorted(tuning.TABLES.glob("linear-*.json")):
        data = json.loads(path.read_text())
        assert path.name == table_name(data["gpu"])
        machine = Machine(data["gpu"], tuple(data["capability"]), data["multiprocessors"], 233_472)
        for key, entry in data["entries"].items():
            lines, depth = key.split("-")[0].split("x")
            shape = SkinnyShape(int(lines), int(depth), "-gated" in key, "-norm" in key)
            assert shape.key() == key
            for rows in map(int, entry):
                assert rows <= MOST_ROWS
                _, config = Table(data["entries"]).find(shape, rows)
                if config is not None:
                    assert predicted_us(config, shape, rows, machine) < float("inf"), (key, rows)
                    assert fields_of(config) == entry[str(rows)]


def test_compiled_kernels_lie_under_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLIMSERVE_HOME", str(tmp_path))
    assert compiled_folder() == tmp_path / "triton"
    monkeypatch.delenv("SLIMSERVE_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert compiled_folder() == tmp_path / "slimserve" / "triton"
