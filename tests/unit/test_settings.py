from __future__ import annotations

import ast
from pathlib import Path

import pytest

from server import settings as settings_module
from server.errors import UsageError
from server.requests import Targets
from server.settings import (
    ClassTargets,
    ModelSettings,
    Settings,
    is_loopback,
    load_settings,
    parse_duration,
    parse_memory,
)
from server.tenants import NOBODY, hash_key

KEY = "slim-a-long-enough-key"


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    for name in [name for name in os.environ if name.startswith("SLIMSERVE_")]:
        monkeypatch.delenv(name)


def write(folder: Path, text: str) -> Path:
    path = folder / "config.yaml"
    path.write_text(text)
    return path


def test_layers_win_in_the_documented_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = write(tmp_path, "port: 1\nmax_batch: 1\nmax_delay: 1ms\nmodels: [{source: ./a}]\n")
    monkeypatch.setenv("SLIMSERVE_PORT", "2")
    monkeypatch.setenv("SLIMSERVE_MAX_BATCH", "2")
    settings = load_settings({"port": 3}, config=config)
    assert (settings.port, settings.max_batch, settings.max_delay, settings.grace) == (3, 2, 0.001, 30.0)


def test_options_of_a_model_come_from_its_entry_then_the_top_of_the_file(tmp_path: Path) -> None:
    config = write(tmp_path, "dtype: bfloat16\nmodels:\n- {source: ./a}\n- {source: ./b, dtype: float32}\n")
    settings = load_settings({}, config=config)
    assert [entry.dtype for entry in settings.models] == ["bfloat16", "float32"]


def test_options_of_a_model_as_flag_or_variable_apply_to_every_entry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write(tmp_path, "models:\n- {source: ./a, dtype: float32, threads: 1}\n- {source: ./b}\n")
    monkeypatch.setenv("SLIMSERVE_THREADS", "2")
    settings = load_settings({"dtype": "bfloat16"}, config=config)
    assert [(entry.dtype, entry.threads) for entry in settings.models] == [("bfloat16", 2), ("bfloat16", 2)]


def test_model_on_the_command_line_is_one_entry() -> None:
    [entry] = load_settings({"max_model_len": 64}, model="dir/Some-Model.gguf").models
    assert (entry.served_name, entry.source, entry.max_model_len) == ("Some-Model", "dir/Some-Model.gguf", 64)
    [entry] = load_settings({}, model="./x", served_model_name="other").models
    assert entry.served_name == "other"


def test_without_a_model_the_default_one_is_served() -> None:
    assert [entry.served_name for entry in load_settings({}).models] == ["smollm2-135m"]


