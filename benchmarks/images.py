"""The images of deploy/Containerfile as they run: `python -m benchmarks.images --state var`, with podman.

Builds the three images and starts Prefect's server, MLflow, a worker and an endpoint from them as deploy/compose.yaml
does: uid 1000, a read-only root, no capabilities. They share one network namespace, which has no way out. Prints each
image's size, the packages that its lock does not name, the seconds until its health check passes, and its memory, then
the endpoint's answer, which comes from a copy of the state folder. Words after `--` go to `podman build`.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parent.parent
LOCKS = {
    "endpoint": "requirements-serve.lock",
    "worker": "requirements-worker.lock",
    "mlflow": "requirements-worker.lock",
}
KEY = "images-benchmark-key"
LIMITS = (
    "--no-healthcheck",
    "--read-only",
    "--tmpfs",
    "/tmp",
    "--cap-drop",
    "ALL",
    "--security-opt",
    "no-new-privileges",
)
SETTINGS = {
    "prefect": {},
    "mlflow": {
        "MLFLOW_BACKEND_STORE_URI": "sqlite:////var/lib/loopwright/mlflow.db",
        "MLFLOW_ARTIFACTS_DESTINATION": "/var/lib/loopwright/artifacts",
        "MLFLOW_AUTH_ADMIN_PASSWORD": KEY,
        "MLFLOW_FLASK_SERVER_SECRET_KEY": KEY,
    },
    "worker": {"PREFECT_API_URL": "http://127.0.0.1:4200/api"},
    "endpoint-a": {"LOOPWRIGHT_API_KEYS": KEY},
}
"""By service of deploy/compose.yaml, what differs from it: one machine, no PostgreSQL and no S3."""
PREFECT_PAGE = "import urllib.request as u; u.urlopen('http://127.0.0.1:4200/', timeout=4)"
"""Not its health, which is as good without a page."""
DISTRIBUTIONS = "import importlib.metadata as m; print(*sorted({d.name for d in m.distributions()}))"
QUESTION = f"""
import json, urllib.request
body = json.dumps({{"model": "agent", "messages": [{{"role": "user", "content": "Hello"}}]}}).encode()
headers = {{"Authorization": "Bearer {KEY}", "Content-Type": "application/json"}}
request = urllib.request.Request("http://127.0.0.1:3000/v1/chat/completions", body, headers)
answer = json.load(urllib.request.urlopen(request, timeout=60))
print(answer["model"] + ": " + answer["choices"][0]["message"]["content"])
"""
PROBE = "import os; print(os.getuid()); open('/app/written', 'w')"


class Engine:
    """podman with the user's own options, such as the folder of its images."""

    def __init__(self, options: list[str]) -> None:
        self._command = ["podman", *options]

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*self._command, *words], capture_output=True, text=True)

    def __call__(self, *words: str) -> str:
        """What a command prints. RuntimeError: it failed."""
        ended = self.run(*words)
        if ended.returncode:
            raise RuntimeError(f"podman {' '.join(words[:4])}: {ended.stderr.strip()[-2000:]}")
        return ended.stdout.strip()

    def build(self, target: str, options: list[str]) -> None:
        file = str(ROOT / "deploy" / "Containerfile")
        words = [
            "build",
            "--format",
            "docker",
            *options,
            "--target",
            target,
            "--tag",
            f"loopwright-{target}",
            "--file",
            file,
            str(ROOT),
        ]
        if (code := subprocess.run([*self._command, *words], stdout=sys.stderr).returncode) != 0:
            raise RuntimeError(f"podman build --target {target} ended with {code}")

    def healthy_after(self, name: str, check: tuple[str, ...], limit: float = 180.0) -> float:
        """Seconds until a command passes in a container."""
        began = time.monotonic()
        while self.run("exec", name, *check).returncode:
            if time.monotonic() - began > limit:
                raise RuntimeError(f"{name} is not healthy after {limit:.0f} s: {self('logs', '--tail', '20', name)}")
            time.sleep(0.2)
        return round(time.monotonic() - began, 1)


def health_check(target: str) -> tuple[str, ...]:
    """The command of HEALTHCHECK in a stage of the Containerfile."""
    text = (ROOT / "deploy" / "Containerfile").read_text(encoding="utf-8")
    stage = re.split(rf"^FROM \S+ AS {target}$", text, flags=re.MULTILINE)[1]
    command: list[str] = json.loads(re.findall(r"^HEALTHCHECK [^[]*CMD (\[.*\])$", stage, re.MULTILINE)[0])
    return tuple(command)


