"""What a worker does with its gradients: push them, and take the parameters back before the next forward pass needs them."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from horovod_jobs.comm.channel import CONTROL, done, is_loss, wait_until
from horovod_jobs.comm.world import Handle
from horovod_jobs.errors import WorldError
from horovod_jobs.strategy.base import Setting, StepTime, Updater
from horovod_jobs.strategy.parameter_server import binding, protocol
from horovod_jobs.strategy.parameter_server.account import account, moved
from horovod_jobs.strategy.parameter_server.binding import Holding, Terms
from horovod_jobs.strategy.parameter_server.companions import Flags, Host, Losses
from horovod_jobs.strategy.parameter_server.courier import Courier, Driver
from horovod_jobs.strategy.parameter_server.gates import Gates
from horovod_jobs.strategy.parameter_server.rows import RowCourier, Slices
from horovod_jobs.strategy.parameter_server.server import Server
from horovod_jobs.strategy.parameter_server.sharding import Layout
from horovod_jobs.strategy.parameter_server.shards import squared_norm
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
        tables: Sequence[Slices], terms: Terms, layout: Layout, seat: Seat, here: Server | None,
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
        self._next = 1  # the step that is made, or between two the one to come
        self._behind = False  # this worker's weights have moved since they were pushed
        self._dropped = 0
        self._exchange_s = 0.0
        self._report: list[dict[str, Any]] = []
        self._losses = Losses(seat, endures=not self.lockstep, tells=self.world.is_main)
        self._host = Host(here) if here is not None else None
        self._driver: Driver | None = None
        try:
            self._begin(parameters)
        except BaseException:
            if self._host is not None:
                self._host.stop()
            raise

    def _begin(self, parameters: Sequence[tuple[int, torch.nn.Parameter]]) -> None:
        seat, setting = self._seat, self.setting
        with self.world.agreed("parameter_server.bind"):
            self._holding = Holding(self.optimizer, parameters, self._layout, self._terms, self._tables)
            if self.world.is_main:
                binding.begin(seat.up, seat.down, self._holding, servers=seat.servers, workers=seat.workers)
        if not self._weights:
            self.optimizer.state.clear()  # The servers hold it now.
        number = seat.workers.index(seat.me)
        self._courier = Courier(
            seat.up, seat.down, self._layout, self._dense, servers=seat.servers, window_bytes=self._terms.window_bytes,
            # The server after one's own, so that no server gets all first chunks at once.
            first=number + (self._host is not None), check=self._check,
        )  # fmt: skip
        if self._host is not None:
            self._host.drive(self._courier)
        else:
            self._driver = Driver(self._courier)
        self._rows = RowCourier(seat.up, seat.down, self._tables, servers=seat.servers, check=self._check)
        dials = self._holding.dials
        self._head = torch.zeros(1 + dials.count, dtype=torch.float64)
        self._heads = [seat.up.sender(self._head, to=rank, tag=protocol.HEAD) for rank in seat.servers]
        self._flags = Flags(seat.up, seat.down, server=seat.servers[0], workers=len(seat.workers), check=self._check)
        self._passes = [0] * len(self._parameters)
        self._staged = [False] * len(self._parameters)
        self._hooks: list[Any] = []
        if self._eager:
            for index, parameter in enumerate(self._parameters):
                hook = parameter.register_post_accumulate_grad_hook(lambda tensor, index=index: self._ready(index))
                self._hooks.append(hook)
        self.world.expect_losses(not self.lockstep)
        everything = range(len(self._parameters))
        self._all = list(everything)
        lazy = not setting.averages_weights
        self._gates = (
            Gates(setting.model, self._parameters, fetch=self._fetch, seen=self._prefer)
            if lazy and setting.model
            else None
        )

    def _check(self) -> None:
        if self._host is not None and self._host.error is not None:
            raise WorldError(
                f"the parameter server of rank {self.world.rank} has failed ({self._host.error!r}); see its log file"
            )
        self._losses.look()

    @property
    def exchange_s(self) -> float:
        return self._exchange_s

    @property
    def lost(self) -> list[dict[str, Any]]:
        """Workers that have died in this stage."""
        return self._losses.found

    def _fetch(self, indices: Sequence[int]) -> None:
        """Wait until these parameters are back."""
        dense, start = len(self._dense), time.perf_counter()
        self._courier.fetch([index for index in indices if index < dense] if self._tables else indices)
        for index in indices:
            if index >= dense:
                self._rows.fetch(index - dense)
        self._exchange_s += time.perf_counter() - start

    def _prefer(self, order: Sequence[int]) -> None:
        """The first forward pass has shown in which order it needs parameters: pushes and replies follow it."""
        urgent = self._courier.prefer([index for index in order if index < len(self._dense)])
        for server, rank in enumerate(self._seat.servers):
            chunks = [chunk for chunk in urgent if self._layout.chunks[chunk].server == server]
            self._seat.up.send_json({"op": "order", "chunks": chunks}, to=rank)

    # --- who works --------------------------------------------------------------------------------------------------
    def _members(self) -> list[int]:
        """The workers that are ranks of the world: one that has died is until all next meet."""
        lost = {one["rank"] for one in self.world.lost}
        return [rank for rank in self._seat.workers if rank not in lost]

    def _at_work(self) -> list[bool]:
        """For each rank of the world, whether it makes this step."""
        gone_from = dict(zip(self._seat.workers, self._flags.gone_from, strict=True))
        return [not gone_from[rank] or self._next < gone_from[rank] for rank in self._members()]

    @property
    def shares(self) -> tuple[float, ...] | None:
        """The samples of a worker that has died go to the others, from a step on that is the same for all of them."""
        at_work = self._at_work()
        return None if all(at_work) else tuple(float(there) / sum(at_work) for there in at_work)

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
        start = time.perf_counter()
        sound = (
            self._courier.stage(index, grad, guard=guard)
            if index < dense
            else self._rows.push(index - dense, grad, guard=guard)
        )
        self._exchange_s += time.perf_counter() - start
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
        """Push what has not been pushed. It waits for nothing: gradients leave while the next step begins."""
        if self._eager:
            for index in self._all:
                if not self._staged[index]:
                    self._push_gradient(index)

    def step(self) -> None:
        """The servers update. Here are only local steps (``averaging=weights``) and clipping of a push that is alone."""
        if self._weights:
            self._local_step()
        elif not self._eager:
            self._clip_own()
            for index in self._all:
                self._push_gradient(index)
        if self._gates is None:
            self._fetch(self._all)

    def finish_step(self, spent: StepTime) -> None:
        self._next = self._step + 1

    def _own_mean(self) -> None:
        """Make the gradients this worker's mean: the loop has divided its sum by the global batch."""
        for parameter in self._parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)  # As all-reduce does, where another rank may have one.
            else:
                parameter.grad.mul_(sum(self._at_work()))

    def _clip_own(self) -> None:
        """Clip to ``clip_norm`` as if this worker's mean gradient were the whole one."""
        assert self.setting.clip_norm is not None
        grads = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        grads = [grad.coalesce().values() if grad.is_sparse else grad for grad in grads]
        norm = sum(self._at_work()) * sum(squared_norm(grad) for grad in grads) ** 0.5
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
            self._seat.up.send_json({"op": "fetch", "workers": self._members()}, to=rank)
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
        self.world.expect_losses(False)
        try:
            self._losses.look(now=True)
            home = self._courier.close(limit_s=_FAREWELL_S) and self._rows.close(limit_s=_FAREWELL_S)
        except Exception as error:
            if not isinstance(error, WorldError) and not is_loss(error):
                raise
            home = False  # A server has died, which is being told already.
        if self._driver is not None:
            self._driver.stop()
        if home and self.world.is_main:
            self._report = [self._ask_report(rank) for rank in self._seat.servers]
            _log.info("parameter server: %s", moved(self._report))
        for request in self._heads:
            wait_until(lambda request=request: done(request), limit_s=_FAREWELL_S)  # type: ignore[misc]
            if home:
                request.Free()
        for rank in self._seat.servers:
            if rank not in self._seat.up.lost():
                self._seat.up.send_json({"op": "unbind"}, to=rank)
        if self._host is not None:
            self._host.join(limit_s=_FAREWELL_S)

    def _ask_report(self, rank: int) -> dict[str, Any]:
        self._seat.up.send_json({"op": "report"}, to=rank)
        found: dict[str, Any] = self._seat.down.next_from(rank, CONTROL).json()
        return found

    def describe(self) -> dict[str, Any]:
        """The servers and their load, the staleness that happened (number of chunks by steps), and bytes moved by all workers."""
        return {
            **account(self._layout, self._tables, self._terms, self._report),
            "servers": "colocated" if self._host is not None else len(self._seat.servers),
            "waited_for_at_the_beginning": len(self._all) if self._gates is None else self._gates.at_the_beginning,
            "parameters": len(self._all),
            "pushes_not_finite": self._dropped,
            "lost_workers": [lost | self._last_of(lost["rank"]) for lost in self.lost],
        }

    def _last_of(self, rank: int) -> dict[str, int | None]:
        """A lost worker's last step, and from which on the others had its samples: what lies between, nobody has learnt from."""
        steps = self._report[0]["gone"].get(str(rank)) if self._report else None
        last, step = [self._first_step + one for one in steps] if steps else (None, None)
        return {"last_step": last, "samples_taken_over_from_step": step}
