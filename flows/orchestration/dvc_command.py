"""DVC's command, with files that are replaced in one step: `python -P dvc_command.py ARGUMENTS`.

DVC itself writes dvc.lock and .dvc files in place, and takes a tenth of a second for the first: killed meanwhile, it
leaves a file that it refuses from then on.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def write_in_one_step() -> None:
    """Let DVC, in this process, replace its files as a whole."""
    import dvc.dvcfile
    from dvc.utils.serialize import dumps_yaml, parse_yaml_for_update

    from components.runtime.files import write_text

    def dump_yaml(path: str, data: Any, fs: object = None) -> None:
        write_text(Path(path), dumps_yaml(data))

    @contextmanager
    def modify_yaml(path: str, fs: object = None) -> Iterator[dict[str, Any]]:
        file = Path(path)
        data = parse_yaml_for_update(file.read_text(encoding="utf-8"), path) if file.exists() else {}
        yield data
        dump_yaml(path, data)

    dvc.dvcfile.dump_yaml, dvc.dvcfile.modify_yaml = dump_yaml, modify_yaml


def main() -> int:
    """Run DVC in this process; returns its exit code."""
    # Of these sources, whatever packages the project has in which DVC runs; the stages get none of it.
    sys.path.insert(0, str(Path(__file__).parents[2]))
    write_in_one_step()
    from dvc.cli import main as dvc_main

    return int(dvc_main(sys.argv[1:]))


if __name__ == "__main__":
    sys.exit(main())
