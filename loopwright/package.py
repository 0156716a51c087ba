"""`loopwright package`: a registered model as a Bento."""

from __future__ import annotations

from typing import Annotated

import typer

from components.config.paths import Paths, find_root
from loopwright.output import Json, print_json


def package(
    model: Annotated[
        str, typer.Argument(metavar="NAME@ALIAS", help="Which model; NAME/VERSION works too.")
    ] = "agent@champion",
    as_json: Json = False,
) -> None:
    """Build the Bento of a registered model, weights included, and print its tag."""
    from flows.bento import package as build

    paths = Paths(find_root())
    tag = build(paths, model)
    if as_json:
        print_json({"tag": tag, "serve": f"loopwright serve --bento {tag}", "home": str(paths.home / "bento")})
    else:
        print(tag)
