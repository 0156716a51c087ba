"""The page /registry in a real browser, and who may read what it shows."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Route, expect

from components.config.params import load_params
from components.feedback.store import AnswerRecord, record_success
from components.tracking.registry import Registry
from components.tracking.version_files import store_card
from serving.http.app import new_api
from serving.http.gateway import GatewayMiddleware
from serving.models.state import Serving
from serving.models.versions import Bundled
from tests.serving.browsing import Visit
from tests.serving.listening import listening

pytestmark = pytest.mark.platform

ROOT = Path(__file__).parents[2]
LONG = "a_suite_of_questions/whose_name_is_longer_than_a_telephone_is_wide_by_far"
CARD = f"Score 0.5.\n\n## Held-out suites\n\n| suite | n |\n| --- | ---: |\n| {LONG} | 40 |\n| a \\| b | 2 |\n"
LOOKS = {
    "light": {},
    "dark": {"color_scheme": "dark"},
    "phone": {"viewport": {"width": 360, "height": 740}, "has_touch": True},
}


@pytest.fixture(scope="module")
def site(agent_folder: Path, database: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An endpoint whose registry has a champion, the previous champion and a challenger that the gate refused."""
    home = tmp_path_factory.mktemp("registry")
    (home / "mlflow").mkdir()
    shutil.copy(database / "mlflow/mlflow.db", home / "mlflow")
    registry = Registry(home)
    for gate, reason in (("passed", "there was no champion"), ("passed", "gains"), ("refused", f"regresses: {LONG}")):
        about = {"gate": gate, "gate_reason": reason}
        version = registry.register(agent_folder, "agent", {"score": 0.5}, about, None)
        store_card(version, f"---\nlicense: mit\n---\n\n{CARD}", CARD)
        if gate == "passed":
            registry.promote(version)
        else:
            registry.alias("agent", "challenger", version)
    record_success(home, "ingest")
    (home / "reports").mkdir()
    (home / "reports/drift-2026-11-30.md").write_text(
        "# Drift\n\n| measure | value |\n|---|---|\n| first word | 0.3 |\n"
    )
    api = new_api()
    config = load_params(ROOT / "params.yaml").serve
    facts = {"name": "agent", "version": 2, "tags": {}}
    serving = Serving.open(home, config, "", Bundled(agent_folder, facts), share=0.25)
    serving.store.add_request("chatcmpl-1", "agent/2", {"messages": [{"role": "user", "content": "Hello"}]})
    serving.store.add_answer("chatcmpl-1", AnswerRecord("Hi", "stop", 1, 1, 0.1))
    serving.store.add_feedback("chatcmpl-1", "down", "Good day.", None, None, "local")
    api.state.serving = serving
    serving.wait()
    with listening(GatewayMiddleware(api, api)) as url:
        yield url
    serving.close()


@pytest.mark.parametrize("look", LOOKS)
def test_page_names_champion_and_reason_and_passes_axe(site: str, visit: Visit, look: str) -> None:
    page = visit(site, path="/registry", **LOOKS[look]).page
    expect(page.locator("#state")).to_contain_text("As of")
    agent = page.get_by_role("article", name="agent")
    champion, previous, challenger = agent.locator(".fact").all()
    expect(champion).to_contain_text("Champion agent/2, score 0.500")
    expect(champion.locator(".reason")).to_have_text("gains")
    expect(previous).to_contain_text("Before it agent/1")
    expect(challenger).to_contain_text("Challenger agent/3, score 0.500, answers 25 % of the users")
    expect(challenger.locator(".reason")).to_have_text(f"regresses: {LONG}")
    expect(page.locator("#runs")).to_contain_text("ingest last succeeded")
    expect(page.locator("#feedback")).to_contain_text("1 vote to ingest, 0 items to train on")
    expect(page.locator("#drift")).to_contain_text("Checked on 2026-11-30")
    champion.locator("summary").click()
    expect(champion.locator("td")).to_have_text([LONG, "40", "a | b", "2"])
    widths = page.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
    assert widths[0] <= widths[1], "no horizontal scrolling"
    violations = Axe().run(page).response["violations"]
    assert [(entry["id"], [node["html"] for node in entry["nodes"]]) for entry in violations] == []


def test_keyboard_alone_opens_a_card_and_leads_on(site: str, visit: Visit) -> None:
    page = visit(site, path="/registry").page
    expect(page.locator("#state")).to_contain_text("As of")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "models", "the first stop skips to the models"
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(page.locator("details[open] td").first).to_have_text(LONG)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "table", "a table that scrolls can be scrolled"


def test_nothing_jumps_while_the_page_fills(site: str, visit: Visit) -> None:
    script = """window.shifts = [];
      new PerformanceObserver((list) => window.shifts.push(...list.getEntries().map((entry) => entry.value)))
        .observe({ type: "layout-shift", buffered: true });"""
    page = visit(site, script, "/registry", **LOOKS["phone"]).page
    expect(page.locator("#state")).to_contain_text("As of")
    assert sum(page.evaluate("window.shifts")) < 0.1


def test_keys_without_the_scope_admin_read_no_registry(app: Any) -> None:
    store = app.serving.store
    keys = {scope: store.create_key(scope, [scope])[1] for scope in ("predict", "feedback", "admin")}
    for path in ("/v1/registry", "/v1/registry/agent/1"):
        with suppress(KeyError):
            del app.client.headers["Authorization"]
        assert app.client.get(path).status_code == 401
        statuses = {
            scope: app.client.get(path, headers={"Authorization": f"Bearer {key}"}).status_code
            for scope, key in keys.items()
        }
        assert statuses == {"predict": 403, "feedback": 403, "admin": 200 if path == "/v1/registry" else 404}
    assert app.client.get("/registry").status_code == 200, "the page itself holds nothing"


def test_page_says_what_a_key_lacks(site: str, visit: Visit) -> None:
    """A key that may not read the registry is named in one line."""
    visitor = visit(site, path="/registry")
    visitor.page.route(
        "**/v1/registry", lambda route: route.fulfill(status=403, json={"error": {"message": "no admin"}})
    )
    visitor.page.get_by_label("Reload").click()
    expect(visitor.page.locator("#state")).to_have_text("no admin")
    refused = [text for text in visitor.complaints if "403" in text]
    assert refused, "the browser's console names the status"
    visitor.complaints[:] = [text for text in visitor.complaints if text not in refused]


def test_page_shows_the_last_load_whichever_answer_comes_last(site: str, visit: Visit) -> None:
    page = visit(site, path="/registry").page
    expect(page.locator("#state")).to_contain_text("As of")
    slow: list[Route] = []
    page.route("**/v1/registry", lambda route: slow.append(route), times=1)
    with page.expect_request("**/v1/registry"):
        page.get_by_label("Reload").click()
    page.get_by_label("Reload").click()
    expect(page.locator("#state")).to_contain_text("As of")
    empty = {"models": [], "served": [], "runs": None, "successes": {}, "feedback": {}, "drift": None, "links": []}
    with page.expect_response("**/v1/registry"):
        slow[0].fulfill(json=empty)
    page.evaluate("new Promise(requestAnimationFrame)")
    assert page.get_by_role("article", name="agent").count() == 1
