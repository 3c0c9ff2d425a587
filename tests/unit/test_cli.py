from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from server.tenants import TenantTable, read_tenants


def run(*arguments: str, stdin: str | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("SLIMSERVE_")}
    return subprocess.run(
        [sys.executable, "-m", "server.cli", *arguments],
        capture_output=True,
        text=True,
        input=stdin,
        env=clean | {"COLUMNS": "200"} | environment,
        timeout=60,
        check=False,
    )


FLAGS = """
    host port served-model-name api-key max-model-len dtype kv-dtype device threads random-weights max-batch max-delay
    target-ttft target-tpot memory-limit min-quality log-level config tenants policy
"""


def test_help_of_serve_names_every_flag_and_gives_examples() -> None:
    text = run("serve", "--help").stdout
    for flag in FLAGS.split():
        assert f"--{flag} " in text, flag
    assert "Examples" in text
    assert "5ms" in text
    assert "SLIMSERVE_PORT" in text


def test_help_names_the_commands_quickly() -> None:
    before = os.times().children_user
    text = run("--help").stdout
    for command in ("serve", "pull", "list", "rm", "chat", "tenants"):
        assert command in text
    assert os.times().children_user - before < 1


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (("serve", "no-such-model", "--port", "0"), 2, "there is no model no-such-model"),
        (("serve", "--target-ttft", "soon"), 2, "target_ttft: a time is a number"),
        (("serve", "--host", "0.0.0.0"), 2, "--allow-remote-without-key"),
        (("serve", "--host", "no.such.host.invalid"), 2, "API key"),
        (("serve", "--config", "nothing.yaml"), 2, "there is no file nothing.yaml"),
        (("chat", "--url", "http://127.0.0.1:9"), 1, "no server answers"),
        (("serve", "--tenants", "nothing.yaml", "--port", "0"), 2, "nothing.yaml cannot be read"),
        (("rm", "nothing"), 1, "nothing is not here"),
    ],
)
def test_errors_are_one_line_and_a_status(arguments: tuple[str, ...], status: int, message: str) -> None:
    answer = run(*arguments)
    assert answer.returncode == status
    assert message in answer.stderr
    assert answer.stderr.count("\n") == 1
    assert "Traceback" not in answer.stderr


def test_a_wrong_variable_is_one_line_too() -> None:
    answer = run("serve", SLIMSERVE_PORT="many")
    assert answer.returncode == 2
    assert answer.stderr.startswith("Error: port:")


def test_env_tells_versions_and_no_secret() -> None:
    text = run("env", SLIMSERVE_API_KEY="hidden-value").stdout
    assert "torch" in text
    assert "hidden-value" not in text


def test_a_new_tenant_s_key_opens_the_entry_that_was_printed_with_it(tmp_path: Path) -> None:
    answer = run("tenants", "new", "team-a")
    (tmp_path / "tenants.yaml").write_text(f"tenants:\n{answer.stdout}")
    key = answer.stderr.split()[-1]
    tenant = TenantTable(read_tenants(tmp_path / "tenants.yaml")).find(key.encode())
    assert tenant is not None
    assert tenant.name == "team-a"
    assert run("tenants", "hash", stdin=f"{key}\n").stdout.strip() in answer.stdout


def test_a_key_that_can_be_guessed_is_refused() -> None:
    answer = run("tenants", "hash", stdin="password\n")
    assert answer.returncode == 2
    assert "at least 20 characters" in answer.stderr
