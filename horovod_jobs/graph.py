"""The job graph: stages in an order that respects their needs, and the fingerprint of what each would make. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from horovod_jobs.artifacts import SCHEMA_VERSION
from horovod_jobs.config import EvaluateStage, ExportStage, StageConfig, TrainStage
from horovod_jobs.errors import ConfigError
from horovod_jobs.storage import digest_of

# What a fit setting does to the machine and not to the weights.
_NOT_IN_RESULT = frozenset(
    {"log_every_steps", "checkpoint_every_steps", "checkpoint_every_s", "checkpoint_keep", "workers"}
)


@dataclass(frozen=True)
class Node:
    """A stage in the graph. ``off`` says why it will not run, or is None."""

    name: str
    config: StageConfig
    needs: Mapping[str, str] = field(default_factory=dict)
    off: str | None = None


def build(stages: Mapping[str, StageConfig]) -> list[Node]:
    """Order the stages so that each comes after what it needs, and check how they are wired.

    A stage whose required input is switched off is off as well, and so is one whose free roles are all off.

    Raises:
        ConfigError: a need that names no stage, a role or kind that does not fit, a missing input, a cycle.
    """
    for name, stage in stages.items():
        _check_wiring(name, stage, stages)
    nodes: dict[str, Node] = {}
    for name in _order(stages):
        nodes[name] = _node(name, stages[name], nodes)
    return list(nodes.values())


def _check_wiring(name: str, stage: StageConfig, stages: Mapping[str, StageConfig]) -> None:
    for role, source in stage.needs.items():
        where = f"stages.{name}.needs.{role}={source}"
        if source not in stages and not is_external(source):
            raise ConfigError(
                f"{where} names no stage; there are {', '.join(stages)} (a path to an artifact has a slash in it)"
            )
        accepted = stage.INPUTS.get(role) or stage.FREE_ROLES
        if not accepted:
            roles = ", ".join(stage.INPUTS) or "none"
            raise ConfigError(f"{where}: {_a(stage.kind)} stage has no input {role!r}; it takes {roles}")
        if is_external(source):
            continue  # Its kind is known once it is opened (check_external).
        made = stages[source].OUTPUT
        if made not in accepted:
            raise ConfigError(
                f"{where}: {_a(stages[source].kind)} stage makes {_a(made)}, and {role!r} of {_a(stage.kind)} stage takes "
                f"{' or '.join(accepted)}; wire it to another stage"
            )
    for role in stage.INPUTS:
        if role not in stage.OPTIONAL and role not in stage.needs:
            kinds = " or ".join(stage.INPUTS[role])
            raise ConfigError(f"stages.{name}.needs.{role} is missing; name a stage that makes {_a(kinds)}")


def is_external(source: str) -> bool:
    """Whether a need names an artifact by its path instead of a stage: it has a slash in it."""
    return "/" in source


def check_external(node: Node, role: str, kind: str) -> None:
    """Check the kind of an artifact given by its path.

    Raises:
        ConfigError: the role takes other kinds.
    """
    kinds = node.config.INPUTS.get(role) or node.config.FREE_ROLES
    if kind not in kinds:
        raise ConfigError(
            f"stages.{node.name}.needs.{role}={node.needs[role]} is {_a(kind)} artifact, and {role!r} of {_a(node.config.kind)} stage "
            f"takes {' or '.join(kinds)}; give another one"
        )


def _a(noun: str) -> str:
    """With its article; an artifact's kind that is no noun gets one."""
    noun = f"{noun} model" if noun == "quantized" else noun
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def _order(stages: Mapping[str, StageConfig]) -> list[str]:
    done: list[str] = []
    open_: list[str] = []

    def visit(name: str) -> None:
        if name in done:
            return
        if name in open_:
            cycle = " -> ".join([*open_[open_.index(name) :], name])
            raise ConfigError(f"stages need each other in a circle ({cycle}); take one of these needs away")
        open_.append(name)
        for source in stages[name].needs.values():
            if not is_external(source):
                visit(source)
        open_.pop()
        done.append(name)

    for name in stages:
        visit(name)
    return done


def _node(name: str, stage: StageConfig, nodes: Mapping[str, Node]) -> Node:
    off = {role: source for role, source in stage.needs.items() if source in nodes and nodes[source].off is not None}
    if not stage.enabled:
        return Node(name, stage, stage.needs, off="it is switched off (enabled=false)")
    for role, source in off.items():
        if role in stage.INPUTS:
            return Node(name, stage, stage.needs, off=f"it needs {source}, which is off")
    for source in stage.needs.values():
        if (
            isinstance(stage, EvaluateStage)
            and stage.format == "onnx"
            and _exports_torch_only(nodes.get(source), nodes)
        ):
            return Node(name, stage, stage.needs, off=f"it needs {source}'s model.onnx, which onnx=false leaves out")
    if stage.needs and len(off) == len(stage.needs):
        return Node(name, stage, stage.needs, off="everything it needs is off")
    return Node(name, stage, {role: source for role, source in stage.needs.items() if role not in off})


def _exports_torch_only(node: Node | None, nodes: Mapping[str, Node]) -> bool:
    if node is None or not isinstance(node.config, ExportStage) or node.config.onnx:
        return False
    made_of = nodes.get(node.needs.get("model", ""))
    return made_of is not None and made_of.config.OUTPUT == "model"


def fit_counts_ranks(stage: TrainStage) -> bool:
    """Whether training depends on the number of ranks: batch norm is not synchronised, or sees a rank's part of a batch."""
    return not stage.fit.sync_batchnorm or stage.fit.accumulate > 1


def fingerprint(
    node: Node,
    *,
    inputs: Mapping[str, str],
    data_digest: str,
    code: Mapping[str, str],
    world_size: int,
    global_batch: int | None = None,
    machine: str = "",
    tuning_keys: frozenset[str] = frozenset(),
    counts_ranks: bool = False,
) -> str:
    """SHA-256 over everything that decides what a stage makes.

    ``inputs`` are the fingerprints of its inputs by role, ``code`` the digests of the classes its nodes name, ``machine`` what a
    measurement depends on (evaluate), ``tuning_keys`` those of its strategy that change the speed only. The world's size is in it
    only where it changes the result: see ``fit_counts_ranks``; ``counts_ranks`` says it of the strategy.
    """
    config: dict[str, Any] = asdict(node.config)
    for key in ("enabled", "force", "needs"):
        config.pop(key)
    if isinstance(node.config, TrainStage):
        config["fit"] = {key: value for key, value in config["fit"].items() if key not in _NOT_IN_RESULT}
        config["fit"].pop("batch_per_rank")
        config["fit"]["global_batch"] = global_batch
        if counts_ranks or fit_counts_ranks(node.config):
            config["fit"]["world_size"] = world_size
        if isinstance(config["strategy"], dict):
            config["strategy"] = {key: value for key, value in config["strategy"].items() if key not in tuning_keys}
    return digest_of(
        {
            "schema_version": SCHEMA_VERSION,
            "config": config,
            "inputs": dict(inputs),
            "data": data_digest if node.config.USES_DATA else None,
            "code": dict(code),
            "machine": machine,
        }
    )
