"""`loopwright registry`: the model registry in the terminal."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from components.config.params import InputError
from components.config.paths import Paths, find_root
from loopwright.output import Json, print_indented, print_json, print_markdown, print_table

if TYPE_CHECKING:
    from components.tracking.registry import ModelVersion, Registry

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="The model registry: list, show, history, compare, promote and roll back.",
    rich_markup_mode=None,
)
Name = Annotated[str, typer.Argument(help="A registered model, such as agent.")]


@app.command("list")
def list_(as_json: Json = False) -> None:
    """List every version of every model, newest first."""
    registry = _registry()
    rows = [_summary(version) for name in registry.names() for version in registry.versions(name)]
    if as_json:
        print_json(rows)
    else:
        _print_versions(rows)


@app.command()
def show(
    model: Annotated[str, typer.Argument(metavar="NAME[@ALIAS or /VERSION]", help="Without either: all versions.")],
    as_json: Json = False,
) -> None:
    """Show a version: its model card. --json has its files, metrics and everything it came from."""
    registry = _registry()
    if "@" not in model and "/" not in model:
        versions = [_summary(version) for version in registry.versions(model)]
        if as_json:
            print_json({"name": model, "versions": versions})
        else:
            _print_versions(versions)
        return
    from components.tracking.registry import PRUNED
    from components.tracking.version_files import card, lineage

    version = registry.resolve(model)
    folder = version.stored if version.tags.get(PRUNED) == "true" else version.folder
    details = {**_summary(version), "folder": str(folder)}
    text = card(version)
    if as_json:
        print_json({**details, "card": text, "metrics": version.metrics, "tags": lineage(version)})
        return
    aliases = _cell(details["aliases"]) or "no alias"
    print(f"{version}, {aliases}, registered {details['created'][:16].replace('T', ' ')} UTC\n")
    if text:
        print_markdown(text)
    else:  # of an earlier release
        scores = [(name, value) for name, value in sorted(version.metrics.items()) if name.endswith("score")]
        print_table(("metric", "value"), scores)
        print(f'\n{version} has no model card; everything about it: "loopwright registry show {version} --json"')
    print(f"\nFiles: {details['folder']}")


@app.command()
def history(name: Name, as_json: Json = False) -> None:
    """What became of each version of a model, oldest first, and why."""
    rows = [_event(version) for version in reversed(_registry().versions(name))]
    if as_json:
        print_json(rows)
    else:
        for row in rows:
            score = "" if row["score"] is None else f", score {row['score']:.4g}"
            print(f"{row['version']:>3}  {row['created']}  {row['outcome']}, from {row['from']}{score}")
            print_indented(row["reason"], 5)


@app.command()
def compare(
    name: Name,
    a: Annotated[str, typer.Argument(help="A version number or an alias.")],
    b: Annotated[str, typer.Argument(help="A version number or an alias.")],
    gate: Annotated[
        bool, typer.Option("--gate", help="Both answer this project's held-out rows; B is tested as the candidate.")
    ] = False,
    every: Annotated[bool, typer.Option("--all", help="Every metric; without it, the scores.")] = False,
    as_json: Json = False,
) -> None:
    """Compare the metrics of two versions, or by the promotion gate's paired tests."""
    registry = _registry()
    first, second = (registry.resolve(_spec(name, which)) for which in (a, b))
    if gate:
        from components.evaluation.gate import report
        from flows.release import compare as compare_versions

        decision = compare_versions(registry, second, first, Paths(find_root()))
        if as_json:
            print_json(decision.to_json())
        else:
            print(report(decision, str(second), str(first)), end="")
        return
    rows = _differences(first, second)
    same = first.tags.get("held_out_digest") == second.tags.get("held_out_digest")
    if as_json:
        print_json({"a": str(first), "b": str(second), "same_held_out_sets": same, "metrics": rows})
        return
    shown = [row for row in rows if every or row["metric"].rpartition("/")[2] == "score"]
    print_table(("metric", str(first), str(second), "difference"), [tuple(row.values()) for row in shown], fit=True)
    if len(shown) < len(rows):
        print(f"\n{len(rows) - len(shown)} more metrics: --all")
    if not same:
        print("\nmeasured on different held-out sets: the figures are not comparable")


@app.command()
def promote(
    name: Name,
    version: Annotated[str, typer.Argument(help="A version number or an alias, such as challenger.")],
    as_json: Json = False,
) -> None:
    """Make a version the champion; endpoints that serve the alias switch to it."""
    registry = _registry()
    champion = registry.aliases(name).get("champion")
    chosen = registry.resolve(_spec(name, version))
    registry.promote(chosen, f"{name}/{champion}" if champion else "")
    _print_champion(registry, name, as_json)


@app.command()
def rollback(name: Name, as_json: Json = False) -> None:
    """Make the previous champion the champion again."""
    registry = _registry()
    registry.rollback(name)
    _print_champion(registry, name, as_json)


def _registry() -> Registry:
    from components.feedback.store import shared_registry
    from components.tracking.registry import is_empty

    home = Paths(find_root()).home
    if is_empty(home):
        raise InputError('registry: it is empty; run "loopwright run"')
    return shared_registry(home)


def _spec(name: str, which: str) -> str:
    return f"{name}/{which}" if which.isdigit() else f"{name}@{which}"


def _summary(version: ModelVersion) -> dict[str, Any]:
    return {
        "model": str(version),
        "name": version.name,
        "version": version.version,
        "aliases": list(version.aliases),
        "score": version.metrics.get("score"),
        "created": datetime.fromtimestamp(version.created, UTC).isoformat(timespec="seconds"),
        "gate": version.tags.get("gate"),
        "run_id": version.run_id,
    }


def _print_versions(rows: list[dict[str, Any]]) -> None:
    columns = ("model", "aliases", "score", "created", "gate")
    shown = [{**row, "created": row["created"][:16].replace("T", " ")} for row in rows]
    print_table(columns, [[_cell(row[column]) for column in columns] for row in shown], fit=True)


def _event(version: ModelVersion) -> dict[str, Any]:
    """A version in its model's history."""
    tags = version.tags
    is_back = tags.get("rolled_back") == "true"
    outcome = (tags.get("smoke_failed") and "failed") or (is_back and "rolled back") or tags.get("gate", "not judged")
    return {
        "version": version.version,
        "created": datetime.fromtimestamp(version.created, UTC).strftime("%Y-%m-%d %H:%M"),
        "from": (tags.get("parent") or tags.get("base_version") or "scratch").removeprefix(f"{version.name}/"),
        "score": version.metrics.get("score"),
        "outcome": ", ".join([outcome, *version.aliases]),
        "reason": tags.get("smoke_failed") or tags.get("gate_reason", ""),
    }


def _differences(first: ModelVersion, second: ModelVersion) -> list[dict[str, Any]]:
    rows = []
    for metric in sorted(first.metrics.keys() | second.metrics.keys()):
        a, b = first.metrics.get(metric), second.metrics.get(metric)
        rows.append({"metric": metric, "a": a, "b": b, "difference": None if a is None or b is None else b - a})
    return rows


def _print_champion(registry: Registry, name: str, as_json: bool) -> None:
    champion, previous = registry.resolve(f"{name}@champion"), registry.find(f"{name}@previous")
    if as_json:
        print_json({"champion": str(champion), "previous": str(previous) if previous else None})
    else:
        print(f"{champion} is champion" + (f", {previous} previous" if previous else ""))


def _cell(value: Any) -> Any:
    return ", ".join(value) if isinstance(value, list) else value
