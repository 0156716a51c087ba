"""Names of registered models, versions and aliases."""

from __future__ import annotations


def parse_name(name: str) -> tuple[str, str, str]:
    """Name, version, alias of `NAME@ALIAS`, `NAME/VERSION` or `NAME`."""
    name, at, alias = name.removeprefix("models:/").partition("@")
    if at:
        return name, "", alias
    name, slash, version = name.partition("/")
    return (name, version, "") if slash else (name, "", "champion")


def known_names(names: list[str]) -> str:
    return f"known: {', '.join(names)}" if names else 'it is empty; run "loopwright run"'
