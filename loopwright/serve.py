"""`loopwright serve`: the prediction endpoint."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from components.config.params import InputError
from components.config.paths import Paths, find_root
from loopwright.output import Json

if TYPE_CHECKING:
    from serving.server import Tls


def serve(
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            metavar="NAME@ALIAS|NAME/VERSION",
            help="Which model; an alias is followed. Repeatable, for other tasks; default: every champion.",
        ),
    ] = None,
    bento: Annotated[str | None, typer.Option(metavar="TAG", help="Serve a built Bento instead.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; others than loopback need an API key.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0: any free one.")] = 3000,
    challenger_share: Annotated[
        float,
        typer.Option(
            min=0.0, max=1.0, help="Share of the users who are served by NAME@challenger, where there is one."
        ),
    ] = 0.0,
    tls_cert: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Certificate with its chain, PEM: serve HTTPS.")
    ] = None,
    tls_key: Annotated[Path | None, typer.Option(metavar="FILE", help="Its private key, PEM.")] = None,
    as_json: Json = False,
) -> None:
    """Serve the champions over OpenAI's API until Ctrl-C; follows agent@champion and the others as they move."""
    if challenger_share and (bento is not None or not all(name.endswith("@champion") for name in model or ())):
        raise InputError(f"--challenger-share: {challenger_share} needs --model NAME@champion and no --bento")
    from serving import server

    tls = server.Tls.checked(tls_cert, tls_key)
    paths = Paths(find_root())
    os.chdir(paths.root)
    os.environ["LOOPWRIGHT_HOME"] = str(paths.home)
    os.environ.setdefault("BENTOML_HOME", str(paths.home / "bento"))
    os.environ.setdefault("BENTOML_DO_NOT_TRACK", "true")

    from serving.models.versions import DEFAULT
    from serving.observability import logs

    models = ",".join(model) if model else DEFAULT
    server.check_host(host, paths.home)
    listener = server.listen(host, port)
    if bento is not None:
        _exec_bento(bento, listener.detach(), paths, tls, as_json)
    file = logs.log_to(paths.home / "logs")
    print(f"loading {models}; log: {file}", file=sys.stderr, flush=True)
    ready = server.announce_json if as_json else server.announce
    server.serve_model(models, challenger_share, listener, ready, tls)


def _exec_bento(tag: str, listener: int, paths: Paths, tls: Tls | None, as_json: bool) -> None:
    """Replace this process by one that runs the Bento's own code."""
    from serving.server import find_bento

    folder = find_bento(tag)
    source = folder / "src"
    os.set_inheritable(listener, True)
    command = [sys.executable, "-m", "serving.server", "--bento", str(folder), "--fd", str(listener)]
    command += ["--logs", str(paths.home / "logs"), *(["--json"] if as_json else [])]
    command += ["--tls-cert", str(tls.certificate), "--tls-key", str(tls.key)] if tls else []
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(source), os.environ.get("PYTHONPATH", "")]))
    os.chdir(source)
    os.execv(sys.executable, command)
