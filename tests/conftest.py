"""What many tests share because it takes long to make: one real pipeline run, and MLflow's tables."""

from __future__ import annotations

import functools
import io
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from components.runtime.service_registry import AUTH_FILE
from components.tracking.event_log import PARENT_RUN
from components.tracking.mlflow_client import UPLOADER, connect
from components.tracking.registry import ModelVersion, Registry
from tests.servers import postgres_server

SOURCE = Path(__file__).parents[1]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the tests marked `distributed` or `cluster`, which take both cores for minutes, unless `-m` names them.

    Services and pipelines come first: at the end, one of pytest-xdist's workers would run them alone.
    """
    for marker in ("distributed", "cluster"):
        if marker not in config.getoption("-m"):
            left_out = [item for item in items if item.get_closest_marker(marker)]
            config.hook.pytest_deselected(items=left_out)
            items[:] = [item for item in items if item not in left_out]
    items.sort(key=lambda item: not any(map(item.get_closest_marker, ("platform", "servers"))))
    for item in items:
        if "released" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.timeout(1800))  # the first of them runs the pipeline too


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With `--dist loadfile`, the files that use the released project share a worker: it is made once.

    The marker of pytest-xdist 3.8 for groups has no effect under pytest 9.2.
    """
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file: str = super()._split_scope(nodeid)
            return "released" if "released: Released" in (SOURCE / file).read_text() else file

    return Scheduling(config, log) if config.getoption("dist") == "loadfile" else None


