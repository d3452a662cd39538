"""A rank of an elastic job: it runs the job in one world after another until the job is done, or its place is."""

from __future__ import annotations

import gc
from collections.abc import Callable
from types import FrameType
from typing import TypeVar

from horovod_jobs.comm.connect import world_lost
from horovod_jobs.comm.elastic import Rounds, warm_up
from horovod_jobs.comm.member import Member
from horovod_jobs.comm.world import World
from horovod_jobs.errors import Interrupted, JobError, WorldError
from horovod_jobs.interrupt import StopRequest

T = TypeVar("T")


class MemberStop(StopRequest):
    """A stop that the driver may ask for as well; ``signalled`` says that this process itself got a signal."""

    def __init__(self) -> None:
        super().__init__()
        self.signalled = False

    def ask(self, code: int) -> None:
        """The driver's word."""
        self.code = max(self.code, code)

    def begin(self) -> None:
        """A new world: what formed it has been done."""
        if not self.signalled:
            self.code = 0

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signalled = True
        super()._note(number, frame)


class Verdict:
    """Asked by the run when it fails: whether it goes on in another world, so that nothing is written about its end."""

    def __init__(self, member: Member, stop: MemberStop) -> None:
        self._member, self._stop = member, stop
        self.asked = self.goes_on = False

    def __call__(self, error: BaseException) -> bool:
        self.asked = True
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        if isinstance(error, WorldError) or world_lost(error) is not None:
            self.goes_on = self._member.report("lost", code=WorldError.exit_code, text=text)
        elif isinstance(error, Interrupted):
            self.goes_on = self._member.report("stopped", code=error.exit_code, signalled=self._stop.signalled)
        else:
            self._member.report("failed", code=error.exit_code if isinstance(error, JobError) else 1, text=text)
        return self.goes_on


def run_rounds(member: Member, body: Callable[[World, MemberStop, Verdict], T]) -> T | None:
    """Run ``body`` in every world that this member gets a place in; gives what the last one gave, None for one whose place is gone."""
    rounds = Rounds(member)
    stop = MemberStop()
    with stop.installed():
        member.start(asked=stop.ask)
        warm_up()
        while (world := rounds.enter()) is not None:
            stop.begin()
            verdict = Verdict(member, stop)
            try:
                outcome = body(world, stop, verdict)
            except BaseException as error:
                if not (verdict.goes_on if verdict.asked else verdict(error)):
                    raise
            else:
                member.report("done", code=0)
                return outcome
            rounds.leave()
            gc.collect()  # The failed run's model and hooks refer to each other; nothing of them may outlive its world for long.
    return None
