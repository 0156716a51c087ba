"""From a trained model folder to a champion that serves: register, gate, package, try, promote.

A model takes the alias only after its Bento has answered over HTTP; one that is not better
than the champion on the same held-out sets stays a challenger.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import chdir
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from components.config import Paths, Refused, load_params
from components.journal import PARENT_RUN
from components.process import ask_to_die_with_parent
from components.registry import ModelVersion, Registry, is_empty
from flows.flow_run import Echo, effect
from flows.server import free_port, stop

NAME = "agent"
QUESTION = "What does json.dumps do?"
_SECONDS_TO_SERVE = 180.0
_IN_A_BENTO = (
    "/components/",
    "/serving/",
    "/loopwright/__init__.py",
    "/params.yaml",
    "/dvc.yaml",
    "/requirements.lock",
)


@dataclass(frozen=True)
class Release:
    """The model that answers after a run, and why."""

    version: str
    """`NAME/VERSION` of the champion."""
    outcome: str
    score: float
    scores: dict[str, float] = field(default_factory=dict)
    """Score of each held-out suite."""
    bento: str = ""
    question: str = ""
    answer: str = ""
    """What the served Bento answered to `question`."""


def current_release(paths: Paths) -> Release | None:
    """The champion, when the models on disk need no release; None when they do.

    Raises: Refused when the gate has said no to these very models and the champion is still the same.
    """
    digest = _locked(paths).get(_agent_path(paths))
    if digest is None or is_empty(paths.home):
        return None
    registry = Registry(paths.home)
    champion = registry.find(f"{NAME}@champion")
    version = find_digest(registry, digest)
    if champion is None or version is None:
        return None
    if version.version == champion.version:
        return _released(champion, "up to date") if _has_bento(paths.home, champion.tags.get("bento", "")) else None
    if version.tags.get("rolled_back") == "true":
        return _released(champion, f"{version} was rolled back, {champion} stays")
    if version.tags.get("gate") == "refused" and version.tags.get("gate_against") == str(champion):
        raise Refused(version.tags["gate_reason"])
    return None


def release(paths: Paths, echo: Echo, flow_run: str) -> Release:
    """Release the model folder that `tune` made, each effect a task of the flow run.

    Raises: Refused when the champion is at least as good.
    """
    current = current_release(paths)
    if current:
        return current
    registry = Registry(paths.home)
    figures = json.loads((paths.metrics / "evaluate.json").read_text(encoding="utf-8"))
    version = effect(register, registry, paths, figures, flow_run)
    echo(f"release: {version} registered, score {figures['score']:.4f}")
    reason = effect(gate, registry, version, figures, paths, echo)
    registry.tag(version, {"gate": "passed", "gate_reason": reason})
    echo(f"release: {version} passes: {reason}")
    tag = effect(package, paths, str(version))
    answer = effect(smoke, paths, tag, QUESTION)
    registry.tag(version, {"bento": tag, "smoke_question": QUESTION, "smoke_answer": answer})
    if (champion := registry.find(f"{NAME}@champion")) is None or champion.version != version.version:
        effect(registry.promote, version)
    return _released(registry.resolve(str(version)), "promoted")


def find_digest(registry: Registry, digest: str) -> ModelVersion | None:
    """The version that holds these very files."""
    if NAME not in registry.names():
        return None
    return next((row for row in registry.versions(NAME) if row.tags.get("model_digest") == digest), None)


def register(registry: Registry, paths: Paths, figures: Mapping[str, Any], flow_run: str) -> ModelVersion:
    """Store the model folder with everything it came from; an interrupted release goes on with what it stored."""
    from components.evaluation.evaluate import flat_metrics

    locked = _locked(paths)
    known = find_digest(registry, locked[_agent_path(paths)])
    if known:
        return known
    tags = {
        "model_digest": locked[_agent_path(paths)],
        "held_out_digest": figures["held_out_digest"],
        "prefect_flow_run": flow_run,
        "python": sys.version.split()[0],
        "params": load_params(paths.params).model_dump_json(by_alias=True),
        "validation": _compact(paths.metrics / "validate.json"),
        **_git(paths.root),
        **{f"dvc.{path}": digest for path, digest in locked.items()},
    }
    return registry.register(paths.agent, NAME, flat_metrics(dict(figures)), tags, os.environ.get(PARENT_RUN))


def gate(registry: Registry, version: ModelVersion, figures: Mapping[str, Any], paths: Paths, echo: Echo) -> str:
    """Why this version may become champion.

    Raises: Refused when the champion answers the same held-out sets at least as well.
    """
    champion = registry.find(f"{NAME}@champion")
    if champion is None:
        return "there was no champion"
    if champion.version == version.version:
        return "it is the champion already"
    theirs = score_of(champion, figures["held_out_digest"], paths, echo)
    compared = f"score {figures['score']:.4f} against {theirs:.4f} of the champion {champion} on the same held-out sets"
    if figures["score"] > theirs:
        return compared
    reason = f'{version}: refused: {compared}; overrule with "loopwright registry promote {NAME} {version.version}"'
    registry.tag(version, {"gate": "refused", "gate_reason": reason, "gate_against": str(champion)})
    registry.alias(NAME, "challenger", version)
    raise Refused(reason)


def package(paths: Paths, wanted: str) -> str:
    """Build the Bento of a registered version, weights included, and return its tag; an older build is replaced."""
    os.environ.update(_bento_environment(paths.home))
    import bentoml

    version = Registry(paths.home).resolve(wanted)
    tag = f"{version.name}:v{version.version}"
    for store in (bentoml.bentos, bentoml.models):
        if any(str(kept.tag) == tag for kept in store.list()):
            store.delete(tag)
    facts = {"name": version.name, "version": version.version, "run_id": version.run_id}
    with bentoml.models.create(tag, metadata={**facts, "tags": version.tags, "metrics": version.metrics}) as weights:
        shutil.copytree(version.folder, weights.path, dirs_exist_ok=True)
    # BentoML takes paths relative to the current folder only.
    with chdir(paths.root):
        bento = bentoml.build(
            "serving.service:endpoint",
            name=version.name,
            version=f"v{version.version}",
            labels={"model": str(version), "run_id": version.run_id},
            include=list(_IN_A_BENTO),
            python={"requirements_txt": "requirements.lock", "lock_packages": False},
            models=[tag],
            args={"weights": tag},
        )
    return str(bento.tag)


def smoke(paths: Paths, tag: str, question: str) -> str:
    """Serve a built Bento on a free port, ask it one question over HTTP, and return the answer.

    Raises: RuntimeError with the server's log when it does not answer.
    """
    import httpx

    address = f"http://127.0.0.1:{(port := free_port())}"
    log = paths.home / "logs" / "smoke.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    # A state folder of its own: this question is no customer's.
    with tempfile.TemporaryDirectory() as scratch, log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "bentoml", "serve", tag, "--host", "127.0.0.1", "--port", str(port)],
            env={**os.environ, **_bento_environment(paths.home), "LOOPWRIGHT_HOME": scratch, "LOOPWRIGHT_API_KEYS": ""},
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=ask_to_die_with_parent,
        )
        try:
            _wait_until_ready(f"{address}/readyz", process, log)
            asked = {"messages": [{"role": "user", "content": question}]}
            reply = httpx.post(f"{address}/v1/chat/completions", json=asked, timeout=120).raise_for_status().json()
        finally:
            stop(process)
    return str(reply["choices"][0]["message"]["content"])


def _wait_until_ready(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    import httpx

    deadline = time.monotonic() + _SECONDS_TO_SERVE
    while process.poll() is None and time.monotonic() < deadline:
        try:
            if httpx.get(url, timeout=2).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    raise RuntimeError(f"the served Bento was not ready; {log} ends:\n{log.read_text(errors='replace')[-2000:]}")


def _bento_environment(home: Path) -> dict[str, str]:
    (home / "bento").mkdir(parents=True, exist_ok=True)
    return {"BENTOML_HOME": str(home / "bento"), "BENTOML_DO_NOT_TRACK": "true"}


def _has_bento(home: Path, tag: str) -> bool:
    name, _, version = tag.partition(":")
    return bool(version) and (home / "bento" / "bentos" / name / version / "bento.yaml").exists()


def score_of(champion: ModelVersion, held_out_digest: str, paths: Paths, echo: Echo) -> float:
    """The champion's score on the candidate's held-out sets: known, or measured now."""
    if champion.tags.get("held_out_digest") == held_out_digest:
        return champion.metrics["score"]
    from components.evaluation.evaluate import measure

    echo(f"release: measuring the champion {champion} on the new held-out sets")
    return float(measure(champion.folder, paths.collected, load_params(paths.params)).figures["score"])


def _released(champion: ModelVersion, outcome: str) -> Release:
    scores = {name[: -len("/score")]: value for name, value in champion.metrics.items() if name.endswith("/score")}
    told = {key: champion.tags.get(key, "") for key in ("bento", "smoke_question", "smoke_answer")}
    return Release(str(champion), outcome, champion.metrics.get("score", 0.0), scores, *told.values())


def _agent_path(paths: Paths) -> str:
    return paths.agent.relative_to(paths.root).as_posix()


def _locked(paths: Paths) -> dict[str, str]:
    """DVC's hash of every dependency and output of every stage."""
    lock = paths.root / "dvc.lock"
    stages = (yaml.safe_load(lock.read_text(encoding="utf-8")) or {}).get("stages", {}) if lock.exists() else {}
    entries = [entry for stage in stages.values() for kind in ("deps", "outs") for entry in stage.get(kind, [])]
    return {entry["path"]: entry["md5"] for entry in entries if "md5" in entry}


def _git(root: Path) -> dict[str, str]:
    """The commit that ran, and whether files differed from it."""
    try:
        commit = _ask_git(root, "rev-parse", "HEAD")
        # The run itself writes dvc.lock.
        changed = _ask_git(root, "status", "--porcelain", "--", ".", ":!dvc.lock")
        return {"git_commit": commit, "git_dirty": str(bool(changed)).lower()}
    except (OSError, subprocess.CalledProcessError):
        return {"git_commit": "none"}


def _ask_git(root: Path, *words: str) -> str:
    return subprocess.run(["git", "-C", str(root), *words], check=True, capture_output=True, text=True).stdout.strip()


def _compact(path: Path) -> str:
    return json.dumps(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else ""
