"""The agent in front of another server: a second endpoint, asked over real HTTP."""

from __future__ import annotations

import queue
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from components.agent.agent import ContextTooLong
from components.agent.tools import Tool
from components.config.loop_settings import ServeConfig
from components.config.params import InputError, load_params
from serving.engine.backend import AgentStep, Backend, Completion, Event, Failure, GenerationRequest, Start, TextDelta
from serving.engine.remote import BackendUnavailable, RemoteServer
from serving.http.app import new_api
from serving.http.gateway import GatewayMiddleware
from serving.models.state import Serving
from serving.models.versions import Bundled
from serving.server import listen, serve_in_thread

CONFIG = load_params(Path(__file__).parents[2] / "params.yaml").serve
GREETING = "Grüße, naïve façade: 日本語 and \N{SNOWMAN}."
WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def backend(agent_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Serving]]:
    home = tmp_path_factory.mktemp("backend")
    serving = Serving.open(home, CONFIG, "", Bundled(agent_folder, {"name": "agent", "version": 7}))
    serving.models.first.wait()
    with serve_in_thread(serving) as url:
        yield f"{url}/v1", serving
    serving.close()


def pointed(url: str) -> ServeConfig:
    return CONFIG.model_copy(update={"backend": "openai", "backend_url": url, "backend_model": "agent"})


@pytest.fixture
def remote(agent_folder: Path, backend: tuple[str, Serving]) -> Iterator[Backend]:
    engine = RemoteServer.load(agent_folder, "agent/1", pointed(backend[0]))
    assert isinstance(engine, RemoteServer)
    engine.agent.own_tools = ()
    yield engine
    engine.close()


def events(engine: Backend, content: str, **options: Any) -> list[Event]:
    told: queue.Queue[Event] = queue.Queue()
    engine.submit(GenerationRequest([{"role": "user", "content": content}], **options), told.put)
    found = [told.get(timeout=60)]
    while not isinstance(found[-1], Completion | Failure):
        found.append(told.get(timeout=60))
    return found


def test_words_come_through_as_they_are_written(remote: Backend) -> None:
    told = events(remote, "Hello")
    last = told[-1]
    assert isinstance(told[0], Start)
    assert isinstance(last, Completion)
    assert "".join(event.text for event in told if isinstance(event, TextDelta)) == last.content == GREETING
    assert len(told) > 5
    assert last.finish_reason == "stop"
    assert last.completion_tokens > 5 < last.prompt_tokens


def test_calls_that_come_back_are_run_and_asked_on(remote: Backend) -> None:
    asked: list[str] = []

    def weather(city: str) -> str:
        asked.append(city)
        return "sunny"

    remote.agent.own_tools = (Tool("get_weather", "", WEATHER, weather),)
    told = events(remote, "Weather in Paris?")
    steps = [event.step for event in told if isinstance(event, AgentStep)]
    assert asked[:1] == ["Paris"]
    assert steps[:2] == [
        {"type": "call", "name": "get_weather", "arguments": {"city": "Paris"}},
        {"type": "result", "name": "get_weather", "content": "sunny"},
    ]
    assert isinstance(told[-1], Completion)
    assert told[-1].steps == steps


def test_calls_of_the_clients_tools_are_handed_back(remote: Backend) -> None:
    tools = [{"type": "function", "function": {"name": "get_weather", "parameters": WEATHER}}]
    last = events(remote, "Weather in Paris?", tools=tools)[-1]
    assert isinstance(last, Completion)
    assert [call["function"] for call in last.tool_calls] == [{"name": "get_weather", "arguments": '{"city": "Paris"}'}]
    assert last.finish_reason == "tool_calls"


def test_requests_share_a_connection(remote: Backend) -> None:
    assert isinstance(remote, RemoteServer)
    ports: list[int] = []

    async def note(response: httpx.Response) -> None:
        ports.append(response.extensions["network_stream"].get_extra_info("client_addr")[1])

    remote.client.event_hooks = {"response": [note]}
    for _ in range(3):
        assert isinstance(events(remote, "Hello")[-1], Completion)
    assert len(ports) == 3
    assert len(set(ports)) == 1


