"""What a strategy is: it binds an optimizer to a world and gives the loop an ``Updater``.

A new way to combine gradients is a class with ``environment`` and ``bind``, named by ``strategy._target_``, and an ``Updater``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from horovod_jobs.comm.world import Handle, World

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class Setting:
    """What a strategy may know of the training stage it serves."""

    world: World
    accumulate: int = 1  # backward passes an update
    total_steps: int = 1
    steps_per_epoch: int = 1
    clip_norm: float | None = None  # largest global L2 norm of the gradient
    loss_scaled: bool = False  # fp16: gradients are scaled until the loop unscales them
    synced_batchnorm: bool = False  # forward passes hold collectives, so every rank must make every step
    averages_weights: bool = False  # an EMA follows the weights after every step
    first_step: int = 0  # updates made before this stage was cut off
    model: torch.nn.Module | None = (
        None  # called once a backward pass; parts may get their parameters when they are called
    )


@dataclass(frozen=True)
class StepTime:
    """Where this rank's time of a step went."""

    total_s: float
    compute_s: float  # without data, exchange and waiting for others
    samples: int  # of this rank


class Updater(ABC):
    """What the loop does with local gradients. Each backward pass is already divided by the global batch: they add up.

    In a step the loop calls ``zero_grad``, backward passes, ``agree``, ``synchronize``, ``step``, ``finish_step``.
    """

    lockstep: bool = True
    """All ranks make the same update in the same step. Where not, ``agree`` gives this rank's own sums."""

    reshare_every: int | None = None
    """Steps after which ``reshare`` may change ``shares``; None: never."""

    def __init__(self, optimizer: torch.optim.Optimizer, setting: Setting) -> None:
        self.optimizer, self.setting = optimizer, setting
        self.world = setting.world

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    @property
    def shares(self) -> tuple[float, ...] | None:
        """How a global batch is divided over ranks, adding up to 1; None: evenly."""
        return None

    @property
    def settled(self) -> bool:
        """Whether this step left the same parameters and optimizer state on every rank: only then is a checkpoint taken."""
        return True

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()

    @property
    def lost(self) -> list[dict[str, Any]]:
        """Rank and host of ranks that have died in this stage and without which the others went on."""
        return []

    @property
    def exchange_s(self) -> float:
        """Seconds so far that forward and backward passes and ``step`` spent exchanging: handing gradients over, waiting for parameters."""
        return 0.0

    def agree(self, values: Tensor) -> Handle:
        """Start the loop's one small exchange of a step; ``wait()`` gives ``[n]`` sums over the ranks that make this step together.

        The first four are counts of ranks: whose loss is not finite, that were asked to stop, that got Ctrl-C, that want a checkpoint.
        """
        return self.world.sum_in_order_async(values, name="fit.control")

    @abstractmethod
    def synchronize(self) -> None:
        """Collective where ``lockstep``. Afterwards ``.grad`` is what ``step`` works with: it can be unscaled."""

    def step(self) -> None:
        """Clip to ``setting.clip_norm`` and update the parameters."""
        self.clip()
        self.optimizer.step()

    def clip(self) -> None:
        """Scale the gradient down to ``setting.clip_norm``, if it is longer."""
        if self.setting.clip_norm is not None:
            import torch

            parameters = [parameter for group in self.param_groups for parameter in group["params"]]
            torch.nn.utils.clip_grad_norm_(parameters, self.setting.clip_norm)

    def finish_step(self, spent: StepTime) -> None:  # noqa: B027  Most have nothing to learn from it.
        """Collective where ``lockstep``. Told where the step's time went; a strategy may tune itself."""

    def reshare(self) -> None:  # noqa: B027
        """Collective. Called every ``reshare_every`` steps, and only then may ``shares`` change."""

    def settle(self) -> None:  # noqa: B027
        """Collective. Make parameters and optimizer state the same on every rank: before validation, checkpoints and the end."""

    def optimizer_state(self) -> dict[str, Any]:
        """Collective. The optimizer's state as torch writes it, whoever holds it, for a checkpoint that any strategy can read."""
        state: dict[str, Any] = self.optimizer.state_dict()
        return state

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of the strategy itself (JSON)."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:  # noqa: B027
        """Collective. Take a checkpoint's ``state`` back; empty where there is none."""

    def rank_state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps of each rank alone: what an error feedback still owes, say."""
        return {}

    def restore_rank(self, states: list[dict[str, Tensor]]) -> None:  # noqa: B027
        """Collective. Take ``rank_state`` back: this rank's own, in a smaller world also those of ranks that are gone; maybe none."""

    def describe(self) -> dict[str, Any]:
        """What was chosen and seen, for the artifact's record and the report (JSON)."""
        return {}

    def close(self) -> None:  # noqa: B027
        """Let go of the parameters."""


class Strategy(Protocol):
    """Named by ``strategy._target_``. ``TUNING`` lists the arguments that change the speed and not the result."""

    TUNING: ClassVar[frozenset[str]]

    def environment(self) -> dict[str, str]:
        """Variables that Horovod reads when it starts."""

    def bind(
        self,
        optimizer: torch.optim.Optimizer,
        named_parameters: Iterable[tuple[str, torch.nn.Parameter]],
        setting: Setting,
    ) -> Updater:
        """Collective.

        Raises:
            ConfigError: this strategy cannot serve such a stage.
        """
