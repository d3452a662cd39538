"""Parameter server: some ranks hold the parameters and the optimizer, the others push gradients and pull parameters.

Li et al. 2014 (OSDI); colocated as in BytePS (Jiang et al. 2020, OSDI).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, ClassVar

from horovod_jobs.comm.connect import GLOO_REMEDY
from horovod_jobs.comm.roles import NO_THREADS, Roles, roles_of, threads_may_call_mpi
from horovod_jobs.errors import ConfigError, SetupError
from horovod_jobs.strategy.base import Setting, Updater

if TYPE_CHECKING:
    import torch

_CHOICES = {"consistency": ("sync", "async", "ssp"), "averaging": ("gradients", "weights")}


class ParameterServer:
    """Parameters on servers, over MPI.

    Args:
        servers: the last so many ranks serve and do nothing else; or ``colocated``: every rank works, and serves a part as well.
        consistency: ``sync``: one update of all workers' gradients, as all-reduce makes it; ``async``: each push is applied as it
            comes (Dean et al. 2012, NIPS); ``ssp``: the same, and no worker reads what is staler than ``staleness`` (Ho et al. 2013, NIPS).
        staleness: with ``ssp``, how many steps of the slowest worker a read may miss.
        averaging: ``gradients``: servers step; ``weights``: workers step, servers average their weights.
        period: with ``weights``, steps between averages.
        chunk_kb: largest message in KiB.
        window_kb: how much of a worker's gradients, or of a server's replies, is on its way to each receiver at a time, in KiB.

    Raises:
        ConfigError: a value that cannot be used.
    """

    TUNING: ClassVar[frozenset[str]] = frozenset({"servers", "chunk_kb", "window_kb"})
    whole_world: ClassVar[bool] = True  # Roles are given once, to all ranks.

    def __init__(
        self,
        *,
        servers: int | str = 1,
        consistency: str = "sync",
        staleness: int = 2,
        averaging: str = "gradients",
        period: int = 1,
        chunk_kb: int = 512,
        window_kb: int = 2048,
    ) -> None:
        for name, value in (("consistency", consistency), ("averaging", averaging)):
            if value not in _CHOICES[name]:
                raise ConfigError(f"strategy.{name}={value} is not known; use {', '.join(_CHOICES[name])}")
        if isinstance(servers, str) and servers != "colocated":
            raise ConfigError(f"strategy.servers={servers} is not known; use a number of ranks, or colocated")
        smallest = {
            "staleness": (staleness, 0),
            "period": (period, 1),
            "chunk_kb": (chunk_kb, 1),
            "window_kb": (window_kb, 1),
        }
        if not isinstance(servers, str):
            smallest["servers"] = (servers, 1)
        for name, (number, least) in smallest.items():
            if number < least:
                raise ConfigError(f"strategy.{name}={number} is too small; use {least} or more")
        if period > 1 and averaging != "weights":
            raise ConfigError(f"strategy.period={period} is for strategy.averaging=weights; use 1, or average weights")
        self.servers, self.consistency, self.averaging, self.period = servers, consistency, averaging, period
        self.staleness = staleness if consistency == "ssp" else None
        self.chunk_kb, self.window_kb = chunk_kb, window_kb

    @property
    def dedicated_servers(self) -> int:
        """Ranks that must be set aside before the others join Horovod."""
        return 0 if isinstance(self.servers, str) else self.servers

    @property
    def exact(self) -> bool:
        """Whether the number of workers changes the result by rounding only."""
        return self.consistency == "sync" and self.averaging == "gradients"

    @property
    def outlives_ranks(self) -> bool:
        """Whether workers can go on without one that dies: they do not wait for each other, and none of them serves."""
        return self.consistency != "sync" and self.dedicated_servers > 0

    def environment(self) -> dict[str, str]:
        """Nothing that Horovod must read."""
        return {}

    def bind(
        self,
        optimizer: torch.optim.Optimizer,
        named_parameters: Iterable[tuple[str, torch.nn.Parameter]],
        setting: Setting,
    ) -> Updater:
        """Collective. The updater of one stage; the servers have its parameters and its optimizer's state.

        Raises:
            ConfigError: no servers in this world, an optimizer that cannot be cut into pieces, or a stage that needs lock step.
            SetupError: this MPI does not let several threads call it.
        """
        from horovod_jobs.strategy.parameter_server.binding import Terms
        from horovod_jobs.strategy.parameter_server.rows import Slices, sparse_parameters
        from horovod_jobs.strategy.parameter_server.server import Server
        from horovod_jobs.strategy.parameter_server.sharding import make_layout
        from horovod_jobs.strategy.parameter_server.stage import Seat
        from horovod_jobs.strategy.parameter_server.worker import ParameterServerUpdater

        roles = self._check(setting)
        up, down = roles.wires()
        servers = roles.server_ranks or roles.worker_ranks
        seat = Seat(up, down, me=roles.rank, workers=roles.worker_ranks, servers=servers, hosts=roles.hosts)
        group_of = {
            id(parameter): index for index, group in enumerate(optimizer.param_groups) for parameter in group["params"]
        }
        sparse = sparse_parameters(setting.model) if self.averaging == "gradients" else set()
        trained = [
            (group_of[id(parameter)], parameter) for _, parameter in named_parameters if id(parameter) in group_of
        ]
        parameters = [(group, parameter) for group, parameter in trained if id(parameter) not in sparse]
        layout = make_layout(
            [(group, parameter.dtype, parameter.numel()) for group, parameter in parameters],
            servers=len(servers),
            chunk_bytes=self.chunk_kb * 1024,
        )
        tables = [
            Slices(len(layout.chunks) + number, group, parameter, len(servers))
            for number, (group, parameter) in enumerate(pair for pair in trained if id(pair[1]) in sparse)
        ]
        terms = Terms(
            self.consistency, self.staleness, self.averaging, self.period, setting.clip_norm, self.window_kb * 1024
        )
        module = type(optimizer).__module__
        here = (
            None
            if roles.server_ranks
            else Server(Seat(up, down, roles.rank, roles.worker_ranks, servers, (module,), roles.hosts))
        )
        return ParameterServerUpdater(
            optimizer, parameters, setting, tables=tables, terms=terms, layout=layout, seat=seat, here=here,
        )  # fmt: skip

    def _check(self, setting: Setting) -> Roles:
        roles = roles_of(setting.world)
        if setting.world.controller == "gloo":
            raise ConfigError(GLOO_REMEDY)
        if roles is None:
            raise ConfigError(
                "strategy=parameter_server needs a whole world of ranks under MPI with mpi4py; add launch=local launch.np=3, or use "
                "strategy=allreduce"
            )
        if len(roles.server_ranks) != self.dedicated_servers:
            raise ConfigError(
                f"strategy.servers={self.servers} in a world with {len(roles.server_ranks)} ranks that only serve; roles are given "
                "when a world starts, so use the same number in every stage and job of it"
            )
        if (
            not threads_may_call_mpi()
        ):  # Asked here as well: with colocated servers nobody was set aside when the world began.
            raise SetupError(NO_THREADS)
        if setting.loss_scaled:
            raise ConfigError("fit.precision=fp16 scales losses, which strategy=parameter_server cannot undo; use bf16")
        if self.consistency != "sync":
            if setting.synced_batchnorm:
                raise ConfigError(
                    f"strategy.consistency={self.consistency} lets workers run apart, and fit.sync_batchnorm=true makes them wait "
                    "for each other in every layer; set fit.sync_batchnorm=false, or strategy.consistency=sync"
                )
            if setting.averages_weights:
                raise ConfigError(
                    f"fit.ema_decay needs the same weights everywhere after every step, and strategy.consistency={self.consistency} "
                    "has none; set fit.ema_decay=null, or strategy.consistency=sync"
                )
        return roles
