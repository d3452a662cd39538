"""What an elastic job will do, for a person who asks before it starts (``launch.dry_run=true``)."""

from __future__ import annotations

import shlex

from horovod_jobs.comm.member import VARIABLE
from horovod_jobs.config import LaunchConfig
from horovod_jobs.launch.base import LaunchPlan
from horovod_jobs.launch.elastic.entries import Rules
from horovod_jobs.launch.elastic.spawn import EARLY, HERE, OWN, remote_command


def described(
    launch: LaunchConfig, planned: LaunchPlan, *, rules: Rules, hosts: dict[str, int], own: str, directory: str
) -> dict[str, str]:
    """Heading to text. ``hosts``: those known before a discovery is asked; ``own``: this host's name."""
    many = launch.kind == "hosts"
    return {
        "the driver, on this host": _driver(launch, rules, many=many),
        **{f"on {host}": _on(launch, planned, host, count, own, directory) for host, count in hosts.items()},
        **({"on each host that discovery names": _on(launch, planned, "HOST", None, own, directory)} if not hosts else {}),
        "RANK, which reads its ticket from standard input": "",
    }  # fmt: skip


def _driver(launch: LaunchConfig, rules: Rules, *, many: bool) -> str:
    elastic, fixed = launch.elastic, launch.elastic.discovery is None
    most = "as many ranks as there are slots" if elastic.max_np is None and not fixed else f"{rules.max_np} ranks"
    where = (
        f"the address of {launch.hosts.interface}"
        if launch.hosts.interface
        else "the address that leads to the other hosts"
    )
    lines = [
        f"forms worlds of {rules.min_np} to {most}, by Gloo",
        f"listens at {where if many else '127.0.0.1'}, on a port that the system chooses, for members alone",
        f"asks launch.elastic.discovery={elastic.discovery} for hosts every {elastic.discovery_every_s:g} s; "
        f"a host named without a number has {elastic.slots}" if not fixed else "its hosts are fixed",
        *(["looks at each host, as launch=hosts does, before ranks start there"] if many else []),
        f"gives up after {rules.reset_limit} losses, or after {rules.start_s:g} s with too few ranks",
    ]  # fmt: skip
    return "\n".join(lines)


def _on(launch: LaunchConfig, planned: LaunchPlan, host: str, count: int | None, own: str, directory: str) -> str:
    up_to = "as many ranks as it has slots" if count is None else f"up to {count} ranks"
    if launch.kind == "local" or host in (*HERE, own):
        names = " ".join(sorted([*planned.env, VARIABLE]))
        return f"{up_to}, as processes of the driver\nvariables: {names}"
    from horovod_jobs.launch.hosts.plan import ssh_options

    ssh = shlex.join(["ssh", *ssh_options(launch.hosts), host])
    command = remote_command(["RANK"], env=planned.env, directory=directory)
    late = " ".join(sorted(name for name in planned.env if name not in (*EARLY, *OWN)))
    return f"{up_to}, each by\n{ssh} {shlex.quote(command)}\nvariables that travel inside ssh: {late or 'none'}"
