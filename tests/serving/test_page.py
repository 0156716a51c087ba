"""The page in a real browser, before `loopwright serve`; before the same routes where answers must be held or fail."""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import Callable, Iterator
from contextlib import aclosing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Route, expect

from components.config.params import load_params
from components.feedback.store import Store
from serving.engine.backend import QueueFull
from serving.http.app import new_api
from serving.http.chat_handler import ChatHandler
from serving.http.gateway import GatewayMiddleware
from serving.http.page_files import POLICY
from serving.models.alias_watcher import ServingModels
from serving.models.state import Serving
from serving.models.versions import Bundled
from tests.serving.browsing import Visit
from tests.serving.listening import listening

pytestmark = pytest.mark.platform

ROOT = Path(__file__).parents[2]
STORY = "One two three four five six seven eight nine ten. The end of it. And then some more words."
PHONE = {"viewport": {"width": 360, "height": 740}, "has_touch": True}
FACTS = {
    "name": "agent",
    "version": 1,
    "run_id": "0123456789abcdef0123456789abcdef",
    "created": 1_700_000_000.0,
    "aliases": ["champion"],
    "taught_by": [{"version": "agent/1", "run_id": "r1", "feedback": ["fb-one", "fb-two"]}],
    "metrics": {"lookup/held_out_modules/score": 0.9375, "bits_per_byte": 2.0},
    "tags": {
        "git_commit": "c0ffee" * 6 + "abcd",
        "dvc.data/collected": "d43b07d036d0109ac30e669261f96ad4.dir",
        "dvc.components/data/collect.py": "58fcbaa78781212a72362a0829a7243c",
        "params": '{"seed": 0}',
        "gate": "passed",
        "gate_reason": "there was no champion",
    },
}


class TokenBucket:
    """How many more pieces of answers may leave the server."""

    allowed: float = math.inf


@dataclass
class Site:
    """The routes on a port of their own, whose answers can be held."""

    url: str
    serving: Serving
    pace: TokenBucket
    app: Any


@pytest.fixture(scope="module")
def site(agent_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    api = new_api()
    config = load_params(ROOT / "params.yaml").serve
    serving = Serving.open(tmp_path_factory.mktemp("page"), config, "", Bundled(agent_folder, FACTS))
    api.state.serving = serving
    serving.wait()
    pace, deltas = TokenBucket(), ChatHandler.deltas

    async def paced(handler: ChatHandler) -> Any:
        async with aclosing(deltas(handler)) as pieces:
            async for piece in pieces:
                while pace.allowed <= 0:
                    await asyncio.sleep(0.005)
                pace.allowed -= 1
                yield piece

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ChatHandler, "deltas", paced)
        app = GatewayMiddleware(api, api)
        with listening(app) as url:
            yield Site(url, serving, pace, app)
    serving.close()


def test_served_page_answers_with_its_steps_folded_and_names_the_version(url: str, visit: Visit) -> None:
    visitor = visit(url)
    served = visitor.page.locator("#served")
    expect(served).to_contain_text(re.compile(r"agent/\d+ champion"))
    visitor.ask("What is 6*7?")
    visitor.answered("That is 42.")
    fold = visitor.page.locator(".answer details")
    assert fold.get_attribute("open") is None
    expect(fold.locator("summary")).to_have_text("1 step: calculate")
    fold.locator("summary").click()
    expect(fold.locator("li")).to_have_text(['Calledcalculate(expression="6*7")', "Got42"])
    version = visitor.page.locator(".model").inner_text()
    assert version.strip().endswith(served.locator("strong").inner_text())


