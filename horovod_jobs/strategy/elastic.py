"""All-reduce in a world that grows, shrinks and loses ranks while it trains (docs/elastic.md).

The global batches of an epoch do not depend on the number of ranks, so a world that ends is followed by another one at the same place:
at the newest commit that any of its ranks has kept in memory, or at the last checkpoint on disk.
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from horovod_jobs.comm.member import Kept, current
from horovod_jobs.comm.world import World
from horovod_jobs.errors import ConfigError
from horovod_jobs.strategy.allreduce import Allreduce, AllreduceUpdater
from horovod_jobs.strategy.base import Setting
from horovod_jobs.strategy.compression.base import Method

if TYPE_CHECKING:
    import torch

    from horovod_jobs.config import FitConfig

Loaded = tuple[dict[str, Any], list[dict[str, Any]]]  # what all ranks have in common, and what this one has of its own


class Elastic:
    """All-reduce that commits.

    Args:
        commit_every_steps: steps between two commits into memory: how much is computed again after a loss. A planned change of the
            world loses nothing.
        keep_micro_batch: with fewer ranks than ``ranks``, accumulate over more backward passes, so that one never sees more samples
            than it did at the start; with more ranks over fewer.
        batch: ``fixed``: the global batch stays; ``follow``: each rank's part of it does, so that the global batch follows the number of
            ranks, and with ``fit.lr_reference_batch`` the learning rate follows the batch.
        ranks: the number of ranks that ``fit.global_batch`` is meant for.
        compression, fusion_mb, cycle_time_ms: as for all-reduce.

    Raises:
        ConfigError: a value that cannot be used.
    """

    TUNING: ClassVar[frozenset[str]] = frozenset({"commit_every_steps", "ranks", "fusion_mb", "cycle_time_ms"})
    elastic = True

    def __init__(
        self,
        *,
        commit_every_steps: int = 10,
        keep_micro_batch: bool = True,
        batch: str = "fixed",
        ranks: int = 1,
        compression: str | Method = "none",
        fusion_mb: float | None = 4.0,
        cycle_time_ms: float | None = None,
    ) -> None:
        if commit_every_steps < 1:
            raise ConfigError(
                f"strategy.commit_every_steps={commit_every_steps} is not a number of steps; use 1 or more"
            )
        if batch not in ("fixed", "follow"):
            raise ConfigError(f"strategy.batch={batch} is not known; use fixed or follow")
        self.commit_every_steps, self.keep_micro_batch = commit_every_steps, keep_micro_batch
        self.batch, self.ranks = batch, ranks
        # Not tuned: the choice of one world would be a guess in the next.
        self._inner = Allreduce(compression=compression, fusion_mb=fusion_mb, cycle_time_ms=cycle_time_ms, tune=False)
        if not self._inner.exact:
            raise ConfigError(
                f"strategy.compression={self._inner.compression} keeps a part of each gradient on its rank, which is lost with it; "
                "use none, fp16 or bf16 with strategy=elastic"
            )

    @property
    def exact(self) -> bool:
        """The number of ranks is no part of the artifact's fingerprint: it changes while the artifact is made."""
        return True

    @property
    def whole_world(self) -> bool:
        """A stage on a part of the ranks could not be joined by others."""
        return True

    def environment(self) -> dict[str, str]:
        """Variables that Horovod reads when it starts."""
        return self._inner.environment()

    def adjust(self, fit: FitConfig, *, global_batch: int, size: int) -> Adjusted:
        """The batch, and backward passes an update, in a world of ``size`` ranks.

        Raises:
            ConfigError: what is in the artifact's fingerprint would change with the number of ranks.
        """
        ranks = max(1, self.ranks)
        for wrong, remedy in (
            (fit.batch_per_rank is not None, f"fit.batch_per_rank={fit.batch_per_rank}; use fit.global_batch"),
            (not fit.sync_batchnorm, "fit.sync_batchnorm=false; use true, or a model without batch norm"),
            (
                fit.accumulate > 1,
                f"fit.accumulate={fit.accumulate}; use 1, and strategy.ranks={fit.accumulate * ranks}",
            ),
        ):
            if wrong:
                raise ConfigError(
                    f"strategy=elastic must make the same artifact in every world, which it does not with {remedy}"
                )
        if current() is None:  # No driver: the world stays as it is.
            return Adjusted(global_batch, 1)
        if self.batch == "follow":
            return Adjusted(max(1, round(global_batch * size / ranks)), 1)
        return Adjusted(global_batch, passes(ranks=ranks, size=size) if self.keep_micro_batch else 1)

    def bind(
        self,
        optimizer: torch.optim.Optimizer,
        named_parameters: Iterable[tuple[str, torch.nn.Parameter]],
        setting: Setting,
    ) -> AllreduceUpdater:
        """Collective. The updater of one stage in one world."""
        return self._inner.bind(optimizer, named_parameters, setting)


