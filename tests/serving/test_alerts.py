"""Alert rules, dashboard and runbook agree with the metrics that there are, and the rules with Prometheus."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks.alerts import FAULTS
from flows.orchestration.deploy import read_deployments
from tests.pages import ROOT
from tests.serving.conftest import open_local

DEPLOY = ROOT / "deploy"
RULES: list[dict[str, Any]] = yaml.safe_load((DEPLOY / "alerts.yaml").read_text(encoding="utf-8"))["groups"][0]["rules"]
_METRIC = re.compile(r"\bloopwright_\w+")


def test_every_metric_of_rules_and_dashboard_is_exposed(agent_folder: Path, tmp_path: Path) -> None:
    with open_local(agent_folder, tmp_path) as app:
        text = app.client.get("/metrics").text
    exposed = set(re.findall(r"^# TYPE (\w+)", text, re.MULTILINE))
    panels = json.loads((DEPLOY / "dashboard.json").read_text(encoding="utf-8"))["panels"]
    exprs = [rule["expr"] for rule in RULES] + [target["expr"] for panel in panels for target in panel["targets"]]
    used = {name for expr in exprs for name in _METRIC.findall(expr)}
    assert len(used) > 15
    assert not [name for name in used if name not in exposed and name.removesuffix("_bucket") not in exposed]


def test_every_alert_has_a_section_of_the_runbook_and_every_section_an_alert() -> None:
    page = (ROOT / "docs/runbook.md").read_text(encoding="utf-8")
    headings = re.findall(r"^## (.+)$", page, re.MULTILINE)
    assert headings == [rule["alert"] for rule in RULES]
    assert all(rule["annotations"]["runbook"] == f"docs/runbook.md#{rule['alert'].lower()}" for rule in RULES)
    sections = re.split(r"^## .+$", page, flags=re.MULTILINE)[1:]
    assert all("```sh" in section for section in sections)


def test_every_schedule_has_an_alert() -> None:
    (rule,) = (rule for rule in RULES if rule["alert"] == "ScheduleLate")
    named = {flow for group in re.findall(r'flow=~?"([\w|]+)"', rule["expr"]) for flow in group.split("|")}
    scheduled = [entry for entry in read_deployments(ROOT) if entry["schedules"]]
    assert named == {entry["entrypoint"].rpartition(".")[2] for entry in scheduled}


@pytest.mark.parametrize("words", [["check", "rules", "alerts.yaml"], ["test", "rules", "alerts.test.yaml"]])
def test_prometheus_accepts_the_rules_and_their_tests(words: list[str]) -> None:
    """Of the unit tests each fires one alert by its fault, and one is a quiet hour."""
    if (promtool := shutil.which("promtool")) is None:
        pytest.skip("promtool is not installed; install prometheus")
    done = subprocess.run([promtool, *words], cwd=DEPLOY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_rule_has_a_unit_test() -> None:
    tests = yaml.safe_load((DEPLOY / "alerts.test.yaml").read_text(encoding="utf-8"))["tests"]
    assert [test["name"] for test in tests] == [*(rule["alert"] for rule in RULES), "a quiet hour"]


def test_every_rule_has_a_fault_that_happens_for_real() -> None:
    """`python -m benchmarks.alerts` lets them happen."""
    assert {fault.alert for fault in FAULTS} == {rule["alert"] for rule in RULES}
