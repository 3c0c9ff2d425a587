"""The Dockerfile, the compose files and Prometheus's configuration, by their own tools and against the server."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from server.api.middleware import OPEN_PATHS
from server.settings import Settings, load_settings, parse_duration
from tests.deploy_tools import ROOT, load, needs, run
from tests.promtool import needs_promtool, promtool

DEPLOY = ROOT / "deploy"
COMPOSE = [DEPLOY / "compose.yaml", DEPLOY / "compose.gpu.yaml"]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
SERVICES: dict[str, Any] = load(COMPOSE[0])["services"]


def stage(name: str) -> str:
    """The lines of one stage, without the comments between them."""
    parts = re.split(r"^FROM \S+ AS (\S+)$", DOCKERFILE, flags=re.MULTILINE)
    lines = parts[parts.index(name) + 1].splitlines()
    return "\n".join(line for line in lines if not line.startswith("#"))


def copied() -> set[str]:
    """What the build takes from the repository."""
    sources = re.findall(r"^COPY (?!--from)(.+) \S+$", DOCKERFILE, flags=re.MULTILINE)
    return {name for line in sources for name in line.split()}


def mounts(service: str) -> dict[str, str]:
    """Container paths and where they come from, of one service."""
    return {volume.split(":")[1]: volume.split(":")[0] for volume in SERVICES[service]["volumes"]}


# --- the image


@needs("hadolint")
def test_the_dockerfile_has_no_findings() -> None:
    done = run("hadolint", "--no-color", ROOT / "Dockerfile")
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_build_gets_what_it_copies_and_nothing_else() -> None:
    taken = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert taken == copied()
    assert all((ROOT / name).exists() for name in taken)


def test_every_package_of_the_wheel_is_copied() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = {name.removesuffix("*") for name in project["tool"]["setuptools"]["packages"]["find"]["include"]}
    assert packages <= copied()
    assert {project["project"]["readme"], *project["project"]["license-files"]} <= copied()


def test_the_images_take_the_torch_that_the_installer_takes() -> None:
    installer = (ROOT / "install.sh").read_text()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    (pinned,) = re.findall(r'^cpu_torch="(.+)"$', installer, flags=re.MULTILINE)
    assert f'"{pinned}"' in stage("packages-cpu")
    (bounds,) = (name for name in project["project"]["dependencies"] if name.startswith("torch"))
    assert f'"{bounds}"' in stage("packages-cuda")


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_an_image_runs_as_a_numbered_user_that_is_not_root(target: str) -> None:
    users = re.findall(r"^USER (\S+)$", stage("runtime") + "\n" + stage(target), flags=re.MULTILINE)
    assert users[-1] == "10001:10001"


def test_cpu_is_the_default_target() -> None:
    assert re.findall(r"^FROM \S+ AS (\S+)$", DOCKERFILE, flags=re.MULTILINE)[-2:] == ["cuda", "cpu"]


def test_the_image_s_health_check_needs_no_key() -> None:
    (path,) = set(re.findall(r"'(/health/\w+)'", stage("runtime")))
    assert path in OPEN_PATHS


def test_the_image_s_environment_is_known_to_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    found = dict(re.findall(r"(SLIMSERVE_\w+)=(\S+)", stage("runtime")))
    assert "SLIMSERVE_HOST" in found
    for name, value in found.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SLIMSERVE_API_KEY", "a-key-of-this-test")
    assert load_settings({}).host == "0.0.0.0"


# --- compose


@needs("check-jsonschema")
@pytest.mark.parametrize("path", COMPOSE, ids=lambda path: path.name)
def test_compose_files_keep_the_specification(path: Path) -> None:
    done = run("check-jsonschema", "--builtin-schema", "vendor.compose-spec", path)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("service", SERVICES)
def test_compose_mounts_what_there_is(service: str) -> None:
    volumes = load(COMPOSE[0])["volumes"]
    for source in mounts(service).values():
        assert (DEPLOY / source).exists() if source.startswith(".") else source in volumes, source


@pytest.mark.parametrize("service", SERVICES)
def test_compose_opens_ports_on_this_machine_only_and_gives_no_rights(service: str) -> None:
    assert all(port.startswith("127.0.0.1:") for port in SERVICES[service]["ports"])
    assert SERVICES[service]["cap_drop"] == ["ALL"]
    assert SERVICES[service]["security_opt"] == ["no-new-privileges:true"]


def test_the_server_s_container_writes_nowhere_but_where_it_may() -> None:
    server = SERVICES["server"]
    writable = {path for path in mounts("server") if path not in ("/etc/slimserve/config.yaml",)}
    writable |= {entry.split(":")[0] for entry in server["tmpfs"]}
    assert server["read_only"]
    homes = set(re.findall(r"\b(?:HOME|SLIMSERVE_HOME)=(\S+)", stage("runtime")))
    assert homes <= writable
    assert "/tmp" in writable


def test_compose_waits_for_open_streams() -> None:
    seconds = parse_duration(SERVICES["server"]["stop_grace_period"])
    assert isinstance(seconds, float)
    assert seconds > Settings.model_fields["grace"].default + 10


def test_compose_s_server_starts_with_its_file_and_only_with_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    server = SERVICES["server"]
    file = DEPLOY / mounts("server")[server["command"][-1]]
    monkeypatch.setenv("SLIMSERVE_HOST", "0.0.0.0")
    with pytest.raises(Exception, match="no API key is set"):
        load_settings({}, config=file)
    for name in server["environment"]:
        monkeypatch.setenv(name, "a-key-of-this-test")
    assert load_settings({}, config=file).models[0].served_name == "smollm2-135m"


def test_keys_are_required_and_kept_out_of_git() -> None:
    wanted = re.findall(r"\$\{(\w+):\?", COMPOSE[0].read_text())
    given = dict(line.split("=") for line in (DEPLOY / "example.env").read_text().splitlines() if "=" in line)
    assert set(wanted) == set(given)
    assert not any(given.values())
    assert ".env" in (ROOT / ".gitignore").read_text().splitlines()


# --- Prometheus and Grafana


def test_grafana_finds_its_dashboards_and_prometheus() -> None:
    provisioning = ROOT / "grafana" / "provisioning"
    (provider,) = load(provisioning / "dashboards" / "slimserve.yaml")["providers"]
    assert mounts("grafana")[provider["options"]["path"]] == "../grafana/dashboards"
    (source,) = load(provisioning / "datasources" / "prometheus.yaml")["datasources"]
    assert source["url"].strip("${}") in SERVICES["grafana"]["environment"]


@needs_promtool
def test_prometheus_takes_its_configuration(tmp_path: Path) -> None:
    # The files lie elsewhere in the container; here they are where the mounts take them from.
    key = tmp_path / "api-key"
    key.write_text("a-key-of-this-test")
    text = (DEPLOY / "prometheus" / "prometheus.yaml").read_text()
    assert "/run/secrets/api-key" in text
    text = text.replace("/run/secrets/api-key", str(key))
    for inside, outside in mounts("prometheus").items():
        text = text.replace(inside, str((DEPLOY / outside).resolve()))
    config = tmp_path / "prometheus.yaml"
    config.write_text(text)
    done = promtool("check", "config", str(config))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "rules found" in done.stdout


def test_prometheus_scrapes_the_server_under_the_name_that_alerts_expect() -> None:
    (job,) = load(DEPLOY / "prometheus" / "prometheus.yaml")["scrape_configs"]
    assert f'job="{job["job_name"]}"' in (ROOT / "grafana" / "alerts" / "slimserve.yaml").read_text()
    assert job["static_configs"][0]["targets"] == ["server:8000"]
