"""Prefect and MLflow as `loopwright up` starts them answer nobody but the person whose state folder it is.

A page of another site in that person's browser, one that was rebound to this machine by DNS, and another user's
program try to start a command and to read the registry.
"""

from __future__ import annotations

import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import httpx
import pytest
from playwright.sync_api import Page, sync_playwright

from components.config.errors import InputError
from components.feedback.store import Store
from components.runtime.service_registry import AUTH_FILE
from components.runtime.supervisor import Supervisor
from components.tracking.mlflow_client import connect
from flows.orchestration.prefect_server import client_settings, free_port, prefect_api
from flows.orchestration.services import MLFLOW_AUTH_FILE, has_champion, platform
from serving.observability.flow_runs import flow_runs
from tests.conftest import SOURCE, prefect_client
from tests.serving.browsing import ARGUMENTS, chromium

pytestmark = [pytest.mark.platform, pytest.mark.timeout(600)]

SECRET = "registered-in-secret"
FETCH = """async ([url, method, headers, body]) => {
    try {
        const response = await fetch(url, {method, headers, body: body || undefined});
        return [response.status, await response.text()];
    } catch (error) {
        return [0, String(error)];
    }
}"""


@dataclass(frozen=True)
class Services:
    home: Path
    prefect: str
    """Address of Prefect's API."""
    mlflow: str


@pytest.fixture(scope="module")
def services(database: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Services]:
    home = tmp_path_factory.mktemp("closed") / "var"
    with pytest.MonkeyPatch.context() as patch:
        for variable in ("PREFECT_API_URL", "MLFLOW_TRACKING_URI", "PREFECT_API_AUTH_STRING"):
            patch.delenv(variable, raising=False)
        for folder in ("mlflow", "prefect", "logs"):
            (home / folder).mkdir(parents=True)
        (home / "mlflow/mlflow.db").write_bytes((database / "mlflow/mlflow.db").read_bytes())
        connect(home).create_registered_model(SECRET)
        ports = {name: free_port() for name in ("prefect", "mlflow", "endpoint")}
        started = [service for service in platform(home, ports, True) if service.name in ("prefect", "mlflow")]
        supervisor = Supervisor(started, home / "logs", SOURCE, lambda entry: None)
        try:
            while not all(entry.state == "healthy" for entry in supervisor.supervised):
                supervisor.tick()
            api, mlflow = f"http://127.0.0.1:{ports['prefect']}/api", f"http://127.0.0.1:{ports['mlflow']}"
            yield Services(home, api, mlflow)
        finally:
            supervisor.stop(7)


def test_the_secret_is_its_owners_alone(services: Services) -> None:
    for name in (AUTH_FILE, MLFLOW_AUTH_FILE):
        file = services.home / name
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        assert len(file.read_text()) > 30


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Basic YWRtaW46"}, {"Host": "evil.test"}])
def test_prefect_answers_nobody_without_the_secret(services: Services, headers: dict[str, str]) -> None:
    for path in ("admin/settings", "csrf-token?client=page", "work_pools/loopwright"):
        assert httpx.get(f"{services.prefect}/{path}", headers=headers).status_code == 401
    for path in ("flows/filter", "deployments/filter", "work_pools/filter", "flow_runs/"):
        assert httpx.post(f"{services.prefect}/{path}", json={}, headers=headers).status_code == 403, "no token either"
    assert httpx.get(f"{services.prefect}/health").is_success


def test_with_the_secret_alone_a_page_changes_nothing(services: Services) -> None:
    """Were it to leak: a browser that signs in by itself sends no token of the page."""
    auth = httpx.BasicAuth(*(services.home / AUTH_FILE).read_text().strip().split(":"))
    refused = httpx.post(f"{services.prefect}/flows/", json={"name": "malice"}, auth=auth)
    assert (refused.status_code, refused.json()["detail"]) == (403, "Missing CSRF token.")