def test_correction_is_stored_and_stays_visible(url: str, visit: Visit, project: Any) -> None:
    visitor = visit(url)
    visitor.ask("What is 6*7?")
    visitor.answered("That is 42.")
    visitor.correct("Forty-two.", "In words, please.")
    store = Store.of(project.home)
    try:
        thumb, correction = store.completion(visitor.completion_id)["feedback"]
    finally:
        store.close()
    assert (thumb["rating"], thumb["replaced_by"]) == ("down", correction["id"])
    assert (correction["rating"], correction["correction"]) == ("down", "Forty-two.")
    assert correction["comment"] == "In words, please."
    assert None not in (thumb["idempotency_key"], correction["idempotency_key"])
    visitor.page.reload()
    expect(visitor.page.locator(".voted blockquote")).to_have_text(["Forty-two.", "In words, please."])
    expect(visitor.page.get_by_label("Bad answer")).to_have_attribute("aria-pressed", "true")
    visitor.page.get_by_label("Good answer").click()
    expect(visitor.page.get_by_label("Good answer")).to_have_attribute("aria-pressed", "true")
    expect(visitor.page.get_by_label("Bad answer")).to_have_attribute("aria-pressed", "false")


def test_answer_is_seen_while_it_is_written(site: Site, visit: Visit) -> None:
    visitor = visit(site.url)
    words = visitor.page.locator(".words")
    visitor.page.evaluate("""() => {
      window.told = 0;
      new MutationObserver(() => (window.told += 1)).observe(document.querySelector("#said"), { childList: true });
    }""")
    site.pace.allowed = 4
    visitor.ask("A story")
    expect(words).to_have_text(re.compile("^One"))
    first = words.inner_text()
    site.pace.allowed = 8
    expect(words).not_to_have_text(first)
    second = words.inner_text()
    site.pace.allowed = math.inf
    visitor.answered(STORY)
    assert STORY.startswith(second)
    assert second.startswith(first)
    assert len(second) < len(STORY)
    expect(visitor.page.locator("#said")).to_contain_text("words.")
    assert visitor.page.evaluate("window.told") <= 4, "that it begins, two sentences at most, and the rest"


@pytest.mark.parametrize("how", ["button", "escape", "another conversation"])
def test_stopped_answer_stays_as_it_is_and_can_be_made_again(site: Site, visit: Visit, how: str) -> None:
    visitor = visit(site.url)
    site.pace.allowed = 4
    visitor.ask("A story")
    expect(visitor.page.locator(".words")).to_have_text(re.compile("^One"))
    if how == "button":
        visitor.page.get_by_label("Stop the answer").click()
    elif how == "escape":
        visitor.page.keyboard.press("Escape")
    else:
        visitor.page.get_by_role("button", name="New conversation").click()
        expect(visitor.page.locator(".turn")).to_have_count(0)
        visitor.page.locator("#past a").click()
    expect(visitor.page.locator(".state")).to_have_text("You stopped this answer.")
    written = visitor.page.locator(".words").inner_text()
    site.pace.allowed = math.inf
    visitor.page.get_by_label("Answer again").click()
    expect(visitor.page.get_by_label("Answer 2 of 2")).to_be_visible()
    expect(visitor.page.get_by_label("Stop the answer")).to_be_hidden()
    expect(visitor.page.locator(".state")).to_have_text("")
    again = visitor.page.locator(".words").inner_text()
    assert again.startswith("One"), "drawn at a temperature: it may differ from the story"
    assert len(again) > len(written)
    visitor.page.get_by_label("Earlier answer").click()
    expect(visitor.page.locator(".state")).to_have_text("You stopped this answer.")
    assert visitor.page.locator(".words").inner_text() == written
    assert written != STORY
    assert STORY.startswith(written)


def test_lineage_is_laid_open_for_a_person(site: Site, visit: Visit) -> None:
    visitor = visit(site.url)
    visitor.ask("What is 6*7?")
    visitor.answered("That is 42.")
    visitor.correct("Forty-two.", "In words.")
    visitor.page.locator(".model").click()
    panel = visitor.page.get_by_role("dialog", name="Behind this answer")
    titles = ["Answer", "Steps", "Feedback", "Model", "Learned from people", "Data versions", "Held-out scores", "More"]
    expect(panel.locator("h3")).to_have_text([*titles, "In a terminal"])
    for text in (
        "agent/1",
        "champion",
        "0123456789ab",
        "c0ffeec0ffee",
        "passed: there was no champion",
        "agent/1: 2 feedback items",
        "lookup/held out modules",
        "0.938",
        "Forty-two.",
        'calculate(expression="6*7")',
        f"loopwright trace {visitor.completion_id}",
    ):
        expect(panel).to_contain_text(text)
    expect(panel.get_by_role("row", name="data/collected d43b07d0")).to_be_visible()
    shown = panel.inner_text()
    assert [word for word in ("undefined", "NaN", "[object") if word in shown] == [], "values of the script, not facts"
    visitor.page.keyboard.press("Escape")
    expect(panel).to_be_hidden()
    expect(visitor.page.locator(".model")).to_be_focused()


