"""Files at addresses of fsspec, such as `s3://BUCKET/NAME`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from components.config.errors import InputError, reason_of


def filesystem(address: str) -> tuple[Any, str]:
    """The file system of an address, and the path in it.

    Raises: InputError where its library is missing.
    """
    from fsspec.core import url_to_fs

    try:
        fs, path = url_to_fs(address if "://" in address else str(Path(address).resolve()))
    except ImportError as error:
        raise InputError(f'{address}: {error}; run "pip install" for it first') from None
    except ValueError as error:
        raise InputError(f"{address}: {error}; name a folder, or an address such as s3://BUCKET/NAME") from None
    return fs, str(path).rstrip("/")


@contextmanager
def local_files(names: Sequence[str]) -> Iterator[list[Path]]:
    """Files by their paths; of those that are addresses, copies that are gone afterwards.

    Raises: InputError for an address without a file.
    """
    with TemporaryDirectory(prefix="loopwright-") as folder:
        copies = (Path(folder) / str(number) for number in range(len(names)))
        yield [_copy(name, copy) if "://" in name else Path(name) for name, copy in zip(names, copies, strict=True)]


def _copy(address: str, folder: Path) -> Path:
    fs, source = filesystem(address)
    target = folder / source.rpartition("/")[2]
    folder.mkdir()
    try:
        is_file = fs.isfile(source)
        if is_file:
            fs.get_file(source, str(target))
    except Exception as error:  # noqa: BLE001 - each file system has errors of its own
        reason = reason_of(error)
        raise InputError(f"{address}: not readable: {reason}; check the address and its credentials") from None
    if not is_file:
        raise InputError(f"{address}: no such file; name one file, such as s3://BUCKET/NAME.jsonl")
    return target
