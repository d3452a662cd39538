"""From a composed Hydra config to a checked, plain ``Job``. Past this door no ``DictConfig`` travels."""

from __future__ import annotations

import difflib
import typing
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf, SCMode
from omegaconf.errors import OmegaConfBaseException

from horovod_jobs.config import (
    STAGES,
    DockerConfig,
    ElasticConfig,
    FitConfig,
    HostsConfig,
    JobConfig,
    KubernetesConfig,
    LaunchConfig,
    RunConfig,
    SlurmConfig,
    StageConfig,
    TrainStage,
)
from horovod_jobs.errors import ConfigError
from horovod_jobs.instantiate import bind, instantiate
from horovod_jobs.launch.starting import KINDS, counted_ranks
from horovod_jobs.limits import check_finite, check_numbers, check_places

PRECISIONS = ("fp32", "bf16", "fp16")


@dataclass(frozen=True)
class Job:
    """A resolved job: plain values only."""

    config: JobConfig
    stages: dict[str, StageConfig]
    resolved: dict[str, Any]  # everything, as written to config.yaml


def register_schema() -> None:
    """Put the schema where Hydra finds it: ``job_schema`` for the root, ``stage/schema/<kind>`` for each stage kind."""
    store = ConfigStore.instance()
    store.store(name="job_schema", node=JobConfig)
    for kind, cls in STAGES.items():
        store.store(group="stage/schema", name=kind, node=cls)


def resolve(cfg: DictConfig) -> Job:
    """Type every stage by its kind, resolve interpolations, and check values that need no world.

    Raises:
        ConfigError: an unknown kind or key, a wrong type, a missing value, an interpolation that leads nowhere.
    """
    cfg = OmegaConf.create(cfg)
    OmegaConf.set_struct(cfg, False)
    try:
        for name in list(cfg.stages):
            cfg.stages[name] = _typed_stage(str(name), cfg.stages[name])
        plain = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True, structured_config_mode=SCMode.DICT)
    except OmegaConfBaseException as error:
        raise ConfigError(one_line(error)) from error
    resolved = typing.cast(dict[str, Any], plain)
    check_finite(resolved)
    stages = {
        name: _dataclass(STAGES[node["kind"]], node, where=f"stages.{name}.")
        for name, node in resolved["stages"].items()
    }
    config = _dataclass(JobConfig, {**resolved, "stages": {}})
    config.launch = replace(config.launch, np=counted_ranks(config.launch))
    job = Job(config=config, stages=stages, resolved=resolved)
    _check(job)
    return job


def _typed_stage(name: str, node: Any) -> DictConfig:
    if not isinstance(node, DictConfig):
        raise ConfigError(f"stages.{name}={node!r} is not a stage; give it a kind and what it needs")
    kind = node.get("kind")
    if kind not in STAGES:
        raise ConfigError(
            f"stages.{name}.kind={kind} is not a stage kind{_meant(str(kind), STAGES)}; use one of {', '.join(STAGES)}"
        )
    schema = OmegaConf.structured(STAGES[kind])
    for key in node:
        if key not in schema:
            known = [str(entry) for entry in schema]
            raise ConfigError(
                f"stages.{name}.{key!s} is not a key of a {kind} stage{_meant(str(key), known)}; it has {', '.join(known)}"
            )
    try:
        return typing.cast(DictConfig, OmegaConf.merge(schema, node))
    except OmegaConfBaseException as error:
        raise ConfigError(f"stages.{name}: {one_line(error)}") from error


def _meant(value: str, known: typing.Iterable[str]) -> str:
    close = difflib.get_close_matches(value, list(known), n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def one_line(error: Exception) -> str:
    """An OmegaConf error as one line that starts with the key."""
    text = str(getattr(error, "msg", None) or error).strip().splitlines()[0]
    key = getattr(error, "full_key", None)
    return f"{key}: {text}; check the key and its value" if key else f"{text}; check the key and its value"


def _dataclass(cls: type, values: dict[str, Any], *, where: str = "") -> Any:
    nested = {"fit": FitConfig, "launch": LaunchConfig, "run": RunConfig, "hosts": HostsConfig, "slurm": SlurmConfig,
              "docker": DockerConfig, "kubernetes": KubernetesConfig,
              "elastic": ElasticConfig}  # fmt: skip
    known = [entry.name for entry in fields(cls)]
    arguments = {}
    for key, value in values.items():
        if key not in known:  # A command line's + puts in what the schema does not have.
            raise ConfigError(
                f"{where}{key}={value} is not a key{_meant(str(key), known)}; {where.rstrip('.') or 'the job'} has {', '.join(known)}"
            )
        if key in nested and not is_dataclass(value):
            value = _dataclass(nested[key], value, where=f"{where}{key}.")
        arguments[key] = value
    return cls(**arguments)


def _check(job: Job) -> None:
    config = job.config
    if not job.stages:
        raise ConfigError("stages is empty; choose a graph (graph=compress) or name stages of your own")
    if config.data is None:
        raise ConfigError("data is empty; choose a data set (data=fashion_mnist)")
    for key, value in (("launch.kind", config.launch.kind),):
        if value not in ("none", *KINDS):
            raise ConfigError(f"{key}={value} is not known; use none or {' or '.join(KINDS)}")
    if config.launch.np < 1 and config.launch.kind not in ("hosts", "slurm"):
        raise ConfigError(f"launch.np={config.launch.np} is not a number of ranks; use 1 or more")
    if config.launch.restarts < 0:
        raise ConfigError(f"launch.restarts={config.launch.restarts} is not a number of starts; use 0 or more")
    if config.run.parallel_stages < 1:
        raise ConfigError(f"run.parallel_stages={config.run.parallel_stages} is not a number of stages; use 1 or more")
    if config.launch.controller not in ("auto", "mpi", "gloo"):
        raise ConfigError(f"launch.controller={config.launch.controller} is not known; use auto, mpi or gloo")
    if config.run.progress not in ("auto", "bars", "lines", "json", "none"):
        raise ConfigError(f"run.progress={config.run.progress} is not known; use auto, bars, lines, json or none")
    if config.run.log_level not in ("debug", "info", "warning", "error"):
        raise ConfigError(f"run.log_level={config.run.log_level} is not known; use debug, info, warning or error")
    check_places(config.run)
    for name, stage in job.stages.items():
        if isinstance(stage, TrainStage) and stage.enabled:
            _check_fit(f"stages.{name}.fit", stage.fit)
        if stage.enabled:
            check_numbers(stage, where=f"stages.{name}")
    # Stages first: a job's key that is wrong is told as that of the stage which takes it.
    check_numbers(config)
    # The ranks of a local world tell it in a moment; a launcher that loads torch for it takes longer, and keeps it.
    if config.launch.kind != "local":
        bind(config.data, where="data", allow=config.allow_targets)
    if config.chaos is not None:
        instantiate(config.chaos, allow=config.allow_targets, where="chaos")


def _check_fit(where: str, fit: FitConfig) -> None:
    if fit.precision not in PRECISIONS:
        raise ConfigError(f"{where}.precision={fit.precision} is not known; use one of {', '.join(PRECISIONS)}")
    if fit.publish not in ("last", "best"):
        raise ConfigError(f"{where}.publish={fit.publish} is not known; use last or best")
    if fit.device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"{where}.device={fit.device} is not known; use auto, cpu or cuda")
