"""Downloading a data set's files once per host, checked and published atomically."""

from __future__ import annotations

import fcntl
import http.client
import os
import tempfile
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from horovod_jobs.data.idx import check_sha256, read_gzip
from horovod_jobs.errors import DataError, StorageError

_TIMEOUT_S = 30.0
_CHUNK_BYTES = 1 << 20


def download_all(
    files: Mapping[str, str], *, address: str, folder: Path, read: Callable[[Path], bytes] = read_gzip
) -> None:
    """Fetch each file that is not in ``folder``, and compare the SHA-256 of what ``read`` says it contains.

    ``files`` maps names to digests; ``read`` uncompresses, or is ``read_plain``. Processes of a host that call this together
    download once: the others wait for the lock and then find the files.

    Raises:
        DataError: no network, or a file that is not what was expected.
        StorageError: ``folder`` cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder.with_name(f".{folder.name}.lock")):
            for name, digest in files.items():
                if not (folder / name).is_file():
                    _download(address + name, target=folder / name, digest=digest, read=read)
    except OSError as error:
        raise StorageError(
            f"{folder} cannot be written ({error.strerror or error}); free space or mend its permissions"
        ) from error


def read_plain(path: Path) -> bytes:
    """The content of a file that is not compressed.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({error.strerror}); check that it is there and its permissions"
        ) from error


def _download(address: str, *, target: Path, digest: str, read: Callable[[Path], bytes]) -> None:
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    part = Path(name)
    try:
        with os.fdopen(handle, "wb") as out:
            _fetch(address, out)
            out.flush()
            os.fsync(out.fileno())
        check_sha256(read(part), expected=digest, name=address)
        part.chmod(0o644)
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


def _fetch(address: str, out: BinaryIO) -> None:
    # Only the reading may be a failed download; an error of writing is the caller's StorageError.
    try:
        response = urllib.request.urlopen(address, timeout=_TIMEOUT_S)
    except (OSError, http.client.HTTPException) as error:
        raise _failed(address, error) from error
    with response:
        while chunk := _read(response, address):
            out.write(chunk)


def _read(response: http.client.HTTPResponse, address: str) -> bytes:
    try:
        return response.read(_CHUNK_BYTES)
    except (OSError, http.client.HTTPException) as error:
        raise _failed(address, error) from error


def _failed(address: str, error: Exception) -> DataError:
    # A launcher hands on no proxy, whose address may hold a password, unless it is told to.
    hint = (
        ""
        if urllib.request.getproxies()
        else "; behind a proxy name its variable, launch.env=[https_proxy], for ranks to see it"
    )
    return DataError(f"{address} could not be downloaded ({getattr(error, 'reason', error)}){hint}")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
