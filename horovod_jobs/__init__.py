"""Sustainable distributed training on Horovod: one Hydra config describes a job graph that runs in one world of ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from horovod_jobs.predict import load

__all__ = ["__version__", "load"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # Lazy: `horovod-runs ls` and `import horovod_jobs` must not pay for torch.
    if name == "load":
        from horovod_jobs.predict import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
