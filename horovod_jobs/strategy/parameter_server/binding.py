"""The beginning of a training stage, and its optimizer's state: how the first worker gives them to the servers, and gets it back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from horovod_jobs.comm.channel import CONTROL, Wire, wait_until
from horovod_jobs.errors import ConfigError
from horovod_jobs.strategy.parameter_server import protocol, rules
from horovod_jobs.strategy.parameter_server.protocol import Dials
from horovod_jobs.strategy.parameter_server.rows import Slices
from horovod_jobs.strategy.parameter_server.sharding import Chunk, Layout


@dataclass(frozen=True)
class Terms:
    """How the servers of a stage work."""

    consistency: str  # sync, async or ssp
    staleness: int | None
    averaging: str  # gradients or weights
    period: int
    clip_norm: float | None  # what the servers clip to
    window_bytes: int  # on their way to workers, and from a worker, at a time


class Holding:
    """An optimizer's parameters as a layout places them, and what to tell each server of them.

    Raises:
        ConfigError: the optimizer does not work on each element alone.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, parameters: Sequence[tuple[int, torch.nn.Parameter]], layout: Layout, terms: Terms,
        tables: Sequence[Slices] = (),
    ) -> None:  # fmt: skip
        self.optimizer, self.layout, self.terms, self.tables = optimizer, layout, terms, list(tables)
        self.parameters = [parameter for _, parameter in parameters]
        self.dials = Dials.of(optimizer.param_groups)
        self._target = rules.target_of(optimizer)
        self._groups = [rules.options_of(group) for group in optimizer.param_groups]
        # Which names of the state have a value an element; those of the worker's own optimizer were loaded from a checkpoint.
        self._kinds: dict[str, bool] = {}
        if terms.averaging == "gradients":
            allow = [type(optimizer).__module__]  # This process has it already; a server asks its own config.
            for group in sorted({group for group, _, _ in layout.buffers}):
                self._kinds.update(rules.state_kinds(self._target, self._groups[group], allow=allow))
        for table in self.tables:
            rules.check_sparse(self._target, self._groups[table.group], rows=table.parameter.shape[0])

    def order(self, server: int) -> dict[str, Any]:
        """What begins a stage at a server (JSON)."""
        terms = self.terms
        return {
            "op": "bind",
            "target": self._target,
            "groups": self._groups,
            "dials": self.dials.to_json(),
            "consistency": terms.consistency,
            "staleness": terms.staleness,
            "averaging": terms.averaging,
            "clip_norm": terms.clip_norm,
            "window_bytes": terms.window_bytes,
            "holders": list(range(self.layout.servers))
            if self.tables
            else sorted({chunk.server for chunk in self.layout.chunks}),
            "chunks": [
                *(self._describe(chunk) for chunk in self.layout.chunks if chunk.server == server),
                *(self._describe_table(table, server) for table in self.tables),
            ],
        }

    def _describe_table(self, table: Slices, server: int) -> dict[str, Any]:
        state = self.optimizer.state.get(table.parameter, {})
        arrays = [
            key for key, value in state.items() if isinstance(value, Tensor) and value.shape == table.parameter.shape
        ]
        scalars = {key: float(value) for key, value in state.items() if value is not None and key not in arrays}
        rows, dim = table.shape(server)
        return {
            "index": table.index,
            "group": table.group,
            "dtype": str(table.parameter.dtype).removeprefix("torch."),
            "numel": rows,
            "dim": dim,
            "arrays": sorted(arrays),
            "scalars": scalars,
        }

    def everything(self, server: int, order: dict[str, Any]) -> Iterator[Tensor]:
        """The arrays that follow an order, one after the other."""
        for told, chunk in zip(
            order["chunks"], [one for one in self.layout.chunks if one.server == server], strict=False
        ):
            yield from self.arrays(chunk, ["", *told["arrays"]])
        for told, table in zip(order["chunks"][len(order["chunks"]) - len(self.tables) :], self.tables, strict=True):
            state = self.optimizer.state.get(table.parameter, {})
            for key in ["", *told["arrays"]]:
                yield table.of(table.parameter.detach() if key == "" else state[key], server).contiguous().cpu()

    def _describe(self, chunk: Chunk) -> dict[str, Any]:
        group, dtype, _ = self.layout.buffers[chunk.buffer]
        states = [state for _, state in self._inside(chunk) if state]
        present = {key for state in states for key, value in state.items() if value is not None}
        scalars = {
            key: max(float(state[key]) for state in states if key in state)
            for key in sorted(present)
            if not self._kinds.get(key, True)
        }
        arrays = [key for key in sorted(present) if self._kinds.get(key, False)]
        name = str(dtype).removeprefix("torch.")
        return {
            "index": chunk.index,
            "group": group,
            "dtype": name,
            "numel": chunk.numel,
            "dim": None,
            "arrays": arrays,
            "scalars": scalars,
        }

    def _inside(self, chunk: Chunk) -> list[tuple[int, dict[str, Any]]]:
        """The parameters that have a part of a chunk, with their state."""
        return [
            (index, self.optimizer.state.get(self.parameters[index], {}) if self.terms.averaging == "gradients" else {})
            for index in self.layout.parameters_of(chunk.index)
        ]

    def arrays(self, chunk: Chunk, keys: Sequence[str]) -> list[Tensor]:
        """A chunk's part of the parameters (key ``""``) and of their state, each as one flat tensor."""
        _, dtype, _ = self.layout.buffers[chunk.buffer]
        found = []
        for key in keys:
            flat = torch.zeros(chunk.numel, dtype=dtype)
            for index, state in self._inside(chunk):
                value = self.parameters[index].detach() if key == "" else state.get(key)
                if value is None:
                    continue  # Never updated; others in the chunk were.
                place = self.layout.places[index]
                start, stop = max(place.start, chunk.start), min(place.stop, chunk.stop)
                part = value.reshape(-1)[start - place.start : stop - place.start]
                flat[start - chunk.start : stop - chunk.start].copy_(part)
            found.append(flat)
        return found