def command_output(root: Path, environment: Mapping[str, str], *words: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `loopwright WORDS` in `root`, run in this process: that spares its imports."""
    from loopwright.cli import main

    out, err = io.StringIO(), io.StringIO()
    mask, variables = os.umask(0o077), dict(os.environ)
    with ExitStack() as stack:
        stack.callback(os.umask, mask)
        stack.callback(os.environ.update, variables)
        stack.callback(os.environ.clear)
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setattr(sys, "argv", ["loopwright", *words])
        patch.chdir(root)
        os.environ.clear()
        os.environ.update(environment)
        stack.enter_context(redirect_stdout(out))
        stack.enter_context(redirect_stderr(err))
        try:
            main()
        except SystemExit as ended:
            return int(ended.code or 0), out.getvalue(), err.getvalue()
    return 0, out.getvalue(), err.getvalue()


@dataclass(frozen=True)
class Project:
    """A copy of this project in a folder of its own, with a state folder of its own."""

    root: Path

    @property
    def home(self) -> Path:
        return self.root / "var"

    @property
    def environment(self) -> dict[str, str]:
        foreign = ("LOOPWRIGHT_", "PREFECT_", "MLFLOW_", "BENTOML_", "DVC_")
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
        # Dead ones: nothing that a project does on this machine may go by a proxy.
        proxies = {"http_proxy": "http://127.0.0.1:9", "HTTPS_PROXY": "127.0.0.1:9", "ALL_PROXY": "socks://127.0.0.1:9"}
        return {**inherited, **proxies, "OMP_NUM_THREADS": "2"}

    def command(self, *words: str) -> list[str]:
        return [sys.executable, "-m", "loopwright", *words]

    def loopwright(self, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run the command in the project, from its own sources."""
        return subprocess.run(
            self.command(*words), cwd=self.root, env={**self.environment, **environment}, capture_output=True, text=True
        )

    def ask(self, *words: str, **environment: str) -> Any:
        """The JSON document of a command that must succeed."""
        ended = self.loopwright(*words, "--json", **environment)
        assert ended.returncode == 0, f"{words}: exit {ended.returncode}\n{ended.stderr}"
        return json.loads(ended.stdout)

    def answer(self, *words: str) -> Any:
        """As `ask`, in this process: for commands that read or write the stores alone."""
        code, out, err = command_output(self.root, self.environment, *words, "--json")
        assert code == 0, f"{words}: exit {code}\n{err}"
        return json.loads(out)


def clone(root: Path) -> Project:
    """The files of this working tree, committed in a repository of their own."""
    listed = subprocess.run(
        ["git", "-C", str(SOURCE), "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        check=True,
        capture_output=True,
        text=True,
    )
    for name in filter(None, listed.stdout.split("\0")):
        # Without the results of the reference.
        if (SOURCE / name).is_file() and not name.endswith("dvc.lock") and not name.startswith("data/metrics/"):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes((SOURCE / name).read_bytes())
    git = ["git", "-C", str(root), "-c", "user.name=test", "-c", "user.email=test@example.com"]
    for words in (["init", "--quiet"], ["add", "--all"], ["commit", "--quiet", "--message", "Clone"]):
        subprocess.run([*git, *words], check=True)
    return Project(root)


@dataclass(frozen=True)
class Released:
    """A project whose pipeline ran at scale smoke and released `agent/1`."""

    project: Project
    report: dict[str, Any]
    """What `loopwright run --json` printed."""
    said: str
    """What it told meanwhile."""


def prefect_login(home: Path) -> tuple[str, str]:
    """User and password of the Prefect server of this state folder."""
    user, _, password = (home / AUTH_FILE).read_text().strip().partition(":")
    return user, password


@functools.cache
def csrf_headers(home: Path, api: str) -> dict[str, str]:
    """A token of this Prefect server, valid for an hour; asked for once, since each is a write to its database."""
    address, name = f"{api}/csrf-token", "tests"
    while (
        answer := httpx.get(address, params={"client": name}, auth=prefect_login(home), timeout=60)
    ).status_code == 503:
        time.sleep(0.1)  # its database is busy
    return {"Prefect-Csrf-Client": name, "Prefect-Csrf-Token": answer.raise_for_status().json()["token"]}


@contextmanager
def prefect_client(home: Path, api: str) -> Iterator[httpx.Client]:
    """A client of the Prefect server of this state folder, signed in as Prefect's page does."""
    headers = csrf_headers(home, api)
    with httpx.Client(base_url=api, auth=prefect_login(home), headers=headers, timeout=60) as client:
        yield client


@pytest.fixture(scope="session")
def released(tmp_path_factory: pytest.TempPathFactory) -> Released:
    """`loopwright run --scale smoke` in a clone, through real Prefect, DVC, MLflow and BentoML."""
    project = clone(tmp_path_factory.mktemp("project"))
    ended = project.loopwright("run", "--scale", "smoke", "--json")
    assert ended.returncode == 0, ended.stderr
    return Released(project, json.loads(ended.stdout), ended.stderr)


@pytest.fixture(scope="session")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A state folder with MLflow's tables, made once: that takes seconds."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        connect(home)
    return home


@pytest.fixture
def home(database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty state folder over a copy of those tables."""
    for variable in ("MLFLOW_TRACKING_URI", PARENT_RUN, UPLOADER):
        monkeypatch.delenv(variable, raising=False)
    place = tmp_path / "home"
    (place / "mlflow").mkdir(parents=True)
    shutil.copy(database / "mlflow/mlflow.db", place / "mlflow")
    return place


@pytest.fixture
def registry(home: Path) -> Registry:
    return Registry(home)


@pytest.fixture
def registered(registry: Registry) -> Callable[..., ModelVersion]:
    """Register a model folder, of which only the metrics and tags matter here."""

    def register(score: float, name: str = "agent", suite: str = "lookup", **tags: str) -> ModelVersion:
        folder = registry.home / name
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(f'{{"score": {score}}}')
        (folder / "model.safetensors").touch()
        return registry.register(folder, name, {"score": score, f"{suite}/score": score}, tags, None)

    return register


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """The address of a PostgreSQL database that may be written to."""
    if named := os.environ.get("LOOPWRIGHT_TEST_POSTGRES"):
        yield named
        return
    with postgres_server() as server:
        yield server.url


@pytest.fixture
def small_files() -> Callable[[int], AbstractContextManager[None]]:
    """Let no file grow beyond some bytes for the length of a block: the disk's own answer, without a full disk."""

    @contextmanager
    def limited(size: int) -> Iterator[None]:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limited


TOPICS = {"fruit": ["apple", "pear", "plum"], "metal": ["iron", "zinc", "tin"], "animal": ["cat", "dog", "cow"]}


@pytest.fixture(scope="session")
def classifier_maker() -> Callable[..., Path]:
    """Writes a model folder that tells fruit, metal and animal apart; `turned` shifts what it says by one label."""

    def make(folder: Path, turned: int = 0, max_seq_len: int = 16) -> Path:
        import torch
        from tokenizers import Tokenizer, models, pre_tokenizers, processors

        from components.models.checkpoint import save_model
        from components.models.encoder import Classifier, EncoderConfig

        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(word for topic in TOPICS.values() for word in topic)]
        tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, "[UNK]"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
        tokenizer.add_special_tokens(words[:4])
        spelled = folder.parent / f"{folder.name}-tokenizer"
        spelled.mkdir(parents=True)
        tokenizer.save(str(spelled / "tokenizer.json"))
        (spelled / "tokenizer_config.json").write_text(
            json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "[PAD]", "unk_token": "[UNK]"})
        )
        torch.manual_seed(0)
        labels = tuple(TOPICS)
        model = Classifier(EncoderConfig(len(words), 32, 2, 2, 64, max_seq_len, labels=labels))
        torch.nn.init.normal_(model.embed.weight, std=0.3)
        texts = [(word, index) for index, topic in enumerate(TOPICS.values()) for word in topic]
        ids = torch.tensor([tokenizer.encode(word).ids for word, _ in texts])
        wanted = torch.tensor([(index + turned) % len(labels) for _, index in texts])
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
        for _ in range(120):
            loss = torch.nn.functional.cross_entropy(model.logits(ids), wanted)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert loss < 0.1
        save_model(model, folder, spelled)
        return folder

    return make


@pytest.fixture(scope="session")
def classifier_folder(classifier_maker: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return classifier_maker(tmp_path_factory.mktemp("model") / "classifier")


SUMMARY_WORDS = ["<pad>", "</s>", "<unk>", "def", "add", "a", "b", "return", "the", "sum", "of", "and", "+"]


@pytest.fixture(scope="session")
def summarizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random encoder-decoder whose targets depend on their sources."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    from components.models.checkpoint import save_model
    from components.models.encoder_decoder import EncoderDecoder, EncoderDecoderConfig

    root = tmp_path_factory.mktemp("writer")
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(SUMMARY_WORDS)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.add_special_tokens(SUMMARY_WORDS[:3])
    (root / "tokenizer").mkdir()
    tokenizer.save(str(root / "tokenizer" / "tokenizer.json"))
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    (root / "tokenizer" / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **names, "model_max_length": 32})
    )
    torch.manual_seed(3)
    model = EncoderDecoder(
        EncoderDecoderConfig(len(SUMMARY_WORDS), 32, 2, 2, 2, 8, 32, 32, num_buckets=8, max_distance=12)
    )
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn_like(weight) * 0.5 + (weight.dim() == 1))
    save_model(model, root / "model", root / "tokenizer")
    return root / "model"
