"""What leaves a worker and a server when: order, windows, and a thread that drives messages on while layers compute. Without MPI."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from horovod_jobs.strategy.parameter_server import courier as courier_module
from horovod_jobs.strategy.parameter_server import stage as stage_module
from horovod_jobs.strategy.parameter_server.courier import Courier, Driver
from horovod_jobs.strategy.parameter_server.lanes import Lanes
from horovod_jobs.strategy.parameter_server.protocol import index_of
from horovod_jobs.strategy.parameter_server.sharding import make_layout
from horovod_jobs.strategy.parameter_server.shards import squared_norm
from horovod_jobs.strategy.parameter_server.stage import Seat, Stage


# --- lanes --------------------------------------------------------------------------------------------------------------
def drained(lanes: Lanes[str]) -> list[str]:
    found = []
    while (item := lanes.take()) is not None:
        found.append(item)
    return found


def test_the_most_urgent_leaves_first_and_a_full_lane_holds_up_nobody_else() -> None:
    lanes: Lanes[str] = Lanes(2, window_bytes=20, largest_bytes=10)
    for number, lane in ((3, 0), (1, 0), (2, 0), (0, 1)):
        lanes.put(lane, f"{number}", nbytes=10, urgency=2 * number)
    assert drained(lanes) == ["0", "1", "2"]
    assert not lanes.empty
    lanes.put(0, "urgent", nbytes=10, urgency=0)
    lanes.landed(0, nbytes=10)
    assert drained(lanes) == ["urgent"], "it overtakes what waits"
    lanes.landed(0, nbytes=10)
    assert drained(lanes) == ["3"]


def test_senders_begin_with_another_receiver_each() -> None:
    firsts = []
    for first in range(3):
        lanes: Lanes[str] = Lanes(3, window_bytes=100, largest_bytes=1, first=first)
        for lane in range(3):
            lanes.put(lane, f"{lane}", nbytes=1, urgency=lane)
        lanes.put(0, "later", nbytes=1, urgency=3)
        firsts.append(drained(lanes))
    assert [one[0] for one in firsts] == ["0", "1", "2"]
    assert all(one[-1] == "later" for one in firsts)


def test_a_message_larger_than_the_window_leaves_alone_and_the_dead_get_nothing() -> None:
    lanes: Lanes[str] = Lanes(2, window_bytes=1, largest_bytes=1)
    lanes.put(0, "large", nbytes=50, urgency=0)
    lanes.put(0, "small", nbytes=1, urgency=1)
    lanes.put(1, "to the dead", nbytes=1, urgency=2)
    assert lanes.take() == "large"
    lanes.close(1)
    assert lanes.take() is None


# --- a worker's side ----------------------------------------------------------------------------------------------------
class Request:
    """A persistent request: done when somebody says so."""

    def __init__(self, log: list[int], number: int) -> None:
        self.log, self.number, self.active, self.done = log, number, False, False

    def Start(self) -> None:
        assert not self.active, "started twice"
        self.log.append(self.number)
        self.active, self.done = True, False

    def Test(self) -> bool:
        self.active = self.active and not self.done
        return not self.active

    def Free(self) -> None:
        assert not self.active


class Wire:
    """Both directions of a wire whose messages travel when a test says so. ``started`` are numbers of chunks in their order."""

    def __init__(self) -> None:
        self.started: list[int] = []
        self.requests: dict[int, Request] = {}

    def _request(self, tensor: Tensor, *, tag: int, **place: int) -> Request:
        number = index_of(tag) + 1000 * place.get("to", 0)
        self.requests[number] = Request(self.started, number)
        return self.requests[number]

    sender = receiver = _request

    def lost(self) -> frozenset[int]:
        return frozenset()


def some(requests: list[Any]) -> list[int]:
    return [at for at, request in enumerate(requests) if request.active and request.Test()]


class Rig:
    """A courier of four tensors of 4 KiB, a chunk each, at one server; two may leave at a time."""

    def __init__(self, **changed: Any) -> None:
        self.up, self.down = Wire(), Wire()
        self.tensors = [torch.zeros(1024) for _ in range(4)]
        layout = make_layout([(0, torch.float32, 1024)] * 4, servers=1, chunk_bytes=4096)
        arguments = {"servers": [0], "window_bytes": 8192, "first": 0, "check": lambda: None, **changed}
        self.courier = Courier(self.up, self.down, layout, self.tensors, **arguments)  # type: ignore[arg-type]
        assert [chunk.index for chunk in layout.chunks] == [0, 1, 2, 3]

    def travel(self, chunk: int, *, value: float = 0.0) -> None:
        """A chunk arrives at its server, and comes back."""
        self.courier.last(chunk).fill_(value)
        self.up.requests[chunk].done = self.down.requests[chunk].done = True


@pytest.fixture
def rig(monkeypatch: pytest.MonkeyPatch) -> Rig:
    monkeypatch.setattr(courier_module, "some", some)
    return Rig()


def test_pushes_leave_by_urgency_and_only_so_many_at_a_time(rig: Rig) -> None:
    for index in (3, 2, 1, 0):  # As a backward pass makes gradients.
        rig.courier.stage(index, torch.ones(1024))
    assert rig.up.started == [3, 2], "the window is full"
    rig.travel(3)
    assert rig.courier.poke()
    assert rig.up.started == [3, 2, 0], "the front layer overtakes the one that waits"
    rig.travel(2)
    rig.courier.poke()
    assert rig.up.started == [3, 2, 0, 1]
    assert not rig.courier.poke(), "nothing moved"


def test_the_order_of_the_forward_pass_is_the_order_of_pushes(rig: Rig) -> None:
    assert rig.courier.prefer([2, 3, 0, 1]) == [2, 3, 0, 1]
    for index in (1, 0, 3, 2):
        rig.courier.stage(index, None)
    rig.travel(1)
    rig.courier.poke()
    assert rig.up.started == [1, 0, 2], "2 is read first, so it goes before 3"


def test_a_parameter_is_waited_for_by_itself_while_another_thread_drives(rig: Rig) -> None:
    driver = Driver(rig.courier)
    try:
        for index in range(4):
            rig.courier.stage(index, torch.ones(1024))
        rig.travel(0, value=5.0)
        rig.courier.fetch([0])
        assert bool((rig.tensors[0] == 5.0).all())
        later = threading.Timer(0.05, rig.travel, args=(1,), kwargs={"value": 7.0})
        later.start()
        rig.courier.fetch([1])
        assert bool((rig.tensors[1] == 7.0).all())
        assert bool((rig.tensors[2] == 0.0).all()), "not waited for"
    finally:
        driver.stop()


def test_pushes_go_on_while_a_layer_computes(rig: Rig) -> None:
    """The training thread does nothing for the messages between two hooks."""
    driver = Driver(rig.courier)
    try:
        for index in (3, 2, 1, 0):
            rig.courier.stage(index, torch.ones(1024))
        deadline = time.monotonic() + 10
        while len(rig.up.started) < 4 and time.monotonic() < deadline:
            for chunk in list(rig.up.started):
                rig.travel(chunk)
            time.sleep(0.001)  # A layer.
        assert sorted(rig.up.started) == [0, 1, 2, 3]
    finally:
        driver.stop()


def test_the_driver_sleeps_while_there_is_nothing_to_drive(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = list[int]()
    monkeypatch.setattr(courier_module, "some", lambda requests: looks.append(1) or some(requests))
    driver = Driver(rig.courier)
    try:
        time.sleep(0.05)
        assert not looks
        rig.courier.stage(0, None)
        rig.travel(0)
        rig.courier.fetch([0])
        seen = len(looks)
        time.sleep(0.05)
        assert len(looks) == seen >= 1
    finally:
        driver.stop()


def test_what_the_driver_meets_is_raised_where_the_worker_waits(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(requests: list[Any]) -> list[int]:
        raise OSError("the link is down")

    monkeypatch.setattr(courier_module, "some", fails)
    monkeypatch.setattr(courier_module, "_NAMED_WITHIN_S", 0.0)
    driver = Driver(rig.courier)
    rig.courier.stage(0, None)
    with pytest.raises(OSError, match="the link is down"):
        rig.courier.fetch([0])
    driver.stop()


def test_a_push_that_is_not_finite_stays_here(rig: Rig) -> None:
    sent = rig.courier._views_out[0]
    assert not rig.courier.stage(0, torch.full((1024,), float("nan")), guard=True)
    assert bool((sent == 0).all())


def test_leaving_waits_for_what_is_away_but_not_for_ever(rig: Rig) -> None:
    rig.courier.stage(0, None)
    assert not rig.courier.close(limit_s=0.1)
    rig.travel(0)
    rig.courier.poke()
    assert rig.courier.close(limit_s=0.1)


# --- a server's side ----------------------------------------------------------------------------------------------------
def told(chunks: int, *, window_bytes: int) -> dict[str, Any]:
    one = {"group": 0, "dtype": "float32", "numel": 1024, "dim": None, "arrays": [], "scalars": {}}
    return {
        "dials": [[["lr", 0]]], "clip_norm": None, "averaging": "gradients", "groups": [{"lr": 1.0}], "target": "torch.optim.sgd.SGD",
        "consistency": "sync", "staleness": None, "holders": [0], "window_bytes": window_bytes,
        "chunks": [{"index": index, **one} for index in range(chunks)],
    }  # fmt: skip


def test_replies_leave_in_the_order_in_which_their_worker_reads_and_within_a_window(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stage_module, "finished", some)
    up, down = Wire(), Wire()
    seat = Seat(up, down, me=1, workers=(0,), servers=(1,))  # type: ignore[arg-type]
    order = told(4, window_bytes=4096)
    stage = Stage(seat, order, {index: {"": torch.zeros(1024)} for index in range(4)})
    stage.prefer(0, [3, 1, 0, 2])
    stage._tuned[0] = [[1.0], [1.0]]
    for index in range(4):  # All have come when the server looks.
        stage.shards[index].buffers[0].zero_()  # type: ignore[attr-defined]
        stage._rule.pushed(stage.shards[index], 0)
    stage._start_replies()
    assert down.started == [3, 1], "two a worker are let go"
    for request in down.requests.values():
        request.done = True
    assert stage.turn()
    assert down.started == [3, 1, 0, 2]


# --- memory -------------------------------------------------------------------------------------------------------------
class Made(TorchDispatchMode):
    """Counts the bytes of new tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {one.untyped_storage().data_ptr() for one in tensors((args, kwargs or {}))}
        result = func(*args, **(kwargs or {}))
        self.nbytes += sum(one.nbytes for one in tensors(result) if one.untyped_storage().data_ptr() not in known)
        return result


