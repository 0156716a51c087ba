"""Pictures and clips in chat requests: what reaches the model, what is recorded, and what is refused by name."""

from __future__ import annotations

import base64
import io
import json
import os
import random
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from openai import OpenAI
from PIL import Image

from components.media.messages import IMAGE
from components.media.pictures import Picture, decode_picture
from serving.engine.picture_parts import with_picture_parts
from tests.serving.listening import listening


def pixels(width: int, height: int, seed: int) -> Any:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def picture_file(width: int = 5, height: int = 3, seed: int = 0, form: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels(width, height, seed)).save(file, form, **({"lossless": True} if form == "WEBP" else {}))
    return file.getvalue()


def clip_file(count: int = 3, milliseconds: int = 500, form: str = "WEBP") -> bytes:
    frames = [Image.fromarray(pixels(16, 8, seed)) for seed in range(count)]
    file = io.BytesIO()
    options: dict[str, Any] = {"lossless": True} if form == "WEBP" else {}
    frames[0].save(file, form, save_all=True, append_images=frames[1:], duration=milliseconds, **options)
    return file.getvalue()


def data_url(content: bytes, media_type: str = "image/png") -> str:
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"


def image(content: bytes, media_type: str = "image/png", **more: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": data_url(content, media_type), **more}}


def video(content: bytes, media_type: str = "video/mp4") -> dict[str, Any]:
    return {"type": "video_url", "video_url": {"url": data_url(content, media_type)}}


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def digest(content: bytes) -> str:
    return decode_picture(content, "test").digest


def last_request(app: Any) -> Any:
    return app.serving.models.engine.requests[-1]


def answer(response: Any) -> str:
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["message"]["content"])


def refusal(response: Any) -> tuple[str, str, str]:
    """Param, code and message of a 400."""
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    return error["param"], error["code"], error["message"]


@pytest.mark.parametrize("form", ["PNG", "WEBP", "GIF", "JPEG"])
@pytest.mark.parametrize("media_type", ["image/png", "image/jpeg", "application/octet-stream"])
def test_a_picture_reaches_the_model_whatever_its_media_type_says(seeing: Any, form: str, media_type: str) -> None:
    content = picture_file(9, 4, form=form)
    said = answer(seeing.ask([text("What is this?"), image(content, media_type, detail="low")]))
    assert said == f"9x4 {digest(content)[:8]}"


def test_marks_stand_where_the_pictures_do_and_typed_marks_are_broken(seeing: Any) -> None:
    first, second = picture_file(seed=1), picture_file(seed=2)
    content = [text("<ima"), text("ge> is "), image(first), text("or "), image(second), text("?")]
    history = [{"role": "user", "content": f"A {IMAGE}"}, {"role": "assistant", "content": "Yes."}]
    answer(seeing.post({"messages": [*history, {"role": "user", "content": content}]}))
    *earlier, message = last_request(seeing).messages
    assert message["content"] == f"<image > is \n{IMAGE}\nor \n{IMAGE}\n?"
    assert [each.digest for each in message["images"]] == [digest(first), digest(second)]
    assert [(each["content"], each.get("images")) for each in earlier] == [(f"A {IMAGE}", None), ("Yes.", None)]


def test_a_clip_is_its_frames_each_after_its_time(seeing: Any) -> None:
    answer(seeing.ask([video(clip_file(3, 500)), text("What moves?")]))
    (message,) = last_request(seeing).messages
    assert message["content"] == f"0.0 s {IMAGE} 0.5 s {IMAGE} 1.0 s {IMAGE}\nWhat moves?"
    assert [np.array_equal(each.pixels, pixels(16, 8, seed)) for seed, each in enumerate(message["images"])] == [
        True
    ] * 3


@pytest.mark.parametrize("stream", [False, True])
def test_the_record_has_digests_and_each_picture_once(seeing: Any, stream: bool) -> None:
    content, clip = picture_file(6, 7, seed=3), clip_file(2)
    parts = [image(content), image(content), video(clip), text("See?")]
    response = seeing.ask(parts, stream=stream)
    line = response.text.split("\n\n")[0].removeprefix("data: ") if stream else response.text
    found = seeing.client.get(f"/v1/lineage/{json.loads(line)['id']}").json()
    recorded = found["request"]["messages"][0]["content"]
    reference = {"type": "image_url", "image_url": {"url": f"loopwright:sha256:{digest(content)}"}}
    assert recorded[:2] == [reference, reference]
    assert recorded[2]["video_url"]["text"] == f"0.0 s {IMAGE} 0.5 s {IMAGE}"
    assert recorded[3] == text("See?")
    assert "base64" not in json.dumps(found)
    listed = {each["digest"]: each for each in found["pictures"]}
    frames = [frame["url"].rpartition(":")[2] for frame in recorded[2]["video_url"]["frames"]]
    assert list(listed) == [digest(content), *frames]
    about = listed[digest(content)]
    assert (about["width"], about["height"]) == (6, 7)
    stored = seeing.client.get(about["path"])
    assert stored.headers["content-type"] == "image/png"
    assert len(stored.content) == about["bytes"]
    assert decode_picture(stored.content, "stored").digest == digest(content)


