import warnings

import pytest
import torch
from torch.utils.data import Dataset, IterableDataset, TensorDataset

from horovod_jobs.data.base import Batch, DataModule, MapSplit, Split, TensorSplit, as_data_module, batches
from horovod_jobs.errors import DataError


class Pairs(Dataset):
    def __init__(self, count=10, offset=0):
        self.inputs = torch.arange(count * 3, dtype=torch.float64).view(count, 3) + offset
        self.targets = [position % 4 for position in range(count)]

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, position):
        return self.inputs[position], self.targets[position]


class Noisy(Pairs):
    def __getitem__(self, position):
        return torch.rand(3), 0


class Broken(Pairs):
    def __getitem__(self, position):
        return torch.zeros(3 + position), 0


class Stream(IterableDataset):
    def __iter__(self):
        yield torch.zeros(3), 0


class Module:
    """A user's object: only what it is given."""

    def __init__(self, **parts):
        self.__dict__.update(parts)


def test_tensor_split_normalises_uint8_and_float():
    raw = torch.randint(0, 256, (6, 2, 4, 4), dtype=torch.uint8)
    split = TensorSplit(raw, torch.arange(6), mean=[0.5, 0.25], std=[0.5, 2.0])
    batch = split.fetch(torch.tensor([4, 0]))
    mean, std = torch.tensor([0.5, 0.25]).view(2, 1, 1), torch.tensor([0.5, 2.0]).view(2, 1, 1)
    torch.testing.assert_close(batch.inputs, (raw[[4, 0]].float() / 255 - mean) / std)
    assert batch.inputs.dtype == torch.float32
    assert batch.targets.tolist() == batch.indices.tolist() == [4, 0]
    plain = torch.randn(6, 3)
    before = plain.clone()
    fetched = TensorSplit(plain, torch.arange(6), mean=1.0, std=2.0).fetch(torch.arange(6)).inputs
    torch.testing.assert_close(fetched, (before - 1) / 2)
    assert torch.equal(plain, before)


def test_tensor_split_subset_counts_from_zero():
    split = TensorSplit(torch.arange(10.0).view(10, 1), torch.arange(10), mean=1.0, std=2.0)
    part = split.subset(torch.tensor([7, 2]))
    assert len(part) == 2
    assert part.targets.tolist() == [7, 2]
    assert torch.equal(part.fetch(torch.tensor([1])).inputs, split.fetch(torch.tensor([2])).inputs)


@pytest.mark.parametrize(
    ("inputs", "targets", "options", "message"),
    [
        (torch.zeros(3, 2), torch.zeros(4), {}, r"\[3, 2\] and targets of shape \[4\]"),
        (torch.zeros(3, 2, dtype=torch.int32), torch.zeros(3), {}, "inputs are torch.int32"),
        (torch.zeros(3, 2), torch.zeros(3), {"std": 0.0}, "std=0.0 is not positive"),
        (torch.zeros(3, 2), torch.zeros(3), {"mean": [1, 2, 3]}, "mean has 3 numbers for 2 channels"),
    ],
)
def test_tensor_split_refuses(inputs, targets, options, message):
    with pytest.raises(DataError, match=message):
        TensorSplit(inputs, targets, **options)


@pytest.mark.parametrize(
    "split", [TensorSplit(torch.zeros(5, 1, 2, 2, dtype=torch.uint8), torch.zeros(5).long()), MapSplit(Pairs())]
)
def test_an_empty_fetch_has_the_shape_of_a_batch(split):
    assert isinstance(split, Split)
    empty, one = split.fetch(torch.arange(0)), split.fetch(torch.tensor([0]))
    assert len(empty) == 0
    assert empty.inputs.shape == (0, *one.inputs.shape[1:])
    assert empty.inputs.dtype == one.inputs.dtype == torch.float32
    assert empty.targets.dtype == one.targets.dtype == torch.int64
    assert empty.targets.shape == empty.indices.shape == (0,)


def test_batch_to_the_same_device_is_itself():
    batch = Batch(torch.zeros(2, 3), torch.zeros(2).long(), torch.arange(2))
    assert batch.to(torch.device("cpu")) is batch
    assert batch.to(torch.device("meta")).inputs.device.type == "meta"


def test_map_split_reads_by_position():
    batch = MapSplit(Pairs()).fetch(torch.tensor([3, 9]))
    assert batch.inputs.tolist() == [[9, 10, 11], [27, 28, 29]]
    assert batch.targets.tolist() == [3, 1]
    assert batch.indices.tolist() == [3, 9]


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ([], "has 0 samples"),
        ([1, 2], "sample 0 of the x data set is a int, not a pair"),
        ([(object(), 1)], "do not fit in one tensor"),
        ([({"a": 1}, 1)], "not a tensor or a number"),
        (Stream(), "has no length"),
    ],
)
def test_map_split_refuses(dataset, message):
    with pytest.raises(DataError, match=message):
        MapSplit(dataset, name="x")


