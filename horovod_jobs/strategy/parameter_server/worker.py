"""What a worker does with its gradients: push them, and take the parameters back before the next forward pass needs them."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from horovod_jobs.comm.channel import CONTROL, wait_until
from horovod_jobs.comm.world import Handle
from horovod_jobs.errors import WorldError
from horovod_jobs.strategy.base import Setting, Updater
from horovod_jobs.strategy.parameter_server import binding, protocol
from horovod_jobs.strategy.parameter_server.binding import Holding, Terms
from horovod_jobs.strategy.parameter_server.companions import Flags, Host
from horovod_jobs.strategy.parameter_server.courier import Courier
from horovod_jobs.strategy.parameter_server.gates import Gates
from horovod_jobs.strategy.parameter_server.rows import RowCourier, Slices
from horovod_jobs.strategy.parameter_server.server import Server
from horovod_jobs.strategy.parameter_server.sharding import Layout
from horovod_jobs.strategy.parameter_server.stage import Seat

_FAREWELL_S = 10.0
_log = logging.getLogger("horovod_jobs")


class ParameterServerUpdater(Updater):
    """See ``strategy.base.Updater``. ``.grad`` stays this worker's own: the sum is made, and clipped, where the parameters are.

    Args:
        parameters: (parameter group, parameter), in the order of the forward pass; without the embeddings in ``tables``.
        seat: where the servers are; ``seat.me`` is this rank.
        here: a server that runs in a thread of this process (colocated).
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, parameters: Sequence[tuple[int, torch.nn.Parameter]], setting: Setting, *,
        tables: Sequence[Slices], terms: Terms, layout: Layout, seat: Seat, here: Server | None, window_bytes: int,
    ) -> None:  # fmt: skip
        super().__init__(optimizer, setting)
        self._terms, self._layout, self._seat, self._tables = terms, layout, seat, list(tables)
        self.lockstep = terms.consistency == "sync"
        # Those that move row by row come last; the numbers of the others are the layout's.
        self._dense = [parameter for _, parameter in parameters]
        self._parameters = [*self._dense, *(table.parameter for table in tables)]
        self._weights = terms.averaging == "weights"
        # Gradients can go during the backward pass, unless this worker must know them all first.
        self._eager = not self._weights and (self.lockstep or setting.clip_norm is None)
        self._step, self._first_step = 0, setting.first_step
        self._behind = False  # this worker's weights have moved since they were pushed
        self._dropped = 0
        self._report: list[dict[str, Any]] = []
        self._host = Host(here) if here is not None else None
        try:
            self._begin(parameters, window_bytes)
        except BaseException:
            if self._host is not None:
                self._host.stop()
            raise

    def _begin(self, parameters: Sequence[tuple[int, torch.nn.Parameter]], window_bytes: int) -> None:
        seat, setting = self._seat, self.setting
        with self.world.agreed("parameter_server.bind"):
            self._holding = Holding(self.optimizer, parameters, self._layout, self._terms, self._tables)
            if self.world.is_main:
                binding.begin(seat.up, seat.down, self._holding, servers=seat.servers)
        if not self._weights:
            self.optimizer.state.clear()  # The servers hold it now.
        self._courier = Courier(
            seat.up, seat.down, self._layout, self._dense, servers=seat.servers, window_bytes=window_bytes, check=self._check
        )  # fmt: skip
        self._rows = RowCourier(seat.up, seat.down, self._tables, servers=seat.servers, check=self._courier.poke)
        dials = self._holding.dials
        self._head = torch.zeros(1 + dials.count, dtype=torch.float64)
        self._heads = [seat.up.sender(self._head, to=rank, tag=protocol.HEAD) for rank in seat.servers]
        self._flags = Flags(seat.up, seat.down, server=seat.servers[0], check=self._courier.poke)
        self._passes = [0] * len(self._parameters)
        self._staged = [False] * len(self._parameters)
        self._hooks: list[Any] = []
        if self._eager:
            for index, parameter in enumerate(self._parameters):
                hook = parameter.register_post_accumulate_grad_hook(lambda tensor, index=index: self._ready(index))
                self._hooks.append(hook)
        everything = range(len(self._parameters))
        self._all = list(everything)
        lazy = not setting.averages_weights
        self._gates = Gates(setting.model, self._parameters, fetch=self._fetch) if lazy and setting.model else None

    def _check(self) -> None:
        if self._host is not None and self._host.error is not None:
            raise WorldError(
                f"the parameter server of rank {self.world.rank} has failed ({self._host.error!r}); see its log file"
            )

    def _fetch(self, indices: Sequence[int]) -> None:
        """Wait until these parameters are back."""
        dense = len(self._dense)
        self._courier.fetch([index for index in indices if index < dense] if self._tables else indices)
        for index in indices:
            if index >= dense:
                self._rows.fetch(index - dense)

    # --- a step -----------------------------------------------------------------------------------------------------
    def zero_grad(self) -> None:
        self.optimizer.zero_grad()
        self._step += 1
        self._passes = [0] * len(self._parameters)
        self._staged = [False] * len(self._parameters)
        if not self._weights:
            for request in self._heads:
                wait_until(request.Test)
            self._head[0] = self._step
            self._head[1:] = torch.tensor(self._holding.dials.read(self.param_groups), dtype=torch.float64)
            for request in self._heads:
                request.Start()

    def _ready(self, index: int) -> None:
        """A parameter's gradient has been added to; the last time in a step it can go."""
        self._passes[index] += 1
        if self._passes[index] == self.setting.accumulate:
            self._push_gradient(index)

    def _push_gradient(self, index: int) -> None:
        self._staged[index] = True
        grad, dense, guard = self._parameters[index].grad, len(self._dense), not self.lockstep
        sound = (
            self._courier.stage(index, grad, guard=guard)
            if index < dense
            else self._rows.push(index - dense, grad, guard=guard)
        )
        if not sound:
            self._drop()

    def _drop(self) -> None:
        if self._dropped == 0:
            _log.warning(
                "a push that is not finite was kept from the parameter server, at this stage's step %d", self._step
            )
        self._dropped += 1

    def agree(self, values: Tensor) -> Handle:
        """See ``Updater.agree``. Out of lock step the flags travel by way of the first server, and the sums are this rank's own."""
        if self.lockstep:
            return super().agree(values)
        step, setting = self._first_step + self._step, self.setting
        hold = step % setting.steps_per_epoch == 0 or step == setting.total_steps
        return self._flags.tell(values, step=self._step, hold=hold)

    def synchronize(self) -> None:
        """Push what is not yet on its way. It does not wait for parameters."""
        if self._eager:
            for index in self._all:
                if not self._staged[index]:
                    self._push_gradient(index)
            self._courier.flush()

    def step(self) -> None:
        """The servers update. Here are only local steps (``averaging=weights``) and clipping of a push that is alone."""
        if self._weights:
            self._local_step()
        elif not self._eager:
            self._clip_own()
            for index in self._all:
                self._push_gradient(index)
            self._courier.flush()
        if self._gates is None:
            self._fetch(self._all)

    def _own_mean(self) -> None:
        """Make the gradients this worker's mean: the loop has divided its sum by the global batch."""
        for parameter in self._parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)  # As all-reduce does, where another rank may have one.
            else:
                parameter.grad.mul_(self.world.size)

    def _clip_own(self) -> None:
        """Clip to ``clip_norm`` as if this worker's mean gradient were the whole one."""
        assert self.setting.clip_norm is not None
        grads = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        grads = [grad.coalesce().values() if grad.is_sparse else grad for grad in grads]
        norm = self.world.size * float(sum(float(grad.double().square().sum()) for grad in grads)) ** 0.5
        scale = min(1.0, self.setting.clip_norm / (norm + 1e-6))
        for parameter in self._parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(scale)

    def _local_step(self) -> None:
        self._own_mean()
        self.clip()
        self.optimizer.step()
        self._behind = True
        if (self._first_step + self._step) % self._terms.period == 0:
            self._push_weights()

    def _push_weights(self) -> None:
        for index in self._all:
            value, last = self._parameters[index].detach(), self._courier.last(index)
            if not self._courier.stage(index, value, otherwise=last, guard=not self.lockstep):
                self._drop()
        self._courier.flush()
        self._behind = False

    # --- the same everywhere ----------------------------------------------------------------------------------------
    @property
    def settled(self) -> bool:
        """Whether the workers' weights have just been averaged."""
        return not self._behind

    def settle(self) -> None:
        """Collective. Everything pushed is applied, and every worker has the servers' parameters."""
        if self._behind:
            self._push_weights()
        self._fetch(self._all)
        if self.lockstep:
            return
        # Who has its answers has its pushes applied; when all are here, nothing changes any more until all have read.
        self.world.barrier(name="parameter_server.settled")
        self._courier.expect_all()
        self._rows.expect_all()
        for rank in self._seat.servers:
            self._seat.up.send_json({"op": "fetch"}, to=rank)
        self._fetch(self._all)
        self.world.barrier(name="parameter_server.read")

    def optimizer_state(self) -> dict[str, Any]:
        """Collective. Put together from the servers' shards on rank 0, which writes it; the others' is empty."""
        if self._weights:
            return super().optimizer_state()
        if not self.world.is_main:
            return self.optimizer.state_dict()
        return binding.gather_state(self._seat.up, self._seat.down, self._holding, servers=self._seat.servers)

    def rank_state(self) -> dict[str, Tensor]:
        """With ``averaging=weights``, the state of this worker's own optimizer."""
        if not self._weights:
            return {}
        return {
            f"{number}.{key}": torch.as_tensor(value)
            for number, entry in self.optimizer.state_dict()["state"].items()
            for key, value in entry.items()
            if value is not None
        }

    def restore_rank(self, states: list[dict[str, Tensor]]) -> None:
        """This worker's own optimizer goes on; a worker that was not there before has rank 0's."""
        if not self._weights or not states:
            return
        state = self.optimizer.state_dict()
        for name, value in states[0].items():
            number, _, key = name.partition(".")
            state["state"].setdefault(int(number), {})[key] = value
        self.optimizer.load_state_dict(state)

    # --- the end ----------------------------------------------------------------------------------------------------
    def close(self) -> None:
        """Tell the servers that this stage is over. Not a collective: a worker that fails alone comes here as well."""
        for hook in self._hooks:
            hook.remove()
        if self._gates is not None:
            self._gates.close()
        home = self._courier.close(limit_s=_FAREWELL_S) and self._rows.close(limit_s=_FAREWELL_S)
        if home and self.world.is_main:
            self._report = [self._ask_report(rank) for rank in self._seat.servers]
        for request in self._heads:
            wait_until(request.Test, limit_s=_FAREWELL_S)
            if home:
                request.Free()
        for rank in self._seat.servers:
            self._seat.up.send_json({"op": "unbind"}, to=rank)
        if self._host is not None:
            self._host.join(limit_s=_FAREWELL_S)

    def _ask_report(self, rank: int) -> dict[str, Any]:
        self._seat.up.send_json({"op": "report"}, to=rank)
        found: dict[str, Any] = self._seat.down.next_from(rank, CONTROL).json()
        return found

    def describe(self) -> dict[str, Any]:
        """The servers and their load, the staleness that happened (number of chunks by steps), and bytes moved by all workers."""
        load = self._layout.load_bytes()
        for table in self._tables:
            for server in range(len(load)):
                load[server] += table.of(table.parameter, server).nbytes
        terms = self._terms
        return {
            "strategy": "parameter_server",
            "servers": "colocated" if self._host is not None else len(self._seat.servers),
            "consistency": terms.consistency,
            "staleness_bound": terms.staleness,
            "averaging": terms.averaging,
            "period": terms.period,
            "chunks": len(self._layout.chunks),
            "bytes_by_server": load,
            "load_imbalance": max(load) * len(load) / sum(load) if sum(load) else 1.0,
            "waited_for_at_the_beginning": len(self._all) if self._gates is None else self._gates.at_the_beginning,
            "parameters": len(self._all),
            "read_staleness_steps": _added(self._report, "read_staleness"),
            "update_staleness_updates": _added(self._report, "update_staleness"),
            "bytes_pushed": sum(part["bytes_in"] for part in self._report),
            "bytes_pulled": sum(part["bytes_out"] for part in self._report),
            "embedding_rows": [table.parameter.shape[0] for table in self._tables],
            "embedding_bytes_moved": sum(part["sparse_bytes"] for part in self._report),
            "embedding_bytes_of_whole_tables": sum(part["dense_bytes"] for part in self._report),
            "pushes_not_finite": self._dropped,
        }


def _added(reports: Sequence[dict[str, Any]], name: str) -> dict[str, int]:
    total: Counter[str] = Counter()
    for report in reports:
        total.update(report[name])
    return dict(sorted(total.items(), key=lambda item: int(item[0])))
