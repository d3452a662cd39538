"""Exchanges over hosts with links of 1 Gbit/s and 100 Mbit/s against what the links allow: all-reduce, servers, compression, two levels.

Hosts are network namespaces (``benchmarks/hosts.py``), one rank each. All-reduce is Horovod's, called as the package calls it; the
parameter server is the traffic alone by plain MPI messages, and the package's strategy; compression is the package's strategy. Sums in
two levels are compared with the flat ring with two ranks on each host.
Bounds, for ``B`` bytes, ``N`` workers and a link of ``w`` bytes a second each way:

- ring all-reduce: ``2 (N - 1) / N * B / w``: each link carries that much each way (Patarasuk & Yuan 2009);
- ``S`` servers on hosts of their own: ``2 N B / w / S`` where a server's port carries pushes and pulls in turn. The port is
  full duplex and pulls can go out while pushes come in, so that the least time is ``max(N / S, 1) * B / w``; both are shown;
- a server on every worker: a link carries ``(N - 1) / N * B`` of pushes and as much of pulls, each way: the ring's bound;
- compression: the bytes that leave a rank, by the strategy's count, over ``w``.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from benchmarks._host_files import search_path
from benchmarks._network_runs import (
    KIB,
    MIB,
    Run,
    allreduce_table,
    compression_table,
    goals,
    goals_table,
    server_table,
)
from benchmarks.common import conclude, note, parser, table
from benchmarks.hosts import Hosts, hosts, why_not
from horovod_jobs.errors import SetupError
from horovod_jobs.launch.mpi import EAGER, RING, SEGMENTED_RING, SHORT_QUEUES, TWO_LINKS, options

SIZES = {1000.0: (KIB, 64 * KIB, MIB, 4 * MIB, 16 * MIB, 64 * MIB), 100.0: (KIB, 64 * KIB, MIB, 4 * MIB)}
QUICK_SIZES = {1000.0: (64 * KIB, 4 * MIB), 100.0: (64 * KIB, MIB)}
CHUNK_BYTES = 256 * KIB
COMPRESSIONS = ("none", "fp16", "bf16", "qsgd", "onebit", "topk", "randomk", "powersgd")
COMPRESSED_BYTES = 16 * MIB

TCP_TUNED = tuple(options({**EAGER, **SHORT_QUEUES, **TWO_LINKS}))
METHODS: dict[str, tuple[str, ...]] = {
    "Gloo": (),
    "MPI as it comes": (),
    "MPI ring": tuple(options(RING)),
    "MPI ring in segments, TCP tuned": (*options(SEGMENTED_RING), *TCP_TUNED),
}
TUNED = "MPI ring in segments, TCP tuned"
PARTS = ("allreduce", "server", "compression", "levels")
RANKS_A_HOST = 2  # of the part levels


def on_hosts(
    made: Hosts, kind: str, spec: dict[str, Any], *, launcher: Sequence[str], limit_s: float = 540
) -> list[dict[str, Any]]:
    """Run one kind of ``benchmarks._exchange`` by a launcher on the first host, and give what rank 0 found.

    Raises:
        SetupError: a rank failed; the message ends with what it printed.
    """
    given, out = made.directory / "spec.json", made.directory / "found.json"
    given.write_text(json.dumps(spec))
    out.unlink(missing_ok=True)
    passed = ("HOME", "LANG", "PYTHONPATH", "LD_LIBRARY_PATH")
    env = {name: os.environ[name] for name in passed if name in os.environ}
    env |= {
        "PATH": search_path(),
        "OMP_NUM_THREADS": "1",
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    }
    command = [*launcher, sys.executable, "-m", "benchmarks._exchange", kind, str(given), str(out)]
    try:
        done = made.run(command, env=env, timeout_s=limit_s)
    except subprocess.TimeoutExpired as error:
        raise SetupError(f"{kind} over {len(made.names)} hosts did not end in {limit_s:.0f} s") from error
    if done.returncode or not out.exists():
        raise SetupError(
            f"{kind} over {len(made.names)} hosts failed ({done.returncode}): {done.stdout.strip()[-2000:]}"
        )
    found: list[dict[str, Any]] = json.loads(out.read_text())
    return found


def mpi(made: Hosts, count: int, *more: str, ranks_per_host: int = 1) -> list[str]:
    """``mpirun`` on the first ``count`` hosts; ranks wait by yielding, because the hosts share this machine's cores."""
    names = ["OMP_NUM_THREADS", *[name for name in ("PYTHONPATH", "LD_LIBRARY_PATH") if name in os.environ]]
    passed = [word for name in names for word in ("-x", name)]
    return [
        *made.mpirun(hosts=range(count), ranks_per_host=ranks_per_host),
        *passed,
        "--mca",
        "mpi_yield_when_idle",
        "1",
        *more,
    ]


