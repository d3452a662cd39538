"""The optimizer's rule, as a server applies it to a flat range of parameters."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from horovod_jobs.errors import ConfigError
from horovod_jobs.instantiate import locate

_PROBE_STEPS = 3
_FUSED = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.Adagrad)
_FUSED_TYPES = (torch.float32, torch.float64)
_SPARSE = {"Adam": "torch.optim.SparseAdam", "AdamW": "torch.optim.SparseAdam"}


def target_of(optimizer: torch.optim.Optimizer) -> str:
    """The dotted name of an optimizer's class, by which a server finds it."""
    cls = type(optimizer)
    return f"{cls.__module__}.{cls.__qualname__}"


def options_of(group: Mapping[str, Any]) -> dict[str, Any]:
    """A parameter group's hyperparameters as JSON."""
    found: dict[str, Any] = {}
    for name, value in group.items():
        if name == "params":
            continue
        if isinstance(value, Tensor):
            value = float(value)
        found[name] = list(value) if isinstance(value, tuple) else value
    return found


def make(
    target: str, options: Mapping[str, Any], parameter: torch.nn.Parameter, *, allow: Sequence[str] = ()
) -> torch.optim.Optimizer:
    """An optimizer of this class and these hyperparameters for one parameter.

    Raises:
        ConfigError: the class is not allowed here or does not take its own hyperparameters.
    """
    options = {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}
    cls: Any = locate(target, allow=allow)
    taken = inspect.signature(cls).parameters
    any_taken = any(item.kind is inspect.Parameter.VAR_KEYWORD for item in taken.values())
    try:
        made: torch.optim.Optimizer = cls(
            [parameter], **{key: options[key] for key in options if key in taken or any_taken}
        )
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"optimizer._target_={target} cannot be made anew on a parameter server ({error}); use one of torch.optim's, "
            "or strategy=allreduce"
        ) from error
    made.param_groups[0].update(options)
    return made


def fuse(optimizer: torch.optim.Optimizer) -> None:
    """Let torch make a step in one pass over the memory and without temporaries, where it can and nothing else was asked for."""
    group = optimizer.param_groups[0]
    asked = any(group.get(name) for name in ("foreach", "fused", "differentiable", "capturable", "amsgrad"))
    if (
        type(optimizer) in _FUSED
        and group.get("fused") is None
        and not asked
        and group["params"][0].dtype in _FUSED_TYPES
    ):
        group["fused"] = True


def state_kinds(target: str, options: Mapping[str, Any], *, allow: Sequence[str] = ()) -> dict[str, bool]:
    """The names of an optimizer's state, and whether it has a value for each element (or one for the parameter).

    A server holds flat pieces of tensors, so the rule must work on every element alone. That is tried here: a matrix as a whole and
    in two flat pieces must come to the same.

    Raises:
        ConfigError: they do not.
    """
    options = {**options, "lr": max(float(options.get("lr", 0.0)), 1e-3)} if "lr" in options else dict(options)
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(4, 6, generator=generator)
    whole = torch.nn.Parameter(start.clone())
    parts = [torch.nn.Parameter(part.clone()) for part in start.flatten().split((10, 14))]
    try:
        optimizers = [make(target, options, parameter, allow=allow) for parameter in (whole, *parts)]
        for _ in range(_PROBE_STEPS):
            grad = torch.randn(4, 6, generator=generator)
            whole.grad = grad.clone()
            for part, piece in zip(parts, grad.flatten().split((10, 14)), strict=True):
                part.grad = piece.clone()
            for optimizer in optimizers:
                optimizer.step()
        same = torch.allclose(whole.flatten(), torch.cat([part.detach() for part in parts]), rtol=1e-4, atol=1e-6)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(_refused(target, f"cannot update a flat piece of a parameter ({error})")) from error
    if not same:
        raise ConfigError(_refused(target, "looks at a parameter as a whole"))
    state = optimizers[1].state[parts[0]]
    return {
        str(name): isinstance(value, Tensor) and value.shape == parts[0].shape
        for name, value in state.items()
        if value is not None
    }


def sparse_target(target: str) -> str:
    """The rule that updates the rows of an embedding in the place of this one: torch's SparseAdam for Adam."""
    return _SPARSE.get(target.rpartition(".")[2], target)


def check_sparse(target: str, options: Mapping[str, Any], *, rows: int) -> None:
    """Only the rows that a step touched may change in it.

    Raises:
        ConfigError: this optimizer changes others as well, or takes no sparse gradients.
    """
    kind = target.rpartition(".")[2]
    others = [key for key in ("momentum", "weight_decay", "amsgrad") if options.get(key)]
    if kind not in ("SGD", "Adagrad", "Adam", "AdamW", "SparseAdam") or others:
        why = (
            f"optimizer.{others[0]}={options[others[0]]} changes every row"
            if others
            else f"{kind} takes no sparse gradients"
        )
        raise ConfigError(
            f"an embedding of {rows} rows has sparse gradients, and {why} in every step; use SGD, Adagrad or Adam without "
            "momentum and weight decay, or sparse=False in the model"
        )


def _refused(target: str, why: str) -> str:
    return (
        f"optimizer._target_={target} {why}, and a parameter server holds parameters in flat pieces; use an optimizer that works on "
        "each element alone (SGD, Adam, AdamW, Adagrad, RMSprop), strategy.averaging=weights, or strategy=allreduce"
    )
