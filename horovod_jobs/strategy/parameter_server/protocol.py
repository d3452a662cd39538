"""What the messages between workers and servers are: their tags, and the numbers in them. Pure.

Up, a worker sends a head (the step's hyperparameters) and then chunks; down, a server answers each chunk with its new parameters.
Everything else is rare and goes as JSON under ``comm.channel.CONTROL``. A worker's flags are answered with everybody's, and with the
step from which on each worker is gone (0: it is there).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

HEAD, AGREE, NORM, STATE = 1, 2, 3, 4
FLAGS = 4  # not finite, stop, Ctrl-C, checkpoint due


def tag(index: int) -> int:
    """Of a chunk's values or a table's rows."""
    return 16 + index


def index_of(tag: int) -> int:
    """The chunk or table that a tag is of."""
    return tag - 16


class Room:
    """Memory for one message at a time, as large as the largest has been."""

    def __init__(self) -> None:
        self._bytes = torch.empty(0, dtype=torch.uint8)

    def of(self, nbytes: int) -> Tensor:
        """So much of it; what was there before is gone."""
        if self._bytes.numel() < nbytes:
            self._bytes = torch.empty(max(nbytes, 2 * self._bytes.numel()), dtype=torch.uint8)
        return self._bytes[:nbytes]


def pack_rows(ids: Tensor, table: Tensor, numbers: Tensor, room: Room) -> Tensor:
    """As one message: ``ids`` ``[n]`` (int64) and those rows ``[n, dim]`` of a table that have ``numbers``."""
    dim, dtype = table.shape[1], table.dtype
    packed = room.of(ids.numel() * (8 + dim * dtype.itemsize))
    told, rows = unpack_rows(packed, dim=dim, dtype=dtype)
    told.copy_(ids)
    torch.index_select(table, 0, numbers, out=rows)
    return packed


def unpack_rows(message: Tensor, *, dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What ``pack_rows`` packed."""
    count = message.numel() // (8 + dim * dtype.itemsize)
    return message[: 8 * count].view(torch.int64), message[8 * count :].view(dtype).view(count, dim)


@dataclass(frozen=True)
class Dials:
    """Which hyperparameters of each group are numbers: a schedule may change them, so they travel with every step."""

    names: tuple[tuple[tuple[str, int], ...], ...]  # by group: (name, 0 for a number or n for a tuple of n)

    @staticmethod
    def of(groups: Sequence[Mapping[str, Any]]) -> Dials:
        """Those of an optimizer's parameter groups."""
        return Dials(tuple(tuple(_numbers(group)) for group in groups))

    @property
    def count(self) -> int:
        return sum(max(1, length) for group in self.names for _, length in group)

    def read(self, groups: Sequence[Mapping[str, Any]]) -> list[float]:
        """Their values now, in order."""
        values: list[float] = []
        for names, group in zip(self.names, groups, strict=True):
            for name, length in names:
                values += [float(item) for item in group[name]] if length else [float(group[name])]
        return values

    def of_group(self, index: int, values: Sequence[float]) -> dict[str, Any]:
        """The hyperparameters of one group from all ``values``."""
        at = sum(max(1, length) for group in self.names[:index] for _, length in group)
        found: dict[str, Any] = {}
        for name, length in self.names[index]:
            found[name] = tuple(values[at : at + length]) if length else values[at]
            at += max(1, length)
        return found

    def to_json(self) -> list[list[list[Any]]]:
        return [[[name, length] for name, length in group] for group in self.names]

    @staticmethod
    def from_json(value: list[list[list[Any]]]) -> Dials:
        return Dials(tuple(tuple((str(name), int(length)) for name, length in group) for group in value))


def _numbers(group: Mapping[str, Any]) -> list[tuple[str, int]]:
    found = []
    for name in sorted(group):
        value = group[name]
        if name == "params" or isinstance(value, bool):
            continue
        if isinstance(value, int | float) or (hasattr(value, "dim") and value.dim() == 0):
            found.append((name, 0))
        elif isinstance(value, tuple | list) and value and all(isinstance(item, int | float) for item in value):
            found.append((name, len(value)))
    return found