@pytest.mark.parametrize(
    ("content", "options", "kind", "said"),
    [
        ("word " * 5_000, {}, ContextTooLong, "do not fit"),
        ("Hello", {"temperature": 3.0}, InputError, "the backend refused the request: temperature: 3.0"),
    ],
)
def test_what_the_backend_refuses_is_told_in_its_words(
    remote: Backend, content: str, options: dict[str, Any], kind: type[InputError], said: str
) -> None:
    last = events(remote, content, **options)[-1]
    assert isinstance(last, Failure)
    assert type(last.error) is kind
    assert said in str(last.error)


@contextmanager
def answering(events: bytes) -> Iterator[str]:
    """A server that answers the question for its models and one chat with these events, and goes."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            for _ in range(2):
                connection, _ = listener.accept()
                with connection:
                    connection.recv(65_536)
                    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Length: %d\r\n\r\n"
                    connection.sendall(head % len(events) + events)

        thread = threading.Thread(target=answer)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        thread.join()


@pytest.mark.parametrize(
    ("sent", "said"),
    [
        (b"data: <html>\n\n", "an event is not JSON"),
        (b"data: 3\n\n", "an event is not a JSON object: 3"),
        (b'data:{"error": {"message": "out of memory"}}\n\n', "out of memory"),
        (b'data: {"error": "gone"}\n\n', "gone"),
    ],
)
def test_broken_events_are_said_so(agent_folder: Path, sent: bytes, said: str) -> None:
    with answering(sent) as url:
        engine = RemoteServer.load(agent_folder, "agent/1", pointed(url))
        last = events(engine, "Hello")[-1]
        engine.close()
    assert isinstance(last, Failure)
    assert isinstance(last.error, BackendUnavailable)
    assert said in str(last.error)


def test_cancelling_lets_the_backend_go(remote: Backend, backend: tuple[str, Serving]) -> None:
    told: queue.Queue[Event] = queue.Queue()
    ask = GenerationRequest([{"role": "user", "content": "A story"}], temperature=2.0, seed=1, max_tokens=200)
    task = remote.submit(ask, told.put)
    assert isinstance(told.get(timeout=60), Start)
    task.cancel()
    while not isinstance(last := told.get(timeout=60), Completion):
        pass
    assert last.finish_reason in ("cancelled", "stop", "length")
    finished = events(remote, "Hello")[-1]
    assert isinstance(finished, Completion)


def test_backend_that_is_away_is_said_so(agent_folder: Path) -> None:
    listener = listen("127.0.0.1", 0)
    url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
    listener.close()
    engine = RemoteServer.load(agent_folder, "agent/1", pointed(url))
    last = events(engine, "Hello")[-1]
    assert isinstance(last, Failure)
    assert isinstance(last.error, BackendUnavailable)
    assert "is the backend up?" in str(last.error)
    engine.close()


def test_endpoint_in_front_answers_records_and_traces(
    agent_folder: Path, backend: tuple[str, Serving], tmp_path: Path
) -> None:
    from starlette.testclient import TestClient

    bundled = Bundled(agent_folder, {"name": "agent", "version": 3, "run_id": "r3"})
    serving = Serving.open(tmp_path, pointed(backend[0]), "", bundled)
    serving.models.first.wait()
    api = new_api()
    api.state.serving = serving
    client = TestClient(GatewayMiddleware(api, api))
    body = {"messages": [{"role": "user", "content": "Hello"}], "tool_choice": "none"}
    answer = client.post("/v1/chat/completions", json=body).json()
    assert (answer["model"], answer["choices"][0]["message"]["content"]) == ("agent/3", GREETING)
    vote = client.post("/v1/feedback", json={"completion_id": answer["id"], "rating": "up"})
    assert vote.status_code == 202
    assert client.get(f"/v1/lineage/{answer['id']}").json()["model"] == "agent/3"
    serving.close()


def test_backend_without_an_address_is_an_input_error(agent_folder: Path) -> None:
    config = pointed("http://127.0.0.1:1").model_copy(update={"backend_model": None})
    with pytest.raises(InputError, match=r"needs serve\.backend_url and serve\.backend_model"):
        RemoteServer.load(agent_folder, "agent/1", config)
