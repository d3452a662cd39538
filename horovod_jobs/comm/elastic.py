"""Join and leave the worlds of an elastic job, one after another, in the same process."""

from __future__ import annotations

import os
import socket

from horovod_jobs.comm.connect import BUILD_REMEDY, check_host_name
from horovod_jobs.comm.interfaces import own_address
from horovod_jobs.comm.member import Member, Place
from horovod_jobs.comm.proxy import StoreProxy
from horovod_jobs.comm.world import SingleWorld, World
from horovod_jobs.errors import SetupError


def warm_up() -> None:
    """Load what takes seconds to load before the others are kept waiting for this member: Horovod, and torch's compiler, which an
    optimizer's first step brings along.

    Raises:
        SetupError: Horovod is not installed here.
    """
    import torch

    try:
        import horovod_jobs.comm.horovod_world  # noqa: F401
    except ImportError as error:
        raise SetupError(f"Horovod cannot be imported on {socket.gethostname()} ({error}); {BUILD_REMEDY}") from error
    parameter = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.SGD([parameter], lr=0.0)
    parameter.sum().backward()
    optimizer.step()
    optimizer.zero_grad()


class Rounds:
    """The worlds that a member takes part in. ``world`` is the one it is in now."""

    def __init__(self, member: Member) -> None:
        self.member = member
        self.world: World | None = None
        self._proxy: StoreProxy | None = None

    def enter(self) -> World | None:
        """Wait for the next world and join it; None where there is none for this member any more."""
        while (place := self.member.join()) is not None:
            self._tell_horovod(place)
            if place.size == 1:
                self.world = SingleWorld()
                return self.world
            self.world = self._connect()
            if self.world is not None:
                return self.world
        return None

    def _tell_horovod(self, place: Place) -> None:
        ticket = self.member.ticket
        interface = ticket.interface or own_address(None, towards=ticket.address)[1]
        names = {
            "RANK": place.rank, "SIZE": place.size, "LOCAL_RANK": place.local_rank, "LOCAL_SIZE": place.local_size,
            "CROSS_RANK": place.cross_rank, "CROSS_SIZE": place.cross_size, "CONTROLLER": "gloo", "CPU_OPERATIONS": "gloo",
            "HOSTNAME": ticket.host, "GLOO_IFACE": interface, "GLOO_TIMEOUT_SECONDS": ticket.gloo_timeout_s,
            "ELASTIC": 1,
        }  # fmt: skip
        os.environ.update({f"HOROVOD_{name}": str(value) for name, value in names.items()})

    def _connect(self) -> World | None:
        """None where another member was lost meanwhile. Horovod starts again after a world, not after a start that failed: then this
        process begins anew, with what it has committed."""
        check_host_name()
        from horovod_jobs.comm.horovod_world import HorovodWorld, abandon, init_horovod, joined

        if self._proxy is None:
            self._proxy = StoreProxy(self.member.client, timeout_s=max(5.0, self.member.ticket.lease_s))
        self._proxy.place = self.member.place
        os.environ.update(self._proxy.environment())
        try:
            init_horovod(roles=None)
            return HorovodWorld("gloo")
        except Exception as error:
            text = f"the world could not be joined: {error}"
            if joined():
                abandon()
                self.member.report("lost", code=1, text=text)
            elif self.member.report("restart", code=1, text=text):
                self.member.exec_again()
            return None

    def leave(self) -> None:
        """Leave the world. Nobody is waited for: some may be gone, and what the others had agreed on has reached every rank."""
        world, self.world = self.world, None
        if world is not None and not isinstance(world, SingleWorld):
            from horovod_jobs.comm.horovod_world import abandon

            abandon()