def begin(up: Wire, down: Wire, holding: Holding, *, servers: Sequence[int], workers: Sequence[int]) -> None:
    """By the first worker: give every server its part.

    Raises:
        ConfigError: a server refuses.
    """
    refused = []
    for server, rank in enumerate(servers):
        order = {**holding.order(server), "workers": list(workers)}
        up.send_json(order, to=rank)
        for array in holding.everything(server, order):
            wait_until(up.send(array, to=rank, tag=protocol.STATE).Test)
    for rank in servers:
        error = down.next_from(rank, CONTROL).json()["error"]
        if error is not None:
            refused.append(f"parameter server rank {rank}: {error}")
    if refused:
        raise ConfigError(refused[0])


def gather_state(up: Wire, down: Wire, holding: Holding, *, servers: Sequence[int]) -> dict[str, Any]:
    """By the first worker: the optimizer's state as torch writes it, put together from the servers' parts."""
    layout = holding.layout
    flats: dict[tuple[int, str], Tensor] = {}  # by buffer and name
    scalars: dict[int, dict[str, float]] = {}  # by chunk
    entries: dict[int, dict[str, Any]] = {}  # by id of a table's parameter
    for server, rank in enumerate(servers):
        up.send_json({"op": "state"}, to=rank)
        told = down.next_from(rank, CONTROL).json()
        for chunk in (chunk for chunk in layout.chunks if chunk.server == server):
            mine = told[str(chunk.index)]
            scalars[chunk.index] = mine["scalars"]
            for key in mine["arrays"]:
                _, dtype, numel = layout.buffers[chunk.buffer]
                flat = flats.setdefault((chunk.buffer, key), torch.zeros(numel, dtype=dtype))
                down.receive(flat[chunk.start : chunk.stop], source=rank, tag=protocol.STATE)
        for table in holding.tables:
            mine = told[str(table.index)]
            rows = entries.setdefault(id(table.parameter), {})
            for key in mine["arrays"]:
                part = torch.empty(table.shape(server), dtype=table.parameter.dtype)
                down.receive(part, source=rank, tag=protocol.STATE)
                whole = rows.setdefault(key, torch.zeros(table.parameter.shape, dtype=part.dtype))
                table.of(whole, server).copy_(part)
            rows.update({key: torch.tensor(value) for key, value in mine["scalars"].items()})
    state: dict[str, Any] = holding.optimizer.state_dict()
    numbers = _numbers(holding.optimizer)
    state["state"] = {numbers[parameter]: entry for parameter, entry in entries.items() if entry}
    for index, parameter in enumerate(holding.parameters):
        place = layout.places[index]
        entry: dict[str, Any] = {
            key: flat[place.start : place.stop].view(parameter.shape).clone()
            for (buffer, key), flat in flats.items()
            if buffer == place.buffer
        }
        chunks = layout.chunks_of(index)
        entry.update({key: torch.tensor(value) for key, value in (scalars[chunks[0]] if chunks else {}).items()})
        if entry:
            state["state"][numbers[id(parameter)]] = entry
    state["state"] = dict(sorted(state["state"].items()))
    return state


def _numbers(optimizer: torch.optim.Optimizer) -> dict[int, int]:
    """The number of each parameter in a state dict."""
    ordered = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return {id(parameter): number for number, parameter in enumerate(ordered)}
