"""scikit-learn's digits: 1,797 grey pictures of 8x8 pixels, 10 classes. Small enough for a first try and for tests."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor

from horovod_jobs.data.base import DataModule, TensorSplit
from horovod_jobs.data.partition import hold_out
from horovod_jobs.errors import ConfigError, SetupError


def digits(
    *,
    test_samples: int = 360,
    validation_samples: int = 180,
    split_seed: int = 0,
    augment: Callable[..., Tensor] | None = None,
) -> DataModule:
    """The digits, split by permutations of ``split_seed``.

    Inputs are ``[B, 1, 8, 8]``, normalised by the mean and standard deviation of the training part.

    Raises:
        SetupError: scikit-learn is not installed.
        ConfigError: the splits leave no training sample.
    """
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise SetupError(
            "data=digits needs scikit-learn, which carries the pictures; run: pip install 'horovod-jobs[digits]'"
        ) from error
    pixels, labels = load_digits(return_X_y=True)
    inputs = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8)
    targets = torch.tensor(labels, dtype=torch.int64)
    if test_samples < 1:
        raise ConfigError(f"test_samples={test_samples} leaves nothing to test on; use at least 1")
    rest, test = hold_out(len(inputs), samples=test_samples, seed=split_seed, name="test_samples")
    kept, held_out = hold_out(len(rest), samples=validation_samples, seed=split_seed, name="validation_samples")
    mean, std = _moments(inputs[rest[kept]])

    def split(positions: Tensor) -> TensorSplit:
        return TensorSplit(inputs[positions], targets[positions], mean=mean, std=std)

    content = hashlib.sha256(inputs.numpy().tobytes() + targets.numpy().tobytes())
    content.update(f"digits:{test_samples}:{validation_samples}:{split_seed}".encode())
    return DataModule(
        train=split(rest[kept]),
        test=split(test),
        validation=split(rest[held_out]) if validation_samples else None,
        num_classes=10,
        class_names=tuple(str(digit) for digit in range(10)),
        input_shape=(1, 8, 8),
        digest=content.hexdigest(),
        augment=augment,
    )


def _moments(inputs: Tensor) -> tuple[float, float]:
    # In float64 and rounded, so that the order of a sum on another machine does not change a normalised value.
    values = inputs.double()
    return round(values.mean().item(), 6), round(values.std(correction=0).item(), 6)