def test_lineage_that_comes_late_is_not_shown(site: Site, visit: Visit) -> None:
    visitor = visit(site.url)
    page = visitor.page
    visitor.ask("What is 6*7?")
    visitor.answered("That is 42.")
    slow: list[Route] = []
    page.route("**/v1/lineage/*", lambda route: slow.append(route), times=1)
    with page.expect_request("**/v1/lineage/*"):
        page.locator(".model").click()
    page.locator(".model").click()
    panel = page.get_by_role("dialog", name="Behind this answer")
    expect(panel.locator("h3").last).to_have_text("In a terminal")
    late = slow[0].fetch()
    with page.expect_response("**/v1/lineage/*"):
        slow[0].fulfill(response=late, body=late.text().replace("That is 42.", "Of another answer."))
    page.evaluate("new Promise(requestAnimationFrame)")
    assert "That is 42." in panel.inner_text()


def test_past_conversations_survive_and_are_deleted_only_here(site: Site, visit: Visit) -> None:
    visitor = visit(site.url)
    page, past = visitor.page, visitor.page.locator("#past .title")
    visitor.ask("Hello")
    expect(page.get_by_label("Copy answer")).to_be_visible()
    page.get_by_role("button", name="New conversation").click()
    visitor.ask("A story")
    visitor.answered(STORY)
    completion_id = visitor.completion_id
    page.reload()
    expect(past).to_have_text(["A story", "Hello"])
    visitor.answered(STORY)
    page.get_by_role("link", name="Hello").click()
    expect(page.locator(".question")).to_have_text("You asked: Hello")
    page.go_back()
    expect(page.locator(".question")).to_have_text("You asked: A story")
    page.get_by_label("Delete: A story").click()
    expect(past).to_have_text(["Hello"])
    expect(page.locator("#welcome")).to_be_visible()
    page.get_by_role("button", name="Undo").click()
    expect(past).to_have_text(["A story", "Hello"])
    page.get_by_label("Delete: A story").click()
    page.reload()
    expect(past).to_have_text(["Hello"])
    expect(page.locator("#conversations")).to_contain_text("kept in this browser only")
    assert STORY not in page.evaluate("Object.values(localStorage).join()")
    assert site.serving.store.completion(completion_id)["id"] == completion_id, "the server's record stays"


def test_browser_that_keeps_nothing_still_chats(site: Site, visit: Visit) -> None:
    forbidden = "throw new DOMException('not here', 'SecurityError')"
    forbid = "".join(
        f"Object.defineProperty(window, '{place}', {{ get() {{ {forbidden} }} }});"
        for place in ("localStorage", "sessionStorage")
    )
    visitor = visit(site.url, script=forbid)
    visitor.ask("What is 6*7?")
    visitor.answered("That is 42.")
    expect(visitor.page.locator("#notice")).to_contain_text("This browser does not keep the conversation")
    expect(visitor.page.locator("#past .title")).to_have_text(["What is 6*7?"])
    shown = "getComputedStyle(document.documentElement).colorScheme"
    before = visitor.page.evaluate(shown)
    visitor.page.get_by_label("Switch between dark and light").click()
    assert visitor.page.evaluate(shown) != before


