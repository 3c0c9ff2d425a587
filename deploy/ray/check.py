"""A Ray cluster on this machine, two replicas of the application, a stream through each, and one of them killed.

    python -m deploy.ray.check

Needs ``pip install -e '.[ray]'``, 4 GB of memory and some minutes. Ends with status 1 where something is not as wanted.
"""

from __future__ import annotations

import os
import secrets
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

# Before Ray is imported: it would tell its makers of this, and write a token into the home folder.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(16))

import httpx
import psutil
import ray
import yaml
from ray import serve
from ray.serve.schema import ServeDeploySchema

from deploy.ray.app import MODELS_PER_REPLICA, Slimserve
from deploy.ray.options import Options

OBJECT_STORE = 100 << 20
"""Bytes. Requests and answers do not go through it."""
CPUS = 0.2
"""Of a replica, as Ray counts: this machine may have two cores."""
PATIENCE = 180.0
"""Seconds for replicas to come, or to come back."""
MODEL = "smollm2-135m"
SERVER = {"memory_limit": "1GiB", "threads": 1, "max_model_len": 512, "models": [{"source": MODEL}]}
ON_DEMAND = [
    *({"name": name, "source": MODEL, "memory_limit": "900MiB", "max_model_len": 256} for name in "ab"),
    *({"name": name, "kind": "fake"} for name in "cde"),
]
"""More than two replicas hold. Those of the fake engine load at once and take no memory."""
KEY = "a-key-for-this-check-alone"


class Stream(NamedTuple):
    status: int
    replica: str
    events: int
    first: float
    """Seconds until the first event, as is ``last`` until the last."""
    last: float
    whole: bool


class Client:
    def __init__(self, port: int) -> None:
        self._url = f"http://127.0.0.1:{port}"

    def stream(self, model: str = MODEL, tokens: int = 40, key: str = KEY) -> Stream:
        """A fresh connection each time. An answer that breaks off is not whole."""
        body = {"model": model, "prompt": "Once upon a time", "max_tokens": tokens, "ignore_eos": True, "stream": True}
        headers = {"authorization": f"Bearer {key}"}
        if model != MODEL:
            headers["serve_multiplexed_model_id"] = model
        began = time.monotonic()
        times: list[float] = []
        last, status, replica = "", 0, ""
        with (
            suppress(httpx.TransportError),
            httpx.stream("POST", f"{self._url}/v1/completions", json=body, headers=headers, timeout=PATIENCE) as answer,
        ):
            status, replica = answer.status_code, answer.headers.get("x-served-by", "")
            for line in filter(None, answer.iter_lines()):
                times.append(time.monotonic() - began)
                last = line
        ended = last == "data: [DONE]"
        return Stream(status, replica, len(times), times[0] if times else 0.0, times[-1] if times else 0.0, ended)

    def replicas(self, count: int) -> dict[str, Stream]:
        """Streams until so many replicas have served one."""
        found: dict[str, Stream] = {}

        def enough() -> bool:
            one = self.stream()
            if one.whole:
                found[one.replica] = one
            return len(found) >= count

        until(enough, f"{count} replicas that serve")
        return found

    def models(self, count: int) -> dict[str, list[str]]:
        """What so many replicas serve."""
        found: dict[str, list[str]] = {}

        def enough() -> bool:
            headers = {"authorization": f"Bearer {KEY}"}
            answer = httpx.get(f"{self._url}/v1/models", headers=headers, timeout=PATIENCE)
            found[answer.headers["x-served-by"]] = [model["id"] for model in answer.json()["data"]]
            return len(found) >= count

        until(enough, f"{count} replicas that answer")
        return found


def until(condition: Callable[[], bool], what: str) -> None:
    """Ends the check where it takes too long."""
    began = time.monotonic()
    while not condition():
        if time.monotonic() - began > PATIENCE:
            sys.exit(f"FAILED: waited in vain for {what}")
        time.sleep(0.2)


def want(holds: bool, what: str) -> None:
    """Say it, or that it is not so, and then end."""
    print(f"{'ok' if holds else 'FAILED'}: {what}", flush=True)
    if not holds:
        sys.exit(1)


