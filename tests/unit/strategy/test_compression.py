"""Each method against its paper's formula, worked out another way; several ranks are played in one process."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from horovod_jobs.comm.world import Handle, SingleWorld
from horovod_jobs.errors import ConfigError
from horovod_jobs.strategy.compression import NAMES, chosen
from horovod_jobs.strategy.compression.base import Method, Slot, Wire, share_of
from horovod_jobs.strategy.compression.bf16 import Bf16
from horovod_jobs.strategy.compression.onebit import OneBit
from horovod_jobs.strategy.compression.packing import as_bytes, pack, read, unpack
from horovod_jobs.strategy.compression.powersgd import PowerSgd, orthonormal
from horovod_jobs.strategy.compression.qsgd import Qsgd
from horovod_jobs.strategy.compression.randomk import RandomK, drawn
from horovod_jobs.strategy.compression.topk import TopK, largest

SHAPES = st.tuples(st.integers(2, 12), st.integers(2, 40))
SEEDS = st.integers(0, 2**31)


class Held:
    """What a rank has given to a collective; the driver below combines it."""

    def __init__(self, tensor: Tensor, how: str) -> None:
        self.tensor, self.how = tensor.clone(), how

    def wait(self) -> Tensor:
        raise AssertionError("the driver answers")


class Rank(SingleWorld):
    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size

    def allreduce_async(self, tensor: Tensor, *, name: str, op: str = "sum") -> Handle:
        assert op == "sum"
        return Held(tensor, "sum")

    def allgather_async(self, tensor: Tensor, *, name: str) -> Handle:
        return Held(tensor, "gather")


class Ranks:
    """Several ranks' slots of one tensor."""

    def __init__(self, method: Method, shape: tuple[int, ...], *, ranks: int = 2, momentum: float = 0.0) -> None:
        self.method = method
        self.wires = [Wire(Rank(rank, ranks)) for rank in range(ranks)]
        self.slots = [Slot("w", 0, shape, torch.device("cpu"), momentum=momentum) for _ in range(ranks)]
        for slot, wire in zip(self.slots, self.wires, strict=True):
            method.prepare(slot, wire)

    def step(self, gradients: list[Tensor]) -> Tensor:
        """The sum that the ranks arrive at, which must be the same."""
        runs = [
            self.method.reduce(gradient.reshape(-1), slot, wire)
            for gradient, slot, wire in zip(gradients, self.slots, self.wires, strict=True)
        ]
        held: list[Any] = [next(run) for run in runs]
        totals: list[Tensor] = []
        while not totals:
            sent = torch.stack([one.tensor for one in held])
            answer = sent if held[0].how == "gather" else sent.sum(0)
            for place, run in enumerate(runs):
                try:
                    held[place] = run.send(answer.clone())
                except StopIteration as end:
                    totals.append(end.value)
        assert len(totals) == len(runs)
        assert all(torch.equal(totals[0], total) for total in totals)
        for wire in self.wires:
            wire.traffic.steps += 1
        return totals[0]

    def residuals(self) -> list[Tensor]:
        return [slot.own["residual"].clone() for slot in self.slots]


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def gradients(shape: tuple[int, ...], ranks: int, seed: int) -> list[Tensor]:
    return list(normal(ranks, *shape, seed=seed))


