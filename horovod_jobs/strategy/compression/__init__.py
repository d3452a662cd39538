"""Gradient compression by name (``strategy.compression=topk``), or as a node with the method's own arguments."""

from __future__ import annotations

from typing import Any

from horovod_jobs.errors import ConfigError
from horovod_jobs.instantiate import instantiate
from horovod_jobs.strategy.compression.base import Method

BY_HOROVOD = ("none", "fp16")  # Horovod itself sends these: see ``World.distribute``.
OPS = ("sum", "adasum")
_HERE = "horovod_jobs.strategy.compression"
_NODES: dict[str, dict[str, Any]] = {
    "bf16": {"_target_": f"{_HERE}.bf16.Bf16"},
    "topk": {"_target_": f"{_HERE}.topk.TopK"},
    "randomk": {"_target_": f"{_HERE}.randomk.RandomK"},
    "onebit": {"_target_": f"{_HERE}.onebit.OneBit"},
    "sign": {"_target_": f"{_HERE}.onebit.OneBit", "two_means": False},
    "qsgd": {"_target_": f"{_HERE}.qsgd.Qsgd"},
    "powersgd": {"_target_": f"{_HERE}.powersgd.PowerSgd"},
}
NAMES = (*BY_HOROVOD, *_NODES)


def chosen(compression: Any, *, op: str = "sum") -> Method | None:
    """What combines the gradients: the method that a name or a built node stands for, or None for a sum by Horovod itself.

    Raises:
        ConfigError: a name that is not known, something that is no method, or two things that do not go together.
    """
    if op not in OPS:
        raise ConfigError(f"strategy.op={op} is not known; use one of {', '.join(OPS)}")
    if not isinstance(compression, str | Method):
        raise ConfigError(
            f"strategy.compression is a {type(compression).__name__}; use one of {', '.join(NAMES)}, or a node whose _target_ is "
            f"a Method of {_HERE}"
        )
    if isinstance(compression, str) and compression not in NAMES:
        raise ConfigError(f"strategy.compression={compression} is not known; use one of {', '.join(NAMES)}")
    if op == "adasum":
        from horovod_jobs.strategy.adasum import Adasum

        if compression != "none":
            raise ConfigError(
                "strategy.op=adasum combines whole gradients; use strategy.compression=none, or strategy.op=sum"
            )
        return Adasum()
    if isinstance(compression, Method):
        return compression
    return None if compression in BY_HOROVOD else instantiate(_NODES[compression], where="strategy.compression")