def replica_processes() -> list[psutil.Process]:
    """Of this user's Ray, those that are a replica."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if "ServeReplica" in " ".join(process.cmdline()) and process.uids().real == os.getuid():
                found.append(process)
    return found


def start(folder: Path, port: int) -> None:
    """The cluster, and the application on it, until both replicas are ready."""
    config = folder / "slimserve.yaml"
    config.write_text(yaml.safe_dump(SERVER))
    environment = {"SLIMSERVE_API_KEY": KEY, "OMP_NUM_THREADS": "1"}
    ray.init(
        num_cpus=2,
        object_store_memory=OBJECT_STORE,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": environment},
    )
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    options = Options.model_validate({"config": config, "on_demand": ON_DEMAND, "load_timeout": PATIENCE})
    replicas = Slimserve.options(
        ray_actor_options={"num_cpus": CPUS}, autoscaling_config={"min_replicas": 2, "max_replicas": 2}
    )
    serve.run(replicas.bind(options.model_dump(mode="json", exclude_unset=True)), name="slimserve", route_prefix="/")


def check_streams(client: Client) -> dict[str, Stream]:
    found = client.replicas(2)
    for name, stream in found.items():
        want(
            stream.events > 10 and stream.first < stream.last / 2,
            f"replica {name}: {stream.events} events, the first after {stream.first:.2f} s, the last after"
            f" {stream.last:.2f} s",
        )
    want(client.stream(key="wrong").status == 401, "a wrong key is refused through Ray's proxy")
    return found


def check_on_demand(client: Client) -> None:
    """Five models on demand where two replicas hold two each."""
    for name in ("a", "b", "a", "c", "d", "e"):
        stream = client.stream(name)
        want(
            stream.whole,
            f"model {name} on demand: {stream.status} of replica {stream.replica}, first event after"
            f" {stream.first:.2f} s",
        )
    want(client.stream("f").status == 404, "a model that was not listed is 404")
    for replica, models in client.models(2).items():
        here = [name for name in models if name != MODEL]
        want(len(here) <= MODELS_PER_REPLICA, f"replica {replica} holds {here} beside {MODEL}")


def check_kill(client: Client, before: dict[str, Stream]) -> None:
    processes = replica_processes()
    want(len(processes) == 2, f"replica processes: {[process.pid for process in processes]}")
    victim = processes[0]
    children = victim.children(recursive=True)
    victim.send_signal(signal.SIGKILL)
    killed = time.monotonic()
    print(f"killed replica process {victim.pid}, whose server is {[child.pid for child in children]}", flush=True)
    later = [client.stream(tokens=5) for _ in range(20)]
    served = sorted({stream.replica for stream in later if stream.whole})
    good = sum(stream.whole for stream in later)
    want(good == len(later), f"{good} of {len(later)} requests right after it succeeded, on {served}")
    want(len(before.keys() & served) == 1, "of the replicas before it one served them")
    until(lambda: not any(child.is_running() for child in children), "the end of the killed replica's server")
    print("ok: the killed replica's server and worker ended by themselves", flush=True)
    after = client.replicas(2)
    took = time.monotonic() - killed
    want(len(after.keys() - before.keys()) == 1, f"after {took:.0f} s another replica serves: {sorted(after)}")


def check_manifest() -> None:
    """Ray's own schema reads what is in the RayService, and our options its arguments."""
    documents = yaml.safe_load_all(Path(__file__).with_name("rayservice.yaml").read_text())
    [service] = [each for each in documents if each["kind"] == "RayService"]
    config = ServeDeploySchema.model_validate(yaml.safe_load(service["spec"]["serveConfigV2"]))
    [application] = config.applications
    options = Options.model_validate(application.args)
    want(application.import_path == "deploy.ray.app:build", f"Ray reads rayservice.yaml, which serves {options.config}")
    names = {deployment.name for deployment in application.deployments}
    want(names == {Slimserve.name}, f"its deployment is {Slimserve.name}")


def main() -> None:
    from benchmarks.servers import free_port

    check_manifest()
    port = free_port()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="ray-check-") as name:
        try:
            start(Path(name), port)
            print(f"ok: Ray {ray.__version__}, two replicas ready after {time.monotonic() - began:.0f} s", flush=True)
            client = Client(port)
            before = check_streams(client)
            check_on_demand(client)
            check_kill(client, before)
        finally:
            serve.shutdown()
            ray.shutdown()
    print("all is as wanted", flush=True)


if __name__ == "__main__":
    main()
