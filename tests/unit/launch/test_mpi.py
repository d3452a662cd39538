"""The settings of MPI by where a world runs, and that this Open MPI knows every one of them."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from horovod_jobs.config import HostsConfig, LaunchConfig, SlurmConfig
from horovod_jobs.launch import mpi
from horovod_jobs.launch.base import JobCommand
from horovod_jobs.launch.hosts import plan as hosts
from horovod_jobs.launch.kubernetes import pods
from horovod_jobs.launch.slurm import script as slurm
from tests.unit.launch.support_launch import ENVIRON, HOST, job

BIN = Path(sys.executable).parent
STRATEGIES = Path(__file__).parents[3] / "conf" / "strategy"
TWO = LaunchConfig(kind="hosts", np=2, hosts=HostsConfig(list=["a", "b"]))


def with_strategy(name: str) -> JobCommand:
    """A job of one stage that trains by a strategy of conf/."""
    stages = {"model": {"strategy": yaml.safe_load((STRATEGIES / f"{name}.yaml").read_text())}}
    plain = job()
    return replace(plain, config={**plain.config, "stages": stages})


def told(argv: list[str]) -> dict[str, str]:
    """Settings on a command line."""
    return {argv[at + 1]: argv[at + 2] for at, word in enumerate(argv) if word == "--mca"}


def over(launch: LaunchConfig, strategy: str, **environ: str) -> dict[str, str]:
    made = hosts.plan_job(launch, job=with_strategy(strategy), host=HOST, environ={**ENVIRON, **environ})
    return told(made.argv)


def test_over_one_host_nothing_is_told_of_links() -> None:
    for servers in (False, True):
        found = mpi.over_hosts(hosts=1, servers=servers)
        assert not [name for name in found if name.startswith("btl_tcp")]
        assert found["coll_tuned_allreduce_algorithm"] == "4"


@pytest.mark.parametrize("count", [None, 2, 3])
def test_over_several_hosts_sums_are_made_in_segments_and_servers_have_short_queues(count: int | None) -> None:
    plain, served = (mpi.over_hosts(hosts=count, servers=servers) for servers in (False, True))
    for found in (plain, served):
        assert found["coll_tuned_allreduce_algorithm"] == "5"
        assert int(found["btl_tcp_eager_limit"]) > int(found["coll_tuned_allreduce_algorithm_segmentsize"])
    assert "btl_tcp_sndbuf" in served
    assert "btl_tcp_sndbuf" not in plain
    assert ("btl_tcp_links" in plain) == (count == 2)


def test_a_message_of_a_parameter_server_goes_at_once() -> None:
    chunk_kb = yaml.safe_load((STRATEGIES / "parameter_server.yaml").read_text())["chunk_kb"]
    assert int(mpi.EAGER["btl_tcp_eager_limit"]) > 1024 * chunk_kb


def test_each_launcher_tells_mpi_whether_there_are_servers() -> None:
    for strategy, wanted in (("parameter_server", True), ("allreduce", False)):
        one = with_strategy(strategy)
        made = hosts.plan_job(TWO, job=one, host=HOST, environ=ENVIRON)
        assert ("btl_tcp_sndbuf" in told(made.argv)) == wanted
        args = pods.launcher_args(LaunchConfig(kind="mpijob", np=4), run_id=None, servers=one.has_servers)
        assert ("btl_tcp_sndbuf" in told(args)) == wanted
        for how in ("pmix", "mpirun"):
            launch = LaunchConfig(kind="slurm", np=4, slurm=SlurmConfig(mpi=how, nodes=2))
            text = slurm.batch_text(launch, jobs=[job(), one], host=HOST, env={}, cwd="/w")
            assert ("btl_tcp_sndbuf" in text) == wanted


def test_a_setting_that_the_person_hands_on_stays() -> None:
    assert over(TWO, "allreduce", OMPI_MCA_btl_tcp_links="4")["btl_tcp_links"] == "2", "only where it is named"
    named = replace(TWO, env=["OMPI_MCA_btl_tcp_links"])
    assert "btl_tcp_links" not in over(named, "allreduce", OMPI_MCA_btl_tcp_links="4")
    launch = LaunchConfig(kind="slurm", np=2, env=["OMPI_MCA_btl_tcp_links"], slurm=SlurmConfig(nodes=2))
    env = {"OMPI_MCA_btl_tcp_links": "4", "OMPI_MCA_pml": "ucx"}
    lines = slurm.batch_text(launch, jobs=[job()], host=HOST, env=env, cwd="/w").splitlines()
    assert "#SBATCH --export=OMPI_MCA_btl_tcp_links" in lines, "from outside, and pml is the launcher's"
    assert "export OMPI_MCA_pml=ob1" in lines
    assert not [line for line in lines if line.startswith("export OMPI_MCA_btl_tcp_links")]


@pytest.mark.skipif(shutil.which("ompi_info", path=str(BIN)) is None, reason="Open MPI is not installed here")
def test_this_open_mpi_knows_every_setting() -> None:
    done = subprocess.run([BIN / "ompi_info", "--all", "--parsable"], capture_output=True, text=True, check=True)
    known: dict[str, Any] = {
        words[-3]: words[-1] for line in done.stdout.splitlines() if (words := line.split(":"))[-2:-1] == ["value"]
    }
    wanted = {**mpi.LOCAL, **mpi.over_hosts(hosts=2, servers=False), **mpi.over_hosts(hosts=3, servers=True)}
    assert set(wanted) <= set(known)