def test_map_split_names_samples_of_different_shapes():
    with pytest.raises(DataError, match="samples 0 to 2 of the x data set do not fit"):
        MapSplit(Broken(), name="x").fetch(torch.tensor([0, 1, 2]))


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_keep_order_and_empty_ones(workers):
    wanted = [torch.tensor([2, 5]), torch.arange(0), torch.tensor([9]), torch.tensor([0, 1, 2])]
    state = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="This DataLoader will create")  # on a machine of one core
        got = list(batches(MapSplit(Pairs()), iter(wanted), workers=workers))
    assert torch.equal(torch.get_rng_state(), state)
    assert [batch.indices.tolist() for batch in got] == [part.tolist() for part in wanted]
    assert got[0].inputs.tolist() == [[6, 7, 8], [15, 16, 17]]
    assert got[1].inputs.shape == (0, 3)


def test_workers_may_get_no_batch_at_all_and_do_not_touch_splits_in_memory():
    assert list(batches(MapSplit(Pairs()), [], workers=2)) == []
    split = TensorSplit(torch.arange(4.0).view(4, 1), torch.arange(4))
    assert [batch.targets.tolist() for batch in batches(split, [torch.tensor([3, 0])], workers=2)] == [[3, 0]]


def test_a_data_set_that_cannot_be_sent_to_a_worker():
    dataset = Pairs()
    dataset.transform = lambda value: value
    with pytest.raises(DataError, match="cannot be sent to a worker process"):
        list(batches(MapSplit(dataset), [torch.tensor([0])], workers=1))


def test_a_users_object_without_anything_optional():
    data = as_data_module(Module(train=Pairs(10), test=Pairs(4)), name="mine.Data")
    assert isinstance(data, DataModule)
    assert data.num_classes == 4
    assert data.class_names == ("0", "1", "2", "3")
    assert data.input_shape == (3,)
    assert data.validation is None
    assert data.augment is None
    assert (len(data.train), len(data.test)) == (10, 4)
    assert len(data.digest) == 64


def test_a_users_object_with_everything():
    split = TensorSplit(torch.zeros(4, 1, 2, 2, dtype=torch.uint8), torch.zeros(4).long())
    given = Module(
        train=split, test=split, validation=Pairs(), num_classes=2, class_names=["a", "b"], input_shape=[1, 2, 2],
        digest="d", augment=max,
    )  # fmt: skip
    data = as_data_module(given, name="x")
    assert data.train is split
    assert isinstance(data.validation, MapSplit)
    assert (data.num_classes, data.class_names, data.input_shape) == (2, ("a", "b"), (1, 2, 2))
    assert (data.digest, data.augment) == ("d", max)
    assert as_data_module(data, name="x") is data


def test_the_digest_follows_every_value_of_every_split():
    def digest(**parts):
        return as_data_module(Module(**{"train": Pairs(600), "test": Pairs(4), **parts}), name="x").digest

    changed = Pairs(600)
    changed.inputs[599, 2] += 1
    relabelled = Pairs(600)
    relabelled.targets[598] = 3
    digests = [
        digest(), digest(train=changed), digest(train=relabelled), digest(test=Pairs(5)), digest(validation=Pairs(4))
    ]  # fmt: skip
    assert digest() == digests[0]
    assert len(set(digests)) == len(digests)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"test": Pairs()}, "no attribute 'train'"),
        ({"train": Pairs()}, "no attribute 'test'"),
        ({"train": Pairs(), "test": Pairs(0)}, "0 samples"),
        ({"train": Stream(), "test": Pairs()}, "has no length"),
        ({"train": 5, "test": Pairs()}, "cannot be read by position"),
        ({"train": Noisy(), "test": Pairs()}, "differs between two readings"),
        ({"train": Pairs(), "test": Pairs(), "num_classes": 0}, "num_classes=0"),
        ({"train": Pairs(), "test": Pairs(), "class_names": ["a"]}, "1 class_names for num_classes=4"),
        ({"train": Pairs(), "test": Pairs(), "augment": 3}, "augment of data set x is 3"),
        ({"train": Pairs(), "test": Pairs(), "digest": 3}, "digest=3"),
        ({"train": TensorDataset(torch.zeros(2, 1), torch.zeros(2)), "test": Pairs()}, "give its num_classes"),
    ],
)
def test_a_users_object_that_does_not_fit(parts, message):
    with pytest.raises(DataError, match=message):
        as_data_module(Module(**parts), name="x")