def measure_allreduce(
    made: Hosts,
    method: str,
    *,
    count: int,
    rate_mbit: float,
    sizes: Sequence[int],
    blocks: int,
    compression: Sequence[str],
) -> list[Run]:
    """All-reduce over the first ``count`` hosts, whose links have ``rate_mbit`` already."""
    launcher = made.horovodrun(hosts=range(count)) if method == "Gloo" else mpi(made, count, *METHODS[method])
    spec = {"sizes": list(sizes), "blocks": blocks, "compression": list(compression)}
    return [
        Run("allreduce", method, count, 0, rate_mbit, row["bytes"], row["compression"], tuple(row["seconds"]))
        for row in on_hosts(made, "allreduce", spec, launcher=launcher)
    ]


def measure_server(
    made: Hosts, *, workers: int, servers: int, rate_mbit: float, sizes: Sequence[int], blocks: int, tuned: bool = True
) -> list[Run]:
    """Push and pull by plain messages of ``workers`` with ``servers`` on hosts of their own; 0: a server on every worker."""
    spec = {"sizes": list(sizes), "blocks": blocks, "servers": servers, "chunk_bytes": CHUNK_BYTES}
    launcher = mpi(made, workers + servers, *(TCP_TUNED if tuned else ()))
    method = "messages, TCP tuned" if tuned else "messages"
    return [
        Run("server", method, workers, servers, rate_mbit, row["bytes"], "none", tuple(row["seconds"]))
        for row in on_hosts(made, "server", spec, launcher=launcher)
    ]


def measure_server_strategy(
    made: Hosts, *, workers: int, servers: int, rate_mbit: float, sizes: Sequence[int], blocks: int
) -> list[Run]:
    """The same by ``strategy=parameter_server``, in a step that does little else."""
    node = {"_target_": "horovod_jobs.strategy.parameter_server.ParameterServer", "servers": servers or "colocated"}
    spec = {"strategies": [node], "sizes": list(sizes), "blocks": blocks}
    found = on_hosts(made, "strategies", spec, launcher=mpi(made, workers + servers, *METHODS[TUNED]))
    return [
        Run("server", "strategy", workers, servers, rate_mbit, row["bytes"], "none", tuple(row["seconds"]))
        for row in found
    ]


def measure_compression(
    made: Hosts, *, count: int, rate_mbit: float | None, size: int, blocks: int, kinds: Sequence[str] = COMPRESSIONS
) -> list[Run]:
    """A step's exchange by ``strategy=allreduce`` with each compression."""
    target = "horovod_jobs.strategy.allreduce.Allreduce"
    nodes = [{"_target_": target, "tune": False, "compression": kind} for kind in kinds]
    spec = {"strategies": nodes, "sizes": [size], "blocks": blocks}
    return [
        Run(
            "compression",
            TUNED,
            count,
            0,
            rate_mbit,
            row["bytes"],
            kinds[row["strategy"]],
            tuple(row["seconds"]),
            row["sent_bytes"],
        )
        for row in on_hosts(made, "strategies", spec, launcher=mpi(made, count, *METHODS[TUNED]))
    ]


def measure_levels(made: Hosts, *, count: int, rate_mbit: float, sizes: Sequence[int], blocks: int) -> list[Run]:
    """A step's exchange by the flat ring and in two levels, two ranks on each of ``count`` hosts."""
    target = "horovod_jobs.strategy.allreduce.Allreduce"
    methods = {"flat ring": False, "two levels": True}
    nodes = [{"_target_": target, "tune": False, "hierarchical": value} for value in methods.values()]
    spec = {"strategies": nodes, "sizes": list(sizes), "blocks": blocks}
    launcher = mpi(made, count, *METHODS[TUNED], ranks_per_host=RANKS_A_HOST)
    return [
        Run("levels", list(methods)[row["strategy"]], count, 0, rate_mbit, row["bytes"], "none", tuple(row["seconds"]))
        for row in on_hosts(made, "strategies", spec, launcher=launcher)
    ]


def measure_links(made: Hosts, *, count: int, seconds: float) -> float:
    """Bytes a second that TCP carries when every host sends to the next at the same time; the slowest link's."""
    started = []
    for index in range(count):
        given, out = made.directory / f"stream-{index}.json", made.directory / f"streamed-{index}.json"
        out.unlink(missing_ok=True)
        given.write_text(json.dumps({"to": made.addresses[(index + 1) % count], "port": 7001, "seconds": seconds}))
        command = [sys.executable, "-m", "benchmarks._exchange", "stream", str(given), str(out)]
        started.append((made.start(command, host=index), out))
    for process, _ in started:
        if process.wait(timeout=seconds + 60):
            raise SetupError("a host could not stream to the next one; its message is above")
    return min(float(json.loads(out.read_text())[0]["bytes_per_s"]) for _, out in started)


