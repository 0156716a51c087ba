"""Promotions over a bad network: servers behind a link of 50 MB/s that loses 2 % of the packets in each direction.

`LOOPWRIGHT_TEST_PROMOTIONS=100 pytest tests/test_lossy_network.py` as root on Linux, with iproute2 and nftables. The
link is a pair of virtual interfaces between this machine and a network namespace, in which what trains and what serves
run. The kernel's token bucket (`tc tbf`) limits the rate, and a rule of nftables drops packets at random: netem, which
does both, is not in every kernel.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.servers import PASSWORD, USER, mlflow_server, new_database, postgres_server, s3_server

COUNT = int(os.environ.get("LOOPWRIGHT_TEST_PROMOTIONS", "0"))
pytestmark = [
    pytest.mark.servers,
    pytest.mark.skipif(not COUNT, reason="LOOPWRIGHT_TEST_PROMOTIONS is not set; a hundred need root and nft"),
    pytest.mark.timeout(600 + 120 * COUNT),
]

NAMESPACE = "loopwright-lossy"
HERE, THERE = "10.77.0.1", "10.77.0.2"
PORT = "38765"
KEY = "a key of the tests"
SECONDS_TO_FOLLOW = 30.0
RULES = """
table inet lossy {
  chain input { type filter hook input priority 0; iifname "lossy1" numgen random mod 100 < 2 drop; }
  chain output { type filter hook output priority 0; oifname "lossy1" numgen random mod 100 < 2 drop; }
}
"""
PROMOTER = """
import json, shutil, sys, time
from pathlib import Path
from components.tracking import registry as module
from components.tracking.registry import Registry

module.save_pyfunc = lambda folder, path: shutil.copytree(folder, path / "data" / folder.name)
registry, folder = Registry(Path(sys.argv[1])), Path(sys.argv[2])
for _ in sys.stdin:
    begin = time.monotonic()
    version = registry.register(folder, "classifier", {"score": 0.5}, {}, None)
    uploaded = time.monotonic()
    registry.promote(version)
    seconds = {"register": uploaded - begin, "promote": time.monotonic() - uploaded}
    print(json.dumps({"version": str(version), **seconds}), flush=True)
"""


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


def inside(*command: str) -> list[str]:
    return ["ip", "netns", "exec", NAMESPACE, *command]


@pytest.fixture
def link() -> Iterator[None]:
    if os.geteuid() or not shutil.which("nft") or not shutil.which("tc"):
        pytest.skip("only root can make a network namespace, with iproute2 and nftables")
    for left in (["netns", "delete", NAMESPACE], ["link", "delete", "lossy0"]):  # by a test that was killed
        subprocess.run(["ip", *left], capture_output=True)
    ip("netns", "add", NAMESPACE)
    try:
        ip("link", "add", "lossy0", "type", "veth", "peer", "name", "lossy1", "netns", NAMESPACE)
        ip("address", "add", f"{HERE}/24", "dev", "lossy0")
        ip("link", "set", "lossy0", "up")
        for words in (
            ["ip", "address", "add", f"{THERE}/24", "dev", "lossy1"],
            ["ip", "link", "set", "lossy1", "up"],
            ["ip", "link", "set", "lo", "up"],
        ):
            subprocess.run(inside(*words), check=True)
        shape = ["root", "tbf", "rate", "400mbit", "burst", "128kb", "latency", "50ms"]
        subprocess.run(["tc", "qdisc", "add", "dev", "lossy0", *shape], check=True)
        subprocess.run(inside("tc", "qdisc", "add", "dev", "lossy1", *shape), check=True)
        subprocess.run(inside("nft", "-f", "-"), input=RULES, text=True, check=True)
        yield
    finally:
        ip("netns", "delete", NAMESPACE)


@pytest.fixture
def environment(link: None, tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment of what runs in the namespace, all of whose stores are behind the link."""
    with (
        postgres_server(HERE) as postgres,
        s3_server() as s3,
        mlflow_server(tmp_path, postgres.url, s3, HERE) as mlflow,
    ):
        yield {
            **os.environ,
            "MLFLOW_TRACKING_URI": mlflow,
            "MLFLOW_TRACKING_USERNAME": USER,
            "MLFLOW_TRACKING_PASSWORD": PASSWORD,
            "LOOPWRIGHT_DATABASE_URL": new_database(postgres.url, "store"),
            "LOOPWRIGHT_API_KEYS": KEY,
        }


