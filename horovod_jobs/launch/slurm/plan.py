"""``launch=slurm``: a batch job whose ranks write a checkpoint before the time limit, and which requeues itself until it is done."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from horovod_jobs.config import LaunchConfig
from horovod_jobs.errors import SetupError
from horovod_jobs.launch.base import Host, JobCommand, LaunchPlan, environment
from horovod_jobs.launch.slurm.script import batch_text, check_config, job_name
from horovod_jobs.storage import storage_errors

_FINISHED = (
    "COMPLETED",
    "FAILED",
    "TIMEOUT",
    "CANCELLED",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "BOOT_FAIL",
    "DEADLINE",
    "PREEMPTED",
)
_POLL_S = 2.0
_UNKNOWN = "Invalid job id"  # what scontrol says of a job that Slurm has forgotten


@dataclass(frozen=True)
class SlurmPlan(LaunchPlan):
    """A batch script and how it is submitted."""

    script: str = ""  # name in ``files``
    logs: str = "slurm"
    jobs: tuple[JobCommand, ...] = ()  # several: a sweep, as one array


def count(launch: LaunchConfig) -> int:
    """Ranks of ``nodes`` x ``ntasks_per_node``; 0 where these do not say."""
    return (launch.slurm.nodes or 0) * (launch.slurm.ntasks_per_node or 0)


def plan_job(launch: LaunchConfig, *, job: JobCommand, host: Host, environ: Mapping[str, str]) -> SlurmPlan:
    """The batch script of a job, and the command that submits it.

    Raises:
        ConfigError: a key that does not work out.
        SetupError: mpirun is asked for and not installed.
    """
    return plan_jobs(launch, jobs=[job], host=host, environ=environ)


def plan_jobs(launch: LaunchConfig, *, jobs: Sequence[JobCommand], host: Host, environ: Mapping[str, str]) -> SlurmPlan:
    """The same for one job or for the jobs of a sweep, which share what they ask for."""
    check_config(launch)
    if launch.slurm.mpi == "mpirun" and host.mpirun is None:
        raise SetupError(
            "launch.slurm.mpi=mpirun needs mpirun, which is not installed; run launch/install.sh, or use pmix"
        )
    env = environment(launch, host=host, environ=environ)
    if not launch.threads and "OMP_NUM_THREADS" not in environ:
        del env["OMP_NUM_THREADS"]  # Each rank shares out the cores that Slurm gave its node's part of the job.
    if "SLURM_CONF" in environ:
        env["SLURM_CONF"] = environ["SLURM_CONF"]  # The job itself asks Slurm for its state and to be put back.
    cwd = os.getcwd()
    name = f"{job_name(jobs[0].name)}.sbatch"
    text = batch_text(launch, jobs=jobs, host=host, env=env, cwd=cwd)
    path = os.path.join(launch.slurm.logs, name)
    return SlurmPlan(
        ["sbatch", "--parsable", path], env, "mpi", {path: text}, script=path, logs=launch.slurm.logs, jobs=tuple(jobs)
    )


def start(launch: LaunchConfig, planned: LaunchPlan) -> int:
    """Submit the job, say how to follow it, and with ``launch.slurm.wait`` wait for its end. Gives its exit code, or 0.

    Raises:
        SetupError: sbatch is not installed, or refuses the job.
        StorageError: the script cannot be written.
    """
    assert isinstance(planned, SlurmPlan)
    if shutil.which("sbatch") is None:
        raise SetupError(
            "launch=slurm needs sbatch, which is not installed here; submit from a login node of the cluster, or look at the "
            "script with launch.dry_run=true"
        )
    script = Path(planned.script)
    with storage_errors("write", script):
        script.parent.mkdir(parents=True, exist_ok=True)
        script.write_text(planned.files[planned.script], encoding="utf-8")
    # Slurm hands on the variables that the script names; sbatch itself may need others, of the site's own.
    done = _run(planned.argv, env={**os.environ, **planned.env})
    if done.returncode:
        raise SetupError(
            f"sbatch refused {script} ({_last(done)}); correct launch.slurm.* or ask the cluster's support"
        )
    number = done.stdout.strip().split(";")[0]
    print(_told(planned, number), file=sys.stderr)
    return _wait(number) if launch.slurm.wait else 0


def _told(planned: SlurmPlan, number: str) -> str:
    """What a person needs to follow the job."""
    name, many = job_name(planned.jobs[0].name), len(planned.jobs) > 1
    output = os.path.join(planned.logs, f"{name}-{number}_*.out" if many else f"{name}-{number}.out")
    what = f"array {number} of {len(planned.jobs)} jobs" if many else f"job {number}"
    return (
        f"submitted {what} ({planned.script})\n  follow:  tail -F {output}\n  state:   squeue --jobs={number}\n"
        f"  stop:    scancel {number}"
    )


def _run(argv: Sequence[str], *, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(argv, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)


def _last(done: subprocess.CompletedProcess[str]) -> str:
    lines = [line.strip() for line in (done.stderr + done.stdout).splitlines() if line.strip()]
    return lines[-1] if lines else f"exit code {done.returncode}"


def states(text: str) -> list[tuple[str, int]]:
    """State and exit code of each job in the output of ``scontrol show job --oneliner``."""
    found = []
    for line in text.splitlines():
        words = dict(word.split("=", 1) for word in line.split() if "=" in word)
        if "JobState" in words:
            code, _, number = words.get("ExitCode", "0:0").partition(":")
            found.append((words["JobState"], int(code) or (128 + int(number or 0) if number not in ("", "0") else 0)))
    return found


def _wait(number: str) -> int:
    """Wait for a job, through every requeue and while Slurm does not answer. Ctrl-C ends the waiting and not the job."""
    last: list[tuple[str, int]] = []
    silent = False
    try:
        while True:
            done = _run(["scontrol", "show", "job", "--oneliner", number])
            now = states(done.stdout)
            if now and now != last:
                print(f"job {number}: {', '.join(state.lower() for state, _ in now)}", file=sys.stderr)
            last = now or last
            if (now and _ended(now)) or (not now and _UNKNOWN in done.stderr):
                break
            if done.returncode and not silent:  # The controller restarts, say; the job goes on meanwhile.
                print(f"job {number}: no answer from Slurm ({_last(done)}); waiting goes on", file=sys.stderr)
            silent = done.returncode != 0
            time.sleep(_POLL_S)
    except KeyboardInterrupt:
        print(f"job {number} goes on; scancel {number} stops it", file=sys.stderr)
        raise
    if not _ended(last):
        raise SetupError(
            f"Slurm does not know job {number} any more, so its end is not known; look with sacct -j {number}"
        )
    codes = [code or (0 if state == "COMPLETED" else 1) for state, code in last]
    return next((code for code in codes if code), 0)


def _ended(jobs: Sequence[tuple[str, int]]) -> bool:
    return bool(jobs) and all(state in _FINISHED for state, _ in jobs)
