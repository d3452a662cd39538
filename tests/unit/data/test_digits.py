import sys

import pytest
import torch
from sklearn.datasets import load_digits

from horovod_jobs.data.digits import digits
from horovod_jobs.errors import ConfigError, SetupError


def test_splits_are_a_partition_of_the_1797_pictures():
    data = digits()
    assert (len(data.train), len(data.validation), len(data.test)) == (1257, 180, 360)
    assert data.input_shape == (1, 8, 8)
    train = data.train.fetch(torch.arange(len(data.train))).inputs
    assert abs(train.double().mean().item()) < 1e-5
    assert abs(train.double().std(correction=0).item() - 1) < 1e-5
    labels = torch.cat([data.train.targets, data.validation.targets, data.test.targets])
    assert torch.equal(torch.bincount(labels), torch.bincount(torch.tensor(load_digits().target)))
    parts = [
        split.fetch(torch.arange(len(split))).inputs.flatten(1) for split in (data.train, data.validation, data.test)
    ]
    assert len(torch.cat(parts).unique(dim=0)) == len(torch.tensor(load_digits().data).unique(dim=0))


def test_the_split_is_deterministic_and_in_the_digest():
    assert digits().digest == digits().digest
    variants = [digits(), digits(split_seed=1), digits(test_samples=361), digits(validation_samples=0)]
    assert len({data.digest for data in variants}) == 4
    assert variants[3].validation is None


def test_bad_settings():
    with pytest.raises(ConfigError, match="test_samples=0"):
        digits(test_samples=0)
    with pytest.raises(ConfigError, match="validation_samples=1437 does not leave any of the 1437"):
        digits(validation_samples=1437)


def test_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(SetupError, match=r"pip install 'horovod-jobs\[digits\]'"):
        digits()
