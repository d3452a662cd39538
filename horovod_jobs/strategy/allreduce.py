"""All-reduce: every rank holds the whole model and sums gradients with the others (Sergeev & Del Balso 2018, arXiv:1802.05799).

How Horovod groups tensors decides how much of the exchange hides behind the backward pass, and no setting wins for every model.
``tune`` therefore tries a few in the first steps, in turn, and keeps the fastest.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, ClassVar

from horovod_jobs.errors import ConfigError
from horovod_jobs.strategy.balance import Even, balancer, check_balance
from horovod_jobs.strategy.base import Setting, StepTime, Updater
from horovod_jobs.strategy.compression import chosen
from horovod_jobs.strategy.compression.base import Method
from horovod_jobs.strategy.hierarchical import in_levels
from horovod_jobs.strategy.probe import Probe

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from horovod_jobs.comm.world import GradientExchange
    from horovod_jobs.strategy.compression.exchange import MethodExchange

_CANDIDATES = (0, 1, 2, 4)  # Horovod's num_groups; 0 leaves the fusion to Horovod's cycle.
_ROUNDS = 4
_STEPS_A_TURN = 5
PROBE_STEPS = len(_CANDIDATES) * _ROUNDS * _STEPS_A_TURN


class Allreduce:
    """All-reduce by ``hvd.DistributedOptimizer``, or what else combines the ranks' gradients into one update.

    Args:
        compression: ``none``; ``fp16``: Horovod sends gradients in half precision; or a method of ``strategy.compression``, by name
            or as a node with its arguments. Those have an exchange of our own.
        op: ``sum`` (each gradient is divided by the global batch, so the sum is the mean over samples), or ``adasum``.
        predivide: gradients are divided by this before they are sent and their sum multiplied by it. The same result but for
            rounding; above 1 it keeps a sum within fp16's range, below 1 small gradients above its smallest number.
        tune: try several groupings in the first steps of a stage that is at least ten times as long, keep the fastest; with
            compression none or fp16 only, for nothing else is grouped.
        num_groups: number of groups without tuning; 0 lets Horovod fuse what is ready at each cycle.
        fusion_mb: size of Horovod's fusion buffer in MiB: larger tensors travel where they lie, without a copy; None for Horovod's
            default (128).
        cycle_time_ms: time between Horovod's cycles while nobody waits for a collective; None for 5 ms, or 1 ms with parallel stages.
        balance: ``none``, or ``throughput``: each rank's share of the global batch follows its measured speed.
        balance_every: steps between looks at the speeds.
        hierarchical: sum inside each host, then between the hosts' leaders, and hand out inside each host; the same result.
        parallel_stages: stages that may run side by side (``run.parallel_stages``): Horovod must be able to form process sets.

    Raises:
        ConfigError: a value that cannot be used.
    """

    TUNING: ClassVar[frozenset[str]] = frozenset(
        {
            "tune",
            "num_groups",
            "fusion_mb",
            "cycle_time_ms",
            "balance",
            "balance_every",
            "hierarchical",
            "parallel_stages",
        }
    )

    def __init__(
        self,
        *,
        compression: str | Method = "none",
        op: str = "sum",
        predivide: float = 1.0,
        tune: bool = True,
        num_groups: int = 0,
        fusion_mb: float | None = 4.0,
        cycle_time_ms: float | None = None,
        balance: str = "none",
        balance_every: int = 20,
        hierarchical: bool = False,
        parallel_stages: int = 1,
    ) -> None:
        self.hierarchical, self.parallel_stages = hierarchical, parallel_stages
        self.method = chosen(compression, op=op)
        if hierarchical:
            self.method = in_levels(self.method, compression=compression)
        self.compression = compression if isinstance(compression, str) else compression.name
        if predivide <= 0:
            raise ConfigError(f"strategy.predivide={predivide} is not positive; use 1 for none")
        if predivide != 1 and self.method is not None:
            raise ConfigError(
                f"strategy.predivide={predivide} is for sums by Horovod, and {self.method.name} is combined in another way; use 1, "
                "or strategy.compression none or fp16 with strategy.op=sum"
            )
        if num_groups < 0:
            raise ConfigError(f"strategy.num_groups={num_groups} is negative; use 0 or more")
        for name, value in (("fusion_mb", fusion_mb), ("cycle_time_ms", cycle_time_ms)):
            if value is not None and value < 0:
                raise ConfigError(f"strategy.{name}={value} is negative; use 0 or more, or null")
        self.op, self.predivide, self.tune, self.num_groups = op, predivide, tune, num_groups
        self.fusion_mb, self.cycle_time_ms = fusion_mb, cycle_time_ms
        check_balance(balance, every=balance_every)
        self.balance, self.balance_every = balance, balance_every

    @property
    def exact(self) -> bool:
        """Whether the update is the same, to rounding, for every number of ranks."""
        return self.method is None or self.method.exact

    @property
    def whole_world(self) -> bool:
        """Whether a stage cannot run beside another on a part of the ranks: process sets are formed by all ranks together."""
        return self.hierarchical

    def environment(self) -> dict[str, str]:
        """Variables that Horovod reads when it starts."""
        env = {}
        if self.parallel_stages > 1 or self.hierarchical:
            env["HOROVOD_DYNAMIC_PROCESS_SETS"] = "1"
        if self.fusion_mb is not None:
            env["HOROVOD_FUSION_THRESHOLD"] = str(int(self.fusion_mb * 1024 * 1024))
        if self.cycle_time_ms is not None:
            env["HOROVOD_CYCLE_TIME"] = str(self.cycle_time_ms)
        elif self.parallel_stages > 1:
            # Ranks that compute are in every cycle of those that wait beside them for a stage of their own.
            env["HOROVOD_CYCLE_TIME"] = "1.0"
        return env

    def bind(
        self,
        optimizer: torch.optim.Optimizer,
        named_parameters: Iterable[tuple[str, torch.nn.Parameter]],
        setting: Setting,
    ) -> AllreduceUpdater:
        """Collective. The updater of one stage.

        Raises:
            ConfigError: the method cannot serve this stage, or not in this world.
        """
        if self.op == "adasum":
            from horovod_jobs.strategy.adasum import check_world

            check_world(setting.world)
        long = setting.total_steps >= 10 * PROBE_STEPS
        return AllreduceUpdater(
            optimizer,
            list(named_parameters),
            setting,
            compression=self.compression,
            op=self.op,
            method=self.method,
            num_groups=self.num_groups,
            predivide=self.predivide,
            tune=self.tune and setting.world.size > 1 and long and self.method is None,
            balancer=balancer(
                self.balance, every=self.balance_every, world=setting.world, accumulate=setting.accumulate
            ),
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
        op: str,
        method: Method | None,
        num_groups: int,
        predivide: float,
        tune: bool,
        balancer: Even,
    ) -> None:
        super().__init__(optimizer, setting)
        self._balancer, self.reshare_every = balancer, balancer.every
        self._compression, self._op = compression, op
        self._gradient_bytes = sum(parameter.nbytes for _, parameter in named_parameters if parameter.requires_grad)
        self._num_groups = num_groups
        self._tuned_by: dict[str, float] = {}  # num_groups -> median step in ms
        self._probe = Probe(_CANDIDATES, rounds=_ROUNDS, steps_a_turn=_STEPS_A_TURN) if tune else None
        if self._probe is not None:
            self._num_groups = self._probe.candidate
        self._own: MethodExchange | None = None
        self._exchange: GradientExchange
        if method is not None:
            from horovod_jobs.strategy.compression.exchange import MethodExchange

            self._exchange = self._own = MethodExchange(optimizer, named_parameters, setting, method)
        else:
            self._exchange = self.world.distribute(
                optimizer,
                named_parameters,
                accumulate=setting.accumulate,
                compression=compression,
                num_groups=self._num_groups,
                predivide=predivide,
            )

    @property
    def tuning(self) -> bool:
        """Whether candidates are still being tried."""
        return self._probe is not None

    @property
    def shares(self) -> tuple[float, ...] | None:
        return self._balancer.shares

    def reshare(self) -> None:
        """Collective. Let the shares follow the speeds that were measured since the last time."""
        self._balancer.reshare()

    def zero_grad(self) -> None:
        self._exchange.zero_grad()

    def synchronize(self) -> None:
        """Collective. Afterwards ``.grad`` is what the ranks have combined, the same on all of them."""
        self._exchange.synchronize()

    def step(self) -> None:
        if self._own is None or not self._own.clips_itself:
            self.clip()
        self._exchange.step()

    def finish_step(self, spent: StepTime) -> None:
        """Collective while tuning. Note the step's time and move on to the next candidate when its turn is over."""
        self._balancer.note(spent)
        if self._probe is None:
            return
        if any(p.grad is not None and p.grad.is_sparse for group in self.param_groups for p in group["params"]):
            self._probe = None  # Sparse gradients travel by themselves, so there is no grouping to choose.
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
        """What was sent and how: see docs/compression.md. The grouping in use, and the median steps it was chosen by."""
        return {
            "strategy": "allreduce",
            "op": self._op,
            "compression": self._compression,
            **({"method": self._own.describe()} if self._own is not None else {}),
            **self._exchange.traffic.summary(uncompressed_bytes=self._gradient_bytes, ranks=self.world.size),
            "num_groups": self._num_groups,
            "tuned_step_ms_by_num_groups": self._tuned_by,
            "balance": self._balancer.describe(),
        }

    def state(self) -> dict[str, Any]:
        """The choice, once it is made; an unfinished probe starts again."""
        tuned = {"num_groups": self._num_groups, "tuned_by": self._tuned_by} if self._tuned_by else {}
        return {**tuned, "balance": self._balancer.state(), "traffic": self._exchange.traffic.to_json()}

    def restore(self, state: dict[str, Any]) -> None:
        """Collective. Go on with the choice that was made, and with the shares."""
        self._balancer.restore(state.get("balance", {}))
        self._exchange.traffic.restore(state.get("traffic", {}))
        if "tuned_by" in state and self._probe is not None:
            self._probe = None
            self._tuned_by = dict(state["tuned_by"])
            self._use(int(state["num_groups"]))

    def rank_state(self) -> dict[str, Tensor]:
        """What this rank has not sent yet."""
        return {} if self._own is None else self._own.rank_state()

    def restore_rank(self, states: list[dict[str, Tensor]]) -> None:
        """Collective. Of several ranks, the sum: what they owe stays owed."""
        if self._own is not None:
            self._own.restore_rank(states)

    def close(self) -> None:
        """Take the hooks off the parameters."""
        self._exchange.close()
