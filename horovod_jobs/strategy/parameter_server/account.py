"""What the servers of a stage came to, for its record."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from horovod_jobs.strategy.parameter_server.binding import Terms
from horovod_jobs.strategy.parameter_server.rows import Slices
from horovod_jobs.strategy.parameter_server.sharding import Layout


def account(
    layout: Layout, tables: Sequence[Slices], terms: Terms, reports: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """The servers' load, the staleness that happened and the bytes that moved; ``reports``: of each server, at rank 0 only."""
    load = layout.load_bytes()
    for table in tables:
        for server in range(len(load)):
            load[server] += table.of(table.parameter, server).nbytes
    return {
        "strategy": "parameter_server",
        "consistency": terms.consistency,
        "staleness_bound": terms.staleness,
        "averaging": terms.averaging,
        "period": terms.period,
        "chunks": len(layout.chunks),
        "bytes_by_server": load,
        "load_imbalance": max(load) * len(load) / sum(load) if sum(load) else 1.0,
        "read_staleness_steps": _added(reports, "read_staleness"),
        "update_staleness_updates": _added(reports, "update_staleness"),
        "bytes_pushed": sum(part["bytes_in"] for part in reports),
        "bytes_pulled": sum(part["bytes_out"] for part in reports),
        "embedding_rows": [table.parameter.shape[0] for table in tables],
        "embedding_bytes_moved": sum(part["sparse_bytes"] for part in reports),
        "embedding_bytes_of_whole_tables": sum(part["dense_bytes"] for part in reports),
    }


def moved(reports: Sequence[dict[str, Any]]) -> str:
    """What all workers pushed and pulled, in words; of embeddings that move row by row, beside what whole tables would have been."""
    pushed, pulled, rows, tables = (
        sum(part[name] for part in reports) / 1e6 for name in ("bytes_in", "bytes_out", "sparse_bytes", "dense_bytes")
    )
    text = f"{pushed:.1f} MB pushed and {pulled:.1f} MB pulled by all workers"
    return f"{text}, of it {rows:.1f} MB rows of embeddings (whole tables: {tables:.1f} MB)" if tables else text


def _added(reports: Sequence[dict[str, Any]], name: str) -> dict[str, int]:
    total: Counter[str] = Counter()
    for report in reports:
        total.update(report[name])
    return dict(sorted(total.items(), key=lambda item: int(item[0])))
