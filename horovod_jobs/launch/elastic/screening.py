"""Only hosts that can run the job: each one that is named is looked at before ranks start there, when the job begins and later."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Sequence

from horovod_jobs.errors import SetupError
from horovod_jobs.launch.elastic.discovery import Discovery
from horovod_jobs.launch.elastic.spawn import HERE
from horovod_jobs.launch.hosts.judging import Finding

AGAIN_S = 16.0
_SOON_S = 2.0  # A host that has only just started may be a moment late with its ssh.
# Gloo's ranks connect by address: a host that does not know the others' names can still work with them.
_UNNEEDED = ("name",)


def name_for_others(host: str) -> str:
    """``localhost`` is another host for each of them."""
    return socket.gethostname() if host in HERE else host


class Screened:
    """A discovery without the hosts that cannot run the job. The first look is waited for; later ones go on beside the job.

    Args:
        found: which hosts there are.
        look: what is found at hosts, of which the first is held to be as it should be (``checks.look_at``).
        fault: told a host that is left out, and why, whenever that is news.
        alone: nobody else will ever be named, so that a job with no host at all need not wait.
        again_s: time between two looks at a host that is left out; the first ones follow each other sooner.
    """

    def __init__(
        self,
        found: Discovery,
        *,
        look: Callable[[Sequence[str]], list[Finding]],
        fault: Callable[[str, str], None],
        alone: bool,
        again_s: float = AGAIN_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._found, self._look, self._fault, self._alone = found, look, fault, alone
        self._again_s, self._clock = again_s, clock
        self._good: list[str] = []
        self._bad: dict[
            str, tuple[str, float, float]
        ] = {}  # host -> its fault, when to look again, and after what pause
        self._silent: set[str] = set()  # good ones that did not answer the last look: no measure for others
        self._looking: threading.Thread | None = None
        self._began = False
        self._lock = threading.Lock()

    def find(self) -> dict[str, int]:
        """The hosts that can work.

        Raises:
            SetupError: it cannot be found out, or none of the hosts that will ever be there can work.
        """
        hosts = self._found.find()
        with self._lock:
            self._forget(hosts)
            now = self._clock()
            due = [host for host in hosts if host not in self._good and self._bad.get(host, ("", now, 0))[1] <= now]
        if due and not self._began:
            self._examine(due)
            self._began = True
            if self._alone and not self._good:
                more = f" (none of the {len(due)} hosts can be used, see above)" if len(due) > 1 else ""
                raise SetupError(f"host {due[0]}: {self._bad[due[0]][0]}{more}")
        elif due and (self._looking is None or not self._looking.is_alive()):
            self._looking = threading.Thread(target=self._examine, args=(due,), name="elastic.screening", daemon=True)
            self._looking.start()
        with self._lock:
            return {host: count for host, count in hosts.items() if host in self._good}

    def wait(self) -> None:
        """Until no look is under way."""
        if self._looking is not None:
            self._looking.join()

    def _forget(self, hosts: dict[str, int]) -> None:
        """A host that has gone may come back as another one."""
        self._good = [host for host in self._good if host in hosts]
        self._bad = {host: entry for host, entry in self._bad.items() if host in hosts}
        self._silent.intersection_update(self._good)

    def _look_over(self, names: Sequence[str]) -> list[Finding]:
        """What is found, by one that answers: the others must see what the first one writes."""
        known: list[Finding] = []
        while True:
            try:
                findings = self._look(names)
            except SetupError as error:  # ssh itself is not there.
                findings = [Finding(name, "ssh", "was not asked", str(error)) for name in names]
            silent = {one.host for one in findings if one.what == "ssh" and one.remedy}
            if names[0] not in silent or silent.issuperset(names):
                return known + findings
            known += [one for one in findings if one.host in silent]
            names = [name for name in names if name not in silent]

    def _examine(self, due: Sequence[str]) -> None:
        with self._lock:
            measure = [host for host in self._good if host not in self._silent][:1]
        names = {name_for_others(host): host for host in (*measure, *due)}
        bad = [one for one in self._look_over(list(names)) if one.remedy and one.what not in _UNNEEDED]
        with self._lock:
            for name, host in names.items():
                own = [one for one in bad if one.host == name]
                if host in measure:
                    self._silent.update({host} if any(one.what == "ssh" for one in own) else ())
                elif own:
                    self._leave_out(host, "; ".join(f"{one.what}: {one.value}; {one.remedy}" for one in own))
                else:
                    self._good.append(host)
                    self._bad.pop(host, None)

    def _leave_out(self, host: str, why: str) -> None:
        before, _, pause_s = self._bad.get(host, ("", 0.0, 0.0))
        pause_s = min(self._again_s, max(_SOON_S, 2 * pause_s))
        self._bad[host] = (why, self._clock() + pause_s, pause_s)
        if why != before:
            self._fault(host, why)
