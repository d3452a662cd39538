"""``launch=docker``: the command, and with a stand-in for the engine what happens around it. No container is started here."""

from __future__ import annotations

import json
import os
import shlex
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from horovod_jobs.config import DockerConfig, LaunchConfig
from horovod_jobs.errors import ConfigError, SetupError
from horovod_jobs.launch import docker
from horovod_jobs.launch.base import JobCommand, LaunchPlan
from tests.unit.launch.support_launch import ENVIRON, HOST, golden, job

ROOT = Path(__file__).resolve().parents[3]


def planned(config: DockerConfig | None = None, *, command: JobCommand | None = None, **changes: Any) -> LaunchPlan:
    launch = LaunchConfig(**{"kind": "docker", "np": 4, "docker": config or DockerConfig(), **changes})
    return docker.plan(launch, job=command or job(), environ=ENVIRON, cwd="/home/me/my project", user="1017:100")


def shown(made: LaunchPlan) -> str:
    return shlex.join(made.argv).replace(" --", " \\\n  --") + "\n"


def test_the_command() -> None:
    golden("docker.txt", shown(planned()))


def test_the_command_with_everything() -> None:
    config = DockerConfig(image="registry.example/jobs:1", data="/srv/data", user="0:0", gpus="device=0,1", cpus=6.0,
                          memory="16g", shm_size="4g", network="none")  # fmt: skip
    arguments = (
        "--config-name=config",
        "--config-dir=my_conf",
        "experiment=mine",
        "+launch.docker.gpus=all",
        "launch=none",
    )
    command = JobCommand("mine", arguments, (), {"run": {"root": "/srv/runs", "store": "../artifacts"}})
    golden("docker_full.txt", shown(planned(config, command=command, env=["MY_TOKEN"], threads=2, grace_s=5.0)))


def test_podman_gets_its_own_words() -> None:
    argv = planned(DockerConfig(engine="/usr/bin/podman", gpus="2")).argv
    assert argv[:2] == ["/usr/bin/podman", "run"]
    assert argv[argv.index("--userns") + 1] == "keep-id"
    assert [argv[at + 1] for at, word in enumerate(argv) if word == "--device"] == [
        "nvidia.com/gpu=0",
        "nvidia.com/gpu=1",
    ]
    assert "--gpus" not in argv


def test_only_named_variables_travel_and_no_value_is_on_the_command_line() -> None:
    made = planned(env=["MY_TOKEN"])
    passed = [made.argv[at + 1] for at, word in enumerate(made.argv) if word == "--env"]
    assert passed == ["HOME=/tmp", "USER=jobs", "MY_TOKEN"]
    assert "hidden-value" not in " ".join(made.argv)
    assert made.env == {"PATH": "/usr/bin", "HOME": "/home/me", "MY_TOKEN": "hidden-value"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"docker": DockerConfig(gpus="some")},
            "launch.docker.gpus=some is not known; use all, a number, or device=0,1",
        ),
        ({"docker": DockerConfig(gpus="device=")}, "launch.docker.gpus=device= is not known"),
        ({"docker": DockerConfig(data="/srv/a,b")}, "/srv/a,b cannot be mounted in a container: it has a comma"),
        ({"env": ["NOT_SET"]}, "launch.env names NOT_SET, which is not set here"),
    ],
)
def test_what_cannot_work_is_said(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        planned(**{"config": change.pop("docker", None), **change})


def test_the_job_inside_is_what_was_typed_without_this_launcher() -> None:
    """The arguments after the image compose: no key of the launcher outside is left, and the world inside is a local one."""
    argv = planned(
        command=JobCommand("m", ("experiment=main", "launch.docker.image=x", "launch=none"), (), job().config)
    ).argv
    inner = argv[argv.index("horovod-jobs", argv.index("--workdir")) + 1 :]
    assert inner == [
        "horovod-jobs",
        "experiment=main",
        "launch=local",
        "launch.np=4",
        "launch.controller=auto",
        "launch.grace_s=60",
    ]


ENGINE = """#!{python}
import json, pathlib, signal, sys, time
here = pathlib.Path({here!r})
def stop(number, frame):
    (here / "signal").write_text(str(number)); sys.exit(75)
signal.signal(signal.SIGTERM, stop)
(here / "argv").write_text(json.dumps(sys.argv[1:]))
if {wait}:
    time.sleep(60)
sys.exit(3)
"""


def engine(directory: Path, *, wait: bool = False) -> Path:
    """A stand-in for docker: it notes what it is told and ends with 3, or with 75 at SIGTERM."""
    path = directory / "engine"
    path.write_text(ENGINE.format(python=sys.executable, here=str(directory), wait=wait))
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def test_directories_are_made_and_the_exit_code_is_the_jobs(tmp_path: Path) -> None:
    config = LaunchConfig(kind="docker", docker=DockerConfig(engine=str(engine(tmp_path))))
    made = docker.plan(config, job=job(), environ=dict(os.environ), cwd=str(tmp_path / "work"), user="1:1")
    assert docker.start(config, made) == 3
    assert json.loads((tmp_path / "argv").read_text()) == made.argv[1:]
    assert (tmp_path / "work/runs").is_dir()
    assert (tmp_path / "work/artifacts").is_dir()


def test_a_signal_goes_to_the_world_inside(tmp_path: Path) -> None:
    argv = [str(engine(tmp_path, wait=True)), "run", "image"]
    script = f"""
import sys
from horovod_jobs.config import LaunchConfig
from horovod_jobs.launch import base, docker
sys.exit(docker.start(LaunchConfig(), base.LaunchPlan({argv!r}, {{"PATH": "/usr/bin:/bin"}}, "auto")))
"""
    process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "argv").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 75
    finally:
        process.kill()
        process.wait()
    assert (tmp_path / "signal").read_text() == str(int(signal.SIGTERM))


@pytest.mark.parametrize("code", [125, 127])
def test_an_engine_that_could_not_run_the_container_is_said(tmp_path: Path, code: int) -> None:
    failing = tmp_path / "engine"
    failing.write_text(f"#!/bin/sh\necho Cannot connect >&2\nexit {code}\n")
    failing.chmod(0o755)
    config = LaunchConfig(kind="docker", docker=DockerConfig(engine=str(failing)))
    made = docker.plan(config, job=job(), environ=dict(os.environ), cwd=str(tmp_path), user="1:1")
    with pytest.raises(SetupError, match=rf"could not run the container \(its exit code is {code}\).*info"):
        docker.start(config, made)


def test_an_engine_that_is_not_there_is_said(tmp_path: Path) -> None:
    config = LaunchConfig(docker=DockerConfig(engine="no-such-engine"))
    made = docker.plan_job(config, job=job(), host=HOST, environ=ENVIRON)
    with pytest.raises(SetupError, match="no-such-engine is not installed; install it, or name another engine"):
        docker.start(config, made)
