"""Which stages may be made by a part of the ranks, what each makes, and in which turn it runs (``schedule`` decides)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from horovod_jobs.config import DistillStage, EvaluateStage, TrainStage
from horovod_jobs.graph import Node, fit_counts_ranks
from horovod_jobs.instantiate import instantiate
from horovod_jobs.schedule import Item, shares, shown, turns

if TYPE_CHECKING:
    from horovod_jobs.planning import Planned, Prepared


def whole_because(node: Node, prepared: Prepared) -> str | None:
    """Why a stage must not be made by a part of the ranks, or beside another one."""
    stage = node.config
    if isinstance(stage, EvaluateStage):
        return "it measures latency, which wants a host to itself"
    if not stage.REUSE:
        return "it reads what the run has done"
    if not isinstance(stage, TrainStage):
        return None
    if fit_counts_ranks(stage) or strategy_counts_ranks(stage, prepared):
        return "what it makes depends on the number of ranks"
    strategy = instantiate(stage.strategy, allow=prepared.job.config.allow_targets, where="strategy")
    return "its strategy takes the whole world" if getattr(strategy, "whole_world", False) else None


def strategy_counts_ranks(stage: TrainStage, prepared: Prepared) -> bool:
    """Whether the strategy's update depends on the number of ranks by more than rounding: unless it says that it is ``exact``."""
    strategy = instantiate(stage.strategy, allow=prepared.job.config.allow_targets, where="strategy")
    return not getattr(strategy, "exact", False)


def keys_of(node: Node, prints: Mapping[str, str]) -> frozenset[str]:
    """What a stage makes: its artifact, and the teacher's outputs where it keeps them."""
    keys = {prints[node.name]}
    if isinstance(node.config, DistillStage) and node.config.distiller.get("cache"):
        keys.add(f"outputs of {prints[node.needs['teacher']]}")
    return frozenset(keys)


def in_turns(planned: list[Planned], *, ranks: int, at_once: int) -> list[Planned]:
    """The plan in the order in which it is run. Stages of one turn run side by side."""
    items = [
        Item(
            step.node.name,
            frozenset(step.node.needs.values()),
            alone=step.action != "run" or step.whole is not None,
            keys=step.keys,
        )
        for step in planned
    ]
    by_name = {step.node.name: step for step in planned}
    ordered = []
    for number, names in enumerate(turns(items, ranks=ranks, at_once=at_once)):
        for name, part in zip(names, shares(ranks, len(names)), strict=True):
            step = by_name[name]
            beside = (
                f"; on {shown(part)} of {ranks}, beside {', '.join(sorted(set(names) - {name}))}"
                if len(names) > 1
                else ""
            )
            ordered.append(replace(step, why=step.why + beside, turn=number))
    return ordered
