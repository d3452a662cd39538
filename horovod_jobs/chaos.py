"""Faults on purpose: a job that is killed, stopped or broken at moments chosen by a seed, to see that it ends as if it had not been.

``chaos=kills launch=local launch.np=2 launch.restarts=10`` soaks a job; ``schedule`` says the moments one by one, for tests. Each fault is
written to ``<run.root>/chaos.jsonl`` before it strikes, and a job that is started again goes on with the next one.
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from horovod_jobs.comm.world import World
from horovod_jobs.console import Doing
from horovod_jobs.errors import ConfigError
from horovod_jobs.storage import pretend_full, storage_errors

LOG = "chaos.jsonl"
FAULTS = ("kill", "stop", "term", "hang", "exception", "disk")


@dataclass(frozen=True)
class Strike:
    """One fault: which rank, and after how many steps that it takes part in since the job was started, or at a stage's step."""

    fault: str
    rank: int
    steps: int
    stage: str | None = None

    def due(self, doing: Doing, *, steps: int) -> bool:
        label, done, _, _ = doing
        return steps >= self.steps if self.stage is None else label == self.stage and done >= self.steps


class Chaos:
    """What is to strike.

    Args:
        faults: of ``kill`` (SIGKILL), ``stop`` (SIGSTOP: the watchdog ends the job), ``term`` (SIGTERM: exit code 75), ``hang`` (a rank
            that works and never comes), ``exception`` and ``disk`` (no rank finds space to write in from there on: exit code 6); one
            is drawn each time.
        times: faults in all; then the job runs undisturbed.
        every_steps: mean number of steps from a start of the job to the next fault.
        seed: decides faults, ranks and moments.
        schedule: instead of drawing: a list of ``{fault, rank, step, stage}`` in the order in which they strike.

    Raises:
        ConfigError: an unknown fault, or a number that is too small.
    """

    def __init__(
        self,
        *,
        faults: Sequence[str] = ("kill",),
        times: int = 3,
        every_steps: int = 200,
        seed: int = 0,
        schedule: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        for fault in [*faults, *(str(entry.get("fault", "")) for entry in schedule)]:
            if fault not in FAULTS:
                raise ConfigError(f"chaos: fault {fault!r} is not known; use {', '.join(FAULTS)}")
        if times < 0 or every_steps < 1:
            raise ConfigError(f"chaos.times={times}, chaos.every_steps={every_steps}: use at least 0 and 1")
        self.faults, self.times, self.every_steps, self.seed = tuple(faults), times, every_steps, seed
        self.schedule = tuple(_strike(entry) for entry in schedule)

    def next_strike(self, *, number: int, ranks: int) -> Strike | None:
        """The fault of this number in a world of so many ranks; None where no more is to come."""
        if self.schedule:
            return self.schedule[number] if number < len(self.schedule) else None
        if number >= self.times or not self.faults:
            return None
        draw = random.Random(f"{self.seed}.{number}")
        return Strike(draw.choice(self.faults), draw.randrange(ranks), draw.randint(1, 2 * self.every_steps))


def _strike(entry: Mapping[str, Any]) -> Strike:
    unknown = set(entry) - {"fault", "rank", "step", "stage"}
    if unknown or not isinstance(entry.get("rank"), int) or not isinstance(entry.get("step"), int):
        raise ConfigError(
            f"chaos.schedule: {dict(entry)} is not a fault; give fault, rank, step and, where steps of one stage are meant, stage"
        )
    return Strike(str(entry["fault"]), int(entry["rank"]), int(entry["step"]), entry.get("stage"))


class Striker:
    """The next fault of a job that has been started; the console tells it of every step."""

    def __init__(self, chaos: Chaos, world: World, *, root: Path) -> None:
        """Collective."""
        self._world, self._path = world, root / LOG
        number = int(world.broadcast_json(len(strikes(self._path)) if world.is_main else None, name="chaos.number"))
        self._number = number
        self._strike = chaos.next_strike(number=number, ranks=world.size)
        self._steps = 0

    def __call__(self, doing: Doing) -> None:
        """A step was made; strike if the moment has come and this is the rank."""
        if self._strike is None or doing[0] is None:
            return
        self._steps += 1
        strike, chosen = self._strike, self._strike.rank == self._world.rank
        if not (chosen or strike.fault == "disk") or not strike.due(doing, steps=self._steps):
            return
        self._strike = None
        if chosen:
            self._tell(strike, doing)
        if strike.fault == "disk":
            pretend_full()
            return
        if strike.fault == "exception":
            raise RuntimeError(f"chaos: fault {self._number} strikes rank {self._world.rank}")
        if strike.fault == "hang":
            time.sleep(1e9)
        number = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "term": signal.SIGTERM}[strike.fault]
        os.kill(os.getpid(), number)

    def _tell(self, strike: Strike, doing: Doing) -> None:
        told = {"time": round(time.time(), 3), "number": self._number, "fault": strike.fault, "rank": self._world.rank,
                "host": socket.gethostname(), "pid": os.getpid(), "stage": doing[0], "step": doing[1]}  # fmt: skip
        with storage_errors("write", self._path), self._path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(told) + "\n")
            stream.flush()
            os.fsync(stream.fileno())


def strikes(path: Path) -> list[dict[str, Any]]:
    """The faults that have struck, from a log."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in lines if line.strip()]
