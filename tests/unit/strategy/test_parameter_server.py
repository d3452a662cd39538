"""The parts of the parameter server that need no ranks: where parameters lie, when pushes count, who is told what in which step."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from horovod_jobs.comm.roles import check_enough
from horovod_jobs.comm.world import SingleWorld
from horovod_jobs.errors import ConfigError
from horovod_jobs.strategy.base import Setting
from horovod_jobs.strategy.parameter_server import ParameterServer, rules
from horovod_jobs.strategy.parameter_server.coordinator import Coordinator
from horovod_jobs.strategy.parameter_server.gates import Gates
from horovod_jobs.strategy.parameter_server.protocol import Dials, Room, pack_rows, unpack_rows
from horovod_jobs.strategy.parameter_server.sharding import deal, make_layout
from horovod_jobs.strategy.parameter_server.shards import Bounded, Flat, Shard, Table

# --- where parameters lie ----------------------------------------------------------------------------------------------
SIZES = st.tuples(st.integers(0, 2), st.sampled_from([torch.float32, torch.float64]), st.integers(0, 9000))


@given(sizes=st.lists(SIZES, min_size=1, max_size=20), servers=st.integers(1, 5), chunk_kb=st.integers(1, 40))
@settings(max_examples=80, deadline=None)
def test_every_element_is_in_one_chunk_and_loads_are_even(
    sizes: list[tuple[int, torch.dtype, int]], servers: int, chunk_kb: int
) -> None:
    layout = make_layout(sizes, servers=servers, chunk_bytes=chunk_kb * 1024)
    for buffer, (_, _, numel) in enumerate(layout.buffers):
        covered = sorted((chunk.start, chunk.stop) for chunk in layout.chunks if chunk.buffer == buffer)
        assert [start for start, _ in covered] == [0, *(stop for _, stop in covered[:-1])][: len(covered)]
        assert (covered[-1][1] if covered else 0) == numel
    assert sum(layout.load_bytes()) == sum(numel * dtype.itemsize for _, dtype, numel in sizes)
    largest = max((layout.nbytes(chunk) for chunk in layout.chunks), default=0)
    assert largest <= chunk_kb * 1024
    assert max(layout.load_bytes()) - min(layout.load_bytes()) <= largest
    for index, place in enumerate(layout.places):
        assert sum(layout.chunks[chunk].numel for chunk in layout.chunks_of(index)) >= place.stop - place.start
    firsts = [min(layout.parameters_of(chunk.index)) for chunk in layout.chunks]
    assert firsts == sorted(firsts), "chunks are numbered in the order of the forward pass"


def test_a_large_tensor_is_split_over_the_servers() -> None:
    layout = make_layout([(0, torch.float32, 1_000_000), (0, torch.float32, 10)], servers=4, chunk_bytes=1 << 19)
    assert len(layout.chunks_of(0)) == 8
    assert max(layout.load_bytes()) <= 1.4 * min(layout.load_bytes())


def test_weights_are_dealt_largest_first() -> None:
    assert deal([3, 3, 2, 2, 2], servers=2) == [0, 1, 0, 1, 0]


# --- the optimizer's rule ----------------------------------------------------------------------------------------------
class WholeNorm(torch.optim.Optimizer):
    """Divides by the norm of the whole gradient, so pieces of a parameter come to something else."""

    def __init__(self, params: Any, *, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.sub_(group["lr"] * parameter.grad / parameter.grad.norm())


@pytest.mark.parametrize(
    "name", ["SGD", "Adam", "AdamW", "Adagrad", "RMSprop", "NAdam", "RAdam", "Adamax", "ASGD", "Rprop"]
)
def test_rules_that_work_on_every_element_alone_are_known_by_trying(name: str) -> None:
    cls = getattr(torch.optim, name)
    options = {"lr": 0.1, "momentum": 0.9} if name == "SGD" else {"lr": 0.1}
    optimizer = cls([nn.Parameter(torch.zeros(2))], **options)
    group = rules.options_of(optimizer.param_groups[0])
    kinds = rules.state_kinds(rules.target_of(optimizer), group)
    made = rules.make(rules.target_of(optimizer), group, nn.Parameter(torch.zeros(3)))
    wanted = {key: value for key, value in optimizer.param_groups[0].items() if key != "params"}
    assert {key: value for key, value in made.param_groups[0].items() if key != "params"} == wanted
    assert any(kinds.values()), "there is a value an element"
    assert not kinds.get("step", False)


@pytest.mark.parametrize("cls", [WholeNorm, torch.optim.Adafactor, torch.optim.LBFGS], ids=lambda cls: cls.__name__)
def test_rules_that_look_at_a_whole_parameter_are_refused(cls: Any) -> None:
    optimizer = cls([nn.Parameter(torch.zeros(2))], lr=0.1)
    with pytest.raises(ConfigError, match=r"strategy=allreduce"):
        rules.state_kinds(
            rules.target_of(optimizer), rules.options_of(optimizer.param_groups[0]), allow=[cls.__module__]
        )


def test_numbers_of_every_group_travel() -> None:
    groups = [{"params": [], "lr": 0.1, "betas": (0.9, 0.99), "amsgrad": False, "name": "a", "foreach": None},
              {"params": [], "lr": torch.tensor(0.5), "betas": (0.8, 0.9), "amsgrad": True}]  # fmt: skip
    dials = Dials.from_json(Dials.of(groups).to_json())
    values = dials.read(groups)
    assert values == pytest.approx([0.9, 0.99, 0.1, 0.8, 0.9, 0.5])
    assert dials.of_group(1, values) == {"betas": pytest.approx((0.8, 0.9)), "lr": 0.5}


# --- when pushes count -------------------------------------------------------------------------------------------------
def bounded(workers: int, *, staleness: int | None) -> tuple[Flat, Bounded, list[tuple[int, list[float]]]]:
    """A shard with a counter for each worker, which its push of -1 raises by one."""
    parameter = nn.Parameter(torch.zeros(workers))
    shard = Flat(0, 0, parameter, torch.optim.SGD([parameter], lr=1.0), workers=workers, shared=False)
    for buffer in shard.buffers:
        buffer.zero_()
    answered: list[tuple[int, list[float]]] = []

    def reply(shard: Shard, worker: int) -> None:
        assert isinstance(shard, Flat)
        answered.append((worker, shard.outgoing(worker).tolist()))

    rule = Bounded([shard], workers=workers, options=lambda shard, worker: {}, reply=reply, mean=False, staleness=staleness)  # fmt: skip
    return shard, rule, answered


@given(workers=st.integers(1, 4), staleness=st.integers(0, 4), seed=st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_no_read_is_staler_than_the_bound_in_any_order_of_pushes(workers: int, staleness: int, seed: int) -> None:
    shard, rule, answered = bounded(workers, staleness=staleness)
    chance = random.Random(seed)
    pace = [chance.random() ** 3 + 0.01 for _ in range(workers)]
    free, clock = set(range(workers)), [0] * workers
    for _ in range(60):
        if not free:
            break
        worker = chance.choices(sorted(free), [pace[one] for one in sorted(free)])[0]
        shard.buffers[worker].zero_()[worker] = -1.0
        clock[worker] += 1
        free.discard(worker)
        rule.pushed(shard, worker)
        for reader, seen in answered:
            free.add(reader)
            assert min(seen) >= clock[reader] - staleness, "it saw every update that is older than the bound"
            assert seen[reader] == clock[reader], "and its own"
        answered.clear()
    assert free, "the slowest worker never waits"
    assert max(rule.read_staleness) <= staleness
    assert sum(rule.read_staleness.values()) + workers - len(free) == sum(clock)


def test_without_a_bound_reads_get_stale() -> None:
    shard, rule, _ = bounded(2, staleness=None)
    for _ in range(9):
        rule.pushed(shard, 1)
    assert max(rule.read_staleness) == 9
    rule.pushed(shard, 0)
    assert rule.update_staleness[9] == 1


@pytest.mark.parametrize("cls", [torch.optim.SGD, torch.optim.Adagrad, torch.optim.Adam], ids=lambda cls: cls.__name__)
def test_a_worker_is_sent_the_rows_that_changed_since_it_read(cls: Any) -> None:
    parameter = nn.Parameter(torch.zeros(10, 4))
    plain = cls([parameter], lr=0.1)
    target = rules.sparse_target(rules.target_of(plain))
    optimizer = rules.make(target, rules.options_of(plain.param_groups[0]), parameter)
    table = Table(0, 0, parameter, optimizer, workers=2)

    def push(worker: int, ids: list[int]) -> None:
        numbers = torch.tensor(ids, dtype=torch.int64)
        packed = pack_rows(numbers, torch.ones(len(ids), 4), torch.arange(len(ids)), Room())
        table.take(worker, packed.numel()).copy_(packed)

    for ids in ([3, 1], [3, 7], []):
        push(0, ids)
        push(1, [])
        table.apply(table.combine(mean=False))
        mine, rows = unpack_rows(table.outgoing(0), dim=4, dtype=torch.float32)
        assert mine.tolist() == sorted(ids)
        assert torch.equal(rows, parameter.detach()[mine])
        assert not len(ids) or bool((rows < 0).all())
    late, _ = unpack_rows(table.outgoing(1), dim=4, dtype=torch.float32)
    assert late.tolist() == [1, 3, 7]
    assert table.outgoing(1).numel() == 0


# --- the same step for all ---------------------------------------------------------------------------------------------
@given(workers=st.integers(1, 4), seed=st.integers(0, 10_000))
@settings(max_examples=150, deadline=None)
def test_raised_flags_reach_all_workers_in_one_step_whatever_their_pace(workers: int, seed: int) -> None:
    """Workers in any order; each waits for its answer. Two flags are raised at random steps; the last step is held."""
    chance = random.Random(seed)
    last = 12
    raised = {(chance.randrange(workers), chance.randint(1, last), kind) for kind in (1, 3)}
    coordinator = Coordinator(workers)
    step, told = [0] * workers, [dict[int, list[float]]() for _ in range(workers)]
    want = [[0.0] * 4 for _ in range(workers)]
    waiting: set[int] = set()
    while min(step) < last or waiting:
        worker = chance.choice([one for one in range(workers) if one not in waiting and step[one] < last] or [-1])
        assert worker >= 0, "nobody waits for ever"
        step[worker] += 1
        for who, when, kind in raised:
            if who == worker and when == step[worker]:
                want[worker][kind] = 1.0
        waiting.add(worker)
        answers = coordinator.note(worker, step=step[worker], hold=step[worker] == last, flags=want[worker])
        for other, flags in answers:
            waiting.discard(other)
            if any(flags):
                told[other][step[other]] = flags
                want[other] = [0.0 if flags[kind] else value for kind, value in enumerate(want[other])]
    assert all(one == told[0] for one in told), "the same flags in the same steps"
    for _, when, kind in raised:
        seen = [number for number, flags in told[0].items() if flags[kind]]
        assert seen, "and none is lost"
        assert max(seen) >= when
    assert len(told[0]) <= len(raised) * 2


# --- the forward pass waits for its own --------------------------------------------------------------------------------
class Tied(nn.Module):
    """Reads the weight of ``late`` before it calls it, and attention reads its projection without calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.early = nn.Linear(4, 4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.late = nn.Linear(4, 4)
        self.last = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.early(x) @ self.late.weight
        x = self.attention(x, x, x, need_weights=False)[0]
        out: Tensor = self.last(self.late(x))
        return out


def test_parameters_are_waited_for_where_they_are_first_read() -> None:
    model, asked, seen = Tied(), list[list[str]](), list[str]()
    named = list(model.named_parameters())
    gates = Gates(
        model,
        [parameter for _, parameter in named],
        fetch=lambda items: asked.append([named[index][0] for index in items]),
        seen=lambda items: seen.extend(named[index][0] for index in items),
    )
    inputs = torch.randn(2, 3, 4)
    wanted = model(inputs)
    assert len(asked[0]) == len(named), "the first pass waits for everything, and is watched"
    asked.clear()
    assert torch.equal(model(inputs), wanted)
    at_once = ["late.weight", "attention.out_proj.weight", "attention.out_proj.bias"]
    assert asked[0] == at_once, "in the order in which they are read"
    assert seen[: len(at_once)] == at_once
    assert seen[3:6] == ["early.weight", "early.bias", "attention.in_proj_weight"]
    assert seen[-2:] == ["last.weight", "last.bias"]
    assert sorted(seen) == sorted(name for name, _ in named)
    assert asked[1] == ["early.weight", "early.bias"]
    assert asked[2][:1] == ["attention.in_proj_weight"]
    assert asked[-1] == ["last.weight", "last.bias"]
    gates.close()
    asked.clear()
    model(inputs)
    assert asked == []


class Backwards(nn.Module):
    """Its last layer is registered first."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.stem = nn.Linear(4, 2), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.stem(x))
        return out


def test_the_order_of_the_forward_pass_is_seen_whatever_the_model_registers_first() -> None:
    model, orders = Backwards(), list[list[int]]()
    Gates(model, list(model.parameters()), fetch=lambda items: None, seen=lambda items: orders.append(list(items)))
    for _ in range(2):
        model(torch.zeros(1, 4))
    assert orders == [[2, 3, 0, 1]], "told once"


def test_a_compiled_model_gets_everything_at_the_beginning() -> None:
    model, asked = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), list[int]()
    model[0].compile(backend="eager")
    gates = Gates(
        model, list(model.parameters()), fetch=lambda items: asked.append(len(items)), seen=lambda items: None
    )
    model[1](torch.zeros(1, 2))
    assert asked == []
    assert gates.at_the_beginning == 4


# --- what is refused ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"servers": 0}, "strategy.servers=0 is too small"),
        ({"servers": "all"}, "strategy.servers=all is not known"),
        ({"consistency": "eventual"}, "strategy.consistency=eventual is not known"),
        ({"averaging": "models"}, "strategy.averaging=models is not known"),
        ({"consistency": "ssp", "staleness": -1}, "strategy.staleness=-1 is too small"),
        ({"period": 3}, "strategy.period=3 is for strategy.averaging=weights"),
        ({"chunk_kb": 0}, "strategy.chunk_kb=0 is too small"),
    ],
    ids=str,
)
def test_values_that_cannot_be_used(arguments: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        ParameterServer(**arguments)


def test_one_process_has_no_servers() -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(ConfigError, match="under MPI"):
        ParameterServer().bind(
            torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters(), Setting(SingleWorld())
        )


def test_too_few_ranks() -> None:
    check_enough(2, ranks=3)
    with pytest.raises(ConfigError, match=r"strategy.servers=2 leaves no worker of 2 ranks; start at least 3"):
        check_enough(2, ranks=2)