def unlisted(engine: Engine, target: str, options: list[str]) -> list[str]:
    """Installed packages that the image's lock does not name."""
    lock = (ROOT / LOCKS[target]).read_text(encoding="utf-8")
    listed = {re.sub("[-_.]+", "-", name) for name in re.findall(r"^([\w.-]+)==", lock, re.MULTILINE)}
    words = ["run", "--rm", "--network", "none", "--no-healthcheck", *options, f"loopwright-{target}"]
    installed = engine(*words, "python", "-c", DISTRIBUTIONS)
    return [name for name in installed.split() if re.sub("[-_.]+", "-", name.lower()) not in listed]


def trial(engine: Engine, state: Path, options: list[str]) -> dict[str, Any]:
    """Start the four services beside a copy of a state folder, and ask the endpoint."""
    compose = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text(encoding="utf-8"))["services"]
    network, result = "none", dict[str, dict[str, Any]]()
    try:
        for name, own in SETTINGS.items():
            service = compose[name]
            target = service["build"]["target"]
            # Without compose's addresses and passwords.
            fixed = {key: value for key, value in service["environment"].items() if not re.search(r"\$\{|://\w", value)}
            settings = [word for key, value in (fixed | own).items() for word in ("--env", f"{key}={value}")]
            volumes = ["--volume", f"{state}:/var/lib/loopwright:U"] if name == "endpoint-a" else []
            words = ["run", "--detach", "--name", f"images-{name}", "--network", network, *LIMITS, *options, *settings]
            engine(*words, *volumes, f"loopwright-{target}", *service.get("command", ()))
            network = "container:images-prefect"
            check = ("python", "-c", PREFECT_PAGE) if name == "prefect" else health_check(target)
            result[name] = {"healthy after": engine.healthy_after(f"images-{name}", check)}
        answer = engine("exec", "images-endpoint-a", "python", "-c", QUESTION)
        probe = engine.run("exec", "images-endpoint-a", "python", "-c", PROBE)
        for name in SETTINGS:
            result[name]["memory"] = engine("stats", "--no-stream", "--format", "{{.MemUsage}}", f"images-{name}")
        engine("stop", "--time", "60", "images-endpoint-a")
        code = engine("inspect", "--format", "{{.State.ExitCode}}", "images-endpoint-a")
    finally:
        for name in reversed(SETTINGS):
            engine.run("rm", "--force", "--time", "5", "--volumes", f"images-{name}")
    return {
        "services": result,
        "answer": answer,
        "uid": probe.stdout.strip(),
        "written to the root": probe.returncode == 0,
        "exit code": int(code),
    }


def main() -> None:
    words = sys.argv[1:]
    end = words.index("--") if "--" in words else len(words)
    parser = argparse.ArgumentParser(prog="python -m benchmarks.images", description=__doc__)
    parser.add_argument("--state", type=Path, default=Path("var"), help="a state folder with a champion agent")
    parser.add_argument("--podman", default="", help="options of podman itself")
    parser.add_argument("--run", default="", help="more options of podman run")
    arguments = parser.parse_args(words[:end])
    engine = Engine(arguments.podman.split())
    for target in LOCKS:
        engine.build(target, words[end + 1 :])
    images = {
        target: {
            "GB": round(int(engine("image", "inspect", "--format", "{{.Size}}", f"loopwright-{target}")) / 1e9, 3),
            "packages beyond the lock": unlisted(engine, target, arguments.run.split()),
        }
        for target in LOCKS
    }
    with tempfile.TemporaryDirectory() as scratch:
        state = Path(scratch) / "state"
        shutil.copytree(arguments.state, state)
        try:
            result = {"images": images, **trial(engine, state, arguments.run.split())}
        finally:  # its files are those of the container's user, which without root another container has to remove
            mount = ("--network", "none", "--no-healthcheck", "--user", "0", "--volume", f"{scratch}:/scratch")
            engine.run(
                "run", "--rm", *mount, *arguments.run.split(), "loopwright-endpoint", "rm", "-rf", "/scratch/state"
            )
    print(json.dumps(result, indent=1))
    sys.exit(result["uid"] != "1000" or result["written to the root"] or result["exit code"] != 0)


if __name__ == "__main__":
    main()