@dataclass(frozen=True)
class Adjusted:
    """What depends on the number of ranks: samples an update over all ranks, and backward passes an update."""

    global_batch: int
    accumulate: int


def passes(*, ranks: int, size: int) -> int:
    """Backward passes of ``size`` ranks such that none sees more samples than one of ``ranks`` ranks would."""
    return max(1, -(-ranks // size))


class Commits:
    """A stage's commits in the memory of its ranks: each keeps the newest that it has made. ``None`` where nobody restores them."""

    def __init__(self, identity: str, *, every_steps: int, kept: dict[str, Kept]) -> None:
        self._identity, self._every_steps, self._kept = identity, every_steps, kept

    def due(self, step: int) -> bool:
        """Whether a commit follows this step."""
        return step % self._every_steps == 0

    def keep(self, state: dict[str, Any], *, step: int) -> None:
        """Keep a copy: what trains on must not change it. An earlier stage's commit goes."""
        import torch

        buffer = io.BytesIO()
        torch.save(state, buffer)
        self._kept.clear()
        self._kept[self._identity] = Kept(self._identity, step, buffer.getvalue())

    def newer(self, saved: Loaded | None, world: World) -> Loaded | None:
        """Collective. The newest commit that any rank has, where it is newer than the checkpoint ``saved``; else that."""
        mine = self._kept.get(self._identity)
        found = choose(world.gather_json(mine.step if mine is not None else None, name="elastic.commits"))
        if found is None or (saved is not None and int(saved[0]["fit"]["step"]) >= found[0]):
            return saved
        return self._share(world, root=found[1]), []

    def _share(self, world: World, *, root: int) -> dict[str, Any]:
        """Collective. The commit of rank ``root``, on every rank."""
        import torch

        mine = self._kept.get(self._identity)
        data = mine.data if mine is not None and world.rank == root else b""
        size = world.gather_json(len(data), name="elastic.commit.size")[root]
        sent = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(size, dtype=torch.uint8)
        received = world.broadcast(sent, name="elastic.commit.bytes", root=root).numpy().tobytes()
        state: dict[str, Any] = torch.load(io.BytesIO(received), map_location="cpu", weights_only=True)
        return state


def choose(steps: list[int | None]) -> tuple[int, int] | None:
    """The largest step and the first rank that has it; None where nobody has one.

    A rank commits only what all ranks of its world have computed, so any commit is one of the same course of training, and the
    newest loses least.
    """
    known = [(step, -rank) for rank, step in enumerate(steps) if step is not None]
    if not known:
        return None
    step, rank = max(known)
    return step, -rank


def commits_of(strategy: Any, *, identity: str) -> Commits | None:
    """Where a stage commits to: nowhere, unless the strategy is elastic and a driver will start a next world."""
    member = current()
    if not isinstance(strategy, Elastic) or member is None:
        return None
    return Commits(identity, every_steps=strategy.commit_every_steps, kept=member.commits)
