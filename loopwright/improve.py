"""`loopwright improve`: continual learning once."""

from __future__ import annotations

import signal
import sys
from dataclasses import asdict
from typing import Annotated

import typer

from components.config.paths import find_root
from loopwright.output import Json, print_json, say
from loopwright.run import Terminal, interrupt, told


def improve(
    force: Annotated[
        bool, typer.Option("--force", help="Also without new feedback, and every stage from its beginning.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Curate what people said, train from the champion, put both before the gate, promote or refuse (exit 3)."""
    from flows.improve import improve as run
    from flows.orchestration.run_stage import StageFailed

    signal.signal(signal.SIGTERM, interrupt)
    try:
        done = run(find_root(), force, Terminal(as_json))
    except StageFailed as failure:
        raise told(failure) from failure
    except KeyboardInterrupt:
        say('improve: stopped; "loopwright improve" goes on from the last checkpoint')
        sys.exit(130)
    if as_json:
        print_json(asdict(done))
        return
    print(f"{done.outcome}: {done.reason}")
    if done.release:
        print(f"champion  {done.champion}, score {done.release.score:.4f}\nbento     {done.release.bento}")