def test_everything_can_be_done_with_the_keyboard(site: Site, visit: Visit) -> None:
    visitor = visit(site.url)
    page, press = visitor.page, visitor.page.keyboard.press
    focused = "document.activeElement.ariaLabel ?? document.activeElement.innerText"
    outline = "getComputedStyle(document.activeElement).outlineStyle"
    page.keyboard.type("one")
    press("Shift+Enter")
    page.keyboard.type("two?")
    expect(page.get_by_label("Your question")).to_have_value("one\ntwo?")
    press("Control+a")
    page.keyboard.type("What is 6*7?")
    press("Enter")
    visitor.answered("That is 42.")
    seen = []
    while "Good answer" not in seen:
        press("Shift+Tab")
        seen.append(page.evaluate(focused).strip())
        assert page.evaluate(outline) == "solid", seen
        assert len(seen) < 9, seen
    assert seen[1:] == ["Answer again", "Copy answer", "Correct this answer", "Bad answer", "Good answer"]
    press("Enter")
    expect(page.get_by_label("Comment")).to_be_focused()
    press("Escape")
    expect(page.get_by_label("Good answer")).to_be_focused()
    press("?")
    expect(page.get_by_role("dialog", name="Keyboard")).to_be_visible()
    press("Escape")
    press("l")
    expect(page.get_by_role("heading", name="Behind this answer")).to_be_focused()
    press("Escape")
    press("n")
    expect(page.locator(".turn")).to_have_count(0)
    expect(page.get_by_label("Your question")).to_be_focused()
    page.keyboard.type("Hello")
    press("Enter")
    expect(page.get_by_label("Copy answer")).to_be_visible()
    page.locator("#past a").first.focus()
    press("ArrowDown")
    press("Enter")
    expect(page.locator(".question")).to_have_text("You asked: What is 6*7?")
    press("Home")
    assert page.evaluate(focused).startswith("Hello")
    press("/")
    expect(page.get_by_label("Your question")).to_be_focused()


def test_phone_width_needs_no_sideways_scrolling(site: Site, visit: Visit) -> None:
    visitor = visit(site.url, **PHONE)
    page = visitor.page
    wider = "document.documentElement.scrollWidth - innerWidth"
    visitor.ask("word" * 60)
    expect(page.get_by_label("Copy answer")).to_be_visible()
    page.get_by_label("New conversation").last.click()
    visitor.ask("What is 6*7?")
    visitor.answered("That is 42.")
    page.locator(".answer summary").click()
    assert page.evaluate(wider) <= 0
    visitor.correct("long" * 80, "comment" * 40)
    assert page.evaluate(wider) <= 0
    expect(page.locator("#bar")).to_be_in_viewport(ratio=1)
    page.locator(".model").click()
    expect(page.get_by_role("heading", name="In a terminal")).to_be_visible()
    assert page.evaluate("document.querySelector('#lineage').matches(':modal')")
    assert page.evaluate("(e => e.scrollWidth - e.clientWidth)(document.querySelector('#lineage-content'))") <= 0
    page.get_by_label("Close", exact=True).click()
    page.get_by_role("button", name="Past conversations").click()
    expect(page.get_by_role("link", name="wordword")).to_be_in_viewport()
    assert page.evaluate(wider) <= 0
    page.get_by_role("link", name="wordword").click()
    expect(page.locator(".question")).to_contain_text("word" * 60)
    expect(page.locator("#conversations")).not_to_be_in_viewport()
    assert page.evaluate(wider) <= 0


