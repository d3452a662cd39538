"""What a roster is made of: rules, slots, members, and what the driver is told to do."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from horovod_jobs.comm.member import Place


@dataclass(frozen=True)
class Rules:
    """How the job may grow, shrink and recover; see ``config.ElasticConfig``."""

    min_np: int
    max_np: int
    start_s: float
    wait_s: float
    lease_s: float
    return_s: float
    cooldown_s: float
    reset_limit: int


@dataclass(frozen=True, order=True)
class Slot:
    """A place for one rank on a host."""

    host: str
    index: int


class State(enum.Enum):
    """Of a member."""

    STARTING, READY, WORKING, DONE = range(4)


@dataclass
class Entry:
    """A member as the driver sees it."""

    member: str
    slot: Slot
    born: float
    heard: float
    since: float  # when it came into its state
    state: State = State.STARTING
    place: Place | None = None  # the last one it had

    def turn(self, state: State, now: float) -> None:
        """Change its state."""
        if state is not self.state:
            self.state, self.since = state, now


@dataclass
class Actions:
    """What the driver is to do now."""

    spawn: list[tuple[str, Slot]] = field(default_factory=list)
    kill: list[tuple[str, str]] = field(default_factory=list)  # member, why
    formed: bool = False
    end: tuple[int, str] | None = None  # exit code and, unless that is 0, the error