def tensors(tree: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def test_staging_and_fetching_make_no_tensor(rig: Rig) -> None:
    gradients = [torch.ones(1024) for _ in range(4)]
    with Made() as made:
        for index in range(4):
            rig.courier.stage(index, gradients[index])
        for chunk in (0, 1, 2, 3):
            rig.travel(chunk)
            rig.courier.poke()
        for chunk in (2, 3):
            rig.travel(chunk)
            rig.courier.poke()
        rig.courier.fetch([0, 1, 2, 3])
    assert made.nbytes == 0


def test_a_norm_is_precise_and_makes_nothing_large() -> None:
    grad = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0))
    with Made() as made:
        found = squared_norm(grad)
    assert found == pytest.approx(float(grad.double().square().sum()), rel=1e-6)
    assert made.nbytes < 1000
    assert squared_norm(torch.full((3,), 1e30)) == pytest.approx(3e60)


@pytest.mark.parametrize("target", ["torch.optim.sgd.SGD", "torch.optim.adam.Adam", "torch.optim.adagrad.Adagrad"])
def test_an_update_on_a_server_makes_nothing_as_large_as_its_chunk(target: str) -> None:
    seat = Seat(Wire(), Wire(), me=1, workers=(0, 2), servers=(1,))  # type: ignore[arg-type]
    stage = Stage(seat, {**told(1, window_bytes=4096), "target": target}, {0: {"": torch.zeros(1024)}})
    shard = stage.shards[0]
    for worker in (0, 1):
        stage._tuned[worker] = [[1.0], [1.0]]
        shard.buffers[worker].fill_(1.0)  # type: ignore[attr-defined]

    def step() -> None:
        shard.apply(shard.combine(mean=False))

    step()  # The optimizer makes its state.
    with Made() as made:
        step()
    assert made.nbytes < shard.parameter.nbytes
