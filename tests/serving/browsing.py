"""A real browser before the page, and what somebody does there."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
QUIET = ("quic", "gpu", "background-networking", "component-update", "sync")
ARGUMENTS = ["--headless", "--no-sandbox", "--no-first-run", *(f"--disable-{what}" for what in QUIET)]


def chromium() -> str:
    """The path of the browser; the test is skipped where there is none."""
    found = next((path for name in CHROMIUM if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"none of {', '.join(CHROMIUM)} is installed here")
    return found


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    found = chromium()
    expect.set_options(timeout=30_000)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=ARGUMENTS)
        yield browser
        browser.close()


@dataclass
class Visitor:
    """Somebody in front of the page, and what the browser had to complain about."""

    page: Page
    complaints: list[str] = field(default_factory=list)
    addresses: list[str] = field(default_factory=list)

    def ask(self, question: str) -> None:
        self.page.get_by_label("Your question").fill(question)
        self.page.keyboard.press("Enter")

    def answered(self, text: str | re.Pattern[str]) -> None:
        expect(self.page.locator(".turn").last.locator(".words")).to_have_text(text)
        expect(self.page.get_by_label("Stop the answer")).to_be_hidden()

    def correct(self, correction: str, comment: str) -> None:
        self.page.get_by_label("Bad answer").click()
        self.page.get_by_label("What it should have said").fill(correction)
        self.page.get_by_label("Comment").fill(comment)
        self.page.locator(".opinion").get_by_role("button", name="Send").click()
        expect(self.page.locator(".voted")).to_contain_text("You corrected this answer. Stored as fb-")

    @property
    def completion_id(self) -> str:
        """Of the first answer of the latest conversation."""
        kept = "Object.values(localStorage).map(text => JSON.parse(text)).sort((a, b) => b.updated - a.updated)"
        return str(self.page.evaluate(f"{kept}[0].turns[0].answers[0].id"))


Visit = Callable[..., Visitor]


@pytest.fixture
def visit(browser: Browser) -> Iterator[Visit]:
    """Opens a page in a browser that knows nothing yet; nothing may be complained of, nor fetched from elsewhere."""
    visitors: list[tuple[str, Visitor]] = []

    def open_page(url: str, script: str = "", path: str = "", **options: Any) -> Visitor:
        page = browser.new_context(**options).new_page()
        page.add_init_script(script)
        visitor = Visitor(page)
        visitors.append((url, visitor))
        page.on("console", lambda said: visitor.complaints.append(said.text) if said.type != "log" else None)
        page.on("pageerror", lambda error: visitor.complaints.append(str(error)))
        page.on("request", lambda request: visitor.addresses.append(request.url))
        page.goto(f"{url}{path}")
        return visitor

    yield open_page
    for url, visitor in visitors:
        visitor.page.context.close()
        assert visitor.complaints == []
        assert [address for address in visitor.addresses if not address.startswith(url)] == []
