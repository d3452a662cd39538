"""Reading ahead of the training loop in worker processes."""

from __future__ import annotations

import itertools
import multiprocessing
import pickle
import warnings
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from horovod_jobs.data.base import Batch, MapSplit
from horovod_jobs.errors import DataError


class _Fetch(Dataset[Batch]):
    """A data set whose "samples" are whole batches: the loader's sampler gives the positions of one batch."""

    def __init__(self, split: MapSplit) -> None:
        self._split = split

    def __getitem__(self, indices: Tensor) -> Batch:
        return self._split.fetch(indices)


def batches_from_workers(split: MapSplit, index_batches: Iterable[Tensor], *, workers: int) -> Iterator[Batch]:
    """The batches of ``index_batches`` in order, fetched by ``workers`` processes.

    Raises:
        DataError: the data set cannot be sent to another process.
    """
    remaining = iter(index_batches)
    first = next(remaining, None)
    if first is None:
        return
    # forkserver: a plain fork would copy a process in which Horovod's and MPI's threads run. The preload makes a
    # worker start in milliseconds, because torch is imported once, in the server.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["horovod_jobs.data.workers"])
    loader = DataLoader(
        _Fetch(split),
        batch_size=None,
        sampler=itertools.chain([first], remaining),
        num_workers=workers,
        multiprocessing_context=context,
        # Its own generator: the loader draws a seed for its workers, and the global one belongs to the training state.
        generator=torch.Generator().manual_seed(int(first.sum())),
    )
    try:
        with warnings.catch_warnings():
            # torch says less about this than the error below.
            warnings.filterwarnings("ignore", message="Got pickle error when attempting to start a worker")
            iterator = iter(loader)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise DataError(
            f"the data set cannot be sent to a worker process ({error}); define its class at the top level of a "
            "module and keep no open files in it, or set workers=0"
        ) from error
    yield from iterator
