"""Reading gzip-compressed IDX files, the format of MNIST and Fashion-MNIST."""

from __future__ import annotations

import gzip
import hashlib
import math
import zlib
from pathlib import Path

import torch
from torch import Tensor

from horovod_jobs.errors import DataError

_UINT8 = 0x08


def read_gzip(path: Path) -> bytes:
    """The decompressed content of a file.

    Raises:
        DataError: the file cannot be read, or is cut short, or is not gzip.
    """
    try:
        return gzip.decompress(path.read_bytes())
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path} is damaged ({error}); delete it and install or download it again") from error
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({error.strerror}); check that it is there and its permissions"
        ) from error


def check_sha256(content: bytes, *, expected: str, name: str) -> None:
    """Compare the SHA-256 of uncompressed content.

    Raises:
        DataError: it is another one.
    """
    found = hashlib.sha256(content).hexdigest()
    if found != expected:
        raise DataError(
            f"{name} is damaged or another file (SHA-256 of its content {found[:16]}..., expected {expected[:16]}...); "
            "delete it and install or download it again"
        )


def parse_idx(content: bytes, *, name: str) -> Tensor:
    """The uint8 tensor in an IDX file: two zero bytes, the type, the number of dimensions, each dimension, the data.

    Raises:
        DataError: another type, another magic number, or a length that does not fit the dimensions.
    """
    if len(content) < 4 or content[:2] != b"\x00\x00" or content[2] != _UINT8 or content[3] == 0:
        raise DataError(
            f"{name} is not an IDX file of unsigned bytes (it starts with 0x{content[:4].hex()}, expected 0x000008 "
            "and the number of dimensions); give the file as it was published"
        )
    start = 4 + 4 * content[3]
    shape = [int.from_bytes(content[at : at + 4], "big") for at in range(4, start, 4)]
    if len(content) != start + math.prod(shape):
        raise DataError(
            f"{name} has {len(content)} bytes, but its header says {shape}, which is {start + math.prod(shape)} "
            "bytes; delete it and install or download it again"
        )
    # bytearray: torch shares the memory and wants it writable.
    return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=start).view(shape)
