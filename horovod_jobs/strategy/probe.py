"""Which of a few settings is the fastest, tried in the first steps of a stage."""

from __future__ import annotations

import statistics
from collections.abc import Sequence


class Probe:
    """Candidates in turn, several rounds, so that a slow moment of the machine does not fall on one of them alone."""

    def __init__(self, candidates: Sequence[int], *, rounds: int, steps_a_turn: int) -> None:
        self._candidates, self._rounds, self._steps_a_turn = candidates, rounds, steps_a_turn
        self._turn = 0
        self._steps = 0
        self._seconds: dict[int, list[float]] = {candidate: [] for candidate in candidates}

    @property
    def candidate(self) -> int:
        """The one whose turn it is."""
        return self._candidates[self._turn % len(self._candidates)]

    @property
    def turn_is_over(self) -> bool:
        return self._steps == self._steps_a_turn

    @property
    def done(self) -> bool:
        return self._turn >= len(self._candidates) * self._rounds

    def note(self, seconds: float) -> None:
        """A step of the candidate's turn took so long."""
        if self._steps > 0:  # The first step after a change also pays for the change.
            self._seconds[self.candidate].append(seconds)
        self._steps += 1

    def next_turn(self) -> None:
        """Go on to the next candidate."""
        self._turn, self._steps = self._turn + 1, 0

    def medians_ms(self) -> dict[str, float]:
        """Median step of each candidate."""
        return {str(candidate): round(1000 * statistics.median(times), 4) for candidate, times in self._seconds.items()}
