"""Pictures and clips on the page: chosen, pasted, dropped, sent, shown, corrected, and behind the answer."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw
from playwright.sync_api import Page, expect

from components.feedback.store import Store
from tests.serving.browsing import Visit, Visitor
from tests.serving.listening import listening

pytestmark = pytest.mark.platform

PHONE = {"viewport": {"width": 360, "height": 740}, "has_touch": True}
PUT = """([name, type, data, how]) => {
  const bytes = Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0));
  const transfer = new DataTransfer();
  transfer.items.add(new File([bytes], name, { type }));
  const options = { bubbles: true, cancelable: true };
  if (how === "paste") {
    const event = new ClipboardEvent("paste", { ...options, clipboardData: transfer });
    document.querySelector("#question").dispatchEvent(event);
  } else {
    for (const kind of ["dragover", "drop"])
      document.querySelector("#main").dispatchEvent(new DragEvent(kind, { ...options, dataTransfer: transfer }));
  }
}"""


def shape(color: str, width: int = 96, height: int = 64) -> Image.Image:
    picture = Image.new("RGB", (width, height), "white")
    ImageDraw.Draw(picture).ellipse((width // 4, height // 6, 3 * width // 4, 5 * height // 6), fill=color)
    return picture


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("files")
    shape("teal").save(folder / "teal.png")
    shape("orange").save(folder / "orange.jpg")
    shape("teal", 4000, 2000).save(folder / "huge.png")
    frames = [shape(color) for color in ("teal", "orange", "navy")]
    frames[0].save(folder / "moves.gif", save_all=True, append_images=frames[1:], duration=500)
    frames[0].save(folder / "moves.webp", save_all=True, append_images=frames[1:], duration=500)
    frames[0].save(folder / "still.gif")
    (folder / "notes.png").write_text("words")
    return {path.name: path for path in folder.iterdir()}


@pytest.fixture
def seeing_url(seeing: Any) -> Iterator[str]:
    with listening(seeing.client.app) as url:
        yield url


@pytest.fixture
def visit_seeing(visit: Visit, seeing_url: str) -> Visit:
    """Opens a page that offers pictures."""

    def open_page(**options: Any) -> Visitor:
        visitor = visit(seeing_url, **options)
        expect(visitor.page.get_by_label("Add a picture or clip")).to_be_visible()
        return visitor

    return open_page


def put(page: Page, path: Path, how: str) -> None:
    """Paste or drop a file."""
    data = base64.b64encode(path.read_bytes()).decode()
    kind = {"png": "image/png", "jpg": "image/jpeg", "gif": "image/gif", "webp": "image/webp"}[path.suffix[1:]]
    page.evaluate(PUT, [path.name, kind, data, how])


def pictures_asked(seeing: Any) -> list[list[str]]:
    """Of each message of the last request, the sizes of its pictures."""
    messages = seeing.serving.models.engine.requests[-1].messages
    return [
        [f"{each.pixels.shape[1]}x{each.pixels.shape[0]}" for each in message.get("images", ())] for message in messages
    ]


@pytest.mark.parametrize("how", ["choose", "paste", "drop"])
def test_a_picture_is_previewed_sent_shown_and_stays(
    seeing: Any, visit_seeing: Visit, files: dict[str, Path], how: str
) -> None:
    visitor = visit_seeing()
    page = visitor.page
    if how == "choose":
        with page.expect_file_chooser() as chooser:
            page.get_by_label("Add a picture or clip").click()
        chooser.value.set_files([files["teal.png"], files["orange.jpg"]])
    else:
        put(page, files["teal.png"], how)
        put(page, files["orange.jpg"], how)
    preview = page.locator("#attached img")
    expect(preview).to_have_count(2)
    expect(page.locator("body")).not_to_have_class(re.compile("dropping"))
    page.get_by_label("Remove teal.png").click()
    expect(preview).to_have_count(1)
    put(page, files["teal.png"], "paste")
    expect(preview).to_have_count(2)
    visitor.ask("What is this?")
    visitor.answered(re.compile("^96x64 .{8}, 96x64 .{8}$"))
    expect(preview).to_have_count(0)
    assert pictures_asked(seeing) == [["96x64", "96x64"]]
    sent = page.locator(".question img")
    expect(sent).to_have_count(2)
    visitor.ask("And now?")
    visitor.answered(re.compile("^96x64 "))
    assert pictures_asked(seeing) == [["96x64", "96x64"], [], []]
    page.reload()
    expect(sent).to_have_count(2)
    assert all(page.evaluate("[...document.querySelectorAll('.question img')].map((each) => each.naturalWidth > 0)"))


def test_animations_are_clips_and_large_pictures_are_made_smaller(
    seeing: Any, visit_seeing: Visit, files: dict[str, Path]
) -> None:
    visitor = visit_seeing()
    for names, sizes in (
        (["moves.gif"], ["96x64"] * 3),
        (["moves.webp"], ["96x64"] * 3),
        (["still.gif"], ["96x64"]),
        (["huge.png"], ["1568x784"]),
    ):
        visitor.page.get_by_role("button", name="New conversation").first.click()
        visitor.page.locator("#files").set_input_files([files[name] for name in names])
        expect(visitor.page.locator("#attached img")).to_have_count(1)
        visitor.page.get_by_label("Your question").press("Enter")
        visitor.answered(re.compile(f"^{sizes[0]} "))
        assert pictures_asked(seeing) == [sizes]
        expect(visitor.page.locator("#past .title").first).to_have_text(names[0])


def test_a_video_is_shown_with_controls_under_the_policy(visit_seeing: Visit) -> None:
    """The browser of a test plays no MP4 file; what counts is that the policy lets it try."""
    visitor = visit_seeing()
    data = base64.b64encode(b"\0\0\0\x18ftypmp42").decode()
    visitor.page.evaluate(PUT, ["walk.mp4", "video/mp4", data, "drop"])
    clip = visitor.page.locator("#attached video")
    expect(clip).to_have_attribute("controls", "")
    assert clip.get_attribute("src") == f"data:video/mp4;base64,{data}"


def test_a_file_that_is_no_picture_is_said_in_one_line(visit_seeing: Visit, files: dict[str, Path]) -> None:
    visitor = visit_seeing()
    put(visitor.page, files["notes.png"], "drop")
    expect(visitor.page.locator("#notice")).to_contain_text("notes.png is no picture or clip that can be sent")
    expect(visitor.page.locator("#attached")).to_be_hidden()
    assert visitor.page.locator("#attached img, #attached video").count() == 0


def test_pictures_are_offered_only_where_the_model_sees(local: Any, visit: Visit, files: dict[str, Path]) -> None:
    with listening(local.client.app) as url:
        visitor = visit(url)
        expect(visitor.page.locator("#served")).to_contain_text("agent/1")
        expect(visitor.page.get_by_label("Add a picture or clip")).to_be_hidden()
        put(visitor.page, files["teal.png"], "paste")
        put(visitor.page, files["teal.png"], "drop")
        expect(visitor.page.locator("#attached")).to_be_hidden()
        assert visitor.page.locator("#attached img, #attached video").count() == 0
        visitor.page.context.close()


def test_an_answer_about_a_picture_is_corrected_and_its_lineage_shows_the_picture(
    seeing: Any, visit_seeing: Visit, files: dict[str, Path]
) -> None:
    visitor = visit_seeing(viewport={"width": 1440, "height": 900})
    page = visitor.page
    put(page, files["teal.png"], "drop")
    visitor.ask("Which color is it?")
    visitor.answered(re.compile("^96x64 "))
    visitor.correct("Teal.", "Look again.")
    store: Store = seeing.serving.store
    vote = store.completion(visitor.completion_id)["feedback"][-1]
    assert (vote["rating"], vote["correction"]) == ("down", "Teal.")
    page.locator(".model").click()
    panel = page.get_by_role("dialog", name="Behind this answer")
    expect(panel.locator("h3").nth(1)).to_have_text("Picture")
    expect(panel.locator("img")).to_have_attribute("alt", "Picture of the question, 96 × 64")
    expect(panel).to_contain_text("Which color is it?")
    source = panel.locator("img").get_attribute("src") or ""
    content = base64.b64decode(source.removeprefix("data:image/png;base64,"))
    with Image.open(io.BytesIO(content)) as shown:
        assert shown.size == (96, 64)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pictures_fit_a_phone(visit_seeing: Visit, files: dict[str, Path], scheme: str) -> None:
    visitor = visit_seeing(color_scheme=scheme, **PHONE)
    page = visitor.page
    for name in ("huge.png", "teal.png", "orange.jpg", "moves.gif"):
        put(page, files[name], "drop")
        expect(page.get_by_label(f"Remove {name}")).to_be_visible()
    widths = "[document.documentElement.scrollWidth, document.querySelector('#scroll').scrollWidth]"
    assert max(page.evaluate(widths)) <= 360
    visitor.ask("What are these?")
    visitor.answered(re.compile("^1568x784 "))
    assert max(page.evaluate(widths)) <= 360
    controls = "document.querySelectorAll('button:not([aria-label]), input:not([aria-label])')"
    unnamed = f"[...{controls}].filter((each) => !each.textContent && !each.labels?.length).length"
    assert page.evaluate(unnamed) == 0
