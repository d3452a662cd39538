"""A server's part of one training stage: it takes what workers push, applies it and answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from horovod_jobs.comm.channel import Incoming, Wire, done, finished, is_loss, wait_until
from horovod_jobs.strategy.parameter_server import protocol, rules
from horovod_jobs.strategy.parameter_server.coordinator import Coordinator
from horovod_jobs.strategy.parameter_server.lanes import Lanes
from horovod_jobs.strategy.parameter_server.shards import Bounded, Consistency, Flat, Shard, Sync, Table


@dataclass(frozen=True)
class Seat:
    """Where a server sits: ``me`` is its rank, ``workers`` and ``servers`` are ranks of the same communicator, ``hosts`` those of all.

    ``allow``: what an optimizer's class may be besides torch's.
    """

    up: Wire
    down: Wire
    me: int
    workers: tuple[int, ...]
    servers: tuple[int, ...]
    allow: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()

    def obituary(self, rank: int) -> str:
        """What to say of a rank that has died."""
        where = f" on {self.hosts[rank]}" if self.hosts else ""
        kind = "a parameter server" if rank in self.servers else "a worker"
        return f"rank {rank}{where}, {kind}, has ended"


def receive_arrays(up: Wire, order: dict[str, Any], *, source: int) -> dict[int, dict[str, Tensor]]:
    """What follows the beginning of a stage: parameters of every chunk, then the optimizer's state where there is some."""
    tensors: dict[int, dict[str, Tensor]] = {}
    for chunk in order["chunks"]:
        mine = tensors[chunk["index"]] = {}
        for key in ["", *chunk["arrays"]]:
            shape = (chunk["numel"],) if chunk["dim"] is None else (chunk["numel"], chunk["dim"])
            mine[key] = torch.empty(shape, dtype=getattr(torch, chunk["dtype"]))
            up.receive(mine[key], source=source, tag=protocol.STATE)
    return tensors


