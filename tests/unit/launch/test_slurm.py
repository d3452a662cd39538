"""The text of a batch job, and what is made of Slurm's answers; nothing is submitted, but the shell's part is run with stand-ins."""

from __future__ import annotations

import os
import stat
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from horovod_jobs.config import LaunchConfig, SlurmConfig
from horovod_jobs.errors import ConfigError, SetupError
from horovod_jobs.launch import starting
from horovod_jobs.launch.base import JobCommand
from horovod_jobs.launch.slurm import plan as slurm
from horovod_jobs.launch.slurm import script as slurm_text
from tests.unit.launch.support_launch import ENVIRON, HOST, golden, job

FULL = SlurmConfig(nodes=2, ntasks_per_node=4, cpus_per_task=6, gpus_per_task=1, mem="64G", time="4:00:00", partition="gpu",
                   account="lab", qos="normal", constraint="a100", extra=["--exclusive", "--mail-type=FAIL"],
                   setup=["module load cuda"])  # fmt: skip


def launch(config: SlurmConfig, **changes: Any) -> LaunchConfig:
    return LaunchConfig(**{"kind": "slurm", "np": 2, "slurm": config, **changes})


def text(config: LaunchConfig, *, numbers: tuple[int, ...] = ()) -> str:
    jobs = [job(number=number) for number in numbers] or [job()]
    env = {
        "PATH": "/usr/bin",
        "HOME": "/home/me",
        "HOSTNAME": "login",
        "MY_TOKEN": "hidden-value",
        "OMPI_MCA_pml": "ucx",
    }
    slurm_text.check_config(config)
    return slurm_text.batch_text(config, jobs=jobs, host=HOST, env=env, cwd="/home/me/my project")


def test_the_script_for_srun() -> None:
    golden("slurm_pmix.sbatch", text(launch(FULL, np=8)))


def test_the_script_for_mpirun() -> None:
    golden("slurm_mpirun.sbatch", text(launch(SlurmConfig(mpi="mpirun", time="30", requeues=0))))


def test_a_sweep_is_one_array() -> None:
    golden("slurm_array.sbatch", text(launch(SlurmConfig(time="30", at_once=2)), numbers=(1, 2, 3)))


def test_only_names_of_variables_are_in_the_script() -> None:
    made = slurm.plan_job(launch(SlurmConfig(), env=["MY_TOKEN"]), job=job(), host=HOST, environ=ENVIRON)
    (script,) = made.files.values()
    line = next(line for line in script.splitlines() if line.startswith("#SBATCH --export="))
    names = line.removeprefix("#SBATCH --export=").split(",")
    assert "MY_TOKEN" in names
    assert not {"ALL", "AWS_SECRET_ACCESS_KEY", "HOSTNAME", "TMPDIR", "OMPI_MCA_pml"} & set(names)
    assert "hidden-value" not in script
    assert made.argv == ["sbatch", "--parsable", "slurm/main.sbatch"]