@pytest.mark.parametrize(
    ("source", "name"),
    [("hf:org/Name-1B@main", "Name-1B"), ("smollm2-135m", "smollm2-135m"), ("./folder/", "folder")],
)
def test_served_name_is_the_last_part_of_the_source(source: str, name: str) -> None:
    assert ModelSettings(source=source).served_name == name


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_bach: 2\n", "max_bach: unknown option; did you mean max_batch"),
        ("models: [{source: ./a, dtpye: auto}]\n", "models.0.dtpye: unknown option; did you mean dtype"),
        ("models: [{name: a}]\n", "needs a source"),
        ("models: [{source: ./a}, {source: b/a}]\n", "two entries are served as a"),
        ("models: [{source: ./a, dtype: int3}]\n", "models.0.dtype"),
        ("target_ttft: 200\n", "target_ttft"),
        ("classes: {urgent: {target_ttft: 1s}}\n", "classes.urgent"),
        (
            "classes: {high: {target_tftt: 1s}}\n",
            r"classes\.high\.target_tftt: unknown.*target_ttft",
        ),
        ("policy: magic\n", "policy"),
        ("tenants: nothing.yaml\n", "nothing.yaml cannot be read"),
        ("memory_limit: lots\n", "8GiB"),
        ("port: [\n", "cannot be read"),
        ("- 1\n", "cannot be read"),
    ],
)
def test_a_wrong_file_is_refused_by_the_key(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_settings({}, config=write(tmp_path, text))


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no file"):
        load_settings({}, config=tmp_path / "nothing.yaml")


def test_an_unknown_variable_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLIMSERVE_PROT", "1")
    with pytest.raises(UsageError, match=r"SLIMSERVE_PROT.*did you mean port"):
        load_settings({})


def test_the_cache_folder_variable_is_no_option(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLIMSERVE_HOME", "somewhere")
    load_settings({})


def test_another_host_than_loopback_needs_a_key_or_a_permission(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="--allow-remote-without-key"):
        load_settings({"host": "0.0.0.0"})
    load_settings({"host": "0.0.0.0", "allow_remote_without_key": True})
    monkeypatch.setenv("SLIMSERVE_API_KEY", "secret")
    settings = load_settings({"host": "0.0.0.0"})
    assert "secret" not in repr(settings)


def test_targets_of_a_class_win_over_those_of_the_top_level(tmp_path: Path) -> None:
    text = "target_ttft: 2s\nclasses: {high: {target_ttft: 500ms}, low: {target_tpot: 1s}}\n"
    settings = load_settings({}, config=write(tmp_path, text))
    assert settings.targets() == {
        "high": Targets(0.5, None),
        "normal": Targets(2.0, None),
        "low": Targets(2.0, 1.0),
    }
    assert set(load_settings({}).targets().values()) == {Targets()}


def test_tenants_and_the_api_key_open_the_server_and_the_admin_key_does_not_close_it(tmp_path: Path) -> None:
    tenants = tmp_path / "tenants.yaml"
    tenants.write_text(f"tenants: [{{name: a, keys: ['{hash_key(KEY)}']}}]")
    config = write(tmp_path, f"tenants: {tenants}\nhost: 0.0.0.0\n")
    table = load_settings({"api_key": "operator"}, config=config).tenant_table()
    tenant = table.find(KEY.encode())
    assert tenant is not None
    assert tenant.name == "a"
    assert table.find(b"operator") is NOBODY
    assert table.find(b"") is None
    assert load_settings({"admin_key": "boss"}).tenant_table().open
    assert "boss" not in repr(load_settings({"admin_key": "boss"}))


@pytest.mark.parametrize(
    ("host", "expected"),
    [("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("::", False)],
)
def test_loopback(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


@pytest.mark.parametrize(("text", "seconds"), [("5ms", 0.005), ("0.5s", 0.5), ("2min", 120), ("3", 3), ("10 us", 1e-5)])
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["5 hours", "ms", "-1s", "1e3s", ""])
def test_wrong_durations(text: str) -> None:
    with pytest.raises(ValueError, match="5ms"):
        parse_duration(text)


@pytest.mark.parametrize(
    ("text", "value"), [("8GiB", 8 * 2**30), ("500MB", 500_000_000), ("0.5", 0.5), ("1", 1.0), ("1048576", 2**20)]
)
def test_memory_is_a_size_or_a_share(text: str, value: float) -> None:
    parsed = parse_memory(text)
    assert parsed == value
    assert type(parsed) is type(value)


def test_each_option_has_a_default_and_a_docstring() -> None:
    for model in (Settings, ModelSettings, ClassTargets):
        for name, field in model.model_fields.items():
            assert not field.is_required(), f"{model.__name__}.{name} has no default"
            assert field.description, f"{model.__name__}.{name} has no docstring"


def test_each_flag_of_serve_is_an_option() -> None:
    tree = ast.parse(Path(settings_module.__file__).with_name("serve_command.py").read_text())
    [serve] = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "serve"]
    flags = {argument.arg for argument in serve.args.args} - {"model", "config", "served_model_name"}
    assert flags <= Settings.model_fields.keys()
    assert len(flags) > 15
