"""deploy/ray: the RayService and the image, as far as it goes without Ray. ``python -m deploy.ray.check`` runs it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.ray.options import Options
from server.settings import load_settings
from tests.deploy_tools import ROOT, needs, run

RAY = ROOT / "deploy" / "ray"
DOCUMENTS: dict[str, dict[str, Any]] = {
    each["kind"]: each for each in yaml.safe_load_all((RAY / "rayservice.yaml").read_text())
}
SERVICE = DOCUMENTS["RayService"]["spec"]
SERVE = yaml.safe_load(SERVICE["serveConfigV2"])
CLUSTER = SERVICE["rayClusterConfig"]
PODS = {"head": CLUSTER["headGroupSpec"]["template"], "worker": CLUSTER["workerGroupSpecs"][0]["template"]}
DOCKERFILE = (RAY / "Dockerfile").read_text()


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLIMSERVE_API_KEY", raising=False)


def container(pod: str) -> dict[str, Any]:
    [only] = PODS[pod]["spec"]["containers"]
    assert isinstance(only, dict)
    return only


@needs("kubernetes-validate")
@pytest.mark.parametrize("version", ["1.27", "1.33"])
def test_what_kubernetes_knows_keeps_its_schemas(version: str, tmp_path: Path) -> None:
    """The RayService's own kind has no schema here: its pods are tried as pods."""
    objects = [each for kind, each in DOCUMENTS.items() if kind != "RayService"]
    objects += [
        {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": pod["spec"]}
        for name, pod in PODS.items()
    ]
    file = tmp_path / "objects.yaml"
    file.write_text(yaml.safe_dump_all(objects))
    done = run("kubernetes-validate", "--strict", "-k", version, file)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_arguments_and_the_server_s_file_are_read_by_our_own_settings(tmp_path: Path) -> None:
    [application] = SERVE["applications"]
    options = Options.model_validate(application["args"])
    [mount] = [each for each in container("worker")["volumeMounts"] if each["name"] == "config"]
    [(name, text)] = DOCUMENTS["ConfigMap"]["data"].items()
    assert str(options.config) == f"{mount['mountPath']}/{name}"
    (tmp_path / name).write_text(text)
    served = {model.served_name for model in load_settings({}, config=tmp_path / name).models}
    assert served.isdisjoint(model.served_name for model in options.on_demand)
    assert not options.allow_remote_without_key
    assert [each["name"] for each in container("worker")["env"]] == ["SLIMSERVE_API_KEY"]


def test_a_pod_outlives_the_drain_of_its_replica() -> None:
    [deployment] = SERVE["applications"][0]["deployments"]
    assert PODS["worker"]["spec"]["terminationGracePeriodSeconds"] > deployment["graceful_shutdown_timeout_s"] > 45
    assert deployment["ray_actor_options"]["num_cpus"] <= int(container("worker")["resources"]["requests"]["cpu"])


def test_pods_have_no_rights_that_they_do_not_need() -> None:
    for pod in PODS:
        assert container(pod)["securityContext"] == {
            "runAsNonRoot": True,
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
        }
    assert CLUSTER["authOptions"] == {"mode": "token"}
    assert PODS["worker"]["spec"]["automountServiceAccountToken"] is False


def test_versions_agree() -> None:
    [base] = re.findall(r"^FROM rayproject/ray:([\d.]+)-", DOCKERFILE, flags=re.MULTILINE)
    assert base == CLUSTER["rayVersion"]
    cpu = re.findall(r"torch==\S+\+cpu", DOCKERFILE)
    assert cpu == re.findall(r"torch==\S+\+cpu", (ROOT / "Dockerfile").read_text())


@needs("hadolint")
def test_the_dockerfile_has_no_findings() -> None:
    done = run("hadolint", "--no-color", RAY / "Dockerfile")
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_build_gets_what_it_copies_and_nothing_else() -> None:
    lines = re.findall(r"^COPY --chown=\S+ (.+) \S+$", DOCKERFILE, flags=re.MULTILINE)
    taken = {line[1:] for line in (RAY / "Dockerfile.dockerignore").read_text().splitlines() if line.startswith("!")}
    assert taken == {name for line in lines for name in line.split()}
    assert all((ROOT / name).exists() for name in taken)
