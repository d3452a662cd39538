"""Files that a reader never sees half-written: write beside the target, fsync, rename."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from horovod_jobs.errors import StorageError

_REMEDY = {
    errno.ENOSPC: "free some space or choose another directory ({keys})",
    errno.EDQUOT: "your quota is spent; free some space or choose another directory ({keys})",
    errno.EACCES: "choose a directory that you may write ({keys})",
    errno.EPERM: "choose a directory that you may write ({keys})",
    errno.EROFS: "the file system is read-only; choose another directory ({keys})",
    errno.ENOTDIR: "a file stands where a directory is wanted; choose another directory ({keys})",
    errno.ENOENT: "choose another directory ({keys})",
    errno.EEXIST: "a file stands where a directory is wanted; choose another directory ({keys})",
}


_full = False


def pretend_full() -> None:
    """From here on this process finds no space to write in; for faults on purpose (``chaos``)."""
    global _full
    _full = True


@contextmanager
def storage_errors(what: str, path: Path, *, keys: str = "run.root=..., run.store=...") -> Iterator[None]:
    """Turn an ``OSError`` of the body into one line that names the path and the remedy; ``keys`` are those that choose it.

    Raises:
        StorageError: the body failed for want of space, permission or a usable path.
    """
    try:
        if _full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        yield
    except OSError as error:
        remedy = _REMEDY.get(error.errno or 0, "check the path and try again").format(keys=keys)
        place = error.filename if error.filename else path
        raise StorageError(f"cannot {what} {place} ({error.strerror or error}); {remedy}") from error


@contextmanager
def locked(path: Path, *, busy: str) -> Iterator[None]:
    """Hold a file's lock for the time of the body; the kernel lets go of it when this process ends, however it ends.

    ``busy``: what to say where another process holds it, with ``{holder}`` for what is known of that one.

    Raises:
        StorageError: another process holds it, or the file cannot be made.
    """
    with storage_errors("lock", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        stream = path.open("a+b", buffering=0)
    with stream:
        if not _take(stream):
            stream.seek(0)
            raise StorageError(busy.format(holder=stream.read().decode().strip() or "unknown"))
        with storage_errors("lock", path):
            stream.truncate(0)
            stream.write(f"process {os.getpid()} on {os.uname().nodename}".encode())
        yield
        stream.truncate(0)


def _take(stream: IO[bytes]) -> bool:
    """Lock a file, or give up after a moment: whoever only asks whether it is held (``is_locked``) holds it for as long as that takes."""
    for attempt in range(4):
        if attempt:
            time.sleep(0.05)
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
    return False


def is_locked(path: Path) -> bool:
    """Whether a process holds the lock of this file (``locked``), as far as this host can see; True also where that cannot be told."""
    try:
        with path.open("rb") as stream:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


def sha256_file(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def canonical_json(value: Any) -> str:
    """The same text for the same value: sorted keys, no spaces. A NaN or an object of another type is refused."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False)


def digest_of(value: Any) -> str:
    """SHA-256 (hex) of a JSON value's canonical text."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """A nested mapping's leaves with their dotted keys; an empty mapping is a leaf."""
    if isinstance(value, dict) and value:
        for key, entry in value.items():
            yield from flatten(entry, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value


def _fsync_dir(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Replace a file's content atomically.

    Raises:
        StorageError: it cannot be written; what was there before is untouched.
    """
    with storage_errors("write", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as stream:
                stream.write(text)
                stream.flush()
                os.fsync(stream.fileno())
            os.chmod(name, 0o644)
            os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
        _fsync_dir(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Replace a file by a value's JSON text, atomically. Raises: see ``write_text``."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False) + "\n")


def publish_dir(staging: Path, target: Path) -> None:
    """Make a finished directory visible under its name in one step; whatever stood there is replaced.

    Raises:
        StorageError: it cannot be published; what was there before is untouched.
    """
    with storage_errors("publish", target):
        for path in staging.rglob("*"):
            if path.is_file():
                with path.open("rb") as stream:
                    os.fsync(stream.fileno())
        _fsync_dir(staging)
        target.parent.mkdir(parents=True, exist_ok=True)
        old = None
        if target.exists():
            # rename() refuses a directory that is not empty, so the old one steps aside first.
            # Killed before the end, this process leaves it behind; its name says whose it was (``sweep_staging``).
            old = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".old-{target.name}-"))
            os.replace(target, old / "content")
        os.replace(staging, target)
        _fsync_dir(target.parent)
        if old is not None:
            shutil.rmtree(old, ignore_errors=True)


def check_can_write(path: Path) -> None:
    """Whether a directory could be made here and written to, by making one where it would begin, for a moment.

    Raises:
        OSError: it could not; it names ``path``.
    """
    place = path.absolute()
    while not os.path.lexists(place) and place != place.parent:
        place = place.parent
    try:
        os.rmdir(tempfile.mkdtemp(dir=place, prefix=".plan-"))
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


def update_link(link: Path, to: str) -> None:
    """Point a symbolic link at ``to``, atomically."""
    with storage_errors("link", link):
        temporary = link.with_name(f".{link.name}.{os.getpid()}")
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(to)
        os.replace(temporary, link)
