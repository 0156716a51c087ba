"""The rules of the house: directions of imports, one tool one door, one declaration of the stages."""

import ast
import re
import subprocess
import sys
import tomllib
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml

from benchmarks import shape
from components.agent.saved_tools import as_tools
from components.config.params import FAMILIES, Params
from components.config.paths import Paths
from components.config.project import Project, load_project
from components.config.versions import VERSIONS_FILE, locked_versions
from components.runtime.stage import STAGE_MODULES, declared_libraries, read_stages, stage_function
from examples.stdlib_agent import facts

ROOT = Path(__file__).parent.parent
PACKAGES = ("loopwright", "flows", "components", "serving", "examples")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
PIPELINE = read_stages(ROOT)

_IN = "components/"
EXAMPLES = "examples"
# What a package may import; what is not listed is forbidden. From top to bottom: each builds on those above it.
CONFIG, RUNTIME, TRACKING, MEDIA = _IN + "config", _IN + "runtime", _IN + "tracking", _IN + "media"
MODELS, DATASETS, VALIDATION = _IN + "models", _IN + "datasets", _IN + "validation"
TOKENIZATION, TOKEN_ROWS, INFERENCE = _IN + "tokenization", _IN + "token_rows", _IN + "inference"
AGENT, TRAINING, EVALUATION, FEEDBACK = _IN + "agent", _IN + "training", _IN + "evaluation", _IN + "feedback"
PREDICTION = _IN + "prediction"
TOP = {CONFIG, RUNTIME, MEDIA}
ALLOWED = {
    CONFIG: {CONFIG},
    RUNTIME: {CONFIG, RUNTIME},
    MEDIA: {CONFIG, MEDIA},
    # The one stage runner opens the tracker that its stages report to.
    "components/runtime/stage.py": {*TOP, TRACKING},
    MODELS: {*TOP, MODELS},
    DATASETS: {*TOP, DATASETS},
    # What the project says of its datasets and its agent is written down at once.
    "components/datasets/collect.py": {*TOP, DATASETS, AGENT},
    # A dataset that is added is validated before it is kept.
    "components/datasets/importers.py": {*TOP, DATASETS, VALIDATION},
    VALIDATION: {*TOP, DATASETS, VALIDATION},
    TOKENIZATION: {*TOP, DATASETS, TOKENIZATION},
    TOKEN_ROWS: {*TOP, DATASETS, TOKENIZATION, TOKEN_ROWS},
    INFERENCE: {*TOP, MODELS, TOKENIZATION, TOKEN_ROWS, INFERENCE},
    AGENT: {*TOP, MODELS, TOKENIZATION, INFERENCE, AGENT},
    PREDICTION: {*TOP, MODELS, DATASETS, TOKENIZATION, INFERENCE, AGENT, PREDICTION},
    TRAINING: {*TOP, MODELS, DATASETS, TOKENIZATION, TOKEN_ROWS, INFERENCE, AGENT, TRAINING, EVALUATION},
    EVALUATION: {*TOP, MODELS, DATASETS, TOKENIZATION, TOKEN_ROWS, INFERENCE, AGENT, EVALUATION, FEEDBACK},
    FEEDBACK: {*TOP, DATASETS, TOKENIZATION, TOKEN_ROWS, FEEDBACK, TRACKING},
    TRACKING: {*TOP, MODELS, TOKENIZATION, AGENT, TRACKING},
    EXAMPLES: {"components", EXAMPLES},
    "components/__init__.py": set(),
    "serving": {"components", "serving"},
    "flows": {"components", "flows"},
    "loopwright": {"components", "serving", "flows", "loopwright"},
}

# What effects of the loop put there for its stages: taken in from people, fetched from the registry.
BROUGHT = {"data/feedback", "data/models/champion", "data/models/start"}

SCALES = "components/config/scales.yaml"

DOORS = {
    "prefect": ("flows/",),
    "bentoml": ("serving/service.py", "serving/server.py", "flows/bento.py"),
    "mlflow": ("components/tracking/",),
    "great_expectations": ("components/validation/validate.py",),
    # examples/sight reads the digits that scikit-learn ships.
    "sklearn": (
        "components/evaluation/",
        "components/datasets/",
        "components/training/classifier.py",
        "examples/sight/picture_files.py",
    ),
    "dvc": ("flows/",),
    "optuna": ("components/training/search.py", "components/training/classifier.py"),
    # mlflow_requests.py catches what MLflow lets through from its database.
    "sqlalchemy": ("components/feedback/", "components/tracking/mlflow_requests.py"),
    "alembic": ("components/feedback/",),
    "mcp": ("components/agent/mcp_servers.py", "loopwright/mcp.py"),
    "llguidance": ("components/inference/grammar.py",),
}


