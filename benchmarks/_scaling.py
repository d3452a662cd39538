"""The cost model of a data-parallel step, as pure functions: what an exchange costs, and how much of it hides behind the backward pass.

An exchange of ``B`` bytes in ``k`` tensors over ``N`` ranks whose link has ``w`` bytes a second (Thakur et al. 2005's ring, with
Horovod's cycle in front) takes

    call + k * tensor + 2 (N - 1) * hop + 2 (N - 1) / N * B * (wire / w + byte * crowd)

where ``crowd`` is the number of hosts that share a core: 1 on hosts of their own.

A step is a walk through time: tensors become ready at known moments of the backward pass; at each of Horovod's cycles, and when
the rank comes to wait, those that are ready are fused, up to a threshold, into messages that are exchanged one after the other;
compute and an exchange under way slow each other where they share cores.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
from scipy.optimize import least_squares, nnls  # type: ignore[import-untyped]

from horovod_jobs.strategy.allreduce import Allreduce

DEFAULT_FUSION_BYTES = int(Allreduce().environment()["HOROVOD_FUSION_THRESHOLD"])
DEFAULT_CYCLE_S = 0.005  # As launch/horovod-0.28.1.fixes sets it


@dataclass(frozen=True)
class Costs:
    """What is fitted. Seconds, but for ``wire`` (multiple of the nominal link's time) and the slowdowns (shares)."""

    call_s: float  # alpha of an exchange: negotiation, copies that do not grow with it
    hop_s: float  # alpha of one of the ring's 2 (N - 1) steps
    wire: float  # beta on the link: 1 is the nominal rate
    byte_s: float  # beta that no link makes faster: copies and sums
    tensor_s: float = 0.0
    compute_slowed: float = 0.0  # longer compute while an exchange is under way
    exchange_slowed: float = 0.0  # longer exchange while compute is under way


@dataclass(frozen=True)
class Exchange:
    """An all-reduce that was measured: alone, one tensor."""

    hosts: int
    rate_mbit: float
    bytes: int
    seconds: float
    crowd: float = 1.0


@dataclass(frozen=True)
class Work:
    """A step without its exchange: when each gradient is ready ([bytes, seconds since the step's start], in that order)."""

    ready: tuple[tuple[int, float], ...]
    backward_end_s: float
    update_s: float

    @property
    def total_s(self) -> float:
        return self.backward_end_s + self.update_s


@dataclass(frozen=True)
class Step:
    """A training step that was measured."""

    name: str
    hosts: int
    rate_mbit: float
    work: Work
    seconds: float
    crowd: float = 1.0


def _features(size: int, *, hosts: int, rate_mbit: float, crowd: float) -> tuple[float, float, float, float]:
    travelled = 2 * (hosts - 1) / hosts * size
    return 1.0, 2.0 * (hosts - 1), travelled * 8 / (rate_mbit * 1e6), travelled * crowd


def exchange_s(costs: Costs, size: int, *, tensors: int = 1, hosts: int, rate_mbit: float, crowd: float = 1.0) -> float:
    """Seconds of one exchange, from the moment that Horovod's cycle takes it up."""
    parts = _features(size, hosts=hosts, rate_mbit=rate_mbit, crowd=crowd)
    fitted = (costs.call_s, costs.hop_s, costs.wire, costs.byte_s)
    return tensors * costs.tensor_s + float(np.dot(parts, fitted))


def fit_exchange(runs: Sequence[Exchange]) -> Costs:
    """Least squares of the relative error over measured all-reduces; no cost is negative.

    Raises:
        ValueError: fewer runs than costs.
    """
    if len(runs) < 4:
        raise ValueError(f"{len(runs)} runs cannot fit 4 costs; measure more")
    rows = np.array([_features(run.bytes, hosts=run.hosts, rate_mbit=run.rate_mbit, crowd=run.crowd) for run in runs])
    rows /= np.array([run.seconds for run in runs])[:, None]
    scale = rows.max(axis=0)  # Columns differ by many orders of magnitude.
    solution, _ = nnls(rows / scale, np.ones(len(runs)))
    call, hop, wire, byte = (float(value) for value in solution / scale)
    return Costs(call, hop, wire, byte)


def step_s(
    costs: Costs,
    work: Work,
    *,
    hosts: int,
    rate_mbit: float,
    crowd: float = 1.0,
    fusion_bytes: int = DEFAULT_FUSION_BYTES,
    cycle_s: float = DEFAULT_CYCLE_S,
) -> float:
    """Seconds of a step with its exchange.

    ``now`` is the clock, ``done`` the compute done so far in seconds of ``work``, ``left`` what is left of the exchange under way.
    """
    waiting = list(work.ready)
    queue: list[int] = []
    now = done = left = 0.0
    while waiting or queue or left > 0 or done < work.backward_end_s:
        computing, exchanging = done < work.backward_end_s, left > 0
        if not exchanging and queue:
            message, count = _fuse(queue, fusion_bytes)
            del queue[:count]
            left = exchange_s(costs, message, tensors=count, hosts=hosts, rate_mbit=rate_mbit, crowd=crowd)
            continue
        pace = 1 / (1 + costs.compute_slowed) if computing and exchanging else 1.0
        drain = 1 / (1 + costs.exchange_slowed) if computing and exchanging else 1.0
        until = []
        if computing:
            until.append(((waiting[0][1] if waiting else work.backward_end_s) - done) / pace)
        if exchanging:
            until.append(left / drain)
        passed = max(min(until, default=0.0), 0.0)
        now += passed
        done = min(done + passed * pace, work.backward_end_s) if computing else done
        left = max(left - passed * drain, 0.0) if exchanging else 0.0
        left = 0.0 if left < 1e-12 else left
        arrived = [item for item in waiting if item[1] <= done + 1e-12 or not computing]
        waiting = waiting[len(arrived) :]
        if arrived and not left and not queue:
            # The cycle after the first of them takes up what is ready by then; where the rank has come to wait, it begins at once.
            until_cycle = min(cycle_s, work.backward_end_s - done)
            more = [item for item in waiting if item[1] <= done + until_cycle]
            waiting = waiting[len(more) :]
            arrived += more
            now += until_cycle
            done += until_cycle
        queue += [size for size, _ in arrived]
        if not arrived and not exchanging and work.backward_end_s - done < 1e-12:
            done = work.backward_end_s
    return now + work.update_s


def _fuse(queue: Sequence[int], fusion_bytes: int) -> tuple[int, int]:
    """Bytes and number of tensors of the next message: at least one tensor."""
    total, count = queue[0], 1
    while count < len(queue) and total + queue[count] <= fusion_bytes:
        total += queue[count]
        count += 1
    return total, count


def fit_steps(costs: Costs, steps: Sequence[Step]) -> Costs:
    """Least squares of the relative error over measured steps, for what only steps show: tensors and slowdowns."""

    def with_values(values: Sequence[float]) -> Costs:
        tensor, compute, exchange = (float(value) for value in values)
        return replace(costs, tensor_s=tensor * 1e-4, compute_slowed=compute, exchange_slowed=exchange)

    def errors(values: Sequence[float]) -> list[float]:
        guess = with_values(values)
        return [predicted(guess, step) / step.seconds - 1 for step in steps]

    # The walk is not smooth where a tensor just misses a cycle: a grid finds the valley, and the difference step is wide.
    grid = product((0.0, 0.2, 1.0, 4.0), (0.0, 0.2, 0.5, 1.0), (0.0, 0.2, 0.5, 1.0))
    starts = sorted(grid, key=lambda values: sum(error**2 for error in errors(values)))[:4]
    bounds = ([0.0, 0.0, 0.0], [50.0, 3.0, 3.0])
    inside = [[max(value, 0.01) for value in start] for start in starts]
    tried = [least_squares(errors, start, bounds=bounds, diff_step=0.02) for start in inside]
    return with_values(min(tried, key=lambda result: float(result.cost)).x)


def predicted(costs: Costs, run: Exchange | Step) -> float:
    """Seconds that the model gives for a run."""
    if isinstance(run, Exchange):
        return exchange_s(costs, run.bytes, hosts=run.hosts, rate_mbit=run.rate_mbit, crowd=run.crowd)
    return step_s(costs, run.work, hosts=run.hosts, rate_mbit=run.rate_mbit, crowd=run.crowd)


def error_of(costs: Costs, run: Exchange | Step) -> float:
    """Relative error of the prediction; positive where the model is too slow."""
    return predicted(costs, run) / run.seconds - 1


Layer = tuple[int, float]  # parameters, multiply-adds (or any measure of time)


def profile(layers: Sequence[Layer], *, compute_s: float, backward_share: float = 2 / 3) -> Work:
    """A step from a network's layers, first to last: backward goes through them in reverse, in proportion to their work."""
    forward, backward = (1 - backward_share) * compute_s, backward_share * compute_s
    total = sum(cost for _, cost in layers)
    spent, ready = 0.0, []
    for parameters, cost in reversed(layers):
        spent += cost
        if parameters:
            ready.append((4 * parameters, forward + backward * spent / total))
    return Work(tuple(ready), compute_s, 0.0)
