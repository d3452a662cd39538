"""Batch norm over the global batch, on any device: statistics are summed over ranks in float64.

With it, training is the same for every world size (to rounding), a rank with an empty share of the last batch included.
Ioffe & Szegedy 2015, arXiv:1502.03167; the backward pass is its section 3 with sums over all ranks.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn

from horovod_jobs.comm.world import World


class Waiting:
    """Seconds that forward and backward passes of this process have spent in collectives: most of it is waiting for others."""

    seconds = 0.0


def _total(local: Tensor, *, world: World, name: str) -> Tensor:
    """Collective. The sum over ranks."""
    start = time.perf_counter()
    total = world.allreduce(local, name=name)
    Waiting.seconds += time.perf_counter() - start
    return total


def _channel_view(vector: Tensor, like: Tensor) -> Tensor:
    return vector.view(1, -1, *([1] * (like.dim() - 2)))


class _Normalise(torch.autograd.Function):
    """(x - mean) / sqrt(var + eps) * weight + bias, with the gradient through mean and var of the global batch."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        mean: Tensor,
        invstd: Tensor,
        count: float,
        world: World,
        name: str,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, mean, invstd)
        ctx.count, ctx.world, ctx.name = count, world, name
        scale = weight * invstd
        return torch.addcmul(_channel_view(bias - mean * scale, x), x, _channel_view(scale, x))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, invstd = ctx.saved_tensors
        dy = grads[0]
        axes = [axis for axis in range(x.dim()) if axis != 1]
        sum_dy = dy.sum(axes)
        sum_dy_xhat = ((dy * x).sum(axes) - mean * sum_dy) * invstd
        local = torch.cat([sum_dy, sum_dy_xhat]).double()
        total = _total(local, world=ctx.world, name=f"{ctx.name}.backward").to(x.dtype)
        mean_dy, mean_dy_xhat = (total / ctx.count).chunk(2)
        # dx = weight * invstd * (dy - mean_dy - xhat * mean_dy_xhat), gathered into one multiplication and addition per element.
        slope = -mean_dy_xhat * invstd
        offset = -mean_dy - slope * mean
        dx = torch.addcmul(dy + _channel_view(offset, x), x, _channel_view(slope, x)) * _channel_view(
            weight * invstd, x
        )
        # The weight's own gradients stay local: the optimizer's exchange sums them like all others.
        return dx, sum_dy_xhat, sum_dy, None, None, None, None, None


class SyncBatchNorm(nn.Module):
    """Takes the place of a ``BatchNorm`` module while training; its parameters and buffers are the original's own."""

    def __init__(self, original: nn.modules.batchnorm._BatchNorm, *, world: World, name: str) -> None:
        super().__init__()
        self._world, self._name = world, name
        self.eps, self.momentum, self.affine = original.eps, original.momentum, original.affine
        self.weight, self.bias = original.weight, original.bias
        self.register_buffer("running_mean", original.running_mean)
        self.register_buffer("running_var", original.running_var)
        self.register_buffer("num_batches_tracked", original.num_batches_tracked)
        self.running_mean: Tensor | None
        self.running_var: Tensor | None
        self.num_batches_tracked: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, ...] -> the same shape. Collective while training."""
        if not self.training and self.running_mean is not None:
            return nn.functional.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
            )
        with torch.no_grad():
            mean, var, count = self._statistics(x)
            self._track(mean, var, count)
        weight = self.weight if self.affine else torch.ones_like(mean)
        bias = self.bias if self.affine else torch.zeros_like(mean)
        dtype = x.dtype
        # Under autocast activations may be bf16; the normalisation itself is done in float32, as torch does.
        y: Tensor = _Normalise.apply(
            x.float(), weight, bias, mean, (var + self.eps).rsqrt(), count, self._world, self._name
        )
        return y.to(dtype)

    def _statistics(self, x: Tensor) -> tuple[Tensor, Tensor, float]:
        """Mean [C] and biased variance [C] of the global batch, and the number of values a channel."""
        axes = [axis for axis in range(x.dim()) if axis != 1]
        channels = x.shape[1]
        n = x.numel() // channels
        packed = torch.zeros(2 * channels + 1, dtype=torch.float64, device=x.device)
        if n:
            var, mean = torch.var_mean(x.float(), axes, correction=0)
            var, mean = var.double(), mean.double()
            packed = torch.cat(
                [mean * n, (var + mean * mean) * n, torch.tensor([float(n)], dtype=torch.float64, device=x.device)]
            )
        packed = _total(packed, world=self._world, name=f"{self._name}.forward")
        count = float(packed[-1])
        mean = packed[:channels] / count
        var = (packed[channels:-1] / count - mean * mean).clamp_(min=0.0)
        return mean.float(), var.float(), count

    def _track(self, mean: Tensor, var: Tensor, count: float) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked += 1
        factor = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, factor)
        self.running_var.lerp_(var * (count / max(1.0, count - 1.0)), factor)


def synchronise(module: nn.Module, *, world: World, compiled: bool = False, prefix: str = "bn") -> None:
    """Put a ``SyncBatchNorm`` in the place of every batch norm below ``module``, in place. Nothing to do in a world of one.

    ``compiled`` keeps torch.compile out of it: the compiler cannot look into a collective.
    """
    if world.size == 1:
        return
    for name, child in list(module.named_children()):
        if isinstance(child, nn.modules.batchnorm._BatchNorm):
            replacement = SyncBatchNorm(child, world=world, name=f"{prefix}.{name}")
            if compiled:
                replacement.forward = torch.compiler.disable(replacement.forward)  # type: ignore[method-assign]
            setattr(module, name, replacement)
        else:
            synchronise(child, world=world, compiled=compiled, prefix=f"{prefix}.{name}")
