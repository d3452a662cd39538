"""QSGD against its definition: levels, expectation, and magnitudes from the smallest to the largest."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from horovod_jobs.strategy.compression.qsgd import Qsgd
from tests.unit.strategy.test_compression import Ranks, normal


@pytest.mark.parametrize("norm", ["max", "l2"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_qsgd_is_unbiased_and_only_uses_the_levels_beside(bits: int, norm: str) -> None:
    values, draws, bucket, levels = normal(4, 40, seed=2), 3000, 64, 2 ** (bits - 1) - 1
    flat = values.reshape(-1).double().numpy()
    norms = np.concatenate(
        [
            np.full(len(part), np.abs(part).max() if norm == "max" else np.sqrt((part**2).sum()))
            for part in np.split(flat, range(bucket, len(flat), bucket))
        ]
    )
    place = np.abs(flat) / norms * levels
    part = place - np.floor(place)
    world = Ranks(Qsgd(bits=bits, bucket=bucket, norm=norm), (4, 40), ranks=1)
    total = np.zeros(len(flat))
    for _ in range(draws):
        got = world.step([values]).double().numpy()
        level = np.abs(got) / norms * levels
        assert (np.abs(level - np.floor(place)) < 1e-4).any() or bits == 2
        assert ((np.abs(level - np.floor(place)) < 1e-3) | (np.abs(level - np.floor(place) - 1) < 1e-3)).all()
        assert ((np.sign(got) == np.sign(flat)) | (got == 0)).all()
        total += got
    deviation = norms / levels * np.sqrt(part * (1 - part) / draws)
    assert (np.abs(total / draws - flat) <= 5 * deviation + 1e-5).all()


@given(
    power=st.integers(-45, 37),
    base=st.lists(st.floats(-1, 1, width=32), min_size=8, max_size=8),
    bits=st.sampled_from([2, 4, 8]),
    norm=st.sampled_from(["max", "l2"]),
)
@settings(max_examples=100, deadline=None)
@example(power=0, base=[0.0] * 8, bits=4, norm="max")
@example(power=-39, base=[1.0, 0.5, -0.3, 0.0, 0.1, 0.2, 0.7, 0.9], bits=4, norm="max")
@example(power=-30, base=[1.0, 0.5, -0.3, 0.0, 0.1, 0.2, 0.7, 0.9], bits=8, norm="l2")
@example(power=37, base=[1.0, 0.5, -0.3, 0.0, 0.1, 0.2, 0.7, 0.9], bits=2, norm="l2")
def test_qsgd_is_finite_and_unbiased_at_any_magnitude(power: int, base: list[float], bits: int, norm: str) -> None:
    """The same bucket many times in one tensor, so that one step has many draws of it."""
    draws, tiny, levels = 2000, float(torch.finfo(torch.float32).tiny), 2 ** (bits - 1) - 1
    bucket = (torch.tensor(base, dtype=torch.float64) * 10.0**power).float()
    got = Ranks(Qsgd(bits=bits, bucket=8, norm=norm), (draws, 8), ranks=1).step([bucket.expand(draws, 8).clone()])
    assert bool(torch.isfinite(got).all())
    exact = bucket.double()
    size = float(exact.abs().max() if norm == "max" else exact.norm())
    step = max(size / levels, tiny)
    mean = got.view(draws, 8).double().mean(0)
    assert ((mean - exact).abs() <= 6 * 0.5 * step / math.sqrt(draws) + 1e-6 * size).all()


def test_qsgd_draws_differently_on_every_rank() -> None:
    world = Ranks(Qsgd(bits=2, bucket=64), (8, 8), ranks=2)
    values = normal(8, 8, seed=4)
    payloads = [
        world.method.encode(values.reshape(-1), slot=slot, wire=wire)  # type: ignore[attr-defined]
        for slot, wire in zip(world.slots, world.wires, strict=True)
    ]
    assert not torch.equal(payloads[0], payloads[1])
    again = world.method.encode(values.reshape(-1), slot=world.slots[0], wire=world.wires[0])  # type: ignore[attr-defined]
    assert torch.equal(payloads[0], again), "a function of step, rank and tensor"