def test_a_picture_is_found_by_the_answer_about_it_alone(seeing: Any) -> None:
    content = picture_file(seed=11)
    sent, other = (seeing.ask([image(each)]).json()["id"] for each in (content, picture_file(seed=12)))
    assert seeing.client.get(f"/v1/pictures/{sent}/{digest(content)}").status_code == 200
    for path in (f"{other}/{digest(content)}", f"{sent}/{'0' * 64}", f"%00/{'0' * 64}"):
        response = seeing.client.get(f"/v1/pictures/{path}")
        assert (response.status_code, response.json()["error"]["code"]) == (404, "not_found")
    assert seeing.client.get(f"/v1/pictures/{sent}/x").status_code == 400


def test_a_lineage_without_pictures_says_so(local: Any) -> None:
    completion = local.ask("Hello").json()["id"]
    assert local.client.get(f"/v1/lineage/{completion}").json()["pictures"] == []


def test_openais_client_sends_pictures_and_clips(seeing: Any) -> None:
    content = [image(picture_file(3, 2, 1)), image(picture_file(2, 3, 2)), video(clip_file(2)), text("Which is wider?")]
    with listening(seeing.client.app) as url, OpenAI(base_url=f"{url}/v1", api_key="unused") as client:
        messages: Any = [{"role": "user", "content": content}]
        plain = client.chat.completions.create(model="agent", messages=messages)
        pieces = client.chat.completions.create(model="agent", messages=messages, stream=True)
        streamed = "".join(piece.choices[0].delta.content or "" for piece in pieces)
    assert plain.choices[0].message.content == streamed
    assert [each.partition(" ")[0] for each in streamed.split(", ")] == ["3x2", "2x3", "16x8", "16x8"]


def test_models_list_what_they_read(local: Any, seeing: Any) -> None:
    read = [app.client.get("/v1/models").json()["data"][0]["modalities"] for app in (local, seeing)]
    assert read == [["text"], ["text", "image", "video"]]


@pytest.mark.parametrize("part", [image(picture_file()), video(clip_file()), image(b"broken")])
def test_a_model_that_reads_text_only_says_so(local: Any, part: dict[str, Any]) -> None:
    param, code, message = refusal(local.ask([text("What is this?"), part]))
    assert (param, code) == ("messages[0].content[1]", "unsupported_parameter")
    assert message == "messages[0].content[1]: this model reads text only; send parts of type 'text'"


