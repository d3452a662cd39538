"""How workers that are not in lock step still act in the same step. Pure; the first server holds it."""

from __future__ import annotations

from collections.abc import Sequence

from horovod_jobs.strategy.parameter_server.protocol import FLAGS

Answer = tuple[int, list[float]]  # worker, flags and from which step on each worker is gone (0: it is there)


class Coordinator:
    """Every worker tells its flags in every step and waits for an answer. Raised flags are answered to all in one step.

    That step is later than any that has been answered, so no worker has passed it, and all see the same flags in it. A worker may
    say ``hold`` (the last step of an epoch, the same for all): then everybody is answered together, and nothing stays untold.
    """

    def __init__(self, workers: int) -> None:
        self._answered = dict.fromkeys(range(workers), 0)  # the last step of each that is there
        self._gone_from = [0.0] * workers
        self._raised = [0.0] * FLAGS  # since the flags that are being told were fixed
        self._telling: list[float] | None = None
        self._step = 0  # in which they are told
        self._told: set[int] = set()
        self._held: dict[int, int] = {}  # worker -> step

    def note(self, worker: int, *, step: int, hold: bool, flags: Sequence[float]) -> list[Answer]:
        """A worker's flags in a step; gives whom to answer now, and with what."""
        for kind, value in enumerate(flags):
            # A worker repeats what it wants until it is told: that is no new wish.
            if self._telling is None or not self._telling[kind]:
                self._raised[kind] += value
        if hold:
            self._held[worker] = step
            return self._release_if_all()
        self._fix()
        self._answered[worker] = step
        if self._telling is None or step != self._step:
            return [self._answer(worker, [0.0] * FLAGS)]
        told = list(self._telling)
        self._told.add(worker)
        self._forget_if_told()
        return [self._answer(worker, told)]

    def drop(self, worker: int) -> tuple[int, int, list[Answer]]:
        """A worker has died. Its last step, the step from which the others divide its samples, and whom to answer now.

        Everybody is told before that step: who has been answered in step t hears of it in step t + 1, and makes t + 2 by it.
        """
        last = max(self._answered.pop(worker), self._held.pop(worker, 0))
        step = max(self._answered.values(), default=last) + 2
        self._gone_from[worker] = float(step)
        self._forget_if_told()
        return last, step, self._release_if_all()

    def _answer(self, worker: int, flags: list[float]) -> Answer:
        return worker, flags + self._gone_from

    def _fix(self) -> None:
        if self._telling is None and any(self._raised):
            self._telling, self._raised = self._raised, [0.0] * FLAGS
            self._step, self._told = max(self._answered.values()) + 1, set()

    def _forget_if_told(self) -> None:
        if self._told >= self._answered.keys():
            self._telling = None

    def _release_if_all(self) -> list[Answer]:
        if not self._held or len(self._held) < len(self._answered):
            return []
        together = [one + other for one, other in zip(self._telling or [0.0] * FLAGS, self._raised, strict=True)]
        self._answered = dict(self._held)
        self._telling, self._raised, self._held = None, [0.0] * FLAGS, {}
        return [self._answer(worker, list(together)) for worker in sorted(self._answered)]
