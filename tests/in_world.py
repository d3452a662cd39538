"""Run pytest itself inside a world: ``python -m tests.in_world -np 2 [--controller mpi|gloo] tests/parallel [pytest arguments]``.

Every rank runs every test in the same order, so collectives meet. Rank 0's report is shown; a failure on any rank fails the run.
A rank that fails alone leaves the others in a collective: pytest-timeout ends them, and with them the world.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback

from horovod_jobs.config import LaunchConfig
from horovod_jobs.launch import in_rank
from horovod_jobs.launch.base import this_host
from horovod_jobs.launch.local import plan
from horovod_jobs.launch.process import run_world


def start(arguments: list[str]) -> int:
    """In the parent: start the ranks by the project's own launcher."""
    parser = argparse.ArgumentParser(prog="python -m tests.in_world")
    parser.add_argument("-np", type=int, default=2)
    parser.add_argument("--controller", default="auto", choices=("auto", "mpi", "gloo"))
    known, rest = parser.parse_known_args(arguments)
    config = LaunchConfig(kind="local", np=known.np, controller=known.controller)
    command = [sys.executable, "-m", "tests.in_world", "--rank", *rest]
    # Parts of the world (comm.groups) are made of process sets, which Horovod lets nobody add later without this.
    environ = {"HOROVOD_DYNAMIC_PROCESS_SETS": "1", **os.environ}
    planned = plan(config, host=this_host(), environ=environ, command=command)
    return run_world(planned, grace_s=5.0)


def rank(arguments: list[str]) -> int:
    """In a rank: run pytest; only rank 0 is heard unless a test fails elsewhere."""
    import pytest

    from horovod_jobs.comm.connect import connect
    from horovod_jobs.early import rank_hint

    in_rank.register_rank()
    quiet = [] if rank_hint() == 0 else ["-q", "--no-header", "--no-summary", "-p", "no:terminalreporter"]
    world = connect()
    os.environ["HOROVOD_JOBS_TEST_RANK"] = str(world.rank)
    sys.modules[__name__].world = world  # type: ignore[attr-defined]
    sys.modules["tests.in_world"] = sys.modules[__name__]
    # mpirun gives ranks a pseudo-terminal; colours would end up in log files.
    try:
        code = int(pytest.main(["-p", "no:cacheprovider", "--color=no", *quiet, *arguments]))
    except BaseException:
        # Pytest may fail while it takes itself down, when all tests have passed: a file that nobody closed and the last garbage
        # collection finds is an error here. A rank that ended by it would shut Horovod down while the others meet below.
        print(f"rank {world.rank}: pytest itself failed", file=sys.stderr)
        traceback.print_exc()
        code = int(pytest.ExitCode.INTERNAL_ERROR)
    codes = world.gather_json(code, name="in_world.codes")
    worst = max(codes)
    if world.is_main and worst:
        print(f"exit codes of pytest by rank: {codes}", file=sys.stderr)
    in_rank.record_exit(worst)
    world.shutdown()
    return worst


if __name__ == "__main__":
    args = sys.argv[1:]
    sys.exit(rank(args[1:]) if args[:1] == ["--rank"] else start(args))