def test_the_registrys_page_reads_the_runs_of_its_state_folder(
    services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prefect import flow, tags
    from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings
    from prefect.states import Completed, State

    @flow(name="improve", validate_parameters=False)
    def improve() -> State[None]:
        return Completed(name="Refused", message="no significant gain")

    monkeypatch.setenv("PREFECT_API_URL", services.prefect)
    secret = (services.home / AUTH_FILE).read_text().strip()
    with temporary_settings({PREFECT_API_URL: services.prefect, PREFECT_API_AUTH_STRING: secret}):
        for home in (services.home, services.home / "another"):
            with tags(f"home:{home}"):
                improve(return_state=True)
    flow_run_states = flow_runs(services.home)
    assert flow_run_states is not None
    assert [(run["flow"], run["state"], run["message"]) for run in flow_run_states["recent"]] == [
        ("improve", "Refused", "no significant gain")
    ]
    assert flow_run_states["scheduled"] == []
    monkeypatch.setenv("PREFECT_API_AUTH_STRING", "admin:another")
    assert flow_runs(services.home) is None


@pytest.mark.parametrize("service", ["prefect", "mlflow"])
def test_no_other_origin_may_read(services: Services, service: str) -> None:
    url = {"prefect": f"{services.prefect}/health", "mlflow": f"{services.mlflow}/api/2.0/mlflow/experiments/search"}
    answer = httpx.options(
        url[service], headers={"Origin": "http://evil.test", "Access-Control-Request-Method": "POST"}
    )
    assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize("path", ["api/2.0/mlflow", "ajax-api/2.0/mlflow"])
def test_mlflow_answers_no_other_host_and_no_other_origin(services: Services, path: str) -> None:
    url, auth = f"{services.mlflow}/{path}/registered-models", mlflow_auth(services)
    assert SECRET in httpx.get(f"{url}/search", auth=auth).text
    assert httpx.get(f"{url}/search", auth=auth, headers={"Host": "evil.test"}).status_code == 403
    created = httpx.post(f"{url}/create", auth=auth, json={"name": "malice"}, headers={"Origin": "http://evil.test"})
    assert created.status_code == 403


@pytest.mark.parametrize("auth", [None, ("admin", ""), ("admin", "password1234"), ("", "")])
def test_mlflow_answers_nobody_without_the_password(services: Services, auth: tuple[str, str] | None) -> None:
    for path in ("", "api/2.0/mlflow/registered-models/search", "ajax-api/2.0/mlflow/experiments/search", "version"):
        answer = httpx.get(f"{services.mlflow}/{path}", auth=auth)
        assert answer.status_code == 401, path
        assert SECRET not in answer.text
    for path in ("graphql", "v1/traces", "api/2.0/mlflow/users/create", "ajax-api/2.0/mlflow/runs/search"):
        answer = httpx.post(f"{services.mlflow}/{path}", auth=auth, json={"username": "mallory", "password": "x" * 12})
        assert answer.status_code == 401, path
    assert httpx.get(f"{services.mlflow}/health").is_success


def test_clients_reach_mlflow_by_its_own_variables(services: Services, monkeypatch: pytest.MonkeyPatch) -> None:
    client = connect(services.home)
    version = client.create_model_version(SECRET, "runs:/0/model")
    client.set_registered_model_alias(SECRET, "champion", version.version)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", services.mlflow)
    with pytest.raises(InputError, match=r"(?i)MLFLOW_TRACKING_URI: .*not authenticated"):
        connect(services.home)
    assert not has_champion(services.home, SECRET)
    user, password = (services.home / MLFLOW_AUTH_FILE).read_text().strip().split(":")
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", user)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", password)
    assert SECRET in {model.name for model in connect(services.home).search_registered_models()}
    assert has_champion(services.home, SECRET)


def mlflow_auth(services: Services) -> httpx.BasicAuth:
    return httpx.BasicAuth(*(services.home / MLFLOW_AUTH_FILE).read_text().strip().split(":"))


