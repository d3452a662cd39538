"""``launch=docker``: the job's world in one container on this machine, by Docker or Podman (docs/docker.md)."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from horovod_jobs.config import DockerConfig, LaunchConfig
from horovod_jobs.console import TERMINAL_VARIABLE
from horovod_jobs.errors import ConfigError, SetupError, StorageError
from horovod_jobs.launch.base import Host, JobCommand, LaunchPlan

HOME = "/home/jobs"  # of the image's user; relative paths of a job are below it
DATA = "/data"
# What the engine itself reads of the environment; the container gets only what ``--env`` names.
_ENGINE = ("PATH", "HOME", "USER", "XDG_RUNTIME_DIR", "XDG_CONFIG_HOME", "XDG_DATA_HOME")
_ENGINE_PREFIXES = ("DOCKER_", "CONTAINER_", "CONTAINERS_")
_CONFIG_DIR = "--config-dir="
_ENGINE_FAILED = (125, 126, 127)  # The engine itself failed, or found no command to run; no job ends with these.


def plan(launch: LaunchConfig, *, job: JobCommand, environ: Mapping[str, str], cwd: str, user: str) -> LaunchPlan:
    """The command that starts the container. ``cwd``: what relative paths are relative to; ``user``: UID:GID. Pure.

    Raises:
        ConfigError: a variable that is not set, a path that cannot be mounted, or GPUs that cannot be read.
    """
    config = launch.docker
    if missing := [name for name in launch.env if name not in environ]:
        raise ConfigError(
            f"launch.env names {', '.join(missing)}, which is not set here; export it or take it off the list"
        )
    run = job.config["run"]
    mounts = [_mount(os.path.join(cwd, run[key]), os.path.join(HOME, run[key])) for key in ("root", "store")]
    if data := config.data or environ.get("HOROVOD_JOBS_DATA"):
        mounts.append(_mount(os.path.join(cwd, data), DATA, read_only=True))
    arguments = []
    for argument in job.arguments:
        if argument.startswith(_CONFIG_DIR):
            path = os.path.normpath(os.path.join(cwd, argument.removeprefix(_CONFIG_DIR)))
            mounts.append(_mount(path, path, read_only=True))
            argument = _CONFIG_DIR + path
        bare = argument.lstrip("+~")
        if not bare.startswith(("launch=", "launch.")) or bare.startswith("launch.elastic."):
            arguments.append(argument)
    # HOME: a user that is not the image's own may write to /tmp alone.
    names = [*launch.env, *([TERMINAL_VARIABLE] if TERMINAL_VARIABLE in environ else [])]
    argv = [config.engine, "run", "--rm", "--init", "--user", config.user or user, "--cap-drop", "ALL",
            "--security-opt", "no-new-privileges", "--shm-size", config.shm_size, *_limits(config), *_gpus(config),
            "--env", "HOME=/tmp", "--env", "USER=jobs", *(word for name in names for word in ("--env", name)),
            *(word for mount in mounts for word in ("--mount", mount)), "--workdir", HOME,
            config.image, "horovod-jobs", *arguments, *_world(launch)]  # fmt: skip
    env = {
        name: value
        for name, value in environ.items()
        if name in (*_ENGINE, *names) or name.startswith(_ENGINE_PREFIXES)
    }
    return LaunchPlan(argv, env, launch.controller)


def _world(launch: LaunchConfig) -> list[str]:
    threads = launch.threads or (max(1, int(launch.docker.cpus) // launch.np) if launch.docker.cpus else None)
    return ["launch=local", f"launch.np={launch.np}", f"launch.controller={launch.controller}", f"launch.grace_s={launch.grace_s:g}",
            *([f"launch.threads={threads}"] if threads else []),
            *([f"launch.env=[{','.join(launch.env)}]"] if launch.env else [])]  # fmt: skip


def _mount(source: str, target: str, *, read_only: bool = False) -> str:
    source = os.path.normpath(source)
    for path in (source, target):
        if "," in path or '"' in path:
            raise ConfigError(
                f"{path} cannot be mounted in a container: it has a comma or a quote; use another directory"
            )
    return f"type=bind,source={source},target={os.path.normpath(target)}" + (",readonly" if read_only else "")


def _limits(config: DockerConfig) -> list[str]:
    # Podman gives files to the user outside only when it is told to keep the ids.
    words = ["--userns", "keep-id"] if _is_podman(config) else []
    for option, value in (("--cpus", config.cpus), ("--memory", config.memory), ("--network", config.network)):
        if value is not None:
            words += [option, f"{value:g}" if isinstance(value, float) else value]
    return words


def _is_podman(config: DockerConfig) -> bool:
    return os.path.basename(config.engine) == "podman"


def _gpus(config: DockerConfig) -> list[str]:
    if config.gpus is None:
        return []
    listed = config.gpus.removeprefix("device=")
    devices = listed.split(",") if config.gpus.startswith("device=") else []
    if not (config.gpus == "all" or config.gpus.isdigit() or (devices and all(devices))):
        raise ConfigError(f"launch.docker.gpus={config.gpus} is not known; use all, a number, or device=0,1")
    if not _is_podman(config):
        return ["--gpus", f'"{config.gpus}"' if "," in config.gpus else config.gpus]
    devices = devices or (["all"] if config.gpus == "all" else [str(number) for number in range(int(config.gpus))])
    return [word for device in devices for word in ("--device", f"nvidia.com/gpu={device}")]


def plan_job(launch: LaunchConfig, *, job: JobCommand, host: Host, environ: Mapping[str, str]) -> LaunchPlan:
    """``plan`` for this directory and this user."""
    return plan(launch, job=job, environ=environ, cwd=os.getcwd(), user=f"{os.getuid()}:{os.getgid()}")


def start(launch: LaunchConfig, planned: LaunchPlan) -> int:
    """Run the container and wait for it; signals go to the world inside, which writes a checkpoint. Gives its exit code.

    Raises:
        SetupError: the engine is not installed, or it could not run the container.
        StorageError: a directory for results cannot be made.
    """
    engine = shutil.which(planned.argv[0])
    if engine is None:
        raise SetupError(
            f"{planned.argv[0]} is not installed; install it, or name another engine with launch.docker.engine=podman"
        )
    for path in _written(planned.argv):
        try:
            Path(path).mkdir(parents=True, exist_ok=True)  # Otherwise the engine makes it, and it belongs to root.
        except OSError as error:
            raise StorageError(
                f"{path} cannot be made ({error.strerror}); choose another run.root and run.store"
            ) from error
    process = subprocess.Popen([engine, *planned.argv[1:]], env=planned.env, start_new_session=True)
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = {number: signal.signal(number, lambda got, frame: process.send_signal(got)) for number in numbers}
    try:
        code = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if code in _ENGINE_FAILED:
        raise SetupError(
            f"{planned.argv[0]} could not run the container (its exit code is {code}); its message is above; see that its daemon "
            f"runs (`{planned.argv[0]} info`) and that the image is there (`{planned.argv[0]} image ls`)"
        )
    return 128 - code if code < 0 else code


def _written(argv: Sequence[str]) -> list[str]:
    """Directories outside that the container writes to."""
    mounts = [
        argv[at + 1] for at, word in enumerate(argv) if word == "--mount" and not argv[at + 1].endswith(",readonly")
    ]
    return [dict(part.split("=", 1) for part in mount.split(","))["source"] for mount in mounts]
