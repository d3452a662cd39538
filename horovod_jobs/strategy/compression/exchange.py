"""The exchange of our own: each gradient is compressed and sent as the backward pass makes it ready, over Horovod's collectives."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from horovod_jobs.errors import ConfigError, JobError
from horovod_jobs.strategy.base import Setting
from horovod_jobs.strategy.compression.base import Method, Rounds, Slot, Wire

_SMALL = "small"


class MethodExchange:
    """An optimizer whose gradients a method combines (``comm.world.GradientExchange``).

    Hooks start a parameter's exchange in its last backward pass of a step. What the method does not take (biases, norms) is summed
    uncompressed, all in one tensor. In a world of one the method works alike, and nothing is sent.

    Raises:
        ConfigError: the method cannot serve such a stage.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        named_parameters: list[tuple[str, torch.nn.Parameter]],
        setting: Setting,
        method: Method,
    ) -> None:
        self._optimizer, self._setting, self._method = optimizer, setting, method
        if method.feedback and setting.loss_scaled:
            raise ConfigError(
                f"strategy.compression={method.name} keeps what it has not sent, and fit.precision=fp16 changes the scale of "
                "gradients between steps; use fit.precision=bf16 or fp32, or strategy.compression none, fp16, bf16 or qsgd"
            )
        self._wire = Wire(setting.world, steps_per_epoch=setting.steps_per_epoch)
        self.traffic = self._wire.traffic
        trainable = [(name, parameter) for name, parameter in named_parameters if parameter.requires_grad]
        self._parameters = [parameter for _, parameter in trainable]
        self._slots: dict[torch.nn.Parameter, Slot] = {}
        self._small: list[torch.nn.Parameter] = []
        momenta = _momenta(optimizer) if method.corrects_momentum else {}
        for index, (name, parameter) in enumerate(trainable):
            if not method.takes(tuple(parameter.shape)):
                self._small.append(parameter)
                continue
            momentum, nesterov = momenta.get(parameter, (0.0, False))
            slot = Slot(name, index, tuple(parameter.shape), parameter.device, momentum=momentum, nesterov=nesterov)
            method.prepare(slot, self._wire)
            self._slots[parameter] = slot
        self.clips_itself = method.clips_locally and setting.clip_norm is not None
        self._passes: dict[torch.nn.Parameter, int] = {}
        self._small_ready = 0
        self._running: dict[str, tuple[Rounds, Any, list[torch.nn.Parameter]]] = {}
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(self._ready)  # type: ignore[arg-type]
            for parameter in self._parameters
        ]

    # --- during the backward passes ---------------------------------------------------------------------------------
    def _ready(self, parameter: torch.nn.Parameter) -> None:
        if parameter.grad is not None and parameter.grad.is_sparse:
            raise ConfigError(
                f"{self._method.name} ({self._method.key}) takes dense gradients and this model has sparse ones; use "
                f"{self._method.key}={self._method.without}, or sparse=false in its embeddings"
            )
        done = self._passes.get(parameter, 0) + 1
        self._passes[parameter] = done
        if done > self._setting.accumulate:
            raise JobError(f"{done} backward passes in a step of {self._setting.accumulate}; call zero_grad before")
        if done < self._setting.accumulate or self.clips_itself:
            return
        if parameter in self._slots:
            self._start(parameter)
        else:
            self._small_ready += 1
            if self._small_ready == len(self._small):
                self._start_small()

    def _start(self, parameter: torch.nn.Parameter) -> None:
        slot = self._slots[parameter]
        with torch.no_grad():
            gradient = _flat(parameter)
            rounds = self._method.reduce(gradient, slot, self._wire)
            self._running[slot.name] = (rounds, next(rounds), [parameter])

    def _start_small(self) -> None:
        with torch.no_grad():
            rounds = self._summed(torch.cat([_flat(parameter) for parameter in self._small]))
            self._running[_SMALL] = (rounds, next(rounds), self._small)

    def _summed(self, flat: Tensor) -> Rounds:
        return (yield self._wire.allreduce(flat, name=_SMALL))

    # --- what the loop calls ----------------------------------------------------------------------------------------
    def zero_grad(self) -> None:
        self._optimizer.zero_grad()

    def synchronize(self) -> None:
        """Collective. Wait until ``.grad`` of every parameter is what the ranks have combined."""
        if self.clips_itself and self._setting.clip_norm is not None:
            # Gradients of independent ranks add up like their squares (Lin et al. 2018, section 3.1).
            limit = self._setting.clip_norm * self._setting.world.size**-0.5
            torch.nn.utils.clip_grad_norm_(self._parameters, limit)
        for parameter, slot in self._slots.items():
            if slot.name not in self._running:
                self._start(parameter)
        if self._small and _SMALL not in self._running:
            self._start_small()
        with torch.no_grad():
            while self._running:  # A round of each before the next round of any: they travel side by side.
                for name, (rounds, handle, parameters) in list(self._running.items()):
                    self._advance(name, rounds, handle, parameters)
        self._passes.clear()
        self._small_ready = 0
        self.traffic.steps += 1

    def _advance(self, name: str, rounds: Rounds, handle: Any, parameters: list[torch.nn.Parameter]) -> None:
        try:
            self._running[name] = (rounds, rounds.send(handle.wait()), parameters)
        except StopIteration as end:
            del self._running[name]
            start = 0
            for parameter in parameters:
                assert parameter.grad is not None
                part = end.value[start : start + parameter.numel()]
                parameter.grad.copy_(part.view(parameter.shape))
                start += parameter.numel()

    def step(self) -> None:
        corrected = [parameter for parameter, slot in self._slots.items() if slot.momentum]
        if not corrected:
            self._optimizer.step()
            return
        # What arrived has its momentum already. The optimizer still has what is left to it: weight decay, with a momentum of
        # its own, and the tensors that were summed uncompressed.
        arrived = {parameter: parameter.grad for parameter in corrected}
        for parameter in corrected:
            parameter.grad = torch.zeros_like(parameter)
        self._optimizer.step()
        with torch.no_grad():
            for group in self._optimizer.param_groups:
                rate = float(group["lr"]) if group.get("maximize") else -float(group["lr"])
                for parameter in group["params"]:
                    if parameter in arrived:
                        parameter.grad = arrived[parameter]
                        parameter.add_(parameter.grad, alpha=rate)

    def regroup(self, num_groups: int) -> None:
        """Every tensor goes by itself, in whatever groups."""

    def close(self) -> None:
        """Take the hooks off the parameters."""
        for hook in self._hooks:
            hook.remove()

    # --- checkpoints ------------------------------------------------------------------------------------------------
    def rank_state(self) -> dict[str, Tensor]:
        """What is kept of each parameter, by ``parameter.what``."""
        return {
            f"{slot.name}.{key}": tensor
            for slot in self._slots.values()
            for key, tensor in {**slot.own, **slot.shared}.items()
        }

    def restore_rank(self, states: list[dict[str, Tensor]]) -> None:
        """Collective. Take back what was kept: of several ranks, their sum, so that nothing that is owed is lost."""
        kept = self._setting.world.broadcast_json(bool(states), name="gradient.kept")
        for slot in self._slots.values():
            for key in slot.own:
                name = f"{slot.name}.{key}"
                total = torch.zeros_like(slot.own[key])
                for state in states:
                    total += state[name].to(total.device)
                slot.own[key] = total
            for key, tensor in slot.shared.items():
                if not kept:
                    break
                name = f"{slot.name}.{key}"
                # A rank that was not there before takes it from rank 0.
                mine = states[0][name].to(tensor.device) if states else tensor
                slot.shared[key] = self._setting.world.broadcast(mine, name=f"gradient.{name}")

    def describe(self) -> dict[str, Any]:
        """What the method does here (JSON)."""
        return {
            **self._method.describe(),
            "tensors_compressed": len(self._slots),
            "tensors_summed": len(self._small),
            "momentum_taken_over": any(slot.momentum for slot in self._slots.values()),
        }


def _flat(parameter: torch.nn.Parameter) -> Tensor:
    """The gradient, ``[numel]`` float32; zeros where a backward pass did not reach the parameter."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad.detach().reshape(-1).float()


def _momenta(optimizer: torch.optim.Optimizer) -> dict[torch.nn.Parameter, tuple[float, bool]]:
    """(momentum, Nesterov's) of every parameter of ``torch.optim.SGD``; empty for other optimizers."""
    if type(optimizer) is not torch.optim.SGD:
        return {}
    found = {}
    for group in optimizer.param_groups:
        if group["momentum"] and group["dampening"]:
            raise ConfigError(
                f"optimizer.dampening={group['dampening']} has no place in momentum correction; use 0, or "
                "strategy.compression.momentum_correction=false"
            )
        for parameter in group["params"]:
            found[parameter] = (float(group["momentum"]), bool(group["nesterov"]))
    return found
