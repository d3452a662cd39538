"""Fashion-MNIST: 60,000 + 10,000 grey pictures of clothes, 28x28, 10 classes (Xiao et al. 2017, arXiv:1708.07747)."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from horovod_jobs.data.base import DataModule, TensorSplit
from horovod_jobs.data.download import download_all
from horovod_jobs.data.idx import check_sha256, parse_idx, read_gzip
from horovod_jobs.data.partition import hold_out
from horovod_jobs.errors import DataError

CLASS_NAMES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
# SHA-256 of the uncompressed content: packagers compress the files again, so the archives' own sums differ.
SHA256 = {
    "train-images-idx3-ubyte.gz": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte.gz": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte.gz": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte.gz": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
ADDRESS = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
# Of all 60,000 training pictures, as values between 0 and 1.
MEAN, STD = 0.286041, 0.353024

_WAYS = (
    "install the Debian package (apt install dataset-fashion-mnist), or put the four files of "
    f"{ADDRESS} in $HOROVOD_JOBS_DATA/fashion-mnist or in a folder named by data.root, or set data.download=true "
    "where the network can be reached"
)


def fashion_mnist(
    root: str | None = None,
    *,
    validation_samples: int = 5000,
    split_seed: int = 0,
    augment: Callable[..., Tensor] | None = None,
    download: bool = True,
) -> DataModule:
    """Fashion-MNIST with ``validation_samples`` of the training pictures held out by a permutation of ``split_seed``.

    Inputs are ``[B, 1, 28, 28]``, normalised by the training set's mean and standard deviation. The files are looked
    for in ``root`` (and only there when it is given), ``$HOROVOD_JOBS_DATA/fashion-mnist``, the Debian package's folder
    and ``~/.cache/horovod_jobs/data/fashion-mnist``, where they are downloaded to when ``download`` is true. Their
    SHA-256 is compared each time.

    Raises:
        DataError: the files are nowhere, damaged, or cannot be downloaded.
        ConfigError: ``validation_samples`` does not leave a training sample.
    """
    folder = _find(root, download=download)
    parts = {name: _load(folder / name, expected=digest) for name, digest in SHA256.items()}
    images, labels, test_images, test_labels = (parts[name] for name in SHA256)
    everything = TensorSplit(images.unsqueeze(1), labels, mean=MEAN, std=STD)
    kept, held_out = hold_out(len(everything), samples=validation_samples, seed=split_seed, name="validation_samples")
    settings = f"fashion_mnist:{validation_samples}:{split_seed}:{MEAN}:{STD}:{':'.join(SHA256.values())}"
    return DataModule(
        train=everything.subset(kept),
        test=TensorSplit(test_images.unsqueeze(1), test_labels, mean=MEAN, std=STD),
        validation=everything.subset(held_out) if validation_samples else None,
        num_classes=len(CLASS_NAMES),
        class_names=CLASS_NAMES,
        input_shape=(1, *images.shape[1:]),
        digest=hashlib.sha256(settings.encode()).hexdigest(),
        augment=augment,
    )


def folders() -> list[Path]:
    """Where the files are looked for when no ``root`` is given, in order; the last is where they are downloaded to."""
    own = os.environ.get("HOROVOD_JOBS_DATA")
    found = [Path(own).expanduser() / "fashion-mnist"] if own else []
    return [*found, DEBIAN_FOLDER, Path.home() / ".cache" / "horovod_jobs" / "data" / "fashion-mnist"]


def _find(root: str | None, *, download: bool) -> Path:
    if root is not None:
        folder = Path(root).expanduser()
        missing = [name for name in SHA256 if not (folder / name).is_file()]
        if missing:
            raise DataError(f"data.root={root} has no {missing[0]}; name a folder with the four files, or {_WAYS}")
        return folder
    places = folders()
    for folder in places:
        if _complete(folder):
            return folder
    if not download:
        raise DataError(f"Fashion-MNIST is in none of {_listed(places)} and data.download=false; {_WAYS}")
    try:
        download_all(SHA256, address=ADDRESS, folder=places[-1])
    except DataError as error:
        raise DataError(f"Fashion-MNIST is in none of {_listed(places)}, and {error}; {_WAYS}") from error
    return places[-1]


def _complete(folder: Path) -> bool:
    return all((folder / name).is_file() for name in SHA256)


def _listed(places: Sequence[Path]) -> str:
    return ", ".join(str(place) for place in places)


def _load(path: Path, *, expected: str) -> Tensor:
    content = read_gzip(path)
    check_sha256(content, expected=expected, name=str(path))
    return parse_idx(content, name=str(path))
