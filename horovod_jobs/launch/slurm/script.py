"""From a job to the text of a Slurm batch script. Pure."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Mapping, Sequence

from horovod_jobs.config import LaunchConfig
from horovod_jobs.console import TERMINAL_VARIABLE
from horovod_jobs.early import COMMAND_VARIABLE
from horovod_jobs.errors import ConfigError, SetupError
from horovod_jobs.launch import mpi
from horovod_jobs.launch.base import Host, JobCommand

# What a node sets for itself; it must not come from the host that submits.
_OWN = ("HOSTNAME", "TMPDIR", "TERM", "COLUMNS", TERMINAL_VARIABLE)
_TIME = re.compile(r"^(\d+|\d+:\d{2}|\d+:\d{2}:\d{2}|\d+-\d+(:\d{2}){0,2})$")
_AGAIN = 75  # Interrupted: a checkpoint is written, the same command goes on

# The batch shell waits beside the ranks, tells them of a warning (SIGUSR1 is a request for a checkpoint), and puts the job back
# into the queue where they ended with a checkpoint. A cancelled job stays cancelled.
_RUN = """
started= warned= code=127
warn() { warned=yes; if [ -n "$started" ]; then kill -USR1 "$started" 2>/dev/null; fi; }
trap warn USR1 TERM

rm -f "$mark"
%(start)s &
started=$!
while :; do  # A signal ends a wait early, with a code of its own.
  warned=; wait "$started"; ended=$?
  if [ "$ended" -ne 127 ]; then code=$ended; fi
  if [ -z "$warned" ]; then break; fi
done
if [ "$code" -eq 0 ] && [ ! -e "$mark" ]; then  # srun gives 0 where it could not launch the step.
  echo "error: no rank was started; see the message above, or use launch.slurm.mpi=mpirun" >&2
  code=%(setup)d
fi
rm -f "$mark"

put_back() {  # Slurm's controller may be away for a while: a restart, or another host takes over.
  tries=0
  while [ "$tries" -lt 60 ]; do
    if state=$(squeue --noheader --jobs="$job" --format=%%T 2>&1); then
      case $state in
        RUNNING|PREEMPTED)
          echo "horovod-jobs: attempt $((attempt + 1)) ended with a checkpoint; the job goes back into the queue"
          if scontrol requeue "$job"; then return; fi ;;
        *) state=${state:-gone}; break ;;
      esac
    fi
    case $state in *"Invalid job id"*) state=gone; break ;; esac
    if [ "$tries" -eq 0 ]; then echo "horovod-jobs: Slurm does not answer ($state); asking again for ten minutes"; fi
    tries=$((tries + 1))
    sleep 10
  done
  echo "horovod-jobs: the job is $state and is not put back into the queue; the same command goes on from the checkpoint"
}

attempt=${SLURM_RESTART_COUNT:-0}
if [ "$code" -eq %(again)d ] && [ "$attempt" -lt %(requeues)d ]; then
  put_back
elif [ "$code" -eq %(again)d ]; then
  echo "horovod-jobs: stopped with a checkpoint after $attempt requeues (launch.slurm.requeues=%(requeues)d); the same command goes on"
