import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from horovod_jobs.data.augment import ShiftFlipCrop, splitmix64, uniform_integers
from horovod_jobs.errors import ConfigError, DataError


def pictures(count, channels=2, height=9, width=7):
    return torch.arange(count * channels * height * width, dtype=torch.float32).view(count, channels, height, width) + 1


def test_splitmix64_gives_the_published_sequence():
    # The generator's first outputs for seed 0: state k * 0x9E3779B97F4A7C15, finalised.
    published = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert [value & (1 << 64) - 1 for value in splitmix64(torch.arange(3)).tolist()] == published


def test_numbers_are_uniform_and_independent_between_streams_and_epochs():
    indices = torch.arange(30_000)
    first = uniform_integers(5, seed=1, epoch=2, indices=indices)
    share = torch.bincount(first, minlength=5) / len(first)
    assert share.sub(0.2).abs().max() < 0.01
    for other in ({"seed": 1, "epoch": 3}, {"seed": 2, "epoch": 2}, {"seed": 1, "epoch": 2, "stream": 1}):
        again = uniform_integers(5, indices=indices, **other)
        assert abs((first == again).double().mean().item() - 0.2) < 0.01


@settings(max_examples=30)
@given(size=st.integers(1, 4), data=st.data())
def test_a_sample_does_not_depend_on_its_batch(size, data):
    augment = ShiftFlipCrop(shift=2, flip=True, crop_padding=1)
    inputs, indices = pictures(12), torch.arange(100, 112)
    whole = augment(inputs, seed=7, epoch=3, indices=indices)
    order = torch.tensor(data.draw(st.permutations(range(12))))
    for part in order.chunk(size):
        assert torch.equal(augment(inputs[part], seed=7, epoch=3, indices=indices[part]), whole[part])


def test_the_result_changes_with_seed_and_epoch_and_leaves_the_input_alone():
    augment = ShiftFlipCrop(shift=3, flip=True)
    inputs = pictures(8)
    before, rng = inputs.clone(), torch.get_rng_state()
    first = augment(inputs, seed=0, epoch=0, indices=torch.arange(8))
    assert torch.equal(inputs, before)
    assert torch.equal(torch.get_rng_state(), rng)
    assert not torch.equal(first, augment(inputs, seed=0, epoch=1, indices=torch.arange(8)))
    assert not torch.equal(first, augment(inputs, seed=1, epoch=0, indices=torch.arange(8)))


def test_flip_mirrors_about_half_of_the_pictures():
    inputs = pictures(400)
    flipped = ShiftFlipCrop(flip=True)(inputs, seed=0, epoch=0, indices=torch.arange(400))
    mirrored = [torch.equal(now, was.flip(2)) for now, was in zip(flipped, inputs, strict=True)]
    unchanged = [torch.equal(now, was) for now, was in zip(flipped, inputs, strict=True)]
    assert all(one != other for one, other in zip(mirrored, unchanged, strict=True))
    assert 160 < sum(mirrored) < 240


@pytest.mark.parametrize(("options", "mode"), [({"shift": 2}, "replicate"), ({"crop_padding": 2}, "constant")])
def test_every_result_is_a_window_of_the_padded_picture_and_all_windows_occur(options, mode):
    inputs = pictures(300)
    value = {} if mode == "replicate" else {"value": -5.0}
    padded = F.pad(inputs, (2, 2, 2, 2), mode=mode, **value)
    moved = ShiftFlipCrop(**options, fill=-5.0)(inputs, seed=0, epoch=0, indices=torch.arange(300))
    seen = set()
    for now, source in zip(moved, padded, strict=True):
        windows = [(y, x) for y in range(5) for x in range(5) if torch.equal(now, source[:, y : y + 9, x : x + 7])]
        assert len(windows) == 1
        seen.add(windows[0])
    assert len(seen) == 25


def test_an_empty_batch_stays_empty():
    augment = ShiftFlipCrop(shift=1, flip=True, crop_padding=1)
    assert augment(pictures(1)[:0], seed=0, epoch=0, indices=torch.arange(0)).shape == (0, 2, 9, 7)


def test_bad_use():
    with pytest.raises(ConfigError, match="shift=-1 is negative"):
        ShiftFlipCrop(shift=-1)
    with pytest.raises(DataError, match=r"not \[3, 4\]"):
        ShiftFlipCrop(flip=True)(torch.zeros(3, 4), seed=0, epoch=0, indices=torch.arange(3))