def url_part(url: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


@pytest.mark.parametrize(
    ("part", "code", "message"),
    [
        (url_part("data:"), "invalid_image_url", "not a data URL in base64"),
        (url_part("data:image/png,abc"), "invalid_image_url", "not a data URL in base64"),
        (url_part("data:image/png;base64,"), "invalid_image", "no data"),
        (url_part("data:image/png;base64,a"), "invalid_base64_image", "its data is not base64"),
        (url_part("data:image/png;base64,\N{SNOWMAN}"), "invalid_base64_image", "its data is not base64"),
        (image(b"nothing"), "invalid_image", ""),
        (image(picture_file()[:40]), "invalid_image", ""),
        (video(b"nothing"), "invalid_video", ""),
        (url_part(""), "invalid_image_url", "not fetched from here; send a data URL"),
        (url_part("file:///etc/passwd"), "invalid_image_url", "file scheme: not fetched from here"),
        (url_part("http://"), "invalid_image_url", "not fetched from here"),
        (url_part("http://[::"), "invalid_image_url", "not an address"),
        (url_part("loopwright:sha256:" + "0" * 64), "invalid_image_url", "not fetched from here"),
        (
            url_part("https://example.com/a.png"),
            "invalid_image_url",
            "https://example.com: not fetched from here; send a data URL (serve.allowed_image_hosts: none)",
        ),
    ],
)
def test_a_wrong_part_is_named(seeing: Any, part: dict[str, Any], code: str, message: str) -> None:
    param, found, said = refusal(seeing.ask([text("What is this?"), part]))
    assert (param, found) == (f"messages[0].content[1].{part['type']}", code)
    assert said.startswith(f"{param}: ")
    assert message in said
    assert len(said) < 400


def test_wrong_shapes_are_named(seeing: Any) -> None:
    for part, param in [
        ({"type": "image_url"}, "messages[0].content[0].image_url"),
        ({"type": "image_url", "image_url": "data:"}, "messages[0].content[0].image_url"),
        ({"type": "image_url", "image_url": {"url": 5}}, "messages[0].content[0].image_url.url"),
        ({"type": "video_url", "video_url": {}}, "messages[0].content[0].video_url.url"),
        ({"type": "input_audio"}, "messages[0].content[0]"),
    ]:
        assert refusal(seeing.ask([part]))[0] == param
    for role in ("system", "assistant"):
        messages = [{"role": role, "content": [image(picture_file())]}, {"role": "user", "content": "x"}]
        param, _, message = refusal(seeing.post({"messages": messages}))
        assert (param, "belong to messages of role 'user'" in message) == ("messages[0]", True)


def test_pictures_of_a_request_are_limited(agent_folder: Path, tmp_path: Path, seeing_app: Any) -> None:
    with seeing_app(agent_folder, tmp_path, max_pictures=3) as app:
        assert answer(app.ask([image(picture_file(seed=seed)) for seed in range(3)])).count("x") == 3
        for parts in ([image(picture_file())] * 4, [image(picture_file()), video(clip_file(3))]):
            param, code, message = refusal(app.ask(parts))
            assert (param, code) == ("messages", "too_many_images")
            assert message == "messages: 4 pictures; send at most 3 (serve.max_pictures)"


def test_pixels_of_a_request_are_limited(seeing: Any) -> None:
    file = io.BytesIO()
    Image.new("1", (4096, 4096)).save(file, "PNG")
    param, code, message = refusal(seeing.ask([image(file.getvalue())] * 2))
    assert (param, code) == ("messages", "image_too_large")
    assert message == "messages: 33554432 pixels in its pictures; send at most 32000000"


def test_requests_that_are_read_at_once_are_limited(
    agent_folder: Path, tmp_path: Path, seeing_app: Any, files: str
) -> None:
    with seeing_app(agent_folder, tmp_path, allowed_image_hosts=[files], max_running=1) as app:
        answers: list[Any] = []
        slow = threading.Thread(target=lambda: answers.append(app.ask([url_part(f"http://{files}/slow")])))
        slow.start()
        assert Files.reached.wait(60)
        full = app.ask([image(picture_file())])
        assert (full.status_code, full.json()["error"]["code"]) == (429, "queue_full")
        assert full.headers["Retry-After"] == "1"
        assert answer(app.ask("Without")) == "no picture"
        Files.released.set()
        slow.join()
        assert answer(answers[0]).startswith("11x2 ")
        assert answer(app.ask([image(picture_file())])).startswith("5x3 ")


def test_bodies_with_pictures_may_be_larger_where_a_model_sees(local: Any, seeing: Any) -> None:
    large = picture_file(700, 700, form="PNG")
    assert len(large) > local.serving.config.max_body_bytes
    assert local.ask([image(large)]).status_code == 413
    assert answer(seeing.ask([image(large)])).startswith("700x700")
    votes = seeing.client.post("/v1/feedback", json={"completion_id": "x" * 1_100_000, "rating": "up"})
    assert votes.status_code == 413


class Files(BaseHTTPRequestHandler):
    """A server of pictures, and of redirects to elsewhere."""

    content: ClassVar[bytes] = picture_file(11, 2)
    hosts: ClassVar[list[str]] = []
    reached: ClassVar[threading.Event] = threading.Event()
    released: ClassVar[threading.Event] = threading.Event()

    def do_GET(self) -> None:
        self.hosts.append(self.headers["Host"])
        if self.path == "/moved":
            self.answer(302, b"", ("Location", "/a.png"))
        elif self.path == "/loop":
            self.answer(302, b"", ("Location", "/loop"))
        elif self.path == "/away":
            self.answer(302, b"", ("Location", "http://localhost:1/a.png"))
        elif self.path == "/slow":
            self.reached.set()
            self.released.wait(60)
            self.answer(200, self.content)
        else:
            self.answer(200 if self.path == "/a.png" else 404, self.content)

    def answer(self, status: int, body: bytes, *headers: tuple[str, str]) -> None:
        self.send_response(status)
        for name, value in (*headers, ("Content-Length", str(len(body)))):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def files() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Files) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def test_pictures_are_fetched_from_named_hosts_alone(
    agent_folder: Path, tmp_path: Path, seeing_app: Any, files: str
) -> None:
    port = files.rpartition(":")[2]
    with seeing_app(agent_folder, tmp_path, allowed_image_hosts=[files]) as app:
        for path in ("a.png", "moved"):
            assert answer(app.ask([url_part(f"http://{files}/{path}")])).startswith("11x2 ")
        assert Files.hosts[-1] == files
        for url, code, message in [
            (f"http://{files}/nothing", "failed_to_download_image", "not fetched: status 404"),
            (f"http://{files}/away", "invalid_image_url", "redirects to another host, localhost"),
            (f"http://{files}/loop", "failed_to_download_image", "more than 3 redirects"),
            (f"http://localhost:{port}/a.png", "invalid_image_url", "http://localhost: not fetched from here"),
            ("http://127.0.0.1/a.png", "invalid_image_url", "http://127.0.0.1: not fetched from here"),
        ]:
            _, found, said = refusal(app.ask([url_part(url)]))
            assert (found, message in said) == (code, True), said