fi
exit "$code"
"""


def check_config(launch: LaunchConfig) -> None:
    """Hold ``launch.slurm`` to what Slurm can do.

    Raises:
        ConfigError: a value that cannot work; the message names it.
    """
    slurm = launch.slurm
    if slurm.mpi not in ("pmix", "mpirun"):
        raise ConfigError(f"launch.slurm.mpi={slurm.mpi} is not known; use pmix (srun starts the ranks) or mpirun")
    if launch.np < 1:
        raise ConfigError(
            f"launch.np={launch.np} is not a number of ranks; use 1 or more, or 0 with launch.slurm.nodes and "
            "launch.slurm.ntasks_per_node"
        )
    if slurm.nodes and slurm.ntasks_per_node and slurm.nodes * slurm.ntasks_per_node != launch.np:
        raise ConfigError(
            f"launch.np={launch.np} is not launch.slurm.nodes={slurm.nodes} x ntasks_per_node={slurm.ntasks_per_node}; "
            f"use launch.np={slurm.nodes * slurm.ntasks_per_node}, or 0"
        )
    if launch.controller == "gloo":
        raise ConfigError(
            "launch.controller=gloo cannot be used with launch=slurm, whose ranks are joined by MPI; use mpi or auto"
        )
    for name, least in (
        ("nodes", 1),
        ("ntasks_per_node", 1),
        ("cpus_per_task", 1),
        ("gpus_per_task", 1),
        ("at_once", 1),
    ):
        value = getattr(slurm, name)
        if value is not None and value < least:
            raise ConfigError(f"launch.slurm.{name}={value} is too small; use {least} or more")
    if slurm.requeues < 0 or slurm.warn_s < 0:
        raise ConfigError(
            f"launch.slurm.requeues={slurm.requeues} and warn_s={slurm.warn_s} must not be negative; use 0 or more"
        )
    if slurm.time is not None and not _TIME.match(slurm.time):
        raise ConfigError(
            f"launch.slurm.time={slurm.time} is not a time limit; use minutes (30), hours:minutes:seconds (4:00:00) or "
            "days-hours:minutes:seconds (1-12:00:00)"
        )
    if slurm.time is not None and 0 < limit_s(slurm.time) <= slurm.warn_s:
        raise ConfigError(
            f"launch.slurm.warn_s={slurm.warn_s} leaves nothing of launch.slurm.time={slurm.time}; use a longer time or a "
            "shorter warning"
        )
    for line in (*slurm.extra, *slurm.setup):
        if "\n" in line:
            raise ConfigError(
                f"launch.slurm.extra and setup take one line an entry, and {line!r} has several; split it"
            )


def limit_s(text: str) -> int:
    """Seconds of a time limit as Slurm writes it."""
    days, _, rest = text.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if days:
        hours, minutes, seconds = (*parts, 0, 0)[:3]
        return ((int(days) * 24 + hours) * 60 + minutes) * 60 + seconds
    if len(parts) == 1:
        return parts[0] * 60
    hours, minutes, seconds = parts if len(parts) == 3 else (0, *parts)
    return (hours * 60 + minutes) * 60 + seconds


def _header(launch: LaunchConfig, *, name: str, names: Sequence[str], tasks: int, logs: str) -> list[str]:
    slurm = launch.slurm
    output = os.path.join(logs.replace("%", "%%"), "%x-%A_%a.out" if tasks > 1 else "%x-%j.out")
    options: dict[str, object] = {
        "job-name": name,
        "array": f"0-{tasks - 1}%{slurm.at_once}" if tasks > 1 else None,
        "ntasks": launch.np,
        "nodes": slurm.nodes,
        "ntasks-per-node": slurm.ntasks_per_node,
        "cpus-per-task": slurm.cpus_per_task,
        "gpus-per-task": slurm.gpus_per_task,
        "mem": slurm.mem,
        "time": slurm.time,
        "partition": slurm.partition,
        "account": slurm.account,
        "qos": slurm.qos,
        "constraint": slurm.constraint,
        "output": f'"{output}"' if " " in output else output,
        "open-mode": "append",  # a requeued job goes on writing where it stopped
        "signal": f"B:USR1@{slurm.warn_s}",
        "requeue" if slurm.requeues else "no-requeue": "",
        "export": ",".join(names) or "NIL",
    }
    lines = [
        f"#SBATCH --{key}" + (f"={value}" if value != "" else "") for key, value in options.items() if value is not None
    ]
    return [*lines, *(f"#SBATCH {line}" for line in slurm.extra)]


def _start_line(launch: LaunchConfig, *, host: Host, settings: Mapping[str, str], outlives_ranks: bool) -> str:
    slurm = launch.slurm
    # Each rank leaves the mark that it was started, and then is the job.
    rank = f"""sh -c ': > "$0" && exec "$@"' "$mark" {shlex.quote(host.python)} -m horovod_jobs"""
    if slurm.mpi == "pmix":
        words = ["srun", "--mpi=pmix", "--export=ALL", "--kill-on-bad-exit=1", f"--ntasks={launch.np}"]
        if slurm.cpus_per_task:
            words.append(
                f"--cpus-per-task={slurm.cpus_per_task}"
            )  # srun does not take it from the job (Slurm 22.05 and later).
        if slurm.gpus_per_task:
            words.append(
                "--gpu-bind=none"
            )  # A rank takes the GPU of its local rank, and NCCL wants to see its neighbours'.
        return f'{shlex.join(words)} {rank} "${{arguments[@]}}"'
    mpirun = [str(host.mpirun), "-np", str(launch.np), "--map-by", "slot", "--bind-to", "none"]
    mpirun += mpi.options(settings)
    mpirun += mpi.OUTLIVE_RANKS if outlives_ranks else ()
    return f'{shlex.join(mpirun)} {rank} "${{arguments[@]}}"'


def batch_text(
    launch: LaunchConfig, *, jobs: Sequence[JobCommand], host: Host, env: Mapping[str, str], cwd: str
) -> str:
    """The script that sbatch takes: one job, or an array with a task a job. Pure.

    Values of the environment are not in it, only names: Slurm passes the values.
    """
    first = jobs[0]
    servers = any(job.has_servers for job in jobs)
    settings = mpi.over_hosts(hosts=launch.slurm.nodes, servers=servers, own=launch.env)
    exported = mpi.variables(settings)
    names = sorted(name for name in env if name not in _OWN and name not in (COMMAND_VARIABLE, *exported))
    logs = os.path.join(cwd, launch.slurm.logs)
    lines = [
        "#!/bin/bash",
        "# Made by horovod-jobs launch=slurm. Exit code 75: stopped with a checkpoint, the same command goes on.",
    ]
    lines += _header(launch, name=job_name(first.name), names=names, tasks=len(jobs), logs=logs)
    lines += ["", f"cd {shlex.quote(cwd)} || exit 6"]
    if launch.slurm.mpi == "pmix":
        lines += [f"export {name}={value}" for name, value in exported.items()]
    lines += launch.slurm.setup
    if len(jobs) == 1:
        lines += ["job=$SLURM_JOB_ID", *_job_lines(first, indent="")]
    else:
        lines += ["job=${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}", "case $SLURM_ARRAY_TASK_ID in"]
        for number, one in enumerate(jobs):
            lines += [f"  {number})", *_job_lines(one, indent="    "), "    ;;"]
        lines += ['  *) echo "there is no job $SLURM_ARRAY_TASK_ID" >&2; exit 2 ;;', "esac"]
    lines += [f"mark={shlex.quote(os.path.join(logs, '.started-'))}$job"]
    body = _RUN % {
        "start": _start_line(launch, host=host, settings=settings, outlives_ranks=first.outlives_ranks),
        "again": _AGAIN,
        "requeues": launch.slurm.requeues,
        "setup": SetupError.exit_code,
    }
    return "\n".join(lines) + "\n" + body


def _job_lines(job: JobCommand, *, indent: str) -> list[str]:
    return [
        f"{indent}export {COMMAND_VARIABLE}={shlex.quote(json.dumps(job.typed))}",
        f"{indent}arguments=({shlex.join(job.arguments)})",
    ]


def job_name(name: str) -> str:
    """A name that Slurm and a file system take."""
    return re.sub(r"[^A-Za-z0-9._-]", "-", name) or "job"
