"""The image of the Dockerfile, built by buildah on a Debian made by debootstrap, and mounted: no engine, no registry.

It is kept below ``~/.cache/horovod_jobs/images`` under a digest of everything that it is built from, so that only a change builds it
again (about ten minutes on two cores). ``HOROVOD_JOBS_IMAGES`` names another directory, ``HOROVOD_JOBS_TEST_IMAGE`` an image in it
that is taken as it is.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
_SOURCES = ("Dockerfile", ".dockerignore", "pyproject.toml", "README.md", "LICENSE", "launch", "conf", "horovod_jobs")
_SUITE = "bookworm"
_CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
_BUILD_LIMIT_S = 5400  # ten minutes on a quiet machine of two cores
_NEED_MB = 12_000


def why_not() -> str | None:
    """Why the image cannot be built here, in a sentence; None where it can."""
    if os.geteuid() != 0:
        return "buildah with chroot isolation and debootstrap need root here"
    if missing := [name for name in ("buildah", "debootstrap") if shutil.which(name) is None]:
        return f"{', '.join(missing)} is not installed; on Debian: apt-get install buildah debootstrap"
    return None


@dataclass(frozen=True)
class Image:
    """A built image in a store of its own."""

    store: Path
    tag: str

    def buildah(self, *arguments: str, timeout_s: float = 300.0, check: bool = True) -> str:
        """Run buildah on this store; gives what it prints."""
        done = subprocess.run(
            [*_buildah(self.store), *arguments],
            capture_output=True,
            text=True,
            timeout=timeout_s,
            env=_environment(self.store),
            check=False,
        )
        assert not check or done.returncode == 0, (
            f"buildah {' '.join(arguments)}: {done.stdout[-2000:]} {done.stderr[-3000:]}"
        )
        return done.stdout.strip()

    @contextmanager
    def container(self) -> Iterator[tuple[str, Path]]:
        """A container over the image with a writable layer of its own: its name and the root of its files."""
        name = self.buildah("from", "--pull-never", self.tag)
        try:
            yield name, Path(self.buildah("mount", name))
        finally:
            self.buildah("rm", name)


def _buildah(store: Path) -> list[str]:
    return ["buildah", "--root", str(store / "storage"), "--runroot", str(store / "run")]


def _environment(store: Path) -> dict[str, str]:
    # Layers of gigabytes pass through this directory; /tmp may be small.
    return {**os.environ, "TMPDIR": str(store / "tmp")}


def built() -> Image:
    """The image of this checkout; skips the test where it cannot be built."""
    if (reason := why_not()) is not None:
        pytest.skip(reason)
    store = Path(os.environ.get("HOROVOD_JOBS_IMAGES", Path.home() / ".cache" / "horovod_jobs" / "images"))
    (store / "tmp").mkdir(parents=True, exist_ok=True)
    if given := os.environ.get("HOROVOD_JOBS_TEST_IMAGE"):
        return Image(store, given)
    image = Image(store, f"localhost/horovod-jobs:{digest()}")
    if image.tag in image.buildah("images", "--format", "{{.Name}}:{{.Tag}}").split():
        return image
    if (free := shutil.disk_usage(store).free // 2**20) < _NEED_MB:
        pytest.skip(
            f"{store} has {free} MB free and building the image needs {_NEED_MB} MB; set HOROVOD_JOBS_IMAGES to a larger disk"
        )
    base = _base(image)
    log = store / "build.log"
    with log.open("wb") as output, tempfile.TemporaryDirectory(dir=store / "tmp") as directory:
        context = Path(directory)
        for name in _SOURCES:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, context / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy2(source, context / name)
        command = [*_buildah(store), "build", "--isolation", "chroot", "--layers=false", "--build-arg", f"BASE_IMAGE={base}",
                   *_package_index(), "-t", image.tag, str(context)]  # fmt: skip
        done = subprocess.run(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            timeout=_BUILD_LIMIT_S,
            env=_environment(store),
            check=False,
        )
    assert done.returncode == 0, (
        f"the image was not built; the end of {log}:\n{log.read_text(errors='replace')[-4000:]}"
    )
    return image


def digest() -> str:
    """Of every file that the image is built from."""
    made = hashlib.sha256()
    for name in _SOURCES:
        for path in sorted((ROOT / name).rglob("*")) if (ROOT / name).is_dir() else [ROOT / name]:
            if path.is_file() and "__pycache__" not in path.parts:
                made.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return made.hexdigest()[:12]


def _base(image: Image) -> str:
    """A Debian as an image: the official Python image cannot be had without a registry."""
    tag = f"localhost/debian-python:{_SUITE}"
    if tag in image.buildah("images", "--format", "{{.Name}}:{{.Tag}}").split():
        return tag
    tree = Path(tempfile.mkdtemp(dir=image.store / "tmp"))
    try:
        command = ["debootstrap", "--variant=minbase", "--include=python3", _SUITE, str(tree / "root")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
        if done.returncode:
            pytest.skip(
                f"debootstrap could not make a Debian: {done.stdout.strip().splitlines()[-1:]}; is Debian's archive reached?"
            )
        for waste in ("var/cache/apt/archives", "var/lib/apt/lists"):
            shutil.rmtree(tree / "root" / waste)
            (tree / "root" / waste).mkdir(parents=True)
        container = image.buildah("from", "scratch")
        image.buildah("add", "-q", container, str(tree / "root"), "/")
        image.buildah("commit", "-q", "--rm", container, tag)
    finally:
        shutil.rmtree(tree, ignore_errors=True)
    return tag


def _package_index() -> Sequence[str]:
    """This machine's way to the package index, where it has one of its own."""
    words = []
    if os.environ.get("PIP_CERT") and _CERTIFICATES.is_file():
        # Not where Debian keeps its own: the package ca-certificates writes there.
        words += ["--build-arg", "PIP_CERT=/opt/certificates.crt", "-v", f"{_CERTIFICATES}:/opt/certificates.crt:ro"]
    if wheels := os.environ.get("PIP_FIND_LINKS"):
        words += ["--build-arg", f"PIP_FIND_LINKS={wheels}"]
        if Path(wheels).is_dir():
            words += ["-v", f"{wheels}:{wheels}:ro"]
    return words
