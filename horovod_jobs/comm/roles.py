"""Who works and who serves: the ranks of an MPI world are divided before anybody joins Horovod.

The last ``servers`` ranks hold parameters and never join; the others are the workers, and Horovod's world.
"""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING, Any

from horovod_jobs.errors import ConfigError, SetupError, WorldError

if TYPE_CHECKING:
    from horovod_jobs.comm.watch import Watch

_NAME_BYTES = 64
SHUTDOWN = {"op": "shutdown"}


class Roles:
    """A division of the ranks of ``comm`` (an mpi4py communicator); ranks below count in it.

    Attributes: ``rank``; ``worker_ranks`` and ``server_ranks``; ``workers`` is the communicator of the workers, in which they
    count from 0; ``hosts`` of all ranks.
    """

    watch: Watch  # where ``outlives_ranks``

    def __init__(self, comm: Any, *, servers: int) -> None:
        """Collective over ``comm``. ``servers`` 0: everybody works, and may serve as well."""
        self.comm, self.rank = comm, int(comm.Get_rank())
        size = int(comm.Get_size())
        self.worker_ranks = tuple(range(size - servers))
        self.server_ranks = tuple(range(size - servers, size))
        self.workers = comm.Split(int(self.is_server), self.rank) if servers else comm
        self.hosts = _hosts(comm)
        self._wires: tuple[Any, Any] | None = None
        if servers:
            self.wires()
            self._watch()

    def _watch(self) -> None:
        from horovod_jobs.comm.channel import failed_in, outlives_ranks
        from horovod_jobs.comm.watch import Watch

        if outlives_ranks():
            vital = (*self.server_ranks, self.worker_ranks[0])
            self.watch = Watch(lambda: failed_in(self.comm), vital=vital, hosts=self.hosts)

    @property
    def is_server(self) -> bool:
        """Whether this rank serves and does nothing else."""
        return self.rank in self.server_ranks

    def wires(self) -> tuple[Any, Any]:
        """Collective the first time. The way up to the servers, and the way down to the workers (``comm.channel.Wire``)."""
        from horovod_jobs.comm.channel import Wire

        if self._wires is None:
            self._wires = Wire(self.comm.Dup()), Wire(self.comm.Dup())
        return self._wires

    def dismiss(self) -> None:
        """Send the servers home. Only the first worker's word counts, so any worker may call this."""
        self._tell_servers(SHUTDOWN)

    def tell_run(self, directory: str | None) -> None:
        """Tell the servers of the run that begins, in which they give signs of life; None: it is over. Any worker may call this."""
        self._tell_servers({"op": "run", "directory": directory})

    def _tell_servers(self, order: dict[str, Any]) -> None:
        if self.server_ranks and self.rank == self.worker_ranks[0]:
            from horovod_jobs.comm.channel import is_loss

            up, _ = self.wires()
            for server in set(self.server_ranks) - up.lost():
                try:
                    up.send_json(order, to=server)
                except Exception as error:
                    if not is_loss(error):
                        raise  # Else it has just died, which is told where it is missed.

    def obituary(self) -> str:
        """Which ranks have died, as far as MPI has heard; nothing where it ends the job with them."""
        up, _ = self.wires()
        named = [f"rank {rank} on {self.hosts[rank]}" for rank in sorted(up.lost())]
        return f"{' and '.join(named)} has ended" if named else ""

    def unwatched(self) -> None:
        """This rank looks for those that have died by itself from here on."""
        if hasattr(self, "watch"):
            self.watch.stop()

    def check_same(self, digest: str) -> None:
        """Collective over all ranks: a server must have been given the job that the workers have.

        Raises:
            WorldError: naming the servers that were not. (Workers compare among themselves, key by key.)
        """
        import numpy as np
        from mpi4py import MPI

        mine = np.frombuffer(digest.encode().ljust(64)[:64], dtype=np.uint8).copy()
        told = np.empty((self.comm.Get_size(), 64), dtype=np.uint8)
        self.comm.Allgather([mine, MPI.BYTE], [told, MPI.BYTE])
        other = [rank for rank in self.server_ranks if not np.array_equal(told[rank], told[0])]
        if other:
            raise WorldError(
                f"rank {', '.join(map(str, other))} (a parameter server) was given another config than rank 0; "
                "start every rank with the same command and files"
            )


def _hosts(comm: Any) -> tuple[str, ...]:
    """Collective. The host of every rank."""
    import numpy as np
    from mpi4py import MPI

    mine = np.frombuffer(socket.gethostname().encode()[:_NAME_BYTES].ljust(_NAME_BYTES), dtype=np.uint8).copy()
    told = np.empty((comm.Get_size(), _NAME_BYTES), dtype=np.uint8)
    comm.Allgather([mine, MPI.BYTE], [told, MPI.BYTE])
    return tuple(row.tobytes().decode(errors="replace").strip() for row in told)


def roles_of(world: Any) -> Roles | None:
    """The roles in a world; None where it was not joined by MPI and mpi4py, or is a part of one."""
    roles = getattr(world, "roles", None)
    return roles if isinstance(roles, Roles) and len(roles.worker_ranks) == world.size else None


def start_mpi() -> bool:
    """Start MPI with the thread level that mpi4py and Horovod can both use. False where mpi4py is not installed."""
    # Read at MPI_Init. Ranks share cores with each other's background threads: without yielding a step takes up to twice as long.
    os.environ.setdefault("OMPI_MCA_mpi_yield_when_idle", "1")
    try:
        import mpi4py.MPI  # noqa: F401
    except ImportError:
        return False  # Horovod starts MPI itself; only the fast path for small reductions is missing.
    return True


def divide(*, servers: int) -> Roles | None:
    """Collective over all ranks that MPI has started: agree on who serves. None where nobody does and mpi4py is not there.

    Raises:
        SetupError: servers are wanted and mpi4py is not installed.
        ConfigError: there are not enough ranks.
        WorldError: ranks were given different numbers of servers.
    """
    if not start_mpi():
        if servers:
            raise SetupError(
                f"strategy.servers={servers} needs mpi4py, which is not installed; run launch/install.sh, or pip install mpi4py"
            )
        return None
    import numpy as np
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    low_high = np.array([-servers, servers], dtype=np.int64)
    comm.Allreduce(MPI.IN_PLACE, low_high, op=MPI.MAX)
    if -low_high[0] != low_high[1]:
        raise WorldError(
            f"ranks were given different strategy.servers (from {-low_high[0]} to {low_high[1]}); "
            "start every rank with the same command and files"
        )
    check_enough(servers, ranks=comm.Get_size())
    if servers and not threads_may_call_mpi():
        raise SetupError(NO_THREADS)
    return Roles(comm, servers=servers)


def threads_may_call_mpi() -> bool:
    """Whether MPI, which has been started, may be called by several threads at once."""
    from mpi4py import MPI

    return bool(MPI.Query_thread() == MPI.THREAD_MULTIPLE)


NO_THREADS = (
    "strategy=parameter_server needs an MPI that grants THREAD_MULTIPLE, and this one does not; use Open MPI 4 or 5"
)


def check_enough(servers: int, *, ranks: int) -> None:
    """At least one rank must be left to work.

    Raises:
        ConfigError: none is.
    """
    if servers and ranks <= servers:
        raise ConfigError(
            f"strategy.servers={servers} leaves no worker of {ranks} rank{'s' if ranks > 1 else ''}; start at least "
            f"{servers + 1} (launch=local launch.np={servers + 1}), or use strategy.servers=colocated"
        )
