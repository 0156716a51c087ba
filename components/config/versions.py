"""Write `versions.yaml`, by which DVC sees an upgrade of a library: `python -m components.config.versions`.

Each stage of dvc.yaml declares the libraries that change what it computes as parameters of that file; their names are
edited there by hand, their versions are those of requirements.lock.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import yaml

VERSIONS_FILE = Path(__file__).with_name("versions.yaml")
_HEADER = "# What stages compute with, by which an upgrade makes them stale; versions written by `make lock`.\n"


def locked_versions(lock: Path, names: Iterable[str]) -> dict[str, str]:
    """Version of each distribution in a requirements file, with the markers of each where it has several."""
    lines = lock.read_text(encoding="utf-8").splitlines()
    pins = [line.removesuffix("\\").rstrip().partition("==") for line in lines]  # a backslash precedes hashes
    return {name: ", ".join(version for pinned, _, version in pins if pinned == name) for name in sorted(names)}


def main() -> None:
    """Bring versions.yaml in line with the requirements.lock of the current folder."""
    names = yaml.safe_load(VERSIONS_FILE.read_text(encoding="utf-8"))
    versions = locked_versions(Path("requirements.lock"), names)
    VERSIONS_FILE.write_text(_HEADER + yaml.safe_dump(versions, width=120), encoding="utf-8")


if __name__ == "__main__":
    main()