def test_each_promotion_is_followed_and_nothing_is_banned_or_half_registered(
    environment: dict[str, str], classifier_folder: Path, tmp_path: Path
) -> None:
    homes = {name: tmp_path / name for name in ("trains", "serves")}
    for home in homes.values():
        home.mkdir()
    folder = shutil.copytree(classifier_folder, tmp_path / "classifier")
    (folder / "padding").write_bytes(os.urandom(5_000_000))
    with (
        process(environment, "-c", PROMOTER, str(homes["trains"]), str(folder)) as promoter,
        httpx.Client(base_url=f"http://{THERE}:{PORT}", headers={"Authorization": f"Bearer {KEY}"}) as client,
    ):
        assert promote(promoter)["version"] == "classifier/1"
        words = ["--model", "classifier@champion", "--host", THERE, "--port", PORT]
        serving = {**environment, "LOOPWRIGHT_HOME": str(homes["serves"])}
        with process(serving, "-m", "loopwright", "serve", *words):
            served(client, "classifier/1", 120.0)
            rows = []
            for number in range(2, COUNT + 2):
                row = promote(promoter)
                assert row["version"] == f"classifier/{number}"
                row["follow"] = served(client, f"classifier/{number}", SECONDS_TO_FOLLOW)
                rows.append(row)
                print(json.dumps(row), flush=True)
            metrics = client.get("/metrics").text
    counts = [line for line in metrics.splitlines() if line.startswith("loopwright_refused_versions{")]
    banned = [line for line in counts if not line.endswith(" 0.0")]
    assert counts
    assert banned == []
    check_versions(environment, homes["trains"])
    for step in ("register", "promote", "follow"):
        seconds = sorted(float(row[step]) for row in rows)
        print(f"{step}: median {seconds[len(seconds) // 2]:.1f} s, longest {seconds[-1]:.1f} s")


@contextmanager
def process(environment: dict[str, str], *words: str) -> Iterator[subprocess.Popen[str]]:
    """A Python program in the namespace, until the block ends."""
    pipe = subprocess.PIPE
    command = inside(sys.executable, *words)
    with subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, text=True, bufsize=1) as running:
        try:
            yield running
        finally:
            running.kill()


def promote(promoter: subprocess.Popen[str]) -> dict[str, Any]:
    """Register and promote a version; what it was called and how long that took."""
    assert promoter.stdin is not None
    assert promoter.stdout is not None
    promoter.stdin.write("\n")
    row: dict[str, Any] = json.loads(promoter.stdout.readline())
    return row


def served(client: httpx.Client, version: str, patience: float) -> float:
    """Seconds until the endpoint answers with this version."""
    begin = time.monotonic()
    seen: object = None
    while seen != version:
        assert time.monotonic() < begin + patience, f"{seen} instead of {version}"
        try:
            answer = client.post("/v1/classify", json={"input": ["iron"]}, timeout=10)
            seen = answer.json().get("model")
        except (httpx.HTTPError, ValueError) as error:
            seen = error
        time.sleep(0.2)
    return time.monotonic() - begin


def check_versions(environment: dict[str, str], home: Path) -> None:
    """Every version has its run, its tags and all of its files; a run has one version at most."""
    program = """
import sys
from pathlib import Path
from components.tracking.registry import Registry
registry = Registry(Path(sys.argv[1]))
versions = registry.versions("classifier")
assert len({version.run_id for version in versions}) == len(versions) == int(sys.argv[2])
for version in versions:
    assert version.tags["weights_sha256"], version
    assert registry.client.get_run(version.run_id).info.status == "FINISHED", version
    version.folder
"""
    subprocess.run([sys.executable, "-c", program, str(home), str(COUNT + 1)], env=environment, check=True)