CONTRASTS = """() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const over = (color, under) => {
    canvas.fillStyle = under;
    canvas.fillRect(0, 0, 1, 1);
    canvas.fillStyle = color;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const css = ([r, g, b]) => `rgb(${r} ${g} ${b})`;
  const ground = (element) => {
    if (!element) return "rgb(255 255 255)";
    return css(over(getComputedStyle(element).backgroundColor, ground(element.parentElement)));
  };
  const light = (channels) => {
    const linear = (c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    const [r, g, b] = channels.map((c) => linear(c / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const rows = [];
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const element = walk.currentNode.parentElement;
    const shown = element.checkVisibility({ opacityProperty: true, visibilityProperty: true });
    if (!walk.currentNode.data.trim() || !shown || element.closest(".unseen, :disabled")) continue;
    const under = ground(element);
    const [a, b] = [over(getComputedStyle(element).color, under), over(under, under)].map(light);
    rows.push([(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), walk.currentNode.data.trim()]);
  }
  return rows;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_stands_out_from_its_ground(site: Site, visit: Visit, scheme: str) -> None:
    other = {"light": "dark", "dark": "light"}[scheme]
    visitor = visit(site.url, color_scheme=other, viewport={"width": 1440, "height": 900})
    page = visitor.page
    page.get_by_label("Switch between dark and light").click()  # by the button, against the system
    page.reload()
    paper = page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
    assert paper == {"light": "rgb(250, 249, 246)", "dark": "rgb(23, 23, 21)"}[scheme]
    read = page.evaluate(CONTRASTS)
    visitor.ask("What is 6*7?")
    visitor.answered("That is 42.")
    page.locator(".answer summary").click()
    visitor.correct("Forty-two.", "In words.")
    page.locator(".model").click()
    expect(page.get_by_role("heading", name="In a terminal")).to_be_visible()
    read += page.evaluate(CONTRASTS)
    page.get_by_role("button", name="Change").click()
    page.get_by_label("Keyboard shortcuts").click()
    read += page.evaluate(CONTRASTS)
    assert len({text for _, text in read}) > 60
    assert [(text, ratio) for ratio, text in read if ratio < 4.5] == []


def test_every_control_has_a_name(site: Site, visit: Visit) -> None:
    visitor = visit(site.url)
    visitor.ask("What is 6*7?")
    visitor.answered("That is 42.")
    visitor.page.get_by_label("Bad answer").click()
    visitor.page.locator(".model").click()
    expect(visitor.page.get_by_role("heading", name="In a terminal")).to_be_visible()
    nameless = """(tags) => [...document.querySelectorAll(tags)].filter((one) =>
      !(one.ariaLabel || one.getAttribute("aria-labelledby") || one.labels?.length || one.textContent.trim()))
      .map((one) => one.outerHTML)"""
    assert visitor.page.evaluate(nameless, "button, a, input, textarea, summary, dialog, nav, aside") == []
    ids = "(all => all.length - new Set(all).size)([...document.querySelectorAll('[id]')].map(one => one.id))"
    assert visitor.page.evaluate(ids) == 0


def test_endpoint_with_keys_is_given_one_for_this_tab(
    site: Site, visit: Visit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOOPWRIGHT_API_KEYS", "sesame")
    with listening(GatewayMiddleware(site.app.app, site.app.api)) as url:
        visitor = visit(url)
        dialog = visitor.page.get_by_role("dialog", name="This endpoint wants an API key")
        for key, said in (("wrong", ""), ("sesame", "The endpoint does not know the key that was given.")):
            expect(dialog.locator(".wrong")).to_have_text(said)
            dialog.get_by_label("API key", exact=True).fill(key)
            visitor.page.keyboard.press("Enter")
        expect(dialog).to_be_hidden()
        expect(visitor.page.locator("#served")).to_contain_text("agent/1")
        visitor.ask("What is 6*7?")
        visitor.answered("That is 42.")
        assert visitor.page.evaluate("sessionStorage.getItem('loopwright.key')") == "sesame"
        assert "sesame" not in visitor.page.evaluate("JSON.stringify(localStorage)")
        visitor.page.context.close()
    assert all("401" in said for said in visitor.complaints), visitor.complaints
    visitor.complaints.clear()


def test_page_works_below_a_path_of_a_proxy(site: Site, visit: Visit) -> None:
    async def below(scope: Any, receive: Any, send: Any) -> None:
        assert scope["path"].startswith("/team/agent/")
        await site.app({**scope, "path": scope["path"].removeprefix("/team/agent")}, receive, send)

    with listening(below) as url:
        visitor = visit(f"{url}/team/agent/")
        visitor.ask("What is 6*7?")
        visitor.answered("That is 42.")
        visitor.page.locator(".model").click()
        expect(visitor.page.get_by_role("heading", name="In a terminal")).to_be_visible()
        visitor.page.context.close()


def test_a_call_that_changes_something_runs_when_a_person_says_so(
    site: Site, visit: Visit, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = site.serving.models.engine.agent
    calls: list[dict[str, Any]] = []

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda **arguments: (calls.append(arguments), function(**arguments))[1]

    tools = tuple(replace(tool, writes=True, function=counted(tool.function)) for tool in agent.own_tools)
    monkeypatch.setattr(agent, "own_tools", tools)
    visitor = visit(site.url)
    visitor.ask("What is 6*7?")
    answer = visitor.page.locator(".answer")
    expect(answer.locator(".state")).to_have_text("A tool that changes something waits for you.")
    expect(answer.locator("code")).to_have_text('calculate(expression="6*7")')
    expect(answer.locator("details")).to_be_hidden()
    assert not calls
    answer.get_by_role("button", name="Run it").click()
    visitor.answered("That is 42.")
    expect(answer.locator("details summary")).to_have_text("1 step: calculate")
    expect(answer.get_by_role("button", name="Run it")).to_be_hidden()
    assert calls == [{"expression": "6*7"}]


def test_full_queue_says_when_to_try_again(site: Site, visit: Visit, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise QueueFull(7)

    visitor = visit(site.url)
    with monkeypatch.context() as patch:
        patch.setattr(ChatHandler, "submit", full)
        visitor.ask("What is 6*7?")
        notice = visitor.page.locator("#notice")
        expect(notice).to_contain_text(
            re.compile(r"Too many questions are being answered right now. Try again in [67] s.")
        )
    notice.get_by_role("button", name="Try again").click()
    visitor.answered("That is 42.")
    expect(notice).to_be_empty()
    assert len(visitor.complaints) == 1
    assert "429" in visitor.complaints.pop()


def test_question_waits_while_the_model_loads(site: Site, visit: Visit) -> None:
    serving_models, site.serving.models.serving_models = site.serving.models.serving_models, ServingModels()
    try:
        visitor = visit(site.url)
        expect(visitor.page.locator("#served")).to_have_text("The model is loading …")
        visitor.ask("What is 6*7?")
        expect(visitor.page.locator(".state")).to_contain_text("The model is still loading.")
    finally:
        site.serving.models.serving_models = serving_models
    visitor.answered("That is 42.")
    expect(visitor.page.locator("#served")).to_contain_text("agent/1")
    assert all("503" in said for said in visitor.complaints)
    visitor.complaints.clear()


def test_lost_connection_and_lost_endpoint_are_said_in_one_line(site: Site, visit: Visit) -> None:
    with listening(site.app) as url:
        visitor = visit(url)
        expect(visitor.page.locator("#served")).to_contain_text("agent/1")
    visitor.ask("Hello")
    expect(visitor.page.locator("#notice p > span")).to_have_text(
        "The endpoint does not answer. Is it running, and is this machine online?"
    )
    expect(visitor.page.locator(".state")).to_have_text("Not answered. Ask again")
    assert all("ERR_CONNECTION_REFUSED" in said for said in visitor.complaints)
    visitor.complaints.clear()


def test_conversation_beyond_the_context_goes_on_without_its_beginning(site: Site, visit: Visit) -> None:
    visitor = visit(site.url)
    visitor.ask("A story")
    visitor.answered(STORY)
    tokenizer = site.serving.models.engine.agent.tokenizer
    question = "long"
    while len(tokenizer.encode_chat([{"role": "user", "content": question}])[0]) < 216:  # of 256, and the story has 80
        question += " long"
    site.pace.allowed = 1
    visitor.ask(question)
    expect(visitor.page.locator("#notice")).to_contain_text("its first 2 messages were left out")
    visitor.page.keyboard.press("Escape")
    site.pace.allowed = math.inf
    assert all("400" in said for said in visitor.complaints)
    visitor.complaints.clear()


def test_policy_keeps_out_what_is_inline_and_what_is_elsewhere(url: str, visit: Visit) -> None:
    visitor = visit(url)
    response = visitor.page.request.get(f"{url}/")
    assert response.headers["content-security-policy"] == POLICY
    assert visitor.page.request.get(f"{url}/page/nope.js").json()["error"]["code"] == "not_found"
    violated = visitor.page.evaluate(
        """async () => {
          const violated = [];
          document.addEventListener("securitypolicyviolation", (event) => violated.push(event.effectiveDirective));
          const script = document.createElement("script");
          script.textContent = "window.inlined = true";
          document.body.append(script);
          document.body.setAttribute("onclick", "window.inlined = true");
          document.body.click();
          const style = document.createElement("style");
          document.body.append(style);
          style.textContent = "body { color: red }";
          const image = new Image();
          image.src = "http://example.invalid/x.png";
          await fetch("http://example.invalid/").catch(() => null);
          await new Promise((resolve) => setTimeout(resolve, 0));
          return [...new Set(violated), String(window.inlined)];
        }"""
    )
    assert set(violated) >= {"script-src-elem", "script-src-attr", "style-src-elem", "img-src", "connect-src"}
    assert violated[-1] == "undefined"
    visitor.complaints.clear()
    visitor.addresses.remove("http://example.invalid/x.png")  # told of, but blocked


MARKDOWN = {
    "plain": "<p>plain</p>",
    "a\nb\n\nc": "<p>a\nb</p><p>c</p>",
    "use `json.dumps` now": "<p>use <code>json.dumps</code> now</p>",
    "**bold** and *slanted*": "<p><strong>bold</strong> and <em>slanted</em></p>",
    "2*3*4 and __init__ and *args, **kwargs": "<p>2*3*4 and __init__ and *args, **kwargs</p>",
    "# Title\ntext": '<p class="heading">Title</p><p>text</p>',
    "- a\n- b\n  - c": "<ul><li>a</li><li>b<ul><li>c</li></ul></li></ul>",
    "3. c\n4. d": '<ol start="3"><li>c</li><li>d</li></ol>',
    "1. a\n   more": "<ol><li>a\nmore</li></ol>",
    "[x](javascript:alert(1))": "<p>[x](javascript:alert(1))</p>",
    "<img src=x onerror=alert(1)>": "<p>&lt;img src=x onerror=alert(1)&gt;</p>",
    "`<b>`": "<p><code>&lt;b&gt;</code></p>",
    "```py\n<b>\n\n*a*\n```\nend": "<pre>&lt;b&gt;\n\n*a*</pre><p>end</p>",
    "```\nopen": "<pre>open</pre>",
    "`` a`b `` `": "<p><code>a`b</code> `</p>",
    "": "",
}


def test_markdown_is_shown_as_elements_and_html_as_text(site: Site, visit: Visit) -> None:
    shown = visit(site.url).page.evaluate(
        """async (texts) => {
          const { show } = await import("/page/markdown.js");
          const seen = (text, pieces) => {
            const box = document.createElement("div");
            for (let end = pieces; end < text.length; end += pieces) show(box, text.slice(0, end), () => {});
            show(box, text, () => {});
            for (const code of box.querySelectorAll(".code")) {
              const pre = document.createElement("pre");
              pre.textContent = code.querySelector("code").textContent;
              code.replaceWith(pre);
            }
            return box.innerHTML;
          };
          return texts.map((text) => [seen(text, text.length + 1), seen(text, 1)]);
        }""",
        list(MARKDOWN),
    )
    assert [whole for whole, _ in shown] == list(MARKDOWN.values())
    assert [grown for _, grown in shown] == list(MARKDOWN.values()), "letter by letter it ends as the same"


def test_events_are_read_however_the_network_cuts_them(site: Site, visit: Visit) -> None:
    text = 'data: {"a":"Grüße 日本"}\n\n: a comment\n\ndata: two\ndata: lines\n\ndata: [DONE]\n\n'
    read = visit(site.url).page.evaluate(
        """async (text) => {
          const { events } = await import("/page/stream.js");
          const bytes = new TextEncoder().encode(text);
          const found = [];
          for (let size = 1; size <= bytes.length; size += 1) {
            const body = new ReadableStream({
              start(control) {
                for (let at = 0; at < bytes.length; at += size) control.enqueue(bytes.slice(at, at + size));
                control.close();
              },
            });
            const said = [];
            for await (const event of events(body)) said.push(event);
            found.push(JSON.stringify(said));
          }
          return [...new Set(found)].map((one) => JSON.parse(one));
        }""",
        text,
    )
    assert read == [['{"a":"Grüße 日本"}', "two\nlines", "[DONE]"]]
