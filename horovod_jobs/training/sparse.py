"""Sparse gradients: those of embedding tables that hold only the rows a batch touched."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from horovod_jobs.errors import ConfigError


def has_sparse_gradients(module: nn.Module) -> bool:
    """Whether a table of the module was made with ``sparse=True``, as ``nn.Embedding`` and ``nn.EmbeddingBag`` take it."""
    return any(getattr(part, "sparse", False) is True for part in module.modules())


def prepare_for_sparse_gradients(
    make_optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer], *, clip_norm: float | None, where: str
) -> None:
    """See on a small table that the optimizer takes sparse gradients beside dense ones, before anything trains.

    Raises:
        ConfigError: it does not, or the gradient cannot be clipped.
    """
    checks = torch.sparse.check_sparse_tensor_invariants
    if not checks.is_enabled():
        # torch's own optimizers make sparse tensors without saying whether to check them, of which torch then warns.
        checks.disable()
    rows, dense = nn.Parameter(torch.ones(4, 2)), nn.Parameter(torch.ones(2))
    rows.grad = torch.sparse_coo_tensor(torch.tensor([[1, 3, 1]]), torch.ones(3, 2), (4, 2))
    dense.grad = torch.ones(2)
    if clip_norm is not None:
        try:
            torch.nn.utils.clip_grad_norm_([rows, dense], clip_norm)
        except (RuntimeError, NotImplementedError) as error:
            raise ConfigError(
                f"{where}.fit.clip_norm={clip_norm} cannot clip sparse gradients; use clip_norm=null, or model.sparse=false"
            ) from error
    try:
        make_optimizer([rows, dense]).step()
    except (RuntimeError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise ConfigError(
            f"{where}.optimizer does not take sparse gradients ({reason}); use optimizer=adagrad, SGD without momentum and "
            "weight_decay, or model.sparse=false"
        ) from error
