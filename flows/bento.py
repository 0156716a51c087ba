"""A registered model as a Bento: built with the code and the weights, and smoke-tested over HTTP."""

from __future__ import annotations

import io
import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import yaml

from components.config.params import InputError, load_params
from components.config.paths import Paths
from components.config.secrets import literal_secrets, redacted, redacted_tags
from components.models.base_store import copy_base, is_adapter
from components.runtime.files import write_text
from components.runtime.process import start, stop
from components.runtime.service_registry import wait_for
from components.tracking.registry import ModelVersion, Registry
from components.tracking.version_files import lineage
from flows.orchestration.prefect_server import free_port
from flows.release_targets import SmokeProbe

_SECONDS_TO_SERVE = 180.0
_BENTOFILE = "bentofile.yaml"
"""What every Bento of the project consists of; BentoML's own commands read it too."""
_PARAMS = "src/params.yaml"
"""Of a Bento, in its folder."""


def package(paths: Paths, model: str) -> str:
    """Build the Bento of a registered version, weights included, and return its tag; an older build is replaced.

    Raises: InputError when another model would have the same tag, for BentoML writes tags in lower case.
    """
    registry = Registry(paths.home)
    version = registry.resolve(model)
    name = version.name.lower()
    if twins := [other for other in registry.names() if other.lower() == name and other != version.name]:
        raise InputError(
            f"{version}: BentoML ignores case, and {twins[0]} is registered too; import the model under another name"
        )
    os.environ.update(bento_environment(paths.home))
    import bentoml

    tag = _tag(version)
    for store in (bentoml.bentos, bentoml.models):
        if any(str(entry.tag) == tag for entry in store.list()):
            store.delete(tag)
    metadata = {"name": version.name, "version": version.version, "run_id": version.run_id}
    with bentoml.models.create(
        tag, metadata={**metadata, "tags": redacted_tags(lineage(version)), "metrics": version.metrics}
    ) as weights:
        shutil.copytree(version.folder, weights.path, dirs_exist_ok=True)
        if is_adapter(version.folder):
            copy_base(version.folder, Path(weights.path))
    options = yaml.safe_load((paths.root / _BENTOFILE).read_text(encoding="utf-8"))
    options["include"].append(f"/{load_params(paths.params).project_path}")
    options["exclude"] = [f"/{paths.params.name}"]  # a build that is killed must not leave secrets
    with tempfile.TemporaryDirectory() as folder:
        bentofile = Path(folder) / _BENTOFILE
        bentofile.write_text(yaml.safe_dump(options), encoding="utf-8")
        bento = bentoml.bentos.build_bentofile(
            str(bentofile),
            name=name,
            version=f"v{version.version}",
            labels={"model": str(version), "run_id": version.run_id},
            build_ctx=str(paths.root),
            args={"weights": tag},
            reload=True,  # the service takes its weights from its arguments as it is imported
        )
    write_text(Path(bento.path) / _PARAMS, _redacted_params(paths.params))
    return str(bento.tag)


def _tag(version: ModelVersion) -> str:
    """BentoML writes tags in lower case."""
    return f"{version.name.lower()}:v{version.version}"


def _redacted_params(path: Path) -> str:
    """The parameters without literal secrets: a Bento goes to other machines and people."""
    from ruamel.yaml import YAML

    text = path.read_text(encoding="utf-8")
    params = yaml.safe_load(text)
    if places := literal_secrets(params):
        editor = YAML()  # which keeps the rest as it is written
        editor.allow_duplicate_keys = True  # the last counts, as `load_params` reads them
        document = editor.load(text)
        for section, values in redacted(params).items():
            if values != params[section]:
                document[section] = values
        changed = io.StringIO()
        editor.dump(document, changed)
        text = changed.getvalue()
        advice = "left out of the Bento; write $NAME in params.yaml and set it in the environment where it is served"
        print(f"package: {', '.join(places)}: {advice}", file=sys.stderr, flush=True)
    return text


def smoke(paths: Paths, tag: str, probe: SmokeProbe, question: str) -> tuple[str, str]:
    """Serve a built Bento on a free port, send it a question over HTTP, and return the answer and the model's device.

    Raises: RuntimeError with the end of the server's log when it does not answer.
    """
    import httpx

    address = f"http://127.0.0.1:{(port := free_port())}"
    log = paths.home / "logs" / "smoke.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    # A state folder of its own: this question is no user's.
    with tempfile.TemporaryDirectory() as scratch, log.open("wb") as file:
        command = [sys.executable, "-m", "bentoml", "serve", tag, "--host", "127.0.0.1", "--port", str(port)]
        environment = {**bento_environment(paths.home), "LOOPWRIGHT_HOME": scratch, "LOOPWRIGHT_API_KEYS": ""}
        process = start(command, file, environment)
        try:
            if not wait_for(f"{address}/readyz", _SECONDS_TO_SERVE, process):
                end = log.read_text(errors="replace")[-2000:]
                raise RuntimeError(f"the served Bento was not ready; {log} ends:\n{end}")
            body = probe.body(question)
            response = httpx.post(f"{address}{probe.path}", json=body, timeout=120).raise_for_status().json()
            served = httpx.get(f"{address}/v1/models", timeout=120).raise_for_status().json()["data"]
        finally:
            stop(process)
    return probe.answer(response), served[0]["device"]


def bento_environment(home: Path) -> dict[str, str]:
    """Environment in which BentoML finds the state folder's Bentos and models."""
    (home / "bento").mkdir(parents=True, exist_ok=True)
    return {"BENTOML_HOME": str(home / "bento"), "BENTOML_DO_NOT_TRACK": "true"}


def prune_bentos(home: Path, retained: Iterable[ModelVersion], newest: int, dry_run: bool) -> list[tuple[str, int]]:
    """Remove all Bentos, with their models, but those of kept versions and the newest built of each model.

    Returns tags and bytes.
    """
    if not (home / "bento" / "bentos").is_dir():
        return []
    os.environ.update(bento_environment(home))
    import bentoml

    tags = {_tag(version) for version in retained}
    sizes = []
    for store in (bentoml.bentos, bentoml.models):
        built: Counter[str] = Counter()
        for entry in sorted(store.list(), key=lambda entry: Path(entry.path).stat().st_mtime, reverse=True):
            built[entry.tag.name] += 1
            if str(entry.tag) not in tags and built[entry.tag.name] > newest:
                files = [path for path in Path(entry.path).rglob("*") if path.is_file()]
                sizes.append((str(entry.tag), sum(path.stat().st_size for path in files)))
                if not dry_run:
                    store.delete(entry.tag)
    return sizes


def has_bento(home: Path, tag: str) -> bool:
    name, _, version = tag.partition(":")
    return bool(version) and (home / "bento" / "bentos" / name / version / _PARAMS).exists()  # written last
