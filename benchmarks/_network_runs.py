"""The runs of ``network``, their bounds, and how they are shown. Nothing here starts anything."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.common import table

KIB, MIB = 1024, 1024 * 1024
ALLREDUCE_GOAL, COLOCATED_GOAL = 1.15, 1.25
GOAL_FROM_BYTES, GOAL_HOSTS, GOAL_RATE = 4 * MIB, 4, 1000.0


@dataclass(frozen=True)
class Run:
    """One exchange measured: ``seconds`` a call by block, on the slowest rank."""

    what: str  # allreduce, server, compression or levels
    method: str
    hosts: int  # workers, one on each host
    servers: int  # on hosts of their own; 0: none, or one on every worker
    rate_mbit: float | None  # None: as fast as the machine
    bytes: int  # of the tensor
    compression: str
    seconds: tuple[float, ...]
    sent_bytes: float | None = (
        None  # what a rank sends, by the strategy's count; None: what the exchange is known to send
    )

    @property
    def median_s(self) -> float:
        return statistics.median(self.seconds)


def ring_bound_s(size: int, *, hosts: int, rate_mbit: float) -> float:
    """Seconds a ring all-reduce of ``size`` bytes takes at least; also push and pull with a server on every worker."""
    return 2 * (hosts - 1) / hosts * size * 8 / (rate_mbit * 1e6)


def server_bound_s(size: int, *, workers: int, servers: int, rate_mbit: float) -> float:
    """Seconds of push, then pull, of ``size`` bytes by every worker, through the ports of servers on hosts of their own."""
    return 2 * workers * size * 8 / (rate_mbit * 1e6) / servers


def duplex_bound_s(size: int, *, workers: int, servers: int, rate_mbit: float) -> float:
    """The same where pulls leave a server while pushes still arrive."""
    return max(workers / servers, 1.0) * size * 8 / (rate_mbit * 1e6)


def bound_s(run: Run) -> float | None:
    """The bound that a run is held to, for the bytes that it sends; None where links have no limit."""
    if run.rate_mbit is None:
        return None
    if run.sent_bytes is not None:
        return run.sent_bytes * 8 / (run.rate_mbit * 1e6)
    size = run.bytes // 2 if run.compression == "fp16" else run.bytes
    if run.what == "server" and run.servers:
        return server_bound_s(size, workers=run.hosts, servers=run.servers, rate_mbit=run.rate_mbit)
    return ring_bound_s(size, hosts=run.hosts, rate_mbit=run.rate_mbit)


def multiple(run: Run) -> float | None:
    """How many times its bound a run took."""
    bound = bound_s(run)
    return run.median_s / bound if bound else None


def goals(runs: Sequence[Run]) -> list[tuple[str, float, float]]:
    """What was to be reached at 1 Gbit/s on 4 hosts from 4 MiB up: title, the worst multiple of the bound, the goal."""
    worst: dict[tuple[str, float], float] = {}
    for run in runs:
        here = (run.hosts, run.rate_mbit, run.compression) == (GOAL_HOSTS, GOAL_RATE, "none")
        reached = multiple(run)
        if not here or reached is None or run.bytes < GOAL_FROM_BYTES:
            continue
        if run.what == "allreduce":
            key = (f"all-reduce, {run.method}", ALLREDUCE_GOAL)
        elif run.what == "server" and run.servers == 0:
            key = (f"parameter server on every worker, {run.method}", COLOCATED_GOAL)
        else:
            continue
        worst[key] = max(worst.get(key, 0.0), reached)
    return [(title, value, goal) for (title, goal), value in worst.items()]


# --- showing ------------------------------------------------------------------------------------------------------------
def size_text(size: int) -> str:
    """1 KiB, 64 MiB."""
    return f"{size // MIB} MiB" if size >= MIB else f"{size // KIB} KiB"


def milliseconds(run: Run | None) -> str:
    """A run's time, and in brackets the multiple of its bound."""
    if run is None:
        return "-"
    value, times = 1000 * run.median_s, multiple(run)
    text = f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f}"
    return text if times is None else f"{text} ({times:.2f})"


def pick(runs: Iterable[Run], **wanted: Any) -> Run | None:
    """The first run with these attributes."""
    return next((run for run in runs if all(getattr(run, name) == value for name, value in wanted.items())), None)


def allreduce_table(runs: Sequence[Run], *, count: int, rate_mbit: float, what: str = "allreduce") -> str:
    """Milliseconds by size and method; in brackets the multiple of the bound of a ring with one rank a host."""
    mine = [run for run in runs if run.what == what and (run.hosts, run.rate_mbit) == (count, rate_mbit)]
    columns = list(dict.fromkeys((run.method, run.compression) for run in mine))
    head = ["tensor", "bound, ms", *[method if kind == "none" else f"{method}, {kind}" for method, kind in columns]]
    rows = []
    for size in sorted({run.bytes for run in mine}):
        cells = [milliseconds(pick(mine, bytes=size, method=method, compression=kind)) for method, kind in columns]
        rows.append([size_text(size), f"{1000 * ring_bound_s(size, hosts=count, rate_mbit=rate_mbit):.2f}", *cells])
    return table(head, rows)


def server_table(runs: Sequence[Run], *, count: int, rate_mbit: float) -> str:
    """Milliseconds by size, method and number of servers; in brackets the multiple of the bound, and of the full-duplex one."""
    mine = [run for run in runs if run.what == "server" and (run.hosts, run.rate_mbit) == (count, rate_mbit)]
    columns = list(dict.fromkeys((run.method, run.servers) for run in mine))
    head = ["tensor", *[f"{method}: {servers or 'on every worker'}" for method, servers in columns]]
    rows = []
    for size in sorted({run.bytes for run in mine}):
        row = [size_text(size)]
        for method, servers in columns:
            run = pick(mine, bytes=size, servers=servers, method=method)
            text = milliseconds(run)
            if run is not None and servers:
                least = duplex_bound_s(size, workers=count, servers=servers, rate_mbit=rate_mbit)
                text = f"{text[:-1]}; {run.median_s / least:.2f})"
            row.append(text)
        rows.append(row)
    return table(head, rows)


def compression_table(runs: Sequence[Run]) -> str:
    """By method: bytes that leave a rank in a step, and milliseconds at each rate with the multiple of those bytes' time."""
    mine = [run for run in runs if run.what == "compression"]
    rates = list(dict.fromkeys(run.rate_mbit for run in mine))
    head = [
        "compression",
        "sent a step, KiB",
        *["full speed, ms" if rate is None else f"{rate:g} Mbit/s, ms" for rate in rates],
    ]
    rows = []
    for kind in dict.fromkeys(run.compression for run in mine):
        cells = [milliseconds(pick(mine, compression=kind, rate_mbit=rate)) for rate in rates]
        sent = next(run.sent_bytes for run in mine if run.compression == kind)
        rows.append([kind, "-" if sent is None else f"{sent / KIB:.0f}", *cells])
    return table(head, rows)


def goals_table(reached: Sequence[tuple[str, float, float]]) -> str:
    """Each goal with what was reached."""
    rows = [
        [title, f"{worst:.2f}", f"{goal:.2f}", "reached" if worst <= goal else "missed"]
        for title, worst, goal in reached
    ]
    return table(["exchange", "worst multiple of the bound", "goal", ""], rows)
