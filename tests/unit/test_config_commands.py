"""``slimserve config``, and the shell's completion, as users type them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from tests.unit.test_cli import run

ROOT = Path(__file__).resolve().parents[2]


def yaml_blocks(page: Path) -> list[str]:
    """Examples of a page that could be a whole ``--config`` file."""
    blocks = [block.split("```")[0] for block in page.read_text().split("```yaml\n")[1:]]
    return [block for block in blocks if not block.startswith(("tenants:", "bits:"))]


def test_the_schema_takes_the_documented_examples_and_no_mistakes() -> None:
    validator = pytest.importorskip("jsonschema").Draft202012Validator
    schema = json.loads(run("config", "schema").stdout)
    validator.check_schema(schema)
    check = validator(schema)
    examples = yaml_blocks(ROOT / "docs" / "operations.md")
    assert len(examples) >= 2
    for example in examples:
        assert list(check.iter_errors(yaml.safe_load(example))) == [], example
    for wrong in ({"prot": 1}, {"port": -1}, {"grace": "soon"}, {"models": [{"source": "a", "dtype": "int3"}]}):
        assert list(check.iter_errors(wrong)), wrong


def test_a_right_file_is_shown_with_what_won(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(
        "port: 1\ngrace: 5s\napi_key: a-secret-of-twenty-letters\nmodels: [{source: ./a, dtype: float16}]\n"
    )
    answer = run("config", "check", str(file), SLIMSERVE_PORT="2")
    assert answer.returncode == 0, answer.stderr
    rows = [line.split() for line in answer.stdout.splitlines()]
    assert ["port", "2", "SLIMSERVE_PORT"] in rows
    assert ["grace", "5.0", "file"] in rows
    assert "model a: ./a, dtype float16" in answer.stdout
    assert "a-secret" not in answer.stdout + answer.stderr


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prot: 1", "prot: unknown option; did you mean port?"),
        ("grace: soon", "grace: a time is a number"),
        ("models: [{dtype: float16}]", "an entry needs a source"),
        ("port: [", "the configuration cannot be read"),
    ],
)
def test_a_wrong_file_is_one_line_and_status_2(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(text)
    answer = run("config", "check", str(file))
    assert answer.returncode == 2
    assert message in answer.stderr


def test_flags_win_over_the_environment_and_that_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("port: 70001\ngrace: nonsense-of-the-file\n")
    serve = ("serve", "no-such-model", "--config", str(file))
    assert "grace: a time is a number" in run(*serve).stderr
    assert "port" in run(*serve, SLIMSERVE_GRACE="1s").stderr
    assert "port: " in run(*serve, SLIMSERVE_GRACE="1s", SLIMSERVE_PORT="70002").stderr
    last = run(*serve, "--port", "0", SLIMSERVE_GRACE="1s", SLIMSERVE_PORT="70002")
    assert "there is no model no-such-model" in last.stderr


@pytest.mark.parametrize(
    ("words", "index", "wanted"),
    [
        ("slimserve se", 1, {"serve"}),
        ("slimserve config ", 2, {"schema", "check"}),
        ("slimserve serve --log-f", 2, {"--log-format"}),
        ("slimserve serve --log-format ", 3, {"text", "json"}),
        ("slimserve serve smollm2-1", 2, {"smollm2-135m"}),
        ("slimserve pull smollm2-1", 2, {"smollm2-135m"}),
    ],
)
def test_the_shell_completes(words: str, index: int, wanted: set[str]) -> None:
    answer = run(_SLIMSERVE_COMPLETE="complete_bash", COMP_WORDS=words, COMP_CWORD=str(index))
    assert set(answer.stdout.split()) == wanted


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts_are_printed_for_shells(shell: str) -> None:
    script = run(_SLIMSERVE_COMPLETE=f"source_{shell}").stdout
    assert "slimserve" in script
    assert "_SLIMSERVE_COMPLETE" in script