def test_files_that_are_fetched_are_limited_in_bytes(
    agent_folder: Path, tmp_path: Path, seeing_app: Any, files: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Files, "content", b"x" * 5000)
    with seeing_app(agent_folder, tmp_path, allowed_image_hosts=[files], max_picture_body_bytes=4096) as app:
        _, code, message = refusal(app.ask([url_part(f"http://{files}/a.png")]))
        assert (code, "larger than 4096 bytes" in message) == ("image_too_large", True)


def test_a_name_that_leads_to_a_private_address_is_refused(
    agent_folder: Path, tmp_path: Path, seeing_app: Any, files: str
) -> None:
    """The resolver of a host that was named may be anybody's; this name is one of 127.0.0.1's."""
    port = files.rpartition(":")[2]
    with seeing_app(agent_folder, tmp_path, allowed_image_hosts=[f"127.1:{port}"]) as app:
        _, code, message = refusal(app.ask([url_part(f"http://127.1:{port}/a.png")]))
        assert code == "invalid_image_url"
        assert "127.1 has the private address 127.0.0.1" in message


def test_another_server_gets_pictures_as_openais_parts() -> None:
    picture = Picture(pixels(4, 4, 0))
    message = {"role": "user", "content": f"{IMAGE}\na\n{IMAGE}", "images": [picture, picture], "name": "me"}
    parts = with_picture_parts(message)["content"]
    assert [part["type"] for part in parts] == ["image_url", "text", "image_url"]
    assert parts[1]["text"].strip() == "a"
    content = base64.b64decode(parts[0]["image_url"]["url"].partition(",")[2])
    assert decode_picture(content, "part").digest == picture.digest
    plain = {"role": "user", "content": f"typed {IMAGE}"}
    assert with_picture_parts(plain) == plain


def damaged(chance: random.Random) -> dict[str, Any]:
    """A picture or clip part with a part of its file, its URL or its shape replaced."""
    content = bytearray(chance.choice([picture_file(form="PNG"), picture_file(form="GIF"), picture_file(form="JPEG")]))
    kind = chance.choice([image, video])
    if kind is video:
        content = bytearray(clip_file(form=chance.choice(["GIF", "WEBP"])))
    for _ in range(chance.randint(0, 4)):
        content[chance.randrange(len(content))] = chance.randrange(256)
    part = kind(bytes(content[: chance.choice([len(content), chance.randrange(len(content))])]))
    holder = part[part["type"]]
    if chance.random() < 0.3:
        url = holder["url"]
        at = chance.randrange(min(len(url), 40))
        holder["url"] = (
            url[:at] + chance.choice(["", ",", ";", "%", "\0", "=", "\N{SNOWMAN}", "http://"]) + url[at + 1 :]
        )
    if chance.random() < 0.1:
        part[part["type"]] = chance.choice([None, "", [], {}, {"url": None}, {"url": []}, 5])
    return part


@pytest.mark.parametrize("seed", range(2))
def test_no_damaged_picture_breaks_the_endpoint(seeing: Any, seed: int) -> None:
    """LOOPWRIGHT_TEST_CASES says how many are sent; the suite sends few."""
    chance = random.Random(seed)
    statuses: Counter[int] = Counter()
    cases = int(os.environ.get("LOOPWRIGHT_TEST_CASES", "100"))
    for _ in range(cases):
        parts = [damaged(chance), text("What?")]
        response = seeing.ask(parts)
        statuses[response.status_code] += 1
        assert response.status_code in (200, 400), (parts, response.text)
        if response.status_code == 400:
            assert refusal(response)[0].startswith("messages[0].content[0]")
    assert min(statuses[200], statuses[400]) >= cases // 20