def test_the_pool_of_the_worker_runs_no_command(services: Services) -> None:
    """Registered as the worker does; also where the pool was of Prefect's own template."""
    program = "from pathlib import Path; from flows.orchestration.deploy import register; register(Path.cwd())"
    with prefect_client(services.home, services.prefect) as client:
        variables = {"type": "object", "properties": {"command": {"type": "string"}}}
        template = {"job_configuration": {"command": "{{ command }}"}, "variables": variables}
        pool = {"name": "cpu", "type": "process", "base_job_template": template}
        assert client.post("/work_pools/", json=pool).is_success
        environment = {**client_settings(services.home, services.prefect), "PATH": "/usr/bin"}
        environment["LOOPWRIGHT_HOME"] = str(services.home)
        subprocess.run([sys.executable, "-c", program], cwd=SOURCE, env=environment, check=True)
        template = client.get("/work_pools/cpu").json()["base_job_template"]
        assert "command" not in str(template)
        deployment = client.get("/deployments/name/monitor/scheduled").json()
        assert deployment["job_variables"] == {}
        started = client.post(
            f"/deployments/{deployment['id']}/create_flow_run", json={"job_variables": {"command": "touch started"}}
        )
        assert started.status_code == 422
    with closing(Store.of(services.home)) as store:
        since = store.schedules()
        assert sorted(since) == ["improve", "ingest", "monitor", "pipeline"], "late as well where they never succeed"
        store.record_schedules(["ingest"])
        assert store.schedules() == {"ingest": since["ingest"]}


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    """A page of http://evil.test, a name that leads to this machine."""
    handler = partial(SimpleHTTPRequestHandler, directory=str(SOURCE / "serving/page"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server, sync_playwright() as playwright:
        Thread(target=server.serve_forever, daemon=True).start()
        rule = "--host-resolver-rules=MAP evil.test 127.0.0.1"
        browser = playwright.chromium.launch(executable_path=chromium(), args=[*ARGUMENTS, rule])
        page = browser.new_page()
        page.goto(f"http://evil.test:{server.server_port}/index.html")
        yield page
        browser.close()
        server.shutdown()


def attempt(page: Page, url: str, body: str = "", **headers: str) -> tuple[int, str]:
    status, text = page.evaluate(FETCH, [url, "POST" if body else "GET", headers, body])
    return status, text


def test_a_page_of_another_site_starts_nothing_and_reads_nothing(services: Services, page: Page) -> None:
    simple, json = {"Content-Type": "text/plain"}, {"Content-Type": "application/json"}
    for headers in (simple, json):
        for path in ("flows/", "deployments/", "flow_runs/", "work_pools/"):
            assert attempt(page, f"{services.prefect}/{path}", '{"name": "malice"}', **headers)[0] == 0
    for api in ("api", "ajax-api"):
        url = f"{services.mlflow}/{api}/2.0/mlflow/registered-models"
        assert attempt(page, f"{url}/search")[0] == 0
        for headers in (simple, json):
            assert attempt(page, f"{url}/create", '{"name": "malice"}', **headers)[0] == 0
    nothing_happened(services)


def test_a_page_rebound_to_this_machine_starts_nothing_and_reads_nothing(services: Services, page: Page) -> None:
    """The browser takes the service for the page's own origin, so that nothing is cross-origin."""
    rebound = services.prefect.replace("127.0.0.1", "evil.test")
    page.goto(f"{rebound}/health")
    for path in ("flows/", "deployments/", "flow_runs/", "work_pools/"):
        body = '{"name": "malice"}'
        assert attempt(page, f"{rebound}/{path}", body, **{"Content-Type": "application/json"})[0] == 403
    assert attempt(page, f"{rebound}/csrf-token?client=page")[0] == 401
    rebound = services.mlflow.replace("127.0.0.1", "evil.test")
    page.goto(f"{rebound}/health")
    for api in ("api", "ajax-api"):
        assert attempt(page, f"{rebound}/{api}/2.0/mlflow/registered-models/search")[0] == 403
    assert attempt(page, f"{rebound}/graphql", "{}", **{"Content-Type": "application/json"})[0] == 403
    nothing_happened(services)


def nothing_happened(services: Services) -> None:
    with prefect_client(services.home, services.prefect) as client:
        rows = [row for kind in ("flows", "work_pools") for row in client.post(f"/{kind}/filter", json={}).json()]
    assert "malice" not in {row["name"] for row in rows}
    assert "malice" not in {model.name for model in connect(services.home).search_registered_models()}


def test_a_run_reaches_its_own_server(services: Services) -> None:
    """The state folder's secret goes to the server that the environment names on this machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFECT_API_URL", services.prefect)
        with prefect_api(services.home) as api:
            assert api.auth == (services.home / AUTH_FILE).read_text().strip()
        patch.setenv("PREFECT_API_URL", "http://prefect.example/api")
        with prefect_api(services.home) as api:
            assert api.auth is None, "no other machine gets it"
