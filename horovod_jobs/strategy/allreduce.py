"""All-reduce: every rank holds the whole model and sums gradients with the others (Sergeev & Del Balso 2018, arXiv:1802.05799).

How Horovod groups tensors decides how much of the exchange hides behind the backward pass, and no setting wins for every model.
``tune`` therefore tries a few in the first steps, in turn, and keeps the fastest.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, ClassVar

from horovod_jobs.errors import ConfigError
from horovod_jobs.strategy.base import Setting, StepTime, Updater

if TYPE_CHECKING:
    import torch

_CANDIDATES = (0, 1, 2, 4)  # Horovod's num_groups; 0 leaves the fusion to Horovod's cycle.
_ROUNDS = 4
_STEPS_A_TURN = 5
PROBE_STEPS = len(_CANDIDATES) * _ROUNDS * _STEPS_A_TURN


class Allreduce:
    """All-reduce by ``hvd.DistributedOptimizer``.

    Args:
        compression: ``none``, or ``fp16``: gradients are sent in half precision.
        tune: try several groupings in the first steps of a stage that is at least ten times as long, keep the fastest.
        num_groups: number of groups without tuning; 0 lets Horovod fuse what is ready at each cycle.
        fusion_mb: size of Horovod's fusion buffer in MiB; None for its default (128).
        cycle_time_ms: time between Horovod's cycles; None for its default (1 ms).

    Raises:
        ConfigError: a value that cannot be used.
    """

    TUNING: ClassVar[frozenset[str]] = frozenset({"tune", "num_groups", "fusion_mb", "cycle_time_ms"})

    def __init__(
        self,
        *,
        compression: str = "none",
        tune: bool = True,
        num_groups: int = 0,
        fusion_mb: float | None = None,
        cycle_time_ms: float | None = None,
    ) -> None:
        if compression not in ("none", "fp16"):
            raise ConfigError(f"strategy.compression={compression} is not known; use none or fp16")
        if num_groups < 0:
            raise ConfigError(f"strategy.num_groups={num_groups} is negative; use 0 or more")
        for name, value in (("fusion_mb", fusion_mb), ("cycle_time_ms", cycle_time_ms)):
            if value is not None and value < 0:
                raise ConfigError(f"strategy.{name}={value} is negative; use 0 or more, or null")
        self.compression, self.tune, self.num_groups = compression, tune, num_groups
        self.fusion_mb, self.cycle_time_ms = fusion_mb, cycle_time_ms

    def environment(self) -> dict[str, str]:
        """Variables that Horovod reads when it starts."""
        env = {}
        if self.fusion_mb is not None:
            env["HOROVOD_FUSION_THRESHOLD"] = str(int(self.fusion_mb * 1024 * 1024))
        if self.cycle_time_ms is not None:
            env["HOROVOD_CYCLE_TIME"] = str(self.cycle_time_ms)
        return env

    def bind(
        self,
        optimizer: torch.optim.Optimizer,
        named_parameters: Iterable[tuple[str, torch.nn.Parameter]],
        setting: Setting,
    ) -> AllreduceUpdater:
        """Collective. The updater of one stage."""
        return AllreduceUpdater(
            optimizer,
            list(named_parameters),
            setting,
            compression=self.compression,
            num_groups=self.num_groups,
            tune=self.tune and setting.world.size > 1 and setting.total_steps >= 10 * PROBE_STEPS,
        )


class AllreduceUpdater(Updater):
    """See ``strategy.base.Updater``."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        named_parameters: list[tuple[str, torch.nn.Parameter]],
        setting: Setting,
        *,
        compression: str,
        num_groups: int,
        tune: bool,
    ) -> None:
        super().__init__(optimizer, setting)
        self._compression = compression
        self._num_groups = num_groups
        self._tuned_by: dict[str, float] = {}  # num_groups -> median step in ms
        self._probe = _Probe() if tune else None
        if self._probe is not None:
            self._num_groups = self._probe.candidate
        self._exchange = self.world.distribute(
            optimizer,
            named_parameters,
            accumulate=setting.accumulate,
            compression=compression,
            num_groups=self._num_groups,
        )

    @property
    def tuning(self) -> bool:
        """Whether candidates are still being tried."""
        return self._probe is not None

    def zero_grad(self) -> None:
        self._exchange.zero_grad()

    def synchronize(self) -> None:
        """Collective. Afterwards ``.grad`` is the sum over ranks."""
        self._exchange.synchronize()

    def step(self) -> None:
        self.clip()
        self._exchange.step()

    def finish_step(self, spent: StepTime) -> None:
        """Collective while tuning. Note the step's time and move on to the next candidate when its turn is over."""
        if self._probe is None:
            return
        self._probe.note(spent.total_s)
        if self._probe.turn_is_over:
            self._probe.next_turn()
            if self._probe.done:
                # Clocks differ between ranks, so one rank decides for all.
                medians = self.world.broadcast_json(self._probe.medians_ms(), name="strategy.tuned")
                self._tuned_by = medians
                self._use(int(min(medians, key=medians.__getitem__)))
                self._probe = None
            else:
                self._use(self._probe.candidate)

    def _use(self, num_groups: int) -> None:
        self._num_groups = num_groups
        self._exchange.regroup(num_groups)

    def describe(self) -> dict[str, Any]:
        """The grouping in use, and the median steps it was chosen by."""
        return {
            "strategy": "allreduce",
            "compression": self._compression,
            "num_groups": self._num_groups,
            "tuned_step_ms_by_num_groups": self._tuned_by,
        }

    def state(self) -> dict[str, Any]:
        """The choice, once it is made; an unfinished probe starts again."""
        return {"num_groups": self._num_groups, "tuned_by": self._tuned_by} if self._tuned_by else {}

    def restore(self, state: dict[str, Any]) -> None:
        """Collective. Go on with the choice that was made."""
        if state and self._probe is not None:
            self._probe = None
            self._tuned_by = dict(state["tuned_by"])
            self._use(int(state["num_groups"]))

    def close(self) -> None:
        """Take Horovod's hooks off the parameters."""
        self._exchange.close()


class _Probe:
    """Candidates in turn, several rounds, so that a slow moment of the machine does not fall on one of them alone."""

    def __init__(self) -> None:
        self._turn = 0
        self._steps = 0
        self._seconds: dict[int, list[float]] = {candidate: [] for candidate in _CANDIDATES}

    @property
    def candidate(self) -> int:
        return _CANDIDATES[self._turn % len(_CANDIDATES)]

    @property
    def turn_is_over(self) -> bool:
        return self._steps == _STEPS_A_TURN

    @property
    def done(self) -> bool:
        return self._turn >= len(_CANDIDATES) * _ROUNDS

    def note(self, seconds: float) -> None:
        if self._steps > 0:  # The first step after a change also pays for the change.
            self._seconds[self.candidate].append(seconds)
        self._steps += 1

    def next_turn(self) -> None:
        self._turn, self._steps = self._turn + 1, 0

    def medians_ms(self) -> dict[str, float]:
        return {str(candidate): round(1000 * statistics.median(times), 4) for candidate, times in self._seconds.items()}