# Libraries that stages import and whose version changes no result, and why.
RESULTS_UNCHANGED = {
    **dict.fromkeys(("pyarrow", "safetensors"), "read and write files of a fixed format"),
    **dict.fromkeys(("jsonschema", "referencing", "pydantic", "pydantic-core"), "check what is computed elsewhere"),
    **dict.fromkeys(("jinja2", "markupsafe"), "render templates of a language that is fixed within a major version"),
    "matplotlib": "draws what the tracker logs; no out of a stage",
    "pyyaml": "reads files of a fixed format",
}


# What we use of other packages although its name begins with an underscore, and why.
PRIVATE = {
    **dict.fromkeys(
        ("_foreach_copy_", "_foreach_lerp_", "_foreach_mul_", "_foreach_norm"),
        "PyTorch documents its foreach functions under these names (docs: torch, Foreach Operators)",
    ),
    "_int_mm": "the int8 product that torchao and PyTorch's own examples call; no other name reaches it",
    "_reorder_linear_weight": "oneDNN's packed weights, as TorchInductor lays them out; no other name reaches them",
    "_linear_pointwise": "the product with a weight packed so",
    "_softmax_backward_data": "the softmax kernel's backward pass, which transformers calls by this name too",
}


def private_names(path: Path, own: set[str]) -> set[str]:
    """What a file uses of others under a name with a leading underscore; `own` are names that our sources define."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.Import):
            found |= {part for alias in node.names for part in alias.name.split(".")}
        elif isinstance(node, ast.ImportFrom) and node.module != "__future__":
            found |= {*(node.module or "").split("."), *(alias.name for alias in node.names)}
        elif isinstance(node, ast.Constant) and node.value == "_internal":  # a path into another package
            found.add(node.value)
    dunder = {name for name in found if name.startswith("__") and name != "__self__"}
    return {name for name in found - dunder - own if name.startswith("_")}


def own_names(paths: list[Path]) -> set[str]:
    """Names that these files define: functions, classes, variables and attributes of `self`."""
    names: set[str] = set()
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                names.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names.add(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                names |= {node.attr} if ast.unparse(node.value) in ("self", "cls") else set()
    return names


@cache
def imports(path: Path) -> frozenset[str]:
    """Every module that a file imports when it runs, anywhere in it."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    guarded = {
        node
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    found: set[str] = set()
    for node in set(ast.walk(tree)) - guarded:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return frozenset(found)


@cache
def place(module: str) -> str | None:
    """The file or folder of the house that a module name means."""
    parts = module.split(".")
    if parts[0] not in PACKAGES:
        return None
    for length in range(len(parts), 0, -1):
        path = ROOT.joinpath(*parts[:length])
        if path.with_suffix(".py").is_file():
            return path.with_suffix(".py").relative_to(ROOT).as_posix()
        if path.is_dir():
            return path.relative_to(ROOT).as_posix()
    raise AssertionError(f"{module}: no such module")


def within(path: str, rooms: set[str]) -> bool:
    return any(path == room or path.startswith(f"{room}/") for room in rooms)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_walk_one_way(path: Path) -> None:
    name = path.relative_to(ROOT).as_posix()
    room = max((room for room in ALLOWED if within(name, {room})), key=len)
    targets = {target for module in imports(path) if (target := place(module)) and target != name}
    strays = {target for target in targets if target not in PACKAGES and not within(target, ALLOWED[room])}
    assert not strays, f"{name} imports {sorted(strays)}"


@pytest.mark.parametrize("tool", DOORS)
def test_one_tool_has_one_door(tool: str) -> None:
    users = {
        path.relative_to(ROOT).as_posix() for path in SOURCES if tool in {name.split(".")[0] for name in imports(path)}
    }
    strays = {user for user in users if not user.startswith(DOORS[tool])}
    assert not strays, f"{tool} is imported by {sorted(strays)}"


def declared(*requirements: list[str]) -> set[str]:
    """Names of the distributions that lists of requirements name, as PyPI normalizes them."""
    return {normalized(re.split(r"[^\w.-]", entry, maxsplit=1)[0]) for entries in requirements for entry in entries}


def normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_every_imported_package_is_declared() -> None:
    """What another package happens to bring may go with its next version."""
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    project = pyproject["project"]
    run = declared(project["dependencies"], *project["optional-dependencies"].values())
    dev = run | declared(pyproject["dependency-groups"]["dev"])
    tests = [path for package in ("tests", "benchmarks") for path in (ROOT / package).rglob("*.py")]
    providers = packages_distributions()
    own = {*PACKAGES, "tests", "benchmarks"}
    missing = {
        f"{path.relative_to(ROOT)}: {module}"
        for paths, known in ((SOURCES, run), (tests, dev))
        for path in paths
        for module in {name.partition(".")[0] for name in imports(path)} - own - sys.stdlib_module_names
        if not known & {normalized(name) for name in providers.get(module, [module])}
    }
    assert not missing


def test_files_import_each_other_in_no_circle() -> None:
    assert shape.circles(shape.import_graph()) == []


def test_the_shape_stays_within_its_bounds() -> None:
    figures = shape.figures()
    assert figures["modules outside a package in components"] == 0
    assert figures["function length, longest"] <= 80
    assert figures["files"] <= 300
    assert figures["source lines"] <= 52_000


def test_no_package_is_reached_into_behind_its_public_names() -> None:
    own = own_names(SOURCES)
    used = {name for path in SOURCES for name in private_names(path, own)}
    assert used - set(PRIVATE) == set()
    assert set(PRIVATE) - used == set(), "allowed, and no longer used"


def test_every_stage_is_a_section_a_module_and_a_function() -> None:
    assert list(dict.fromkeys(name.partition("@")[0] for name in PIPELINE)) == list(STAGE_MODULES)
    sections = {field.alias or name for name, field in Params.model_fields.items()}
    for name, stage in PIPELINE.items():
        # What is fine-tuned has a section of its own name.
        assert sections & set(name.split("@"))
        assert stage["cmd"] == f"python -m components.runtime.stage {name}"
        assert callable(stage_function(name))


def test_every_out_of_the_pipeline_has_a_name_in_paths() -> None:
    paths = Paths(ROOT)
    known = {getattr(paths, name) for name, value in vars(Paths).items() if isinstance(value, property)}
    known |= {path(family) for path in (paths.tokenizer, paths.tokens, paths.base) for family in FAMILIES}
    known |= {paths.assessment(name.partition("@")[2]) for name in PIPELINE if name.startswith("assess@")}
    for stage in PIPELINE.values():
        for out in stage["outs"]:
            assert ROOT / out in known


def test_every_dependency_of_the_pipeline_exists_or_is_an_out() -> None:
    outs = {out for stage in PIPELINE.values() for out in stage["outs"]}
    for stage in PIPELINE.values():
        for dependency in stage["deps"]:
            assert (ROOT / dependency).exists() or within(dependency, outs | BROUGHT), dependency


def sources_of(stage: str) -> set[str]:
    """Files that a stage runs, but for the runner, which changes no result, and configuration, watched by value."""
    module = stage.partition("@")[0]
    files: set[str] = set()
    todo = [f"{STAGE_MODULES[module].replace('.', '/')}.py"]
    if module == "collect":
        todo += [path.relative_to(ROOT).as_posix() for path in (ROOT / "examples/stdlib_agent").glob("*.py")]
    while todo:
        file = todo.pop()
        files.add(file)
        for imported in imports(ROOT / file):
            target = place(imported)
            if target and target.endswith(".py") and target not in files and not within(target, {CONFIG, RUNTIME}):
                todo.append(target)
    return files


def test_stages_declare_each_module_of_the_house_that_they_import() -> None:
    for name, stage in PIPELINE.items():
        missing = {file for file in sources_of(name) if not within(file, set(stage["deps"]))}
        assert not missing, f"{name}: dvc.yaml lists no dependency on {sorted(missing)}"


def test_stages_declare_the_version_of_each_library_that_they_compute_with() -> None:
    providers = packages_distributions()
    for name, stage in PIPELINE.items():
        modules = {module.partition(".")[0] for file in sources_of(name) for module in imports(ROOT / file)}
        imported = {normalized(provider) for module in modules for provider in providers.get(module, [])}
        libraries = {library for library in imported if library != "loopwright"} - set(RESULTS_UNCHANGED)
        assert declared_libraries(stage) == libraries, name


def test_the_versions_that_stages_declare_are_those_of_the_lock() -> None:
    versions = yaml.safe_load(VERSIONS_FILE.read_text())
    assert versions == locked_versions(ROOT / "requirements.lock", versions), 'run "make lock"'
    assert all(versions.values())
    assert set(versions) == {library for stage in PIPELINE.values() for library in declared_libraries(stage)}


