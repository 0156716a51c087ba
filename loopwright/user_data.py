"""`loopwright data export-user` and `erase-user`: the records of one person, and the models trained on them."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from components.config.errors import InputError
from components.config.paths import Paths, find_root
from loopwright.output import Json, print_json

if TYPE_CHECKING:
    from components.feedback.store import Store

Name = Annotated[str, typer.Argument(metavar="OWNER_OR_USER", help="Owner of API keys, or the `user` of requests.")]
Owner = Annotated[
    str | None, typer.Option(help="Only records of this owner of API keys; '' for those made without a key.")
]


def export_user(
    name: Name,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A new folder.")],
    owner: Owner = None,
    as_json: Json = False,
) -> None:
    """Write all records of a person: requests, answers, votes and pictures, and the models trained on the votes."""
    with closing(_store()) as store:
        records = store.user_records(name, owner)
        try:
            folder.mkdir(mode=0o700)
        except OSError as error:
            raise InputError(f"{folder}: {error.strerror}; name a new folder in an existing one") from None
        models = _models(records.votes)
        with (folder / "completions.jsonl").open("w", encoding="utf-8") as out:
            for completion_id in records.completions:
                out.write(json.dumps(store.completion(completion_id), ensure_ascii=False) + "\n")
                for picture in store.pictures_of(completion_id):
                    (folder / f"{picture['digest']}.png").write_bytes(store.picture(picture["digest"]))
        with (folder / "votes.jsonl").open("w", encoding="utf-8") as out:
            out.writelines(json.dumps(store.vote(vote), ensure_ascii=False) + "\n" for vote in records.votes)
        (folder / "models.json").write_text(json.dumps(models, indent=2) + "\n", encoding="utf-8")
        store.add_audit("export-user", name, f"{len(records.completions)} requests, {len(records.votes)} votes")
    report = {"folder": str(folder), "requests": len(records.completions), "votes": len(records.votes)}
    if as_json:
        print_json({**report, "models": models})
        return
    print(f"{folder}: {report['requests']} requests, {report['votes']} votes")
    _print_models(models)


def erase_user(
    name: Name,
    owner: Owner = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    as_json: Json = False,
) -> None:
    """Erase all records of a person from the store, revoke their votes, and name the models trained on them."""
    with closing(_store()) as store:
        records = store.user_records(name, owner)
        counts = f"{len(records.completions)} requests and {len(records.votes)} votes"
        if not yes and not as_json:
            typer.confirm(f"{name}: erase {counts} for good?", abort=True)
        records = store.erase_user(name, owner)
    models = _models(records.votes)
    report = {"requests": len(records.completions), "votes": len(records.votes)}
    if as_json:
        print_json({**report, "models": models})
        return
    print(f"{name}: erased {counts}")
    _print_models(models)
    if records.votes:
        print('next: "loopwright feedback ingest" deletes ingested items from data/feedback; "dvc gc" former states')


def _store() -> Store:
    from components.feedback.store import Store, has_store

    home = Paths(find_root()).home
    if not has_store(home):
        raise InputError(f"{home}: no request was ever recorded here; set LOOPWRIGHT_HOME or LOOPWRIGHT_DATABASE_URL")
    return Store.of(home)


def _models(votes: list[str]) -> dict[str, list[str]]:
    """By version, those of the votes that it was trained on."""
    from components.feedback.lineage import versions_trained_on
    from components.tracking.registry import Registry, is_empty

    home = Paths(find_root()).home
    return {} if not votes or is_empty(home) else versions_trained_on(Registry(home), votes)


def _print_models(models: dict[str, list[str]]) -> None:
    if not models:
        print("no model was trained on it")
    for version, votes in models.items():
        print(f"{version} was trained on {', '.join(votes)}")
