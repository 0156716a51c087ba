"""The page as files: what is served of it, under which policy, and that nothing in it reaches out or builds HTML."""

from __future__ import annotations

import re
from typing import Any

import pytest

from serving.http.page_files import FOLDER, POLICY, assets

PAGES = {"/": "index.html", "/registry": "registry.html"}
NAMES = sorted(assets().keys() - set(PAGES.values()))


@pytest.mark.parametrize("path", [*PAGES, *(f"/page/{name}" for name in NAMES)])
def test_every_file_comes_with_the_policy_and_its_type(local: Any, path: str) -> None:
    response = local.client.get(path)
    assert response.status_code == 200
    assert response.headers["Content-Security-Policy"] == POLICY
    assert response.headers["X-Content-Type-Options"] == "nosniff"
    assert response.headers["Referrer-Policy"] == "no-referrer"
    assert response.headers["Cache-Control"] == "no-cache"
    kind = {"/": "text/html", "ry": "text/html", "js": "text/javascript", "ss": "text/css", "vg": "image/svg+xml"}[
        path[-2:]
    ]
    assert response.headers["Content-Type"].startswith(kind)


def test_policy_allows_nothing_from_elsewhere_and_nothing_inline() -> None:
    allowed = dict(rule.split(" ", 1) for rule in POLICY.split("; "))
    assert allowed.pop("default-src") == "'none'"
    assert {source for rule in allowed.values() for source in rule.split()} == {"'self'", "'none'", "data:"}


def test_a_file_that_is_known_is_not_sent_again(local: Any) -> None:
    for path in (*PAGES, "/page/chat.js"):
        tag = local.client.get(path).headers["ETag"]
        for known in (tag, f"W/{tag}", f'"other", {tag}'):
            again = local.client.get(path, headers={"If-None-Match": known})
            assert (again.status_code, again.content) == (304, b"")
            assert again.headers["ETag"] == tag
        assert local.client.get(path, headers={"If-None-Match": '"other"'}).status_code == 200


@pytest.mark.parametrize("name", ["nope.js", *PAGES.values(), "..%2Fapi.py", "%2e%2e/api.py", "chat.js/x"])
def test_no_other_file_is_served(local: Any, name: str) -> None:
    response = local.client.get(f"/page/{name}")
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "not_found"


def test_files_are_counted_as_one_route(local: Any) -> None:
    for name in ("chat.js", "dom.js", "nope.js"):
        local.client.get(f"/page/{name}")
    text = local.client.get("/metrics").text
    assert 'loopwright_requests_total{route="/page/{name}",status="200"}' in text
    assert "chat.js" not in text


def test_everything_that_a_file_names_is_served() -> None:
    index, registry = (assets()[page].body.decode() for page in PAGES.values())
    named = set(re.findall(r'(?:href|src)="page/([^"]+)"', index + registry))
    for name in NAMES:
        named |= set(re.findall(r'from "\./([^"]+)"', assets()[name].body.decode()))
    assert named == set(NAMES)
    icons = set(re.findall(r'<symbol id="icon-([^"]+)"', index))
    scripts = index + "".join(assets()[name].body.decode() for name in NAMES if name.endswith(".js"))
    used = set(re.findall(r'#icon-([a-z]+)"', scripts)) | set(re.findall(r'icon\("([a-z]+)"\)', scripts))
    used |= set(re.findall(r'iconButton\((?:"[^"]*"|`[^`]*`), "([a-z]+)"', scripts))
    assert used == icons
    assert set(re.findall(r'#icon-([a-z]+)"', registry)) | {"copy"} == set(
        re.findall(r'<symbol id="icon-([^"]+)"', registry)
    ), "what it shows, and what markdown.js shows there"


def test_links_to_the_other_pages_lead_somewhere(local: Any) -> None:
    links = [
        link for page in PAGES.values() for link in re.findall(r'<a href="([^"#]+)"', assets()[page].body.decode())
    ]
    assert {"docs", "openapi.json", "metrics", "registry", "./"} <= set(links)
    for link in links:
        assert local.client.get("/" + link.removeprefix("./")).status_code == 200


@pytest.mark.parametrize("path", sorted(FOLDER.iterdir()), ids=lambda path: path.name)
def test_sources_build_no_html_and_name_no_other_site(path: Any) -> None:
    text = path.read_text(encoding="utf-8").replace('"http://www.w3.org/2000/svg"', "")
    assert "://" not in text
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|DOMParser|\beval\b|new Function", text
    )
    assert not re.search(r"\son\w+=|\sstyle=|<script>|<style", text)
    assert len(text.splitlines()) <= 400
    if path.suffix == ".js":
        assert text.startswith("// "), "its first line says what it is"
