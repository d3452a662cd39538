"""A wide and deep model with dot interactions, for samples of categorical fields."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from horovod_jobs.errors import ConfigError

# Odd, so that they are invertible modulo a power of two; products with ids stay far from 2^63.
_FIRST, _SECOND = 2654435761, 805459861


class WideDeep(nn.Module):
    """A weight for each value (wide), and an embedding for each value whose dot products and MLP make the rest (deep).

    Cheng et al. 2016, arXiv:1606.07792 (wide and deep, crossed features); Naumov et al. 2019, arXiv:1906.00091 (DLRM: pairwise dot
    products of embeddings). Input ``[B, columns]`` int64 ids, output logits ``[B, 2]``, of which the first is 0.

    fields: (name, ids, columns) of each field, from the data set. Id 0 means none: it has a weight and an embedding of its
        own in a field of one column, and none in a field of several, whose values are averaged.
    embedding_dim: numbers an embedding.
    hidden: widths of the MLP on the embeddings and their dot products; []: a linear layer.
    dropout: share of the embeddings' and of each hidden layer's numbers dropped in training.
    crosses: pairs of field names, such as [[user, item]]: each combination of their values is hashed into one table.
    buckets: rows of that table; combinations with the same hash share one.
    sparse: gradients of the tables hold only the rows that a batch touched. Needs an optimizer that takes them (SGD without
        momentum and weight decay, Adagrad without weight decay).

    Raises:
        ConfigError: data without categorical fields, or a value that cannot be used.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        fields: Sequence[Sequence[Any]] = (),
        embedding_dim: int = 16,
        hidden: Sequence[int] = (64, 32),
        dropout: float = 0.0,
        crosses: Sequence[Sequence[str]] = (),
        buckets: int = 0,
        sparse: bool = False,
    ) -> None:
        super().__init__()
        _check(num_classes, fields, embedding_dim=embedding_dim, hidden=hidden, dropout=dropout)
        names = [str(name) for name, _, _ in fields]
        _check_crosses(crosses, names, buckets=buckets)
        sizes, widths = [int(size) for _, size, _ in fields], [int(columns) for _, _, columns in fields]
        starts = [sum(sizes[:at]) for at in range(len(sizes))]
        self._columns = [range(sum(widths[:at]), sum(widths[: at + 1])) for at in range(len(widths))]
        self._crosses = [(names.index(first), names.index(second)) for first, second in crosses]
        self._buckets = buckets
        self.embedding = nn.Embedding(sum(sizes), embedding_dim, sparse=sparse)
        self.wide = nn.Embedding(sum(sizes), 1, sparse=sparse)
        self.cross = nn.Embedding(buckets, embedding_dim, sparse=sparse) if crosses else None
        nn.init.normal_(self.embedding.weight, std=embedding_dim**-0.5 / 4)
        # What was never seen says nothing: no value, and a combination of values that is not in the training part.
        nn.init.zeros_(self.wide.weight)
        with torch.no_grad():
            self.embedding.weight[torch.tensor(starts)] = 0.0
        if self.cross is not None:
            nn.init.zeros_(self.cross.weight)
        vectors = len(fields) + len(crosses)
        self.dropout = nn.Dropout(dropout)
        self.deep = _mlp([vectors * embedding_dim + vectors * (vectors - 1) // 2, *hidden], dropout=dropout)
        self.head = nn.Linear([vectors * embedding_dim + vectors * (vectors - 1) // 2, *hidden][-1], 1)
        for name, value in self._constants(starts, widths, vectors).items():
            self.register_buffer(name, value, persistent=False)

    offsets: Tensor  # [F] where each column's field begins in the tables
    several: Tensor  # [F] whether the column's field has other columns too
    belongs: Tensor  # [K, F] 1 where a column is of a field
    pairs: Tensor  # [2, P] positions of the pairs of vectors

    @staticmethod
    def _constants(starts: list[int], widths: list[int], vectors: int) -> dict[str, Tensor]:
        of = torch.tensor([at for at, width in enumerate(widths) for _ in range(width)])
        return {
            "offsets": torch.tensor(starts)[of],
            "several": (torch.tensor(widths) > 1)[of],
            "belongs": (of.unsqueeze(0) == torch.arange(len(widths)).unsqueeze(1)).float(),
            "pairs": torch.triu_indices(vectors, vectors, offset=1),
        }

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits ``[B, 2]``."""
        there = (~self.several | (inputs != 0)).float()  # [B, F]
        ids = inputs + self.offsets
        counts = (there @ self.belongs.T).clamp(min=1.0)  # [B, K]
        mine = self.belongs * there.unsqueeze(1) / counts.unsqueeze(2)  # [B, K, F]
        vectors = mine @ self.embedding(ids)  # [B, K, D]
        wide = (mine @ self.wide(ids)).sum(1)  # [B, 1]
        if self.cross is not None:
            vectors = torch.cat([vectors, *self._crossed(self.cross, inputs)], dim=1)
        vectors = self.dropout(vectors)
        dots = (vectors @ vectors.transpose(1, 2)).flatten(1)
        dots = dots.index_select(1, self.pairs[0] * vectors.shape[1] + self.pairs[1])
        score: Tensor = self.head(self.deep(torch.cat([vectors.flatten(1), dots], dim=1))) + wide
        return torch.cat([torch.zeros_like(score), score], dim=1)

    def _crossed(self, table: nn.Embedding, inputs: Tensor) -> list[Tensor]:
        """One vector ``[B, 1, D]`` for each crossing: the mean over the combinations of its fields' values."""
        found = []
        for number, (first, second) in enumerate(self._crosses):
            left, right = self._columns[first], self._columns[second]
            a = inputs[:, left.start : left.stop].unsqueeze(2)
            b = inputs[:, right.start : right.stop].unsqueeze(1)
            hashed = ((a * _FIRST + b * _SECOND + number * (_FIRST ^ _SECOND)) % self._buckets).flatten(
                1
            )  # [B, combinations]
            there = ((a != 0) & (b != 0)).flatten(1).float().unsqueeze(1)
            found.append(there @ table(hashed) / there.sum(2, keepdim=True).clamp(min=1.0))
        return found


def _mlp(widths: Sequence[int], *, dropout: float) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU(), nn.Dropout(dropout)]
    return nn.Sequential(*layers)


def _check(
    num_classes: int, fields: Sequence[Sequence[Any]], *, embedding_dim: int, hidden: Sequence[int], dropout: float
) -> None:
    if not fields:
        raise ConfigError(
            "WideDeep needs samples of categorical fields, which this data set does not name; use data=movielens, give your data "
            "set `fields`, or use another model, such as model=mlp"
        )
    if num_classes != 2:
        raise ConfigError(f"WideDeep tells 2 classes apart, and the data set has {num_classes}; use another model")
    if embedding_dim < 1 or any(width < 1 for width in hidden):
        raise ConfigError(
            f"embedding_dim={embedding_dim}, hidden={list(hidden)} has a width below 1; use numbers from 1 on"
        )
    if not 0.0 <= dropout < 1.0:
        raise ConfigError(f"dropout={dropout} is out of range; use 0 or more, below 1")


def _check_crosses(crosses: Sequence[Sequence[str]], names: Sequence[str], *, buckets: int) -> None:
    for cross in crosses:
        if len(cross) != 2 or any(name not in names for name in cross):
            raise ConfigError(f"crosses has {list(cross)}, which is not a pair of the fields {', '.join(names)}")
    if (buckets > 0) != bool(crosses) or buckets < 0:
        raise ConfigError(
            f"buckets={buckets} rows for {len(crosses)} crosses do not go together; give both, or crosses=[] and buckets=0"
        )
