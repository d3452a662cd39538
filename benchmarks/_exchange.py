"""What ``network`` and ``scale_model`` run on every host: exchanges timed in blocks.

``python -m benchmarks._exchange KIND SPEC OUT``: SPEC and OUT are paths of JSON files; rank 0 writes its findings to OUT.
``seconds`` are blocks: the mean of a call over a block of calls in a row, on the slowest rank.
"""

from __future__ import annotations

import json
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.common import die_with_parent, write_whole

BLOCK_S = 0.4
MAX_CALLS = 200


def timed_blocks(
    call: Callable[[], None], *, blocks: int, slowest: Callable[[float], float], meet: Callable[[], None]
) -> list[float]:
    """Seconds a call, by block; the number of calls in a block follows the first ones' time. Collective.

    Args:
        slowest: the largest of the ranks' values, on every rank.
        meet: a barrier.
    """
    call()  # Opens connections and allocates.
    meet()
    start = time.perf_counter()
    call()
    calls = max(1, min(MAX_CALLS, int(BLOCK_S / slowest(time.perf_counter() - start))))
    found = []
    for _ in range(blocks):
        meet()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        found.append(slowest((time.perf_counter() - start) / calls))
    return found


# --- all-reduce, as the package calls it --------------------------------------------------------------------------------
def allreduce(spec: dict[str, Any]) -> list[dict[str, Any]] | None:
    """``World.allreduce_async`` of one fp32 tensor, sent as it is or in half precision, for each size."""
    import torch

    from horovod_jobs.comm.connect import connect

    torch.set_num_threads(1)
    world = connect()

    def slowest(value: float) -> float:
        return float(world.allreduce(torch.tensor(value, dtype=torch.float64), name="bench.slowest", op="max"))

    rows = []
    for compression in spec["compression"]:
        for size in spec["sizes"]:
            tensor = torch.ones(size // 4)
            name = f"bench.{compression}.{size}"

            def call(tensor: torch.Tensor = tensor, name: str = name, half: bool = compression == "fp16") -> None:
                sent = tensor.half() if half else tensor
                world.allreduce_async(sent, name=name).wait().to(torch.float32)

            result = world.allreduce_async(
                tensor.half() if compression == "fp16" else tensor, name=f"{name}.check"
            ).wait()
            if not bool((result == world.size).all()):
                raise RuntimeError(f"the sum over {world.size} ranks of ones is not {world.size} for {size} bytes")
            seconds = timed_blocks(
                call, blocks=spec["blocks"], slowest=slowest, meet=lambda: world.barrier(name="bench.meet")
            )
            rows.append({"bytes": size, "compression": compression, "seconds": seconds})
    rank = world.rank
    world.barrier(name="bench.end")
    world.shutdown()
    return rows if rank == 0 else None


# --- a parameter server's traffic -----------------------------------------------------------------------------------------
def server(spec: dict[str, Any]) -> list[dict[str, Any]] | None:
    """Push and pull by plain messages for each size."""
    from benchmarks._server_traffic import ServerTraffic

    rows = []
    rank = 0
    for size in spec["sizes"]:
        traffic = ServerTraffic(size=size, servers=spec["servers"], chunk_bytes=spec["chunk_bytes"])
        rank = traffic.rank
        seconds = timed_blocks(traffic.call, blocks=spec["blocks"], slowest=traffic.slowest, meet=traffic.meet)
        if not traffic.correct():
            raise RuntimeError(f"the parameter server's sum is wrong for {size} bytes")
        rows.append({"bytes": size, "seconds": seconds})
    return rows if rank == 0 else None


# --- the links themselves -----------------------------------------------------------------------------------------------
def stream(spec: dict[str, Any]) -> list[dict[str, Any]]:
    """One TCP connection to the next host and one from the host before, both full for a while: bytes received a second."""
    received = 0
    listener = socket.create_server(("", spec["port"]))
    ready = threading.Event()

    def receive() -> None:
        nonlocal received
        connection, _ = listener.accept()
        ready.set()
        buffer = bytearray(1 << 20)
        while count := connection.recv_into(buffer):
            received += count

    receiver = threading.Thread(target=receive, daemon=True)
    receiver.start()
    sender = _connect(spec["to"], spec["port"])
    ready.wait(30)
    stop_at = time.monotonic() + spec["seconds"]
    payload = bytes(1 << 20)

    def send() -> None:
        while time.monotonic() < stop_at:
            sender.sendall(payload)

    pusher = threading.Thread(target=send, daemon=True)
    pusher.start()
    time.sleep(0.3 * spec["seconds"])  # Buffers fill at first.
    start, before = time.perf_counter(), received
    time.sleep(0.5 * spec["seconds"])
    rate = (received - before) / (time.perf_counter() - start)
    pusher.join(30)
    sender.shutdown(socket.SHUT_WR)
    receiver.join(30)
    return [{"bytes_per_s": rate}]


def _connect(host: str, port: int) -> socket.socket:
    deadline = time.monotonic() + 20
    while True:
        try:
            return socket.create_connection((host, port), timeout=30)
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


# --- what needs torch and more of the package ---------------------------------------------------------------------------
def steps(spec: dict[str, Any]) -> list[dict[str, Any]] | None:
    """Training steps (``benchmarks._steps``)."""
    from benchmarks._steps import measure

    return measure(spec)


def strategies(spec: dict[str, Any]) -> list[dict[str, Any]] | None:
    """Exchanges by the package's strategies (``benchmarks._strategies``)."""
    from benchmarks._strategies import measure

    return measure(spec)


KINDS: dict[str, Callable[[dict[str, Any]], list[dict[str, Any]] | None]] = {
    "allreduce": allreduce,
    "server": server,
    "stream": stream,
    "steps": steps,
    "strategies": strategies,
}


def main() -> None:
    """One rank."""
    die_with_parent()
    kind, spec, out = sys.argv[1:]
    try:
        found = KINDS[kind](json.loads(Path(spec).read_text()))
    except BaseException:
        traceback.print_exc()
        _end_all()
        raise
    if found is not None:
        write_whole(Path(out), json.dumps(found))


def _end_all() -> None:
    """A rank that fails alone must not leave the others waiting: MPI ends them. Gloo's launcher does so by itself."""
    if "mpi4py.MPI" in sys.modules:
        from mpi4py import MPI

        if MPI.Is_initialized() and not MPI.Is_finalized():
            MPI.COMM_WORLD.Abort(1)


if __name__ == "__main__":
    main()
