"""Find out what world this process was started in, and join it."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Mapping

from horovod_jobs.comm.roles import Roles, check_enough, divide
from horovod_jobs.comm.world import SingleWorld, World
from horovod_jobs.errors import ConfigError, SetupError, WorldError

_MPI_MARKS = ("OMPI_COMM_WORLD_SIZE", "PMIX_RANK", "PMI_RANK", "PMI_SIZE")
_GLOO_MARK = "HOROVOD_GLOO_RENDEZVOUS_ADDR"
GLOO_REMEDY = (
    "strategy=parameter_server needs MPI, and these ranks are joined by Gloo; use launch.controller=mpi, or mpirun"
)
BUILD_REMEDY = (
    f"build it with PYTHON={sys.executable} launch/build_horovod.sh (launch/install.sh does this), or start one process"
)


def launched_by(environ: Mapping[str, str] = os.environ) -> str:
    """What started this process: ``gloo``, ``mpi``, or ``none`` where no launcher did."""
    if environ.get("HOROVOD_CONTROLLER") == "gloo" or _GLOO_MARK in environ:
        return "gloo"
    if any(mark in environ for mark in _MPI_MARKS):
        return "mpi"
    return "none"


def take_role(*, servers: int = 0) -> Roles | None:
    """Collective over all ranks. Who works and who serves parameters; None where nobody can serve (one process, Gloo).

    Raises:
        ConfigError: servers are wanted, and there are not enough ranks or they are joined by Gloo.
        SetupError: servers are wanted and mpi4py is missing.
        WorldError: ranks were given different numbers of servers.
    """
    controller = launched_by()
    if controller == "mpi":
        return divide(servers=servers)
    if servers and controller == "gloo":
        raise ConfigError(GLOO_REMEDY)
    check_enough(servers, ranks=1)
    return None


def connect(roles: Roles | None = None, *, outlives_ranks: bool = False) -> World:
    """Join the world that the launcher made, or be a world of one. ``roles``: of a rank that works; without it all do.

    ``outlives_ranks``: a world that goes on without ranks that die, where there are servers and MPI was started for it.

    Raises:
        SetupError: ranks were started and Horovod is not installed, or it cannot start here.
    """
    controller = launched_by()
    if controller == "none":
        return SingleWorld()
    if controller == "gloo":
        check_host_name()
    roles = roles or take_role()
    if outlives_ranks and roles is not None and hasattr(roles, "watch"):
        from horovod_jobs.comm.surviving import SurvivingWorld

        return SurvivingWorld(roles)
    try:
        try:
            from horovod_jobs.comm.horovod_world import HorovodWorld, init_horovod
        except ImportError as error:
            raise SetupError(
                f"a launcher ({controller}) started several ranks and Horovod cannot be imported ({error}); {BUILD_REMEDY}"
            ) from error
        init_horovod(roles=roles)
        return HorovodWorld(controller, roles)
    except BaseException:
        if roles is not None:
            roles.dismiss()
        raise


def world_lost(error: BaseException, *, world: World | None = None) -> WorldError | None:
    """What to say if ``error`` is Horovod's or MPI's way of telling that another rank has gone; None for any other error."""
    home = (type(error).__module__ or "").split(".")[0]
    if home in ("horovod", "mpi4py") or "Horovod has been shut down" in str(error):
        roles = getattr(world, "roles", None)
        who = (roles.obituary() if roles is not None else "") or "another rank has ended, or the way to it is cut"
        return WorldError(
            f"{who} ({str(error).strip().splitlines()[0][:120]}); see its log file; "
            "the same command goes on from the last checkpoint"
        )
    return None


def check_host_name() -> None:
    """Gloo needs it.

    Raises:
        SetupError: it does not resolve.
    """
    # Gloo dies by a segmentation fault where the host's own name does not resolve.
    try:
        socket.getaddrinfo(socket.gethostname(), None)
    except OSError as error:
        raise SetupError(
            f"this host's name {socket.gethostname()!r} does not resolve ({error}), which Gloo needs; add it to /etc/hosts or "
            "use MPI (launch.controller=mpi)"
        ) from error
