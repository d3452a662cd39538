"""How workers that are not in lock step still act in the same step. Pure; the first server holds it."""

from __future__ import annotations

from collections.abc import Sequence

from horovod_jobs.strategy.parameter_server.protocol import FLAGS

Answer = tuple[int, list[float]]  # worker, flags


class Coordinator:
    """Every worker tells its flags in every step and waits for an answer. Raised flags are answered to all in one step.

    That step is later than any that has been answered, so no worker has passed it, and all see the same flags in it. A worker may
    say ``hold`` (the last step of an epoch, the same for all): then everybody is answered together, and nothing stays untold.
    """

    def __init__(self, workers: int) -> None:
        self._answered = [0] * workers  # the last step of each
        self._raised = [0.0] * FLAGS  # since the flags that are being told were fixed
        self._telling: list[float] | None = None
        self._step = 0  # in which they are told
        self._told = 0
        self._held: dict[int, list[float]] = {}

    def note(self, worker: int, *, step: int, hold: bool, flags: Sequence[float]) -> list[Answer]:
        """A worker's flags in a step; gives whom to answer now, and with what."""
        for kind, value in enumerate(flags):
            # A worker repeats what it wants until it is told: that is no new wish.
            if self._telling is None or not self._telling[kind]:
                self._raised[kind] += value
        if hold:
            self._held[worker] = []
            return self._release(step) if len(self._held) == len(self._answered) else []
        self._fix()
        self._answered[worker] = step
        if self._telling is None or step != self._step:
            return [(worker, [0.0] * FLAGS)]
        told = list(self._telling)
        self._told += 1
        if self._told == len(self._answered):
            self._telling = None
        return [(worker, told)]

    def _fix(self) -> None:
        if self._telling is None and any(self._raised):
            self._telling, self._raised = self._raised, [0.0] * FLAGS
            self._step, self._told = max(self._answered) + 1, 0

    def _release(self, step: int) -> list[Answer]:
        together = [one + other for one, other in zip(self._telling or [0.0] * FLAGS, self._raised, strict=True)]
        self._telling, self._raised, self._held = None, [0.0] * FLAGS, {}
        self._answered = [step] * len(self._answered)
        return [(worker, list(together)) for worker in range(len(self._answered))]
