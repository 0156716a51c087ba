"""deploy/ and mlflow/ agree with the sources, the locks and the tools that read them; no container engine is needed."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest
import yaml

from components.config.params import load_params
from serving.server import SHUTDOWN_SECONDS
from tests.pages import ROOT
from tests.test_architecture import PACKAGES, imports, normalized
from tests.test_supply_chain import SERVE, locked

DEPLOY = ROOT / "deploy"
CONTAINERFILE = (DEPLOY / "Containerfile").read_text(encoding="utf-8")
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))
SERVICES: dict[str, Any] = COMPOSE["services"]
LOCKS = {"requirements.lock", "requirements-serve.lock", "requirements-worker.lock"}
OPTIONAL = {"bitsandbytes", "av"}
"""Imported by serving where they are installed alone: quantized bases on CUDA, clips."""
WORKLOADS = ("mlflow", "prefect", "worker", "endpoint")


def sources_of(*modules: str) -> Iterator[Path]:
    """The project's files that these modules import, directly or not."""
    waiting, seen = [*modules], set()
    while waiting:
        module = waiting.pop()
        base = ROOT / module.replace(".", "/")
        path = base / "__init__.py" if base.is_dir() else base.with_suffix(".py")
        if path in seen or not path.is_file():
            continue
        seen.add(path)
        yield path
        waiting += [name for name in imports(path) if name.partition(".")[0] in PACKAGES]


SERVING = list(sources_of("serving.service", "serving.server", "loopwright.serve"))


def test_the_serving_lock_has_what_serving_imports() -> None:
    providers, known = packages_distributions(), {name.partition("==")[0] for name in locked(SERVE)} | OPTIONAL
    # MLflow's client comes as mlflow-skinny, which has the same modules.
    known |= {"mlflow"} if "mlflow-skinny" in known else set()
    missing = {
        f"{path.relative_to(ROOT)}: {module}"
        for path in SERVING
        for module in {name.partition(".")[0] for name in imports(path)} - set(PACKAGES) - sys.stdlib_module_names
        if not known & {normalized(name) for name in providers.get(module, [module])}
    }
    assert not missing
    assert len(SERVING) > 60


def stages() -> dict[str, str]:
    """The instructions of the Containerfile's stages."""
    parts = re.split(r"^FROM \S+ AS (\S+)$", CONTAINERFILE, flags=re.MULTILINE)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


def copies(text: str) -> set[str]:
    """What instructions copy from the checkout."""
    return {name for line in re.findall(r"^COPY ([^-\n].*)$", text, re.MULTILINE) for name in line.split()[:-1]}


def test_the_endpoints_image_has_the_sources_of_serving() -> None:
    copied = copies(stages()["endpoint"])
    assert not [name for name in copied if not (ROOT / name).exists()]
    missing = [path for path in SERVING if path.relative_to(ROOT).parts[0] not in copied]
    assert not missing
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    names = copies(CONTAINERFILE) - {".", *LOCKS}
    assert not [name for name in names if f"!{name}" not in ignored]


@pytest.mark.parametrize("stage", ["endpoint", "worker", "mlflow"])
def test_an_image_runs_as_nobody_special_and_says_whether_it_is_well(stage: str) -> None:
    lines = stages()[stage]
    assert "HEALTHCHECK" in lines
    user = re.findall(r"^USER (.*)$", lines, re.MULTILINE)
    assert user == ["1000:1000"] or (not user and f"FROM worker AS {stage}\n" in CONTAINERFILE)


def test_images_are_pinned() -> None:
    images = [service["image"] for service in SERVICES.values() if "build" not in service]
    images += re.findall(r"^ARG BASE=(.*)$", CONTAINERFILE, re.MULTILINE)
    assert len(images) >= 4
    assert not [image for image in images if not re.search(r":[\w.-]*\d[\w.-]*$|@sha256:", image)]


def test_every_secret_of_compose_is_in_the_example_and_no_other() -> None:
    named = set(re.findall(r"\$\{(\w+):\?\}", (DEPLOY / "compose.yaml").read_text(encoding="utf-8")))
    assert named == set(re.findall(r"^(\w+)=", (DEPLOY / "env.example").read_text(encoding="utf-8"), re.MULTILINE))


