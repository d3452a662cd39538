"""What MPI is told, in one place: settings by where a world runs. docs/network.md says what was measured of each."""

from __future__ import annotations

from collections.abc import Collection, Mapping

_VARIABLE = "OMPI_MCA_"  # Open MPI reads a setting from this variable too; what mpirun's command line says comes first.
RING: Mapping[str, str] = {"coll_tuned_use_dynamic_rules": "1", "coll_tuned_allreduce_algorithm": "4"}

# Measured (docs/training.md): a step of a small transformer takes 1.8x as long where idle ranks do not yield their core.
LOCAL: Mapping[str, str] = {"mpi_yield_when_idle": "1", "btl": "self,sm", "pml": "ob1", **RING}
_ANY_HOSTS = {"mpi_yield_when_idle": "1", "pml": "ob1", "btl": "self,sm,tcp", **RING}

# Sums are made while the next segment travels.
SEGMENTED_RING: Mapping[str, str] = {
    **RING,
    "coll_tuned_allreduce_algorithm": "5",
    "coll_tuned_allreduce_algorithm_segmentsize": "262144",
}
# A message up to this size goes at once, without asking the receiver first, which on a full link waits behind the whole queue.
EAGER: Mapping[str, str] = {
    "btl_tcp_eager_limit": "525312",
    "btl_tcp_rndv_eager_limit": "525312",
    "btl_tcp_max_send_size": "525312",
}
# Servers fill every link both ways all the time: small socket buffers let pulls pass pushes.
SHORT_QUEUES: Mapping[str, str] = {"btl_tcp_sndbuf": "131072", "btl_tcp_rcvbuf": "131072"}
# A ring over two hosts has one connection for both directions: acknowledgements would wait behind data.
TWO_LINKS: Mapping[str, str] = {"btl_tcp_links": "2"}

# ULFM: who talks to a rank that has died gets an error, and mpirun does not end the others.
OUTLIVE_RANKS = ("--with-ft", "ulfm")


def over_hosts(*, hosts: int | None, servers: bool, own: Collection[str] = ()) -> dict[str, str]:
    """Settings of a world that is started over hosts.

    Args:
        hosts: how many; None where a scheduler decides.
        servers: whether a parameter server takes part.
        own: names of variables that the person hands to the ranks: a setting that is among them stays as it is there.
    """
    found = dict(_ANY_HOSTS)
    if hosts != 1:
        found |= {**SEGMENTED_RING, **EAGER}
        found |= SHORT_QUEUES if servers else TWO_LINKS if hosts == 2 else {}
    return {name: value for name, value in found.items() if _VARIABLE + name not in own}


def options(settings: Mapping[str, str]) -> list[str]:
    """Settings as options of mpirun."""
    return [word for name, value in settings.items() for word in ("--mca", name, value)]


def variables(settings: Mapping[str, str]) -> dict[str, str]:
    """Settings as variables, for ranks that mpirun does not start."""
    return {_VARIABLE + name: value for name, value in settings.items()}