# --- the whole -----------------------------------------------------------------------------------------------------------
class Session:
    """The runs of one start of this benchmark, and what is said of them."""

    def __init__(self, made: Hosts, *, quick: bool, parts: Sequence[str]) -> None:
        self._made, self._quick, self._parts = made, quick, parts
        self._blocks = 2 if quick else 5
        self.runs: list[Run] = []
        self.links: list[list[str]] = []
        self.text: list[str] = []

    def case(self, count: int, rate: float) -> None:
        """All-reduce, parameter server and two levels on some hosts at one rate."""
        made, blocks = self._made, self._blocks
        made.set_rate(rate)
        sizes = (QUICK_SIZES if self._quick else SIZES).get(rate, (64 * KIB, MIB, 4 * MIB))
        title = f"{count} hosts, {rate:g} Mbit/s"
        streamed = measure_links(made, count=count, seconds=1.0 if self._quick else 4.0)
        self.links.append([str(count), f"{rate:g}", f"{streamed * 8 / 1e6:.0f}", f"{rate * 1e6 / 8 / streamed:.3f}"])
        for method in METHODS if "allreduce" in self._parts else ():
            note(f"{title}: {method}")
            self.runs += measure_allreduce(
                made, method, count=count, rate_mbit=rate, sizes=sizes, blocks=blocks, compression=("none", "fp16")
            )
        for servers in (1, 2, 0) if "server" in self._parts else ():
            note(f"{title}: parameter server, {servers or 'one on every worker'}")
            for tuned in (False, True):
                self.runs += measure_server(
                    made, workers=count, servers=servers, rate_mbit=rate, sizes=sizes, blocks=blocks, tuned=tuned
                )
            self.runs += measure_server_strategy(
                made, workers=count, servers=servers, rate_mbit=rate, sizes=sizes[1:], blocks=blocks
            )
        if "levels" in self._parts:
            note(f"{title}: {RANKS_A_HOST} ranks a host, flat and in two levels")
            self.runs += measure_levels(made, count=count, rate_mbit=rate, sizes=sizes[1:], blocks=blocks)
            shown = allreduce_table(self.runs, count=count, rate_mbit=rate, what="levels")
            said = f"{RANKS_A_HOST} ranks on each of {title}: ms (multiple of the bound of one rank a host)"
            self._add(f"A step's exchange, {said}", shown)
        if "allreduce" in self._parts:
            self._add(
                f"All-reduce, {title}: ms (multiple of the bound)",
                allreduce_table(self.runs, count=count, rate_mbit=rate),
            )
        if "server" in self._parts:
            said = "ms (multiple of the bound; of the full-duplex one)"
            self._add(f"Parameter server, {title}: {said}", server_table(self.runs, count=count, rate_mbit=rate))

    def compression(self, count: int, rates: Sequence[float | None]) -> None:
        """Every compression at each rate."""
        size = MIB if self._quick else COMPRESSED_BYTES
        for rate in rates:
            note(f"{count} hosts, {'full speed' if rate is None else f'{rate:g} Mbit/s'}: compression")
            self._made.set_rate(rate)
            self.runs += measure_compression(
                self._made, count=count, rate_mbit=rate, size=size, blocks=2 if self._quick else 3
            )
        shape = f"{size // 4096} x 1024 fp32"
        self._add(
            f"Compression, {count} hosts, {shape}: ms a step (multiple of the bytes' time)",
            compression_table(self.runs),
        )

    def _add(self, title: str, shown: str) -> None:
        self.text.append(f"### {title}\n\n{shown}")

    def conclusion(self) -> str:
        """All tables."""
        head = ["hosts", "link, Mbit/s", "TCP, Mbit/s, all hosts at once", "bound with TCP's rate / bound"]
        parts = [f"### What TCP carries\n\n{table(head, self.links)}", *self.text]
        if reached := goals(self.runs):
            parts.append(f"### Goals, 4 hosts at 1 Gbit/s from 4 MiB up\n\n{goals_table(reached)}")
        return "\n\n".join(parts)


def main() -> None:
    """Measure and print."""
    args_parser = parser(__doc__ or "")
    args_parser.add_argument("--hosts", type=int, action="append", help="number of workers; 2 and 4 without it")
    args_parser.add_argument("--rate", type=float, action="append", help="Mbit/s of a link; 1000 and 100 without it")
    args_parser.add_argument("--only", choices=PARTS, action="append", help="one part; all without it")
    args = args_parser.parse_args()
    if (reason := why_not()) is not None:
        raise SystemExit(f"benchmarks.network cannot run here: {reason}")
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))  # So that the hosts are ended in order.
    counts, rates, parts = args.hosts or [2, 4], args.rate or [1000.0, 100.0], args.only or list(PARTS)
    with hosts(max(counts) + 2) as made:
        session = Session(made, quick=args.quick, parts=parts)
        for count in counts if set(parts) & {"allreduce", "server", "levels"} else ():
            for rate in rates:
                session.case(count, rate)
        if "compression" in parts:
            session.compression(max(counts), [None, *rates])
    figures = {"runs": [asdict(run) for run in session.runs], "links": session.links}
    conclude("Exchanges over shaped links", session.conclusion(), figures=figures, args=args)


if __name__ == "__main__":
    main()
