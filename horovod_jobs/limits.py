"""Which numbers the schema's keys take: nonsense is refused while the config is read, before a world is started.

What depends on the data set, on the world's size or on a launcher's own rules is checked where these are known.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from horovod_jobs.config import (
    DockerConfig,
    ElasticConfig,
    EvaluateStage,
    ExportStage,
    FitConfig,
    HostsConfig,
    JobConfig,
    KubernetesConfig,
    LaunchConfig,
    QuantizeStage,
    RunConfig,
    SlurmConfig,
    StageConfig,
)
from horovod_jobs.errors import ConfigError


@dataclass(frozen=True)
class Limit:
    """The numbers from ``least`` to ``most``. ``strict``: the two themselves are refused."""

    least: float = 0
    most: float = math.inf
    strict: bool = False
    advice: str = ""  # what to use instead, where the limits do not say it well

    def refuses(self, value: float) -> str:
        """What is wrong with a value and what to use, or an empty text."""
        low, high = (
            (value <= self.least, value >= self.most) if self.strict else (value < self.least, value > self.most)
        )
        if not (low or high):
            return ""
        if self.strict and self.most < math.inf:
            wrong = f"is not between {self.least:g} and {self.most:g}"
        elif high:
            wrong = "is too large"
        elif self.strict:
            wrong = "is not positive"
        else:
            wrong = "is negative" if self.least == 0 else "is too small"
        bound = f"{self.least:g} or more" if low else f"{self.most:g} or less"
        return f"{wrong}; use {self.advice or ('more than 0' if self.strict else bound)}"


_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
COUNT = Limit(1)
ZERO_OR_MORE = Limit(0)
POSITIVE = Limit(0, strict=True)
# Some generators take 64 bits.
SEED = Limit(-(2**63), 2**63 - 1, advice="a whole number of at most 18 digits")

LIMITS: Mapping[type, Mapping[str, Limit]] = {
    JobConfig: {"seed": SEED},
    FitConfig: {
        "epochs": COUNT,
        "max_steps": COUNT,
        "global_batch": COUNT,
        "batch_per_rank": COUNT,
        "accumulate": COUNT,
        "workers": ZERO_OR_MORE,
        "lr_reference_batch": COUNT,
        "clip_norm": Limit(0, strict=True, advice="1.0"),
        "ema_decay": Limit(0, 1, strict=True, advice="0.999"),
        "validate_every_epochs": ZERO_OR_MORE,
        "early_stop_epochs": COUNT,
        "checkpoint_every_steps": COUNT,
        "checkpoint_every_s": ZERO_OR_MORE,
        "checkpoint_keep": COUNT,
        "log_every_steps": COUNT,
    },
    StageConfig: {"seed": SEED},
    QuantizeStage: {
        "calibration_samples": COUNT,
        "calibration_batch": COUNT,
        "max_drop": Limit(0, advice="percentage points from 0 on"),
        "check_samples": COUNT,
    },
    EvaluateStage: {"batch": COUNT, "latency_batches": COUNT, "latency_runs": COUNT, "latency_threads": COUNT},
    ExportStage: {"tolerance": Limit(0, strict=True, advice="the largest difference you accept, 1e-4 say")},
    HostsConfig: {
        "connect_timeout_s": COUNT,
        "keepalive_s": COUNT,
        "clock_limit_s": POSITIVE,
        "disk_free_mb": ZERO_OR_MORE,
    },
    SlurmConfig: {
        "nodes": COUNT,
        "ntasks_per_node": COUNT,
        "cpus_per_task": COUNT,
        "gpus_per_task": COUNT,
        "warn_s": ZERO_OR_MORE,
        "requeues": ZERO_OR_MORE,
        "at_once": COUNT,
    },
    DockerConfig: {"cpus": POSITIVE},
    KubernetesConfig: {
        "slots": COUNT,
        "gpus": ZERO_OR_MORE,
        "gang_timeout_s": COUNT,
        "backoff_limit": ZERO_OR_MORE,
        "deadline_s": COUNT,
        "ttl_s": ZERO_OR_MORE,
        "wait_s": COUNT,
    },
    ElasticConfig: {
        "min_np": COUNT,
        "max_np": COUNT,
        "discovery_every_s": POSITIVE,
        "slots": COUNT,
        "start_s": POSITIVE,
        "wait_s": ZERO_OR_MORE,
        "beat_s": POSITIVE,
        "lease_s": POSITIVE,
        "return_s": POSITIVE,
        "gloo_timeout_s": COUNT,
        "cooldown_s": ZERO_OR_MORE,
        "reset_limit": ZERO_OR_MORE,
    },
    LaunchConfig: {
        "np": ZERO_OR_MORE,  # 0 is for launchers that count; the others refuse it.
        "threads": COUNT,
        "grace_s": ZERO_OR_MORE,
        "restarts": ZERO_OR_MORE,
    },
    RunConfig: {"silent_limit_s": POSITIVE, "stall_limit_s": POSITIVE, "parallel_stages": COUNT},
}


def check_numbers(config: Any, *, where: str = "") -> None:
    """Hold a dataclass of the schema, and those inside it, to their limits. ``where``: the key it stands under.

    Raises:
        ConfigError: naming the key, the value and what to use.
    """
    limits = {key: limit for cls in type(config).__mro__ for key, limit in LIMITS.get(cls, {}).items()}
    for entry in fields(config):
        key, value = f"{where}.{entry.name}".lstrip("."), getattr(config, entry.name)
        if is_dataclass(value):
            check_numbers(value, where=key)
        elif entry.name in limits:
            _check(key, value, limits[entry.name], or_null="None" in str(entry.type))


def _check(key: str, value: Any, limit: Limit, *, or_null: bool) -> None:
    if isinstance(value, list) and not value:
        raise ConfigError(f"{key}=[] is empty; use numbers such as [1]")
    for number in value if isinstance(value, list) else [value]:
        if number is not None and (wrong := limit.refuses(number)):
            raise ConfigError(f"{key}={value} {wrong}{', or null' if or_null else ''}")


def check_places(run: RunConfig) -> None:
    """Hold where a run is written to: names that are there, and an id that is one directory's name everywhere.

    Raises:
        ConfigError: naming the key, the value and what to use.
    """
    for key, default in (("root", RunConfig.root), ("store", RunConfig.store)):
        if not getattr(run, key).strip():
            raise ConfigError(f"run.{key}= is empty; name a directory, or leave it out for {default}")
    if run.id is not None and (run.id == "latest" or not _ID.fullmatch(run.id)):
        raise ConfigError(
            f"run.id={run.id} is not a directory name{' of its own' if run.id == 'latest' else ''}; use letters, digits, dashes, "
            "underscores and dots, a letter or digit first, or leave it out"
        )


def check_finite(value: Any, *, where: str = "") -> None:
    """Refuse NaN and infinity anywhere in a resolved config: a comparison with NaN is false, so other checks let it pass.

    Raises:
        ConfigError: naming the key.
    """
    if isinstance(value, Mapping):
        for key, entry in value.items():
            check_finite(entry, where=f"{where}.{key}".lstrip("."))
    elif isinstance(value, list):
        for position, entry in enumerate(value):
            check_finite(entry, where=f"{where}[{position}]")
    elif isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{where}={value} is not a finite number; give one, or leave the key out for its default")
