"""Local SGD: each rank makes ``period`` steps on its own gradients, then the ranks average their parameters.

Stich 2019, arXiv:1805.09767, algorithm 1. Post-local SGD (Lin et al. 2020, arXiv:1808.07217, section 3) sums gradients in every step
first and goes local later. Between two averagings nothing at all is exchanged: a stop, a checkpoint or a loss that is not finite is
agreed in the step that ends a period.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, ClassVar

from horovod_jobs.comm.world import GradientExchange, Handle, Traffic
from horovod_jobs.errors import ConfigError
from horovod_jobs.strategy.base import Setting, Updater

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_FLAGS = 4  # counts of ranks at the head of what the loop agrees on (see ``Updater.agree``)


class LocalSgd:
    """Local and post-local SGD.

    Args:
        period: steps between two averagings; the end of an epoch is one, too.
        start_step: steps at the start of the run in which gradients are summed over ranks (post-local SGD); 0: none.
        start_fraction: the same as a part of all steps, instead of ``start_step``.
        average_state: average the optimizer's state (momentum, say) as well. Yu et al. 2019, arXiv:1905.03817, do; Lin et al. 2020
            leave each rank its own momentum, which sends less.

    Raises:
        ConfigError: a value that cannot be used.
    """

    TUNING: ClassVar[frozenset[str]] = frozenset()
    exact = False  # The number of ranks changes the result, so it is in the artifact's fingerprint.

    def __init__(
        self,
        *,
        period: int = 8,
        start_step: int = 0,
        start_fraction: float | None = None,
        average_state: bool = False,
    ) -> None:
        if period < 1:
            raise ConfigError(f"strategy.period={period} is not a number of steps; use 1 or more")
        if start_step < 0:
            raise ConfigError(f"strategy.start_step={start_step} is negative; use 0 or more")
        if start_fraction is not None and not 0.0 <= start_fraction <= 1.0:
            raise ConfigError(
                f"strategy.start_fraction={start_fraction} is not a part of the run; use 0.5, say, or null"
            )
        if start_fraction is not None and start_step:
            raise ConfigError(
                f"strategy.start_fraction={start_fraction} and strategy.start_step={start_step} say the same; set one of them"
            )
        self.period, self.start_step, self.start_fraction = period, start_step, start_fraction
        self.average_state = average_state

    def environment(self) -> dict[str, str]:
        """Variables that Horovod reads when it starts: none."""
        return {}

    def bind(
        self,
        optimizer: torch.optim.Optimizer,
        named_parameters: Iterable[tuple[str, torch.nn.Parameter]],
        setting: Setting,
    ) -> LocalSgdUpdater:
        """Collective. The updater of one stage.

        Raises:
            ConfigError: the stage needs what ranks that go alone cannot give.
        """
        check_setting(setting)
        start = self.start_step
        if self.start_fraction is not None:
            start = round(self.start_fraction * setting.total_steps)
        return LocalSgdUpdater(
            optimizer,
            list(named_parameters),
            setting,
            period=self.period,
            start=start,
            average_state=self.average_state,
        )


def check_setting(setting: Setting) -> None:
    """Check that a stage's steps hold nothing that every rank must do together.

    Raises:
        ConfigError: they do; the message says what to set.
    """
    if setting.synced_batchnorm:
        raise ConfigError(
            "fit.sync_batchnorm=true: batch norm over all ranks exchanges in every step, and strategy=local_sgd exchanges only once a "
            "period; set fit.sync_batchnorm=false"
        )
    if setting.averages_weights:
        raise ConfigError(
            "fit.ema_decay is set: the average would follow each rank's own weights, which differ under strategy=local_sgd; set "
            "fit.ema_decay=null"
        )
    if setting.loss_scaled:
        raise ConfigError(
            "fit.precision=fp16 scales the loss by what all ranks saw in every step, and strategy=local_sgd exchanges only once a "
            "period; use fit.precision=bf16 or fp32"
        )


class LocalSgdUpdater(Updater):
    """See ``strategy.base.Updater``. A boundary is a step after which all ranks have the same parameters."""

    lockstep = False

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        named_parameters: list[tuple[str, torch.nn.Parameter]],
        setting: Setting,
        *,
        period: int,
        start: int,
        average_state: bool,
    ) -> None:
        super().__init__(optimizer, setting)
        self._parameters = [parameter for _, parameter in named_parameters if parameter.requires_grad]
        self._named = named_parameters
        self._gradient_bytes = sum(parameter.nbytes for parameter in self._parameters)
        self._period, self._start, self._average_state = period, start, average_state
        self._step, self._averaged_at = 0, 0
        self._averagings, self._traffic = 0, Traffic()
        self._exchange: GradientExchange | None = None
        self._join()

    def _join(self) -> None:
        """Collective. Sum gradients in every step up to ``start``."""
        if self._step < self._start and self._exchange is None:
            self._exchange = self.world.distribute(
                self.optimizer, self._named, accumulate=self.setting.accumulate, compression="none", num_groups=0
            )
        elif self._step >= self._start and self._exchange is not None:
            self._exchange.close()
            self._exchange = None

    @property
    def settled(self) -> bool:
        return self._averaged_at == self._step

    @property
    def _ends_period(self) -> bool:
        """Whether the step under way is a boundary. The same on every rank, as all count the same steps."""
        number = self._step + 1
        return (
            self._exchange is not None
            or number - self._averaged_at >= self._period
            # All must have agreed on flags before an epoch's end: a loss that is not finite would else be averaged into the result.
            or number % self.setting.steps_per_epoch == 0
            or number == self.setting.total_steps
        )

    def zero_grad(self) -> None:
        (self._exchange or self.optimizer).zero_grad()

    def agree(self, values: Tensor) -> Handle:
        """At a boundary ``[n]``: the flags summed over ranks; before it no flag is up. The sums are always this rank's own."""
        flags, own = values[:_FLAGS], values[_FLAGS:]
        if not self._ends_period:
            return _Agreed(None, flags, own)
        return _Agreed(self.world.sum_in_order_async(flags.contiguous(), name="fit.control"), flags, own)

    def synchronize(self) -> None:
        """Collective before ``start``. Afterwards ``.grad`` is the sum over ranks; later, ranks times what this rank adds to it.

        The loop divides by the global batch: so a rank's step is that of the mean over its own samples, and where a last batch is
        uneven the average of the ranks' gradients is still that of the whole batch.
        """
        import torch

        if self._exchange is not None:
            self._exchange.synchronize()
            self._traffic.take(self._exchange.traffic)
            return
        self._traffic.steps += 1
        for parameter in self._parameters:
            if parameter.grad is None:  # As Horovod does: or optimizer states would have other entries on other ranks.
                parameter.grad = torch.zeros_like(parameter)
        grads = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        torch._foreach_mul_(grads, float(self.world.size))

    def step(self) -> None:
        """Collective at a boundary."""
        boundary = self._ends_period
        self.clip()
        if self._exchange is not None:
            self._exchange.step()
            self._step += 1
            self._averaged_at = self._step
            self._join()
            return
        self.optimizer.step()
        self._step += 1
        if boundary:
            self._average()

    def settle(self) -> None:
        """Collective. Average now, unless the last step has."""
        if not self.settled:
            self._average()

    def _average(self) -> None:
        """Collective. Parameters, and the optimizer's state where asked for, become their mean over ranks."""
        import torch

        self._averaged_at = self._step
        self._averagings += 1
        if self.world.size == 1:
            return
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for tensor in [*self._parameters, *(self._own_state().values() if self._average_state else ())]:
            by_dtype.setdefault(tensor.dtype, []).append(tensor)
        with torch.no_grad():
            handles = {}
            for dtype, tensors in by_dtype.items():
                flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
                # bf16 travels as fp32.
                wire_bytes = flat.numel() * (4 if dtype is torch.bfloat16 else flat.element_size())
                self._traffic.count_allreduce(wire_bytes, ranks=self.world.size)
                handles[dtype] = self.world.allreduce_async(flat, name=f"strategy.local_sgd.{dtype}", op="average")
            for dtype, handle in handles.items():
                parts = handle.wait().split([tensor.numel() for tensor in by_dtype[dtype]])
                for tensor, part in zip(by_dtype[dtype], parts, strict=True):
                    tensor.copy_(part.view_as(tensor))

    def _own_state(self) -> dict[str, Tensor]:
        """What the optimizer keeps in tensors; scalars count steps and are equal on every rank anyway."""
        import torch

        found = {}
        for number, parameter in enumerate(self._parameters):
            for key, value in sorted(self.optimizer.state.get(parameter, {}).items()):
                if isinstance(value, torch.Tensor) and value.is_floating_point() and value.dim() > 0:
                    found[f"{number}.{key}"] = value
        return found

    def rank_state(self) -> dict[str, Tensor]:
        """Each rank's own optimizer state, where it is not averaged."""
        return {} if self._average_state or self.world.size == 1 else self._own_state()

    def restore_rank(self, states: list[dict[str, Tensor]]) -> None:
        """This rank's own optimizer state; a rank that is new goes on with rank 0's, which the checkpoint's common part has."""
        mine = self._own_state() if states else {}
        for key, value in (states[0] if states else {}).items():
            mine[key].copy_(value)

    def state(self) -> dict[str, Any]:
        return {"step": self._step, "averagings": self._averagings, "traffic": self._traffic.to_json()}

    def restore(self, state: dict[str, Any]) -> None:
        """Collective. Checkpoints are written at boundaries only."""
        if state:
            self._step = self._averaged_at = int(state["step"])
            self._averagings = int(state["averagings"])
            self._traffic.restore(state["traffic"])
            self._join()

    def describe(self) -> dict[str, Any]:
        """What was sent for gradients, parameters and optimizer state, against gradients in every step (``comm.world.Traffic``)."""
        return {
            "strategy": "local_sgd",
            "period": self._period,
            "allreduce_steps": min(self._start, self._step),
            "average_state": self._average_state,
            "averagings": self._averagings,
            **self._traffic.summary(uncompressed_bytes=self._gradient_bytes, ranks=self.world.size),
        }

    def close(self) -> None:
        """Take Horovod's hooks off the parameters, if they are still there."""
        if self._exchange is not None:
            self._exchange.close()


class _Agreed:
    """Flags that were exchanged, or none; with this rank's own sums."""

    def __init__(self, handle: Handle | None, flags: Tensor, own: Tensor) -> None:
        self._handle, self._flags, self._own = handle, flags, own

    def wait(self) -> Tensor:
        import torch

        flags = self._flags.new_zeros(_FLAGS) if self._handle is None else self._handle.wait()
        return torch.cat([flags, self._own])
