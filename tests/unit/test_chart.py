"""The Helm chart: what it refuses, what it renders, and that this fits the server."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml

from server.api.middleware import OPEN_PATHS
from server.metric_table import TABLE
from server.settings import load_settings
from tests.deploy_tools import CHART, ROOT, load, needs, render, run

pytestmark = needs("helm")

KEY = "auth.secret=keys"
MANY = "cache.kind=perPod"
VARIANTS = {
    "one pod": (KEY,),
    "no key": ("auth.allowWithoutKey=true",),
    "tenants": (KEY, "auth.tenants=true", "auth.adminKey=true"),
    "hpa": (KEY, MANY, "autoscaling.kind=hpa"),
    "keda": (KEY, MANY, "autoscaling.kind=keda", "podMonitor.enabled=true"),
    "gpus": (KEY, "gpus=2", "cache.kind=emptyDir", "networkPolicy.downloads=false"),
    "metrics port": (KEY, "metricsPort=9100", "podMonitor.enabled=true"),
    "shared cache": (KEY, "replicas=3", "cache.accessMode=ReadWriteMany", "cache.storageClass=shared"),
}
CUSTOM_KINDS = {"PodMonitor", "ScaledObject"}


def pod(*values: str) -> dict[str, Any]:
    spec: dict[str, Any] = render(*values)["Deployment"]["spec"]["template"]["spec"]
    return spec


def server(*values: str) -> dict[str, Any]:
    (container,) = pod(*values)["containers"]
    found: dict[str, Any] = container
    return found


def series(query: str) -> set[str]:
    """Names of the metrics in a query. Raises ValueError for a wrong one."""
    names: set[str] = set()

    def visit(node: Any) -> None:
        if isinstance(node, promql_parser.VectorSelector):
            names.add(node.name or "")

    promql_parser.walk(promql_parser.parse(query), visit)
    return names


KNOWN = {f"slimserve_{metric.name}{'_total' if metric.kind == 'counter' else ''}" for metric in TABLE}


@pytest.mark.parametrize("values", VARIANTS.values(), ids=VARIANTS)
def test_helm_has_nothing_to_say_against_it(values: tuple[str, ...]) -> None:
    options = [part for value in values for part in ("--set", value)]
    done = run("helm", "lint", "--strict", CHART, *options)
    assert done.returncode == 0, done.stdout + done.stderr


@needs("kubernetes-validate")
@pytest.mark.parametrize("version", ["1.27", "1.33"])
@pytest.mark.parametrize("values", VARIANTS.values(), ids=VARIANTS)
def test_objects_keep_the_schemas_of_kubernetes(values: tuple[str, ...], version: str, tmp_path: Path) -> None:
    objects = [each for kind, each in render(*values).items() if kind not in CUSTOM_KINDS]
    file = tmp_path / "objects.yaml"
    file.write_text(yaml.safe_dump_all(objects))
    done = run("kubernetes-validate", "--strict", "-k", version, file)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ((), "auth.secret"),
        ((KEY, "replicas=2"), "ReadWriteMany"),
        ((KEY, "autoscaling.kind=keda"), "ReadWriteMany"),
        ((KEY, MANY, "autoscaling.kind=hpa", "autoscaling.min=9"), "min is more than max"),
        ((KEY, "config.port=80"), "config.port"),
        ((KEY, "config.api_key=secret"), "config.api_key"),
        ((KEY, "replica=2"), "replica"),
        ((KEY, "config.grace=soon"), "grace"),
        ((KEY, "gpus=many"), "gpus"),
    ],
)
def test_what_cannot_work_is_refused(values: tuple[str, ...], words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        render(*values)


@pytest.mark.parametrize("values", VARIANTS.values(), ids=VARIANTS)
def test_the_server_reads_what_the_pod_gives_it(
    values: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    container = server(*values)
    tenants = tmp_path / "tenants.yaml"
    tenants.write_text(f'tenants:\n  - name: first\n    keys: ["sha256:{"0" * 64}"]\n')
    for each in container["env"]:
        value = each.get("value", f"the-{each['name']}-of-this-test")
        monkeypatch.setenv(each["name"], str(tenants) if each["name"] == "SLIMSERVE_TENANTS" else value)
    config = tmp_path / "config.yaml"
    config.write_text(render(*values)["ConfigMap"]["data"]["config.yaml"])
    settings = load_settings({}, config=config)
    assert (settings.host, settings.port) == ("0.0.0.0", container["ports"][0]["containerPort"])
    assert (settings.api_key is None) == ("auth.allowWithoutKey=true" in values)


def test_a_service_named_like_the_server_does_not_set_its_options(monkeypatch: pytest.MonkeyPatch) -> None:
    assert pod(KEY)["enableServiceLinks"] is False
    monkeypatch.setenv("SLIMSERVE_PORT", "tcp://10.0.0.1:8000")  # what it would put into the environment
    with pytest.raises(Exception, match="port"):
        load_settings({})


def test_probes_need_no_key_and_a_first_pull_has_its_time() -> None:
    container = server(KEY, "loadSeconds=600")
    probes = [container[f"{name}Probe"] for name in ("startup", "liveness", "readiness")]
    assert {probe["httpGet"]["path"] for probe in probes} <= OPEN_PATHS
    assert {probe["httpGet"]["port"] for probe in probes} == {container["ports"][0]["name"]}
    assert probes[0]["periodSeconds"] * probes[0]["failureThreshold"] >= 600


@pytest.mark.parametrize(("grace", "seconds"), [("30s", 30), ("2min", 120), ("500ms", 1), ("45", 45), ("1.5min", 90)])
def test_a_pod_is_given_the_time_to_drain(grace: str, seconds: int) -> None:
    values = (KEY, f"config.grace={grace}", "preStopSeconds=20")
    assert server(*values)["lifecycle"]["preStop"]["exec"]["command"] == ["sleep", "20"]
    assert pod(*values)["terminationGracePeriodSeconds"] == 20 + seconds + 15


@pytest.mark.parametrize("values", VARIANTS.values(), ids=VARIANTS)
def test_a_pod_has_no_rights_and_writes_nowhere_but_where_it_may(values: tuple[str, ...]) -> None:
    container, spec = server(*values), pod(*values)
    assert spec["securityContext"]["runAsNonRoot"]
    assert spec["automountServiceAccountToken"] is False
    rights = container["securityContext"]
    assert rights["readOnlyRootFilesystem"]
    assert not rights["allowPrivilegeEscalation"]
    assert rights["capabilities"] == {"drop": ["ALL"]}
    assert {each["mountPath"] for each in container["volumeMounts"] if not each.get("readOnly")} == {"/cache", "/tmp"}
    assert {each["name"] for each in container["volumeMounts"]} == {each["name"] for each in spec["volumes"]}


def test_the_image_s_user_owns_the_cache() -> None:
    (user,) = set(re.findall(r"^USER (?!0)(\d+):", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE))
    context = pod(KEY)["securityContext"]
    assert {str(context[name]) for name in ("runAsUser", "runAsGroup", "fsGroup")} == {user}


def test_a_volume_of_one_node_is_not_asked_for_twice() -> None:
    assert render(KEY)["Deployment"]["spec"]["strategy"] == {"type": "Recreate"}
    rolling = render(KEY, MANY)["Deployment"]["spec"]["strategy"]
    assert rolling["rollingUpdate"] == {"maxUnavailable": 0, "maxSurge": 1}


def test_gpus_take_the_image_for_them() -> None:
    assert server(KEY)["image"].endswith("-cpu")
    with_gpus = server(KEY, "gpus=2")
    assert with_gpus["image"].endswith("-cuda")
    assert with_gpus["resources"]["limits"]["nvidia.com/gpu"] == 2


def test_a_single_pod_does_not_keep_its_node_from_being_drained() -> None:
    assert "PodDisruptionBudget" not in render(KEY)
    assert render(KEY, MANY, "replicas=2")["PodDisruptionBudget"]["spec"]["maxUnavailable"] == 1


def test_a_changed_option_rolls_the_pods() -> None:
    def mark(*values: str) -> str:
        found: str = render(KEY, *values)["Deployment"]["spec"]["template"]["metadata"]["annotations"][
            "checksum/config"
        ]
        return found

    assert mark() == mark("service.port=80") != mark("config.max_batch=4")


def test_who_scales_the_pods_alone_sets_their_number() -> None:
    assert "replicas" not in render(*VARIANTS["hpa"])["Deployment"]["spec"]
    assert "replicas" not in render(*VARIANTS["keda"])["Deployment"]["spec"]
    assert render(KEY)["Deployment"]["spec"]["replicas"] == 1


def test_keda_asks_for_metrics_that_there_are() -> None:
    triggers = render(*VARIANTS["keda"])["ScaledObject"]["spec"]["triggers"]
    queries = [each["metadata"]["query"] for each in triggers]
    names = [series(query) for query in queries]
    assert "slimserve_requests_waiting" in names[0]
    assert "slimserve_slo_requests_total" in names[1]
    assert set().union(*names) <= KNOWN
    assert all('namespace="models",pod=~"release-slimserve-.*"' in query for query in queries)


def test_the_hpa_asks_for_what_the_adapter_makes_of_metrics() -> None:
    rules = load(ROOT / "deploy" / "prometheus" / "adapter-rules.yaml")["rules"]["custom"]
    made = {rule["name"].get("as", rule["name"]["matches"]) for rule in rules}
    metrics = render(*VARIANTS["hpa"])["HorizontalPodAutoscaler"]["spec"]["metrics"]
    assert {each["pods"]["metric"]["name"] for each in metrics} == made
    for rule in rules:
        query = rule["metricsQuery"].replace("<<.LabelMatchers>>", 'pod="a"').replace("<<.GroupBy>>", "pod")
        assert series(query) <= KNOWN
        assert series(rule["seriesQuery"]) <= KNOWN


def test_prometheus_gets_in_with_the_key_under_the_name_that_alerts_expect() -> None:
    (endpoint,) = render(*VARIANTS["keda"])["PodMonitor"]["spec"]["podMetricsEndpoints"]
    assert endpoint["port"] == server(KEY)["ports"][0]["name"]
    assert endpoint["authorization"]["credentials"] == {"name": "keys", "key": "api-key"}
    assert endpoint["relabelings"] == [{"targetLabel": "job", "replacement": "slimserve"}]


def test_the_network_policy_lets_nothing_out_that_is_not_needed() -> None:
    assert render(*VARIANTS["gpus"])["NetworkPolicy"]["spec"]["egress"] == []
    names, downloads = render(KEY)["NetworkPolicy"]["spec"]["egress"]
    assert {each["port"] for each in names["ports"]} == {53}
    assert "169.254.0.0/16" in downloads["to"][0]["ipBlock"]["except"]


def test_a_metrics_port_is_prometheus_s_alone() -> None:
    values = VARIANTS["metrics port"]
    assert {each["name"]: each["containerPort"] for each in server(*values)["ports"]} == {"http": 8000, "metrics": 9100}
    environment = {each["name"]: each.get("value") for each in server(*values)["env"]}
    options = {key: environment[f"SLIMSERVE_{key.upper()}"] for key in ("metrics_port", "metrics_host")}
    assert load_settings({**options, "api_key": "k" * 32}).metrics_port == 9100
    rendered = render(*values)
    (endpoint,) = rendered["PodMonitor"]["spec"]["podMetricsEndpoints"]
    assert endpoint["port"] == "metrics"
    api, metrics = rendered["NetworkPolicy"]["spec"]["ingress"]
    assert [each["port"] for each in api["ports"]] == ["http"]
    assert [each["port"] for each in metrics["ports"]] == ["metrics"]
    assert all("namespaceSelector" in each for each in metrics["from"])
    assert not any("namespaceSelector" in each for each in api["from"])
    assert [each["name"] for each in rendered["Service"]["spec"]["ports"]] == ["http"]