def test_services_of_compose_are_closed_and_wait_for_what_exists() -> None:
    for name, service in SERVICES.items():
        after = service.get("depends_on", {})
        for other, condition in after.items() if isinstance(after, dict) else ():
            healthy = "healthcheck" in SERVICES[other] or "build" in SERVICES[other]
            assert condition["condition"] != "service_healthy" or healthy, f"{name}: {other}"
        if "build" in service:
            assert service["build"]["target"] in stages(), name
            assert service["read_only"], name
            assert service["cap_drop"] == ["ALL"], name
        for volume in service.get("volumes", ()):
            assert volume.partition(":")[0] in COMPOSE["volumes"], volume
        assert not [port for port in service.get("ports", ()) if not port.startswith("127.0.0.1:")], name


def test_compose_fits_its_specification() -> None:
    reader = pytest.importorskip("compose_spec").PyOptions()
    merged = {name: part for name, part in COMPOSE.items() if not name.startswith("x-")}
    assert {"services", "volumes"} <= merged.keys()
    reader.from_yaml(yaml.safe_dump(merged))  # refuses what the specification does not have


def variables(manifests: list[dict[str, Any]]) -> Iterator[str]:
    """Names of the environment variables of compose, Kubernetes and mlflow/server.env."""
    for service in SERVICES.values():
        yield from service.get("environment", {})
    for manifest in manifests:
        yield from manifest.get("data", {}) if manifest["kind"] == "ConfigMap" else ()
        for container in pods(manifest):
            yield from (variable["name"] for variable in container.get("env", ()))