# --- bytes ------------------------------------------------------------------------------------------------------------
@given(st.sampled_from([1, 2, 4, 8]), st.integers(1, 70), SEEDS)
def test_packing_loses_nothing_and_fills_every_byte(bits: int, count: int, seed: int) -> None:
    codes = torch.randint(2**bits, (count,), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    packed = pack(codes, bits=bits)
    assert packed.numel() == -(-count * bits // 8)
    meaning = torch.arange(2**bits, dtype=torch.uint8)
    assert torch.equal(unpack(packed, bits=bits, numel=count, meaning=meaning), codes)


def test_signs_are_packed_as_numpy_packs_them() -> None:
    signs = (normal(1003, seed=3) >= 0).to(torch.uint8)
    assert np.array_equal(pack(signs, bits=1).numpy(), np.packbits(signs.numpy(), bitorder="little"))


def test_numbers_are_read_where_no_such_number_may_begin() -> None:
    payload = as_bytes(torch.tensor([7], dtype=torch.uint8), torch.tensor([1.5, -2.0]))
    assert read(payload, start=1, count=2, dtype=torch.float32).tolist() == [1.5, -2.0]


@pytest.mark.parametrize(
    ("method", "wanted"),
    [
        (TopK(ratio=0.1, warmup_epochs=0), lambda n: 8 * (n // 10)),
        (RandomK(ratio=0.1), lambda n: 4 * (n // 10)),
        (OneBit(bucket=100), lambda n: n // 8 + 8 * (n // 100)),
        (OneBit(bucket=100, two_means=False), lambda n: n // 8 + 4 * (n // 100)),
        (Qsgd(bits=4, bucket=100), lambda n: n // 2 + 4 * (n // 100)),
        (Bf16(), lambda n: 2 * n),
        (PowerSgd(rank=2), lambda n: 4 * 2 * (20 + n // 20)),
    ],
    ids=lambda value: value.name if isinstance(value, Method) else "",
)
def test_what_is_handed_to_the_collectives_is_counted(method: Method, wanted: Any) -> None:
    ranks = Ranks(method, (20, 200))
    for seed in range(3):
        ranks.step(gradients((20, 200), 2, seed))
    assert [wire.traffic.sent_bytes for wire in ranks.wires] == [3 * wanted(4000)] * 2


# --- what is kept -----------------------------------------------------------------------------------------------------
FEEDBACK = [
    TopK(ratio=0.1, warmup_epochs=0),
    RandomK(ratio=0.1),
    OneBit(bucket=16),
    OneBit(bucket=16, two_means=False),
    PowerSgd(rank=1),
    PowerSgd(rank=2, warm_start=False),
]


@pytest.mark.parametrize("method", FEEDBACK, ids=lambda method: f"{method.name} {method.describe()}")
@given(shape=SHAPES, ranks=st.integers(1, 3), seed=SEEDS)
@settings(max_examples=25, deadline=None)
def test_nothing_is_lost(method: Method, shape: tuple[int, int], ranks: int, seed: int) -> None:
    """What came in is what was summed and what is kept, over several steps."""
    world = Ranks(method, shape, ranks=ranks)
    came, summed = torch.zeros(shape[0] * shape[1], dtype=torch.float64), torch.zeros(shape[0] * shape[1]).double()
    for step in range(4):
        given_now = gradients(shape, ranks, seed + step)
        came += sum(gradient.reshape(-1).double() for gradient in given_now)
        summed += world.step(given_now).double()
        kept = sum(residual.double() for residual in world.residuals())
        assert torch.allclose(came, summed + kept, atol=1e-4 * max(1.0, float(came.abs().max())))


@pytest.mark.parametrize("method", [TopK(ratio=0.2, warmup_epochs=0), RandomK(ratio=0.2)], ids=["topk", "randomk"])
@given(shape=SHAPES, seed=SEEDS)
@settings(max_examples=25, deadline=None)
def test_a_sparse_step_sends_an_element_or_keeps_it(method: Method, shape: tuple[int, int], seed: int) -> None:
    """Exactly: g + e_old = sent + e_new, to the last bit, of one rank."""
    world = Ranks(method, shape, ranks=1)
    for step in range(3):
        owed = gradients(shape, 1, seed + step)[0].reshape(-1) + world.residuals()[0]
        sent = world.step([gradients(shape, 1, seed + step)[0]])
        assert torch.equal(sent + world.residuals()[0], owed)
        assert int(((sent != 0) & (world.residuals()[0] != 0)).sum()) == 0


# --- top-k ------------------------------------------------------------------------------------------------------------
@given(st.integers(1, 300), st.floats(0.001, 1.0), SEEDS)
@settings(max_examples=60, deadline=None)
def test_the_largest_are_kept(count: int, ratio: float, seed: int) -> None:
    values = normal(count, seed=seed)
    wanted = share_of(count, ratio)
    indices = largest(values, wanted).tolist()
    ranked = sorted(range(count), key=lambda place: (-abs(float(values[place])), place))
    assert len(set(indices)) == wanted == len(indices)
    assert indices == sorted(indices)
    assert min(abs(float(values[place])) for place in indices) == abs(float(values[ranked[wanted - 1]]))
    assert sum(abs(float(values[place])) for place in indices) == pytest.approx(
        sum(abs(float(values[place])) for place in ranked[:wanted])
    )


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_all_elements_is_the_sum(ranks: int) -> None:
    world = Ranks(TopK(ratio=1.0), (6, 7), ranks=ranks)
    for seed in range(3):
        given_now = gradients((6, 7), ranks, seed)
        wanted = given_now[0].clone()
        for gradient in given_now[1:]:
            wanted += gradient
        assert torch.equal(world.step(given_now), wanted.reshape(-1))
        assert all(int(residual.count_nonzero()) == 0 for residual in world.residuals())


def test_the_share_comes_down_as_in_the_paper() -> None:
    """Lin et al. 2018, section 3.2: 75 %, 93.75 %, 98.4375 %, 99.6 %, 99.9 % are left out."""
    method = TopK(ratio=0.001, warmup_epochs=4)
    shares = [method.share(epoch) for epoch in range(6)]
    assert shares == pytest.approx([0.25, 0.0625, 0.015625, 0.004, 0.001, 0.001], rel=0.02)
    assert TopK(ratio=0.01, warmup_epochs=0).share(0) == pytest.approx(0.01)


@pytest.mark.parametrize(("nesterov", "masking"), [(False, True), (True, True), (False, False)])
def test_momentum_correction_follows_equation_4(nesterov: bool, masking: bool) -> None:
    momentum, count, keep = 0.9, 30, 3
    method = TopK(ratio=0.1, warmup_epochs=0, momentum_masking=masking)
    world = Ranks(method, (5, 6), ranks=2, momentum=momentum)
    for slot in world.slots:
        slot.nesterov = nesterov
    u, v = np.zeros((2, count)), np.zeros((2, count))
    for step in range(6):
        given_now = gradients((5, 6), 2, step)
        total = np.zeros(count)
        for rank in range(2):
            g = given_now[rank].reshape(-1).numpy().astype(np.float64)
            u[rank] = momentum * u[rank] + g
            v[rank] += momentum * u[rank] + g if nesterov else u[rank]
            sent = np.argsort(-np.abs(v[rank]), kind="stable")[:keep]
            total[sent] += v[rank][sent]
            v[rank][sent] = 0.0
            if masking:
                u[rank][sent] = 0.0
        assert np.allclose(world.step(given_now).numpy(), total, atol=1e-5)
    assert np.allclose(world.slots[1].own["momentum"].numpy(), u[1], atol=1e-5)


# --- random-k ---------------------------------------------------------------------------------------------------------
@given(st.integers(1, 500), st.floats(0.001, 1.0), SEEDS)
def test_random_indices_are_one_of_each_stretch(numel: int, ratio: float, seed: int) -> None:
    count = share_of(numel, ratio)
    indices, lengths = drawn(numel, count, torch.Generator().manual_seed(seed))
    assert int(lengths.sum()) == numel
    ends = lengths.cumsum(0)
    assert bool((indices < ends).all())
    assert bool((indices >= ends - lengths).all())


def means(method: Method, values: Tensor, *, draws: int) -> Tensor:
    world = Ranks(method, tuple(values.shape), ranks=1)
    total = torch.zeros(values.numel(), dtype=torch.float64)
    for _ in range(draws):
        total += world.step([values]).double()
    return total / draws


def test_random_k_without_feedback_is_unbiased() -> None:
    values, draws = normal(8, 25, seed=1), 4000
    mean = means(RandomK(ratio=0.1, feedback=False), values, draws=draws)
    exact = values.reshape(-1).double()
    # An element is sent once in ten draws, as ten times itself: variance v^2 (10 - 1).
    bound = 5 * exact.abs() * math.sqrt(9 / draws)
    assert bool(((mean - exact).abs() <= bound).all())
    assert float((mean - exact).abs().max()) > 0


def test_random_k_draws_alike_on_all_ranks_and_anew_in_every_step() -> None:
    world = Ranks(RandomK(ratio=0.1), (10, 10), ranks=2)
    seen = [world.step(gradients((10, 10), 2, 0)).nonzero().reshape(-1).tolist() for _ in range(3)]
    assert len(seen[0]) == 10
    assert seen[0] != seen[1] != seen[2]


def test_zeros_stay_zeros() -> None:
    for name in NAMES[2:]:
        method = chosen(name)
        assert method is not None
        world = Ranks(method, (16, 100), ranks=2)
        for _ in range(2):
            assert int(world.step([torch.zeros(16, 100)] * 2).count_nonzero()) == 0, name


# --- one bit ----------------------------------------------------------------------------------------------------------
@given(st.integers(9, 200), st.sampled_from([8, 16, 50]), SEEDS)
@settings(max_examples=40, deadline=None)
def test_one_bit_decodes_to_the_means_of_each_side(numel: int, bucket: int, seed: int) -> None:
    values = normal(numel, 1, seed=seed)
    got = Ranks(OneBit(bucket=bucket), (numel, 1), ranks=1).step([values]).numpy()
    flat = values.reshape(-1).numpy()
    for start in range(0, numel, bucket):
        part = flat[start : start + bucket]
        wanted = np.empty_like(part)
        for side in (part >= 0, part < 0):
            if side.any():
                wanted[side] = part[side].mean()
        assert np.allclose(got[start : start + bucket], wanted, atol=1e-6)


@given(st.integers(9, 200), SEEDS)
@settings(max_examples=40, deadline=None)
def test_a_sign_decodes_to_the_mean_magnitude(numel: int, seed: int) -> None:
    """Karimireddy et al. 2019, algorithm 1: |p|_1 / d * sign(p)."""
    values = normal(numel, 1, seed=seed)
    got = Ranks(OneBit(bucket=16, two_means=False), (numel, 1), ranks=1).step([values]).numpy()
    flat = values.reshape(-1).numpy()
    wanted = np.concatenate(
        [np.abs(part).mean() * np.where(part >= 0, 1, -1) for part in np.split(flat, range(16, numel, 16))]
    )
    assert np.allclose(got, wanted, atol=1e-6)


# --- PowerSGD ---------------------------------------------------------------------------------------------------------
@given(st.tuples(st.integers(2, 9), st.integers(2, 9)), st.integers(1, 3), SEEDS)
@settings(max_examples=40, deadline=None)
def test_a_full_rank_is_exact(shape: tuple[int, int], ranks: int, seed: int) -> None:
    world = Ranks(PowerSgd(rank=min(shape)), shape, ranks=ranks)
    given_now = gradients(shape, ranks, seed)
    wanted = sum(given_now).reshape(-1)  # type: ignore[union-attr]
    assert torch.allclose(world.step(given_now), wanted, atol=1e-4)
    assert all(float(residual.abs().max()) < 1e-4 for residual in world.residuals()) or shape[0] > shape[1]
    assert torch.allclose(sum(world.residuals()), torch.zeros_like(wanted), atol=1e-4)  # type: ignore[arg-type]


def test_powersgd_is_the_projection_of_the_sum() -> None:
    world = Ranks(PowerSgd(rank=3), (20, 30), ranks=2)
    start = world.slots[0].shared["q"].double().numpy()
    given_now = gradients((20, 30), 2, 5)
    summed = sum(gradient.double().numpy() for gradient in given_now)
    # The projector on the span of P by its singular vectors, not by an orthonormalisation.
    left = np.linalg.svd(summed @ start, full_matrices=False)[0]
    assert np.allclose(world.step(given_now).view(20, 30).numpy(), left @ left.T @ summed, atol=1e-4)


def test_a_warm_start_comes_to_the_best_approximation() -> None:
    left, right = (torch.linalg.qr(normal(size, 20, seed=size)).Q for size in (20, 30))
    matrix = left @ torch.diag(torch.tensor([2.0**-place for place in range(20)])) @ right.T
    errors = {}
    for warm in (True, False):
        world = Ranks(PowerSgd(rank=2, warm_start=warm), (20, 30), ranks=1)
        for _ in range(15):
            world.slots[0].own["residual"].zero_()
            got = world.step([matrix]).view(20, 30)
        errors[warm] = float((matrix - got).norm())
    best = float((matrix - left[:, :2] @ torch.diag(torch.tensor([1.0, 0.5])) @ right[:, :2].T).norm())
    assert errors[True] == pytest.approx(best, rel=1e-3)
    assert errors[False] > 1.02 * best


def test_a_basis_of_dependent_columns_is_orthonormal() -> None:
    basis = orthonormal(torch.ones(7, 3))
    assert torch.allclose(basis.T @ basis, torch.eye(3), atol=1e-5)


def test_what_would_not_become_smaller_is_left_alone() -> None:
    method = PowerSgd(rank=4, min_elements=1)
    assert not method.takes((6, 6))
    assert method.takes((32, 3, 3, 16))
    assert not method.takes((4096,))
    assert not PowerSgd(rank=1).takes((10, 100))


# --- bfloat16 ---------------------------------------------------------------------------------------------------------
def test_bf16_is_rounded_once_and_summed_in_float32() -> None:
    given_now = gradients((10, 10), 3, 0)
    got = Ranks(Bf16(), (10, 10), ranks=3).step(given_now)
    # bfloat16 has 8 bits: round to nearest even of the float's upper half, by hand.
    wanted = np.zeros(100, dtype=np.float32)
    for gradient in given_now:
        raw = gradient.reshape(-1).numpy().view(np.uint32)
        wanted += ((raw + 0x7FFF + ((raw >> 16) & 1)) & 0xFFFF0000).view(np.float32)
    assert np.array_equal(got.numpy(), wanted)


# --- names and values -------------------------------------------------------------------------------------------------
def test_every_name_is_a_method_or_horovods_own() -> None:
    assert [chosen(name) is None for name in NAMES] == [True, True, *[False] * 7]
    assert chosen("sign").describe()["two_means"] is False  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (lambda: chosen("int3"), r"=int3 is not known; use one of none, fp16, bf16, topk, randomk, onebit, sign, qsgd, powersgd"),
        (lambda: chosen(3), r"compression is a int; use one of none"),
        (lambda: chosen("none", op="mean"), r"op=mean is not known; use one of sum, adasum"),
        (lambda: chosen("fp16", op="adasum"), r"adasum combines whole gradients; use strategy\.compression=none"),
        (lambda: TopK(ratio=0), r"ratio=0 is not a share"),
        (lambda: RandomK(ratio=1.5), r"ratio=1\.5 is not a share"),
        (lambda: TopK(warmup_epochs=-1), r"warmup_epochs=-1 is negative"),
        (lambda: TopK(min_elements=-1), r"min_elements=-1 is negative"),
        (lambda: Qsgd(bits=3), r"bits=3 does not fill a byte evenly; use 2, 4 or 8"),
        (lambda: Qsgd(bucket=4), r"bucket=4 is too small"),
        (lambda: Qsgd(norm="l1"), r"norm=l1 is not known; use one of max, l2"),
        (lambda: OneBit(bucket=1), r"bucket=1 is too small"),
        (lambda: PowerSgd(rank=0), r"rank=0 is not a rank"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_refused(build: Any, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        build()
