"""Files at addresses of fsspec, such as `s3://BUCKET/NAME`."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from shutil import copyfileobj
from typing import IO, Any, cast

from components.config.errors import InputError, reason_of
from components.config.paths import writing
from components.runtime.files import replace_file, scratch_folder

_BUFFER_BYTES = 1 << 20


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
def local_files(names: Sequence[str], home: Path) -> Iterator[list[Path]]:
    """Files by their paths; of addresses, of a file or as `list_files` takes them, copies that are gone afterwards.

    Copies are below the state folder `home`.

    Raises: InputError for an address without a file.
    """
    if not any("://" in name for name in names):
        yield [Path(name) for name in names]
        return
    with scratch_folder(home, "download") as folder:
        files: list[Path] = []
        for name in names:
            for file in list_files(name) if "://" in name else [name]:
                files.append(_copy(file, folder / str(len(files))) if "://" in name else Path(file))
        yield files


def list_files(address: str) -> list[str]:
    """The file at a path or address, or the files in the folder there or of a pattern (`*`), in order of name.

    What a folder has under a name that begins with a dot or an underscore is left out.

    Raises: InputError where there is none.
    """
    fs, path = filesystem(address)
    with _reaching(address):
        fs.invalidate_cache()
        if fs.isfile(path):
            names = [path]
        elif re.search(r"[*?\[]", path):
            names = sorted(name for name, about in fs.glob(path, detail=True).items() if about["type"] == "file")
        else:
            # Consoles of S3 make empty objects of the folder's own name, with a slash at the end.
            names = [name for name in sorted(fs.find(path)) if not re.search(r"/[._]|/$", name.removeprefix(path))]
    if not names:
        raise InputError(f"{address}: no such file, and no folder with files; check the name")
    return [str(fs.unstrip_protocol(name)) for name in names] if "://" in address else names


def open_file(address: str) -> IO[bytes]:
    """Open a file at a path or address for reading.

    Raises: InputError when it cannot be opened.
    """
    fs, path = filesystem(address)
    with _reaching(address):
        return cast(IO[bytes], io.BufferedReader(fs.open(path, "rb"), _BUFFER_BYTES))


def version_of(address: str) -> str:
    """A token that changes with the file at an address, from what its store says of it."""
    fs, path = filesystem(address)
    with _reaching(address):
        return str(fs.ukey(path))


def size_of(address: str) -> int | None:
    """Bytes of the file at a path or address; None where there is none."""
    fs, path = filesystem(address)
    with _reaching(address):
        return int(fs.size(path)) if fs.isfile(path) else None


def read_bytes(address: str) -> bytes | None:
    """The content of the file at a path or address; None where there is none."""
    fs, path = filesystem(address)
    with _reaching(address):
        return bytes(fs.cat_file(path)) if fs.isfile(path) else None


def write_file(address: str, source: Path | bytes) -> None:
    """Write bytes, or the content of a file on this machine, to a path or address: as a whole or not at all.

    Raises: InputError when the disk or the store refuses.
    """
    if "://" in address:
        fs, path = filesystem(address)
        with _reaching(address, "writable"):
            if isinstance(source, bytes):
                fs.pipe_file(path, source)
            else:
                fs.put_file(str(source), path)
        return
    with writing(Path(address)), io.BytesIO(source) if isinstance(source, bytes) else source.open("rb") as content:
        Path(address).parent.mkdir(parents=True, exist_ok=True)
        replace_file(Path(address), lambda file: copyfileobj(content, file))


@contextmanager
def _reaching(address: str, what: str = "readable") -> Iterator[None]:
    try:
        yield
    except Exception as error:  # noqa: BLE001 - each file system has errors of its own
        reason = reason_of(error)
        raise InputError(f"{address}: not {what}: {reason}; check the address and its credentials") from None


def _copy(address: str, folder: Path) -> Path:
    fs, source = filesystem(address)
    target = folder / source.rpartition("/")[2]
    folder.mkdir()
    with _reaching(address):
        fs.get_file(source, str(target))
    return target