def test_lint_sees_every_source() -> None:
    """`data` and `var` are left out at the root alone, not wherever a folder is called so."""
    ruff = [sys.executable, "-m", "ruff", "check", "--show-files", "--no-respect-gitignore", "--no-cache"]
    packages = [*PACKAGES, "tests", "benchmarks"]
    seen = set(subprocess.run([*ruff, *packages], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split())
    assert {str(path) for package in packages for path in (ROOT / package).rglob("*.py")} == seen


PROJECTS = [load_project(name) for name in ("examples.stdlib_agent", "examples.helpdesk", "examples.sight")]
PLATFORM = [
    path
    for package in ("components", "flows", "loopwright", "serving")
    for path in sorted((ROOT / package).rglob("*"))
    if path.is_file() and "__pycache__" not in path.parts
]


@pytest.mark.parametrize("project", PROJECTS, ids=lambda project: project.name)
def test_the_platform_names_nothing_of_a_project(project: Project, tmp_path: Path) -> None:
    """Neither its datasets, nor its tools, nor its questions, nor what it is about; the default's name once."""
    knowledge = tmp_path / "knowledge.sqlite"
    facts.build(knowledge, [])
    tools = [tool.name for tool in as_tools(project.tools(tmp_path))]
    names = [re.escape(name) for name in (*project.datasets, *project.smoke_questions.values())]
    quoted = [rf"(?<!type=)[\"'`]{name}[\"'`(]" for name in tools]
    ideas = [r"[Ss]tdlib(?!_agent\")", r"[Ss]tandard[ -]librar", r"json\.dumps[^(]", r"[Hh]elpdesk"]
    pattern = re.compile("|".join([*names, *quoted, *ideas]))
    texts = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8", errors="replace") for path in PLATFORM}
    assert not [f"{path}: {found[0]}" for path, text in texts.items() for found in pattern.finditer(text)]
    named = [path for path, text in texts.items() if re.search(r'["`]examples\.', text)]
    assert named == ["components/config/project.py"]


def test_the_folder_mlflow_never_shadows_the_package() -> None:
    assert not (ROOT / "mlflow" / "__init__.py").exists()


def test_no_module_is_called_after_nothing() -> None:
    names = {path.stem for path in SOURCES} | {path.parent.name for path in SOURCES}
    assert not names & {"utils", "util", "common", "base", "core", "helpers", "managers", "misc"}


def test_sources_hold_no_unfinished_work() -> None:
    marks = re.compile(r"\b(TODO|FIXME|XXX|NotImplementedError)\b")
    assert not [path for path in SOURCES if marks.search(path.read_text(encoding="utf-8"))]


def test_every_value_that_a_stage_watches_is_there() -> None:
    """DVC refuses to run a stage that watches a key which does not exist."""
    scales = yaml.safe_load((ROOT / SCALES).read_text())
    names = [scale for scale in scales if scale != "all"]
    given = yaml.safe_load((ROOT / "params.yaml").read_text())
    for stage in PIPELINE.values():
        for entry in stage["params"]:
            if isinstance(entry, str):
                found = given
                for part in entry.split("."):
                    assert part in found, f"{entry}: {part} is not in params.yaml"
                    found = found[part]
            for dotted in entry.get(SCALES, ()) if isinstance(entry, dict) else ():
                for scale in names:
                    found = scales
                    for part in dotted.replace("${scale}", scale).split("."):
                        assert part in found, f"{dotted}: {part} is not in scales.yaml for {scale}"
                        found = found[part]


def test_a_stage_watches_every_place_of_a_value_that_it_reads() -> None:
    """A value set in params.yaml, for all scales, or for one scale: each is seen when it changes."""
    scales = yaml.safe_load((ROOT / SCALES).read_text())

    def has(scale: str, dotted: str) -> bool:
        found = scales[scale]
        for part in dotted.split("."):
            if not isinstance(found, dict) or part not in found:
                return False
            found = found[part]
        return True

    for name, stage in PIPELINE.items():
        given = {entry for entry in stage["params"] if isinstance(entry, str)} - {"seed", "scale"}
        scaled = {dotted for entry in stage["params"] if isinstance(entry, dict) for dotted in entry.get(SCALES, ())}
        for dotted in given:
            # A dataset's name is in params.yaml, always.
            if not dotted.endswith(".dataset"):
                wanted = {f"all.{dotted}"} if has("all", dotted) else set()
                wanted |= {f"${{scale}}.{dotted}"} if any(has(one, dotted) for one in set(scales) - {"all"}) else set()
                assert wanted <= scaled, f"{name}: dvc.yaml watches no {sorted(wanted - scaled)}"
        assert {one.partition(".")[2] for one in scaled} <= given, name
