"""The bounds that exchanges over links are held to, by hand, and how runs are judged and shown."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks import network
from benchmarks._network_runs import (
    MIB,
    Run,
    allreduce_table,
    bound_s,
    compression_table,
    duplex_bound_s,
    goals,
    milliseconds,
    multiple,
    ring_bound_s,
    server_bound_s,
    server_table,
    size_text,
)

# 8 MB over 80 Mbit/s, which are 10 MB a second: 0.8 s once through a link.
SIZE, RATE = 8_000_000, 80.0
RING = Run("allreduce", "MPI ring", 4, 0, 1000.0, 4 * MIB, "none", (0.040, 0.038, 0.050))


def test_bounds_by_hand() -> None:
    assert ring_bound_s(SIZE, hosts=2, rate_mbit=RATE) == pytest.approx(0.8)
    assert ring_bound_s(SIZE, hosts=4, rate_mbit=RATE) == pytest.approx(1.2)
    # One server: 4 pushes come in, then 4 pulls go out. In full duplex they overlap.
    assert server_bound_s(SIZE, workers=4, servers=1, rate_mbit=RATE) == pytest.approx(6.4)
    assert duplex_bound_s(SIZE, workers=4, servers=1, rate_mbit=RATE) == pytest.approx(3.2)
    assert server_bound_s(SIZE, workers=4, servers=2, rate_mbit=RATE) == pytest.approx(3.2)
    # More servers than workers: a worker's own link is what is left.
    assert duplex_bound_s(SIZE, workers=2, servers=8, rate_mbit=RATE) == pytest.approx(0.8)


def test_a_run_is_held_to_what_it_sends() -> None:
    run = Run("allreduce", "MPI ring", 4, 0, RATE, SIZE, "none", (1.0,))
    assert bound_s(run) == pytest.approx(1.2)
    assert bound_s(replace(run, compression="fp16")) == pytest.approx(0.6)
    assert bound_s(replace(run, what="server")) == pytest.approx(1.2)
    assert bound_s(replace(run, what="server", servers=2)) == pytest.approx(3.2)
    assert bound_s(replace(run, what="compression", compression="topk", sent_bytes=100_000)) == pytest.approx(0.01)
    assert bound_s(replace(run, rate_mbit=None)) is None
    assert multiple(replace(run, rate_mbit=None)) is None


def test_a_goal_is_judged_by_the_worst_run_it_covers() -> None:
    runs = [
        RING,
        replace(RING, bytes=16 * MIB, seconds=(0.21,)),
        replace(RING, bytes=1024, seconds=(1.0,)),  # too small for the goal
        replace(RING, hosts=2, seconds=(9.0,)),
        replace(RING, rate_mbit=100.0, seconds=(9.0,)),
        replace(RING, compression="fp16", seconds=(9.0,)),
        replace(RING, what="server", method="messages", servers=1, seconds=(9.0,)),
        replace(RING, what="server", method="messages", seconds=(0.06,)),
    ]
    bound = ring_bound_s(4 * MIB, hosts=4, rate_mbit=1000.0)
    assert goals(runs) == [
        ("all-reduce, MPI ring", pytest.approx(max(0.040 / bound, 0.21 / (4 * bound))), 1.15),
        ("parameter server on every worker, messages", pytest.approx(0.06 / bound), 1.25),
    ]
    assert goals([]) == []


def test_what_is_shown() -> None:
    assert [size_text(size) for size in (1024, 64 * 1024, 4 * MIB)] == ["1 KiB", "64 KiB", "4 MiB"]
    assert milliseconds(None) == "-"
    assert milliseconds(Run("allreduce", "m", 2, 0, RATE, SIZE, "none", (1.6,))) == "1600 (2.00)"
    assert milliseconds(Run("compression", "m", 2, 0, None, SIZE, "none", (0.0123,))) == "12.3"
    shown = allreduce_table([RING, replace(RING, method="Gloo", seconds=(0.1,))], count=4, rate_mbit=1000.0)
    assert shown.splitlines()[0] == "| tensor | bound, ms | MPI ring | Gloo |"
    assert shown.splitlines()[2] == "| 4 MiB | 50.33 | 40.0 (0.79) | 100 (1.99) |"
    served = replace(RING, what="server", method="messages", servers=1, seconds=(0.268435456,))
    assert server_table([served], count=4, rate_mbit=1000.0).splitlines()[2] == "| 4 MiB | 268 (1.00; 2.00) |"
    packed = replace(RING, what="compression", compression="topk", sent_bytes=125_000, seconds=(0.002,))
    fast = replace(packed, rate_mbit=None)
    assert compression_table([fast, packed]).splitlines()[0] == (
        "| compression | sent a step, KiB | full speed, ms | 1000 Mbit/s, ms |"
    )
    assert compression_table([fast, packed]).splitlines()[2] == "| topk | 122 | 2.00 | 2.00 (2.00) |"


def test_who_cannot_make_hosts_is_told_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    monkeypatch.setattr("sys.argv", ["network", "--quick"])
    with pytest.raises(SystemExit, match="benchmarks.network cannot run here: .* root"):
        network.main()
