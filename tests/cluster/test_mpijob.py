"""An MPIJob end to end: what ``launch=mpijob`` prints, run by doing the operator's and the kubelet's work over the real image."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from benchmarks.hosts import why_not as no_hosts
from horovod_jobs.launch.kubernetes.log import manifest_in
from tests.cluster import pods
from tests.cluster.image import FASHION_MNIST, ROOT, Image, built

pytestmark = [pytest.mark.slow, pytest.mark.timeout(7200)]
SHORT = (
    "graph=train",
    "data=fashion_mnist",
    "name=demo",
    "fit.global_batch=64",
    "fit.max_steps=30",
    "tracker=none",
    "run.progress=lines",
)
LONG = (*SHORT, "fit.max_steps=600", "fit.checkpoint_every_s=1", "run.silent_limit_s=20")


@pytest.fixture(scope="module")
def image() -> Image:
    if (reason := no_hosts()) is not None:
        pytest.skip(reason)
    if not FASHION_MNIST.is_dir():
        pytest.skip(f"{FASHION_MNIST} is not there; on Debian: apt-get install dataset-fashion-mnist")
    return built()


@contextmanager
def submitted(image: Image, directory: Path, *arguments: str) -> Iterator[pods.Job]:
    """The job as a person would submit it, with volumes for runs, artifacts and data."""
    command = [sys.executable, "-m", "horovod_jobs", *arguments, "launch=mpijob", "launch.np=2", "launch.threads=1", "launch.grace_s=30",
               f"launch.kubernetes.namespace={pods.NAMESPACE}", "launch.kubernetes.runs_claim=runs",
               "launch.kubernetes.store_claim=artifacts", "launch.kubernetes.data_claim=data", "launch.dry_run=true"]  # fmt: skip
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    text = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=env, cwd=directory, check=True
    ).stdout
    data, work = directory / "data", directory / "pods"
    data.mkdir()
    work.mkdir()
    (data / "fashion-mnist").mkdir()
    for path in FASHION_MNIST.iterdir():
        shutil.copy(path, data / "fashion-mnist")
    volumes = {"data": data}
    for name in ("runs", "artifacts"):
        volumes[name] = directory / name
        volumes[name].mkdir()
        shutil.chown(volumes[name], 1000, 1000)  # fsGroup, on a volume that knows owners
    with pods.job(text, image=image, directory=work, volumes=volumes, data=data) as made:
        yield made


def wait_for_a_checkpoint(job: pods.Job, launcher: str, *, timeout_s: float = 180.0) -> None:
    """Until training has written one that a later attempt can go on from."""
    deadline = time.monotonic() + timeout_s
    while not any(job.claims["artifacts"].rglob("checkpoint.json")):
        assert time.monotonic() < deadline, f"no checkpoint:\n{job.log(launcher)[-4000:]}"
        time.sleep(0.2)


def test_two_workers_train_and_the_manifest_comes_back_in_the_log(image: Image, tmp_path: Path) -> None:
    with submitted(image, tmp_path, *SHORT) as job:
        launcher = job.start_launcher()
        assert job.wait(launcher, timeout_s=300) == 0, job.log(launcher)[-4000:]
        told = manifest_in(job.log(launcher).splitlines())
    assert told is not None, job.log(launcher)[-4000:]
    assert told == json.loads((tmp_path / "runs" / launcher / "manifest.json").read_text())
    assert (told["status"], told["world"]["size"], told["world"]["hosts"], told["world"]["controller"]) == (
        "done",
        2,
        2,
        "mpi",
    )
    assert (tmp_path / "runs" / launcher / "manifest.json").stat().st_uid == 1000


def test_a_worker_that_is_killed_ends_the_attempt_and_the_next_one_goes_on(image: Image, tmp_path: Path) -> None:
    with submitted(image, tmp_path, *LONG) as job:
        first = job.start_launcher()
        wait_for_a_checkpoint(job, first)
        job.kill("demo-worker-1")
        began = time.monotonic()
        code = job.wait(first, timeout_s=120)
        took_s = time.monotonic() - began
        said = job.log(first)
        assert code == 9  # mpirun itself ends with 0 or 255
        assert f"error: the attempt ended with exit code {code}, and 1 of 2 workers cannot be reached any more:" in said
        assert job.fqdn("demo-worker-1") in said.split("cannot be reached any more:")[1]
        assert took_s < 90, "no pod waits for ever for one that has gone"
        # restartPolicy OnFailure and backoffLimit.
        job.start_worker("demo-worker-1")
        second = job.start_launcher()
        assert job.wait(second, timeout_s=600) == 0, job.log(second)[-4000:]
        told = manifest_in(job.log(second).splitlines())
    assert told is not None
    assert told["stages"][0]["resumed_from_step"] > 0


def test_an_evicted_worker_has_its_ranks_write_a_checkpoint_first(image: Image, tmp_path: Path) -> None:
    """The kubelet sends SIGTERM and waits terminationGracePeriodSeconds; exit code 75 says that the same job goes on."""
    with submitted(image, tmp_path, *LONG, "fit.checkpoint_every_s=null") as job:
        launcher = job.start_launcher()
        deadline = time.monotonic() + 180
        while "step" not in job.log(launcher) and time.monotonic() < deadline:
            time.sleep(0.2)
        job.kill("demo-worker-1", signal.SIGTERM)
        assert job.wait("demo-worker-1", timeout_s=60) == 0
        assert job.wait(launcher, timeout_s=60) == 75, job.log(launcher)[-4000:]
        wait_for_a_checkpoint(job, launcher, timeout_s=1)


def test_a_worker_that_shows_another_key_is_refused(image: Image, tmp_path: Path) -> None:
    """Host keys are checked: whoever takes a worker's name or address without the job's key gets no rank to run."""
    with submitted(image, tmp_path, *SHORT) as job:
        keys = tmp_path / "other"
        shutil.copytree(job.directory / "ssh", keys)
        for path in (keys / "id_rsa", keys / "id_rsa.pub"):
            path.unlink()
        make = ["ssh-keygen", "-q", "-t", "ecdsa", "-b", "521", "-m", "PEM", "-N", "", "-f", str(keys / "id_rsa")]
        subprocess.run(make, check=True)
        (keys / "id_rsa").chmod(0o644)
        job.start_worker("demo-worker-1", keys=keys)
        launcher = job.start_launcher()
        assert job.wait(launcher, timeout_s=120) != 0
        assert "Host key verification failed" in job.log(launcher)


def test_an_elastic_job_goes_on_without_a_worker_and_takes_it_back(image: Image, tmp_path: Path) -> None:
    """strategy=elastic: one launcher, which follows the operator's discover_hosts.sh."""
    with submitted(
        image, tmp_path, *LONG, "fit.max_steps=null", "fit.epochs=1000", "strategy=elastic", "launch.elastic.min_np=1"
    ) as job:
        launcher = job.start_launcher()
        journal = tmp_path / "runs" / launcher / "elastic.jsonl"

        def sizes() -> list[int]:
            lines = journal.read_text().splitlines() if journal.exists() else []
            return [entry["size"] for entry in map(json.loads, lines) if entry["event"] == "world"]

        def wait_for_size(size: int) -> None:
            deadline = time.monotonic() + 180
            while sizes()[-1:] != [size]:
                assert job._holding(launcher).poll() is None, job.log(launcher)[-4000:]
                assert time.monotonic() < deadline, f"worlds of {sizes()} ranks\n{job.log(launcher)[-4000:]}"
                time.sleep(0.2)

        wait_for_size(2)
        wait_for_a_checkpoint(job, launcher)
        job.kill("demo-worker-1")
        job.discover(["demo-worker-0"])
        wait_for_size(1)
        job.start_worker("demo-worker-1")
        job.discover(job.workers)
        wait_for_size(2)
        job.kill(launcher, signal.SIGTERM)  # the job is suspended: its ranks write a checkpoint
        assert job.wait(launcher, timeout_s=120) == 75, job.log(launcher)[-4000:]
        told = manifest_in(job.log(launcher).splitlines())
    assert told is not None
    assert told["status"] == "interrupted"
