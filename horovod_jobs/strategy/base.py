"""What a strategy is: it binds an optimizer to a world and gives the loop an ``Updater``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from horovod_jobs.comm.world import World

if TYPE_CHECKING:
    import torch


class Updater(Protocol):
    """What the loop does with local gradients. Each backward pass is already divided by the global batch: they add up."""

    param_groups: list[dict[str, Any]]

    def zero_grad(self) -> None: ...

    def synchronize(self) -> None:
        """Collective. Afterwards ``.grad`` is the gradient over the global batch."""

    def step(self) -> None:
        """Update the parameters."""

    def finish_step(self, seconds: float) -> None:
        """Collective. Told how long the step took; a strategy may tune itself."""

    def describe(self) -> dict[str, Any]:
        """What was chosen, for the artifact's record."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps (JSON)."""

    def restore(self, state: dict[str, Any]) -> None:
        """Collective. Take a checkpoint's state back."""

    def close(self) -> None:
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
        *,
        world: World,
        accumulate: int,
        total_steps: int,
    ) -> Updater:
        """Collective."""
