"""Augmentation of pictures on tensors, with random numbers that belong to the sample and not to the process.

Every number is a hash of (seed, epoch, sample index, stream), so a sample is augmented in the same way whatever the
number of ranks, the batch it is in, or the place where a run was resumed.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from horovod_jobs.errors import ConfigError, DataError


class ShiftFlipCrop:
    """Shift, mirror and crop each picture at random, in one gather.

    shift: moved by up to this many pixels in both directions; the border pixels are repeated into the gap.
    flip: mirrored left to right with probability 1/2.
    crop_padding: padded by this many pixels of ``fill`` on every side and cropped to its size at random
        (He et al. 2015, arXiv:1512.03385, section 4.2, use 4 pixels on 32x32).
    fill: the value of the padding, after normalisation; 0 is the mean.

    Raises:
        ConfigError: a negative ``shift`` or ``crop_padding``.
    """

    def __init__(self, *, shift: int = 0, flip: bool = False, crop_padding: int = 0, fill: float = 0.0) -> None:
        for name, value in (("shift", shift), ("crop_padding", crop_padding)):
            if value < 0:
                raise ConfigError(f"{name}={value} is negative; use 0 to switch it off, or the number of pixels")
        self._shift, self._flip, self._crop, self._fill = shift, flip, crop_padding, fill

    def __call__(self, inputs: Tensor, *, seed: int, epoch: int, indices: Tensor) -> Tensor:
        """Augmented copies of ``inputs`` ``[B, C, H, W]``; ``indices`` ``[B]`` are the samples' positions.

        Raises:
            DataError: inputs that are not pictures.
        """
        if inputs.ndim != 4:
            raise DataError(
                f"shift, flip and crop need pictures [batch, channels, height, width], not {list(inputs.shape)}; "
                "set augment=null for this data set"
            )
        height, width = inputs.shape[2:]
        rows, rows_inside = self._sources(height, seed=seed, epoch=epoch, indices=indices, stream=0)
        columns, columns_inside = self._sources(width, seed=seed, epoch=epoch, indices=indices, stream=2)
        if self._flip:
            mirrored = uniform_integers(2, seed=seed, epoch=epoch, indices=indices, stream=4).bool().unsqueeze(1)
            columns = torch.where(mirrored, columns.flip(1), columns)
            columns_inside = torch.where(mirrored, columns_inside.flip(1), columns_inside)
        pixels = (rows.unsqueeze(2) * width + columns.unsqueeze(1)).flatten(1).unsqueeze(1)
        moved = inputs.flatten(2).gather(2, pixels.expand(-1, inputs.shape[1], -1)).reshape(inputs.shape)
        if self._crop:
            inside = rows_inside.unsqueeze(2) & columns_inside.unsqueeze(1)
            moved = moved.masked_fill(~inside.unsqueeze(1), self._fill)
        return moved

    def _sources(self, length: int, *, seed: int, epoch: int, indices: Tensor, stream: int) -> tuple[Tensor, Tensor]:
        """For each target row or column ``[B, length]``: where it is read from, and whether that is in the picture."""
        target = torch.arange(length, device=indices.device).expand(len(indices), -1)
        # The crop is taken of the shifted picture: first the place in it, then the place in the original.
        if self._crop:
            target = target + _offsets(self._crop, seed=seed, epoch=epoch, indices=indices, stream=stream)
        inside = (target >= 0) & (target < length)
        if self._shift:
            target = target + _offsets(self._shift, seed=seed, epoch=epoch, indices=indices, stream=stream + 1)
        return target.clamp(0, length - 1), inside


def uniform_integers(bound: int, *, seed: int, epoch: int, indices: Tensor, stream: int = 0) -> Tensor:
    """``[B]`` int64 from 0 to ``bound - 1``, each a function of (seed, epoch, its index, stream) only.

    ``bound`` is at most 2^31. Different streams give independent numbers for the same sample.
    """
    key = hashlib.sha256(f"augment:{seed}:{epoch}:{stream}".encode()).digest()
    bits = splitmix64(indices + int.from_bytes(key[:8], "big", signed=True))
    high = (bits >> 32) & 0xFFFFFFFF
    return (high * bound) >> 32


def splitmix64(values: Tensor) -> Tensor:
    """The SplitMix64 hash of int64 values as 64 well-mixed bits, by wrapping int64 arithmetic.

    Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators", doi:10.1145/2660193.2660195.
    """
    mixed = (values + 1) * _signed(0x9E3779B97F4A7C15)
    mixed = (mixed ^ ((mixed >> 30) & 0x3FFFFFFFF)) * _signed(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ ((mixed >> 27) & 0x1FFFFFFFFF)) * _signed(0x94D049BB133111EB)
    return mixed ^ ((mixed >> 31) & 0x1FFFFFFFF)


def _offsets(most: int, *, seed: int, epoch: int, indices: Tensor, stream: int) -> Tensor:
    steps = uniform_integers(2 * most + 1, seed=seed, epoch=epoch, indices=indices, stream=stream)
    return (steps - most).unsqueeze(1)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value