def pods(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """The containers of a workload."""
    template = manifest.get("spec", {}).get("template", {})
    containers: list[dict[str, Any]] = template.get("spec", {}).get("containers", [])
    return containers


@pytest.fixture(scope="module")
def manifests(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What kustomize makes of deploy/kubernetes, with the example's secrets."""
    if not shutil.which("kubectl"):
        pytest.skip("kubectl is not installed")
    root = tmp_path_factory.mktemp("kubernetes")
    for folder in ("deploy/kubernetes", "mlflow"):
        shutil.copytree(ROOT / folder, root / folder)
    folder = root / "deploy/kubernetes"
    shutil.copyfile(folder / "secrets.env.example", folder / "secrets.env")
    made = subprocess.run(["kubectl", "kustomize", str(folder)], capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    return list(yaml.safe_load_all(made.stdout))


def test_mlflow_and_prefect_read_every_variable(manifests: list[dict[str, Any]]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of types in MLflow's own code, while it is imported
        import mlflow.cli
        import mlflow.environment_variables
    import prefect.settings

    known = set(vars(mlflow.environment_variables))
    known |= {option.envvar for option in mlflow.cli.server.params if isinstance(getattr(option, "envvar", None), str)}
    # Read from the environment without a name in the module above.
    known |= {"MLFLOW_FLASK_SERVER_SECRET_KEY", "MLFLOW_S3_ENDPOINT_URL"}
    named = {*variables(manifests), *re.findall(r"\b((?:MLFLOW|PREFECT)_\w+)=", CONTAINERFILE)}
    named |= set(re.findall(r"^(\w+)=", (ROOT / "mlflow/server.env").read_text(encoding="utf-8"), re.MULTILINE))
    assert len(named) > 25
    assert not {name for name in named if name.startswith("MLFLOW_")} - known
    assert not [name for name in named if name.startswith("PREFECT_") and not hasattr(prefect.settings, name)]


def test_workloads_are_restricted_probed_and_refer_to_what_exists(manifests: list[dict[str, Any]]) -> None:
    keys = {manifest["metadata"]["name"]: set(manifest.get("data", {})) for manifest in manifests}
    workloads = {manifest["metadata"]["name"]: manifest for manifest in manifests if pods(manifest)}
    assert set(workloads) == set(WORKLOADS)
    for name, workload in workloads.items():
        pod = workload["spec"]["template"]["spec"]
        (container,) = pods(workload)
        assert (pod["securityContext"]["runAsNonRoot"], pod["securityContext"]["runAsUser"]) == (True, 1000), name
        assert container["securityContext"]["readOnlyRootFilesystem"], name
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}, name
        assert container["readinessProbe"], name
        assert "memory" in container["resources"]["requests"], name
        claims = [claim["metadata"] for claim in workload["spec"].get("volumeClaimTemplates", ())]
        volumes = {volume["name"] for volume in [*pod["volumes"], *claims]}
        assert {mount["name"] for mount in container["volumeMounts"]} == volumes, name
        for variable in container.get("env", ()):
            if reference := variable.get("valueFrom", {}).get("secretKeyRef"):
                assert reference["key"] in keys[reference["name"]], variable
        for reference in container.get("envFrom", ()):
            assert keys[reference["configMapRef"]["name"]], name


def test_prefect_and_mlflow_are_closed_wherever_they_run() -> None:
    closed = {
        "prefect": {"SERVER_API_AUTH_STRING", "SERVER_CSRF_PROTECTION_ENABLED", "SERVER_CORS_ALLOWED_ORIGINS"},
        "mlflow": {"AUTH_ADMIN_PASSWORD", "SERVER_ALLOWED_HOSTS", "SERVER_CORS_ALLOWED_ORIGINS"},
    }
    for name, settings in closed.items():
        manifests = yaml.safe_load_all((DEPLOY / f"kubernetes/{name}.yaml").read_text(encoding="utf-8"))
        in_pods = {variable["name"] for each in manifests for pod in pods(each) for variable in pod["env"]}
        for given in (in_pods, set(SERVICES[name]["environment"])):
            assert {f"{name.upper()}_{setting}" for setting in settings} <= given


def test_an_endpoint_that_stops_has_the_time_that_it_takes() -> None:
    serve = load_params(ROOT / "params.yaml").serve
    needed = serve.notice_seconds + serve.drain_seconds + SHUTDOWN_SECONDS
    manifests = list(yaml.safe_load_all((DEPLOY / "kubernetes/endpoint.yaml").read_text(encoding="utf-8")))
    pod = manifests[-1]["spec"]["template"]["spec"]
    (_, pause) = pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
    unit = (DEPLOY / "systemd/loopwright-endpoint@.service").read_text(encoding="utf-8")
    (timeout,) = re.findall(r"^TimeoutStopSec=(\d+)$", unit, re.MULTILINE)
    graces = [service["stop_grace_period"] for name, service in SERVICES.items() if name.startswith("endpoint")]
    given = [pod["terminationGracePeriodSeconds"] - int(pause), int(timeout), *(int(each[:-1]) for each in graces)]
    assert len(given) == 4
    assert min(given) >= needed


def test_manifests_fit_the_schemas_of_kubernetes(manifests: list[dict[str, Any]]) -> None:
    validator = pytest.importorskip("kubernetes_validate")
    assert manifests
    for manifest in manifests:
        validator.validate(manifest, "1.31", strict=True)


def test_units_are_valid(tmp_path: Path) -> None:
    if not shutil.which("systemd-analyze"):
        pytest.skip("systemd-analyze is not installed")
    for unit in (DEPLOY / "systemd").iterdir():
        # The user and the folder of the machine that they are for.
        text = unit.read_text(encoding="utf-8").replace("/srv/loopwright/.venv/bin", str(Path(sys.executable).parent))
        text = re.sub(r"^User=.*\n", "", text.replace("/srv/loopwright", str(ROOT)), flags=re.MULTILINE)
        (tmp_path / unit.name).write_text(text, encoding="utf-8")
    units = [str(unit) for unit in tmp_path.iterdir()]
    verified = subprocess.run(["systemd-analyze", "verify", *units], capture_output=True, text=True)
    assert (verified.returncode, verified.stderr) == (0, "")


def test_the_proxy_is_configured_for_both_endpoints() -> None:
    servers = re.findall(
        r"^    server (\S+) (\S+):3000$", (DEPLOY / "haproxy-compose.cfg").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert {host for _, host in servers} == {name for name in SERVICES if name.startswith("endpoint")}
    if shutil.which("haproxy"):
        checked = subprocess.run(
            ["haproxy", "-c", "-f", str(DEPLOY / "haproxy-compose.cfg")], capture_output=True, text=True
        )
        assert checked.returncode == 0, checked.stderr
