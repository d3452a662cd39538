"""The SHA-256 of everything in a data set, for those that do not bring one of their own."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from horovod_jobs.errors import DataError

if TYPE_CHECKING:
    from horovod_jobs.data.base import Batch, Split

_CHUNK_SAMPLES = 512


def content_digest(splits: Mapping[str, Split], *, name: str) -> str:
    """SHA-256 (hex) over the name, shapes, types and values of every sample of every split, in order.

    Raises:
        DataError: a sample is not the same when it is read twice, so no digest describes the data.
    """
    total = hashlib.sha256()
    for part, split in splits.items():
        first = torch.tensor([0])
        if _batch_digest(split.fetch(first)) != _batch_digest(split.fetch(first)):
            raise DataError(
                f"sample 0 of {name}.{part} differs between two readings; move random augmentation to the `augment` "
                "attribute, or give a `digest`"
            )
        total.update(f"{part}:{len(split)}".encode())
        for batch in read_all(split):
            total.update(_batch_digest(batch))
    return total.hexdigest()


def read_all(split: Split) -> Iterator[Batch]:
    """The whole split in order, some hundred samples at a time."""
    for start in range(0, len(split), _CHUNK_SAMPLES):
        yield split.fetch(torch.arange(start, min(start + _CHUNK_SAMPLES, len(split))))


def _batch_digest(batch: Batch) -> bytes:
    digest = hashlib.sha256()
    for part in (batch.inputs, batch.targets):
        digest.update(f"{part.dtype}:{list(part.shape)}".encode())
        digest.update(_content(part))
    return digest.digest()


def _content(tensor: Tensor) -> bytes:
    # Bytes, because numpy has no bfloat16.
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