class Stage:
    """A server's part of one training stage."""

    def __init__(self, seat: Seat, order: dict[str, Any], tensors: dict[int, dict[str, Tensor]]) -> None:
        self._seat, self._count = seat, len(seat.workers)
        self._dials = protocol.Dials.from_json(order["dials"])
        self._heads = [torch.zeros(1 + self._dials.count, dtype=torch.float64) for _ in range(self._count)]
        # A worker may already begin its next step while its last chunks are on their way: one set for odd steps, one for even.
        self._tuned: list[list[list[float]]] = [[[], []] for _ in range(self._count)]
        self._clip: float | None = order["clip_norm"]
        self.shards = {chunk["index"]: self._shard(chunk, order, tensors[chunk["index"]]) for chunk in order["chunks"]}
        self._rule = self._consistency(order)
        self._senders: dict[tuple[int, int], Any] = {}
        self._urgency: list[dict[int, int]] = [
            {} for _ in range(self._count)
        ]  # of a worker's chunks; none: their numbers
        largest = max((shard.parameter.nbytes for shard in self.shards.values()), default=0)
        first = seat.workers.index(seat.me) + 1 if seat.me in seat.workers else seat.servers.index(seat.me)
        self._lanes: Lanes[tuple[Flat, int]] = Lanes(
            self._count, window_bytes=order["window_bytes"], largest_bytes=largest, first=first
        )
        self._replying: dict[tuple[int, int], Any] = {}
        self._reading: list[Any] = []
        self._read_what: list[tuple[Shard, int]] = []
        self._outgoing: dict[tuple[int, int], Any] = {}  # rows, by table and worker
        self.sparse_bytes = self.dense_bytes = 0  # of tables: moved, and what whole tables would have moved
        self._peers = [seat.servers[index] for index in order["holders"]]  # servers that hold something
        self._norms: dict[int, list[float]] = {rank: [] for rank in self._peers}  # of the steps to come
        self._coordinator = Coordinator(self._count)
        self._agree = torch.zeros(2 + protocol.FLAGS, dtype=torch.float64)
        self._answers = [torch.zeros(protocol.FLAGS + self._count, dtype=torch.float64) for _ in range(self._count)]
        # Worker that has died -> its last step, and from which one on the others have its samples.
        self._gone: dict[int, list[int]] = {}
        self.bytes_in = self.bytes_out = 0

    def _shard(self, chunk: dict[str, Any], order: dict[str, Any], tensors: dict[str, Tensor]) -> Shard:
        parameter = torch.nn.Parameter(tensors[""])
        optimizer = None
        if order["averaging"] == "gradients":
            options = order["groups"][chunk["group"]]
            target = order["target"] if chunk["dim"] is None else rules.sparse_target(order["target"])
            optimizer = rules.make(target, options, parameter, allow=self._seat.allow)
            if chunk["dim"] is None:
                rules.fuse(optimizer)
            state: dict[str, Any] = {key: value for key, value in tensors.items() if key}
            for key, value in chunk["scalars"].items():
                # torch.optim.SparseAdam counts with a Python number, the others with a tensor.
                counts = isinstance(optimizer, torch.optim.SparseAdam)
                state[key] = int(value) if counts else torch.tensor(value, dtype=torch.float32)
            if state:
                optimizer.state[parameter].update(state)
        if chunk["dim"] is not None:
            return Table(chunk["index"], chunk["group"], parameter, optimizer, workers=self._count)
        shared = order["consistency"] == "sync"
        return Flat(chunk["index"], chunk["group"], parameter, optimizer, workers=self._count, shared=shared)

    def _consistency(self, order: dict[str, Any]) -> Consistency:
        shards, mean = list(self.shards.values()), order["averaging"] == "weights"
        common: dict[str, Any] = {"workers": self._count, "options": self._options, "reply": self._reply, "mean": mean}
        if order["consistency"] == "sync":
            clip = self._clip is not None and not mean
            return Sync(shards, on_complete=self._share_norm if clip else None, **common)
        return Bounded(shards, staleness=order["staleness"], **common)

    # --- what arrives -----------------------------------------------------------------------------------------------
    def take(self, worker: int, message: Incoming) -> None:
        """A head, flags, or the beginning of a chunk."""
        if message.tag == protocol.HEAD:
            message.read(self._heads[worker])
            step, *values = self._heads[worker].tolist()
            self._tuned[worker][int(step) % 2] = values
        elif message.tag == protocol.AGREE:
            message.read(self._agree)
            step, hold, *flags = self._agree.tolist()
            for other, told in self._coordinator.note(worker, step=int(step), hold=bool(hold), flags=flags):
                self._answer(other, told)
        else:
            shard = self.shards[protocol.index_of(message.tag)]
            self.bytes_in += message.nbytes
            if isinstance(shard, Flat):
                self._finish_reply(shard, worker)
                self._start(message, shard.buffers[worker], shard, worker)
            elif isinstance(shard, Table):
                self.sparse_bytes += message.nbytes
                self.dense_bytes += shard.parameter.nbytes
                self._start(message, shard.take(worker, message.nbytes), shard, worker)

    def _start(self, message: Incoming, tensor: Tensor, shard: Shard, worker: int) -> None:
        self._reading.append(message.start(tensor))
        self._read_what.append((shard, worker))

    def turn(self) -> bool:
        """Go on with the chunks that have been read. Whether there were any."""
        replied = self._note_replied()
        read = finished(self._reading)
        if not read:
            return replied
        whole = [self._read_what[index] for index in sorted(read, key=lambda at: self._read_what[at][0].index)]
        keep = [index for index in range(len(self._reading)) if index not in set(read)]
        self._reading = [self._reading[index] for index in keep]
        self._read_what = [self._read_what[index] for index in keep]
        lost = self._seat.up.lost()  # What such a worker sent may be torn.
        for shard, worker in whole:
            if self._seat.workers[worker] not in lost:
                self._rule.pushed(shard, worker)
        self._start_replies()
        return True

    def drop(self, worker: int) -> bool:
        """Go on without a worker that has died: nobody waits for it, nothing is sent to it. Whether that is possible."""
        self._gone[worker] = []
        left = [index for index, (_, one) in enumerate(self._read_what) if one != worker]
        self._reading = [self._reading[index] for index in left]
        self._read_what = [self._read_what[index] for index in left]
        self._lanes.close(worker)
        if not self._rule.drop(worker):
            return False
        self._start_replies()  # To those who waited for it.
        last, step, answers = self._coordinator.drop(worker)
        self._gone[worker] = [last, step]
        for other, told in answers:
            self._answer(other, told)
        return True

    def take_norm(self, message: Incoming) -> None:
        """Another server's part of the squared norm of this step, or of the next where this server is behind."""
        value = torch.zeros(1, dtype=torch.float64)
        message.read(value)
        self._norms[message.source].append(float(value))
        self._try_norm()

    def _share_norm(self, squared: float) -> None:
        value = torch.tensor([squared], dtype=torch.float64)
        self._norms[self._seat.me].append(squared)
        for rank in self._peers:
            if rank != self._seat.me:
                _end(self._seat.up.send(value, to=rank, tag=protocol.NORM))
        self._try_norm()

    def _try_norm(self) -> None:
        if not all(self._norms.values()) or not isinstance(self._rule, Sync):
            return
        # Added in the order of servers, so that all come to the same.
        norm = sum(parts.pop(0) for parts in self._norms.values()) ** 0.5
        assert self._clip is not None
        self._rule.norm_known(min(1.0, self._clip / (norm + 1e-6)))
        self._start_replies()

    # --- what is sent -----------------------------------------------------------------------------------------------
    def _options(self, shard: Shard, worker: int) -> dict[str, Any]:
        return self._dials.of_group(shard.group, self._tuned[worker][(shard.counts[worker] + 1) % 2])

    def _reply(self, shard: Shard, worker: int) -> None:
        rank = self._seat.workers[worker]
        if worker in self._gone:
            return
        if isinstance(shard, Table):
            if (shard.index, worker) in self._outgoing:  # Read long ago, or its worker would not have pushed again.
                _end(self._outgoing[shard.index, worker])
            packed = shard.outgoing(worker)
            self._outgoing[shard.index, worker] = self._seat.down.send(packed, to=rank, tag=protocol.tag(shard.index))
            self.bytes_out += packed.nbytes
            self.sparse_bytes += packed.nbytes
            self.dense_bytes += shard.parameter.nbytes
            return
        assert isinstance(shard, Flat)
        self._finish_reply(shard, worker)
        tensor = shard.outgoing(worker)
        if (shard.index, worker) not in self._senders:
            request = self._seat.down.sender(tensor, to=rank, tag=protocol.tag(shard.index))
            self._senders[shard.index, worker] = request
        self.bytes_out += tensor.nbytes
        urgency = self._urgency[worker].get(shard.index, shard.index)
        self._lanes.put(worker, (shard, worker), nbytes=tensor.nbytes, urgency=urgency)

    def _start_replies(self) -> None:
        """Let go the replies that are most urgent to their workers, as far as the windows allow."""
        while (taken := self._lanes.take()) is not None:
            shard, worker = taken
            try:
                self._senders[shard.index, worker].Start()
            except Exception as error:
                if not is_loss(error):
                    raise
            self._replying[shard.index, worker] = self._senders[shard.index, worker]

    def _note_replied(self) -> bool:
        if not self._replying:
            return False
        keys = list(self._replying)
        sent = [keys[position] for position in finished(list(self._replying.values()))]
        for index, worker in sent:
            del self._replying[index, worker]
            self._lanes.landed(worker, nbytes=self.shards[index].parameter.nbytes)
        if sent:
            self._start_replies()
        return bool(sent)

    def prefer(self, worker: int, chunks: Sequence[int]) -> None:
        """A worker has seen in which order its forward pass needs its chunks: replies leave in that order from now on."""
        self._urgency[worker] = {chunk: number for number, chunk in enumerate(chunks)}

    def _finish_reply(self, shard: Shard, worker: int) -> None:
        """The last one has been read by its worker, or it would not have pushed again; MPI wants to be asked."""

        def gone() -> bool:
            self._note_replied()
            return (shard.index, worker) not in self._replying

        wait_until(gone)

    def _answer(self, worker: int, flags: Sequence[float]) -> None:
        self._answers[worker].copy_(torch.tensor(flags, dtype=torch.float64))
        _end(self._seat.down.send(self._answers[worker], to=self._seat.workers[worker], tag=protocol.AGREE))

    def give_all(self, worker: int) -> None:
        """All parameters to one worker; nobody pushes meanwhile."""
        for shard in self.shards.values():
            shard.read_at[worker] = shard.updates
            self._reply(shard, worker)
        self._start_replies()

    def give_state(self, source: int) -> None:
        """The optimizer's state of every chunk: numbers as JSON, then the arrays in the order that it names."""
        told, arrays = {}, []
        for shard in self.shards.values():
            state = {} if shard.optimizer is None else shard.optimizer.state.get(shard.parameter, {})
            whole = {key: value for key, value in state.items() if _is_array(value, shard)}
            single = {key: float(value) for key, value in state.items() if value is not None and key not in whole}
            told[str(shard.index)] = {"arrays": list(whole), "scalars": single}
            arrays += list(whole.values())
        self._seat.down.send_json(told, to=source)
        for array in arrays:
            wait_until(self._seat.down.send(array.contiguous(), to=source, tag=protocol.STATE).Test)

    def report(self) -> dict[str, Any]:
        """What was seen (JSON)."""
        return {
            "read_staleness": {str(key): count for key, count in sorted(self._rule.read_staleness.items())},
            "update_staleness": {str(key): count for key, count in sorted(self._rule.update_staleness.items())},
            "bytes_in": self.bytes_in,
            "bytes_out": self.bytes_out,
            "sparse_bytes": self.sparse_bytes,
            "dense_bytes": self.dense_bytes,
            "parameter_bytes": sum(shard.parameter.nbytes for shard in self.shards.values()),
            "gone": {str(self._seat.workers[worker]): steps for worker, steps in self._gone.items()},
        }

    def end(self) -> None:
        """Let go of the messages."""
        for request in self._outgoing.values():
            _end(request)
        for (_, worker), request in self._senders.items():
            _end(request)
            if worker not in self._gone:
                request.Free()


def _end(request: Any) -> None:
    """Wait for a request; one to a rank that has died has ended."""
    wait_until(lambda: done(request))


def _is_array(value: Any, shard: Shard) -> bool:
    return isinstance(value, Tensor) and value.shape == shard.parameter.shape