def test_the_number_of_ranks() -> None:
    assert starting.counted_ranks(launch(SlurmConfig(nodes=2, ntasks_per_node=4), np=0)) == 8
    assert starting.counted_ranks(launch(SlurmConfig(), np=3)) == 3
    assert starting.counted_ranks(launch(SlurmConfig(), np=0)) == 0


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (SlurmConfig(mpi="pmi2"), {}, "launch.slurm.mpi=pmi2 is not known; use pmix"),
        (SlurmConfig(), {"np": 0}, "launch.np=0 is not a number of ranks; use 1 or more, or 0 with launch.slurm.nodes"),
        (
            SlurmConfig(nodes=2, ntasks_per_node=4),
            {"np": 7},
            "launch.np=7 is not launch.slurm.nodes=2 x ntasks_per_node=4; use",
        ),
        (SlurmConfig(), {"controller": "gloo"}, "launch.controller=gloo cannot be used with launch=slurm"),
        (SlurmConfig(nodes=0), {}, "launch.slurm.nodes=0 is too small; use 1 or more"),
        (SlurmConfig(requeues=-1), {}, "launch.slurm.requeues=-1 .* must not be negative"),
        (SlurmConfig(time="4h"), {}, "launch.slurm.time=4h is not a time limit; use minutes"),
        (
            SlurmConfig(time="1", warn_s=90),
            {},
            "launch.slurm.warn_s=90 leaves nothing of launch.slurm.time=1; use a longer",
        ),
        (SlurmConfig(extra=["--a\nrm -rf /"]), {}, "take one line an entry"),
    ],
)
def test_what_cannot_work_is_said(config: SlurmConfig, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        slurm_text.check_config(launch(config, **changes))


@pytest.mark.parametrize(
    ("written", "seconds"),
    [("30", 1800), ("2:30", 150), ("4:00:00", 14400), ("1-12", 129600), ("1-12:30", 131400), ("1-12:30:15", 131415)],
)
def test_time_limits(written: str, seconds: int) -> None:
    assert slurm_text.limit_s(written) == seconds


def test_states_and_codes_of_jobs() -> None:
    lines = (
        "JobId=7 JobName=x JobState=COMPLETED Reason=None ExitCode=0:0 Comment=a b=c\n"
        "JobId=8 JobState=FAILED ExitCode=75:0\nJobId=9 JobState=TIMEOUT ExitCode=0:15\nnothing here\n"
    )
    assert slurm.states(lines) == [("COMPLETED", 0), ("FAILED", 75), ("TIMEOUT", 143)]


def test_without_sbatch_it_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    made = slurm.plan_job(launch(SlurmConfig()), job=job(), host=HOST, environ=ENVIRON)
    with pytest.raises(SetupError, match="needs sbatch, which is not installed here; submit from a login node"):
        slurm.start(launch(SlurmConfig()), made)
    assert not (tmp_path / "slurm").exists()


def answers(monkeypatch: pytest.MonkeyPatch, *said: tuple[int, str, str]) -> None:
    """Slurm's answers to ``scontrol show job``, one after the other."""
    left = iter(said)
    monkeypatch.setattr(slurm, "_run", lambda argv, **_: subprocess.CompletedProcess(argv, *next(left)))
    monkeypatch.setattr(slurm, "_POLL_S", 0)


RUNNING = (0, "JobId=7 JobState=RUNNING ExitCode=0:0\n", "")
COMPLETED = (0, "JobId=7 JobState=COMPLETED ExitCode=0:0\n", "")
NO_ANSWER = (1, "", "slurm_load_jobs error: Unable to contact slurm controller (connect failure)\n")
FORGOTTEN = (1, "", "slurm_load_jobs error: Invalid job id specified\n")


@pytest.mark.parametrize("before", [(), (RUNNING,)], ids=["at first", "later"])
def test_a_controller_that_is_away_for_a_while_does_not_end_the_waiting(
    before: tuple[tuple[int, str, str], ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answers(monkeypatch, *before, NO_ANSWER, NO_ANSWER, RUNNING, COMPLETED)
    assert slurm._wait("7") == 0
    told = capsys.readouterr().err
    assert told.count("job 7: no answer from Slurm (slurm_load_jobs error: Unable to contact") == 1, "said once"
    assert told.count("job 7: running") == 1
    assert told.endswith("job 7: completed\n")


@pytest.mark.parametrize("before", [(), (RUNNING,)], ids=["at first", "later"])
def test_a_job_that_slurm_has_forgotten_is_an_error_in_one_sentence(
    before: tuple[tuple[int, str, str], ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    answers(monkeypatch, *before, FORGOTTEN)
    with pytest.raises(SetupError, match="does not know job 7 any more, so its end is not known; look with sacct -j 7"):
        slurm._wait("7")


# --- the shell's part, with stand-ins for srun, squeue and scontrol -------------------------------------------------------
def program(directory: Path, name: str, body: str) -> None:
    path = directory / name
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def batch(
    tmp_path: Path, *, srun: str, state: str = "RUNNING", attempt: str = "0", requeues: int = 3, starts: bool = True
) -> tuple[int, str]:
    """Run the script; gives its exit code and what scontrol was asked. ``starts``: srun leaves the mark of started ranks."""
    (tmp_path / "slurm").mkdir()
    srun = f": > {tmp_path}/slurm/.started-42\n{srun}" if starts else srun
    config = launch(SlurmConfig(requeues=requeues))
    script = tmp_path / "job.sbatch"
    script.write_text(slurm_text.batch_text(config, jobs=[job()], host=HOST, env={}, cwd=str(tmp_path)))
    program(tmp_path, "srun", srun)
    program(tmp_path, "squeue", f"echo {state}")
    program(tmp_path, "scontrol", f'echo "$@" > {tmp_path}/asked')
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "42", "SLURM_RESTART_COUNT": attempt}
    done = subprocess.run(["bash", str(script)], env=env, capture_output=True, text=True, timeout=30, check=False)
    asked = tmp_path / "asked"
    return done.returncode, asked.read_text().strip() if asked.exists() else ""


def test_a_job_that_stopped_with_a_checkpoint_goes_back_into_the_queue(tmp_path: Path) -> None:
    assert batch(tmp_path, srun="exit 75") == (75, "requeue 42")


@pytest.mark.parametrize(
    "case",
    [{"srun": "exit 0"}, {"srun": "exit 8"}, {"srun": "exit 75", "state": "COMPLETING"}, {"srun": "exit 75", "attempt": "3"},
     {"srun": "exit 75", "requeues": 0}],
    ids=["done", "failed", "cancelled", "often enough", "never"],
)  # fmt: skip
def test_and_any_other_does_not(tmp_path: Path, case: dict[str, Any]) -> None:
    code, asked = batch(tmp_path, **case)
    assert code == int(case["srun"].split()[1])
    assert asked == ""


def test_a_step_that_srun_could_not_launch_is_no_success(tmp_path: Path) -> None:
    assert batch(tmp_path, srun="exit 0", starts=False) == (5, "")
    assert not list((tmp_path / "slurm").iterdir())


def test_ranks_leave_the_mark_and_become_the_job(tmp_path: Path) -> None:
    program(tmp_path, "python", f'echo "$@" > {tmp_path}/said\nexit 75')
    config = launch(SlurmConfig())
    here = replace(HOST, python=f"{tmp_path}/python")
    text = slurm_text.batch_text(config, jobs=[job()], host=here, env={}, cwd=str(tmp_path))
    (tmp_path / "slurm").mkdir()
    program(tmp_path, "srun", 'while [ "$1" != sh ]; do shift; done\nexec "$@"')
    program(tmp_path, "squeue", "echo CANCELLED")
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "42"}
    done = subprocess.run(["bash", "-c", text], env=env, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 75, done.stderr
    assert (
        (tmp_path / "said")
        .read_text()
        .startswith("-m horovod_jobs --config-name=config experiment=main name=two words")
    )


@pytest.mark.parametrize("name", ["USR1", "TERM"])
def test_a_warning_reaches_the_ranks_and_their_code_comes_back(tmp_path: Path, name: str) -> None:
    # The rank takes a second signal's time to end: the shell's wait is interrupted by the first one and must be taken up again.
    rank = f"trap 'sleep 0.3; exit 75' USR1\nkill -{name} $PPID\nwhile :; do sleep 0.05; done"
    assert batch(tmp_path, srun=rank) == (75, "requeue 42")


def test_the_example_is_what_the_launcher_writes() -> None:
    """``horovod-jobs experiment=main launch=slurm ...`` as docs/slurm.md has it; HOROVOD_JOBS_WRITE_GOLDEN=1 writes it anew."""
    config = launch(SlurmConfig(nodes=2, time="4:00:00", partition="gpu", gpus_per_task=1), np=8)
    typed = ("experiment=main", "launch=slurm", "launch.np=8", "launch.slurm.nodes=2", "launch.slurm.time=4:00:00",
             "launch.slurm.partition=gpu", "launch.slurm.gpus_per_task=1")  # fmt: skip
    one = JobCommand("main", ("--config-name=config", *typed, "launch=none"), ("horovod-jobs", *typed))
    host = replace(HOST, python="/home/me/project/.venv/bin/python")
    env = dict.fromkeys(("HOME", "LANG", "PATH"), "x")
    made = slurm_text.batch_text(config, jobs=[one], host=host, env=env, cwd="/home/me/project")
    golden("../../../../launch/slurm/example.sbatch", made)
