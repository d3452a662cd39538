"""Recipes: what becomes an integer, and how. A config names one as ``quantizer._target_``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from horovod_jobs.comm.world import World
from horovod_jobs.errors import ConfigError
from horovod_jobs.export import capture, one_thread
from horovod_jobs.quantization.base import Backend, Calibration, DynamicScheme, Program

if TYPE_CHECKING:
    from torch.fx import GraphModule


class StaticInt8:
    """Post-training quantization with fixed scales: integer weights and activations, ranges from calibration samples.

    Jacob et al. 2018, arXiv:1712.05877. Convolution and batch norm are folded first. Through torchao's PT2E.

    symmetric_activations: int8 with zero point 0 instead of uint8 with any zero point. Accelerators such as TensorRT
        ask for it; on x86 it is slower and less exact.
    per_channel: one scale for each output channel of a weight instead of one for all.
    reduce_range: 7-bit weights, for x86 CPUs without VNNI, whose 16-bit sums would saturate.
    backend: null is onnxruntime on the CPU.
    """

    name = "static_int8"

    def __init__(
        self,
        *,
        symmetric_activations: bool = False,
        per_channel: bool = True,
        reduce_range: bool = False,
        backend: Backend | None = None,
    ) -> None:
        self.symmetric_activations, self.per_channel, self.reduce_range = (
            symmetric_activations,
            per_channel,
            reduce_range,
        )
        self._backend = _checked(backend)

    @property
    def format(self) -> str:
        """See ``Recipe``."""
        return self._backend.format

    def quantize(
        self, model: nn.Module, *, input_shape: Sequence[int], calibration: Calibration, world: World, path: Path
    ) -> dict[str, Any]:
        """Collective. See ``Recipe``.

        Raises:
            ConfigError: the model cannot be exported, or has no layer that can become an integer one.
            NonFiniteError: NaN or infinity on the calibration samples.
        """
        from horovod_jobs.quantization.calibration import observe

        with one_thread():
            with world.agreed("quantization.prepare"):
                prepared, layers = self.prepare(model, input_shape=input_shape, input_dtype=calibration.input_dtype)
            observe(prepared, calibration.split, calibration.batches, world=world)

            def write() -> dict[str, Any]:
                program = Program(convert(prepared), tuple(input_shape), calibration.input_dtype)
                return self._backend.write(program, path)

            written = world.main(write, name="quantization.write")
        return {
            "recipe": self.name,
            "backend": self._backend.name,
            "activations": "int8 symmetric" if self.symmetric_activations else "uint8 asymmetric",
            "weights": f"int{7 if self.reduce_range else 8} per {'channel' if self.per_channel else 'tensor'}",
            "layers": layers,
            **written,
        }

    def prepare(
        self, model: nn.Module, *, input_shape: Sequence[int], input_dtype: torch.dtype = torch.float32
    ) -> tuple[GraphModule, dict[str, int]]:
        """A copy of the model's graph with observers in it, and its numbers of convolutions and linear layers."""
        from horovod_jobs.quantization.annotation import IntegerChains, Scheme, count_layers, prepare_pt2e

        graph = capture(model, torch.zeros(2, *input_shape, dtype=input_dtype)).module(check_guards=False)
        layers = count_layers(graph)
        if not any(layers.values()):
            raise ConfigError(
                f"{type(model).__name__} has 0 convolutions and linear layers with weights of their own; there is "
                "nothing to quantize, so leave out this stage"
            )
        scheme = Scheme(
            symmetric_activations=self.symmetric_activations,
            per_channel=self.per_channel,
            reduce_range=self.reduce_range,
        )
        return prepare_pt2e(graph, IntegerChains(scheme)), layers


class DynamicInt8:
    """Integer weights for linear layers, their inputs quantized at run time by each batch's range; no calibration.

    Everything else, convolutions included, stays float32. Worth it for transformers and wide MLPs.

    per_channel, reduce_range: as in ``StaticInt8``. backend: null is onnxruntime on the CPU.
    """

    name = "dynamic_int8"

    def __init__(self, *, per_channel: bool = True, reduce_range: bool = False, backend: Backend | None = None) -> None:
        self._scheme = DynamicScheme(per_channel=per_channel, reduce_range=reduce_range)
        self._backend = _checked(backend)

    @property
    def format(self) -> str:
        """See ``Recipe``."""
        return self._backend.format

    def quantize(
        self, model: nn.Module, *, input_shape: Sequence[int], calibration: Calibration, world: World, path: Path
    ) -> dict[str, Any]:
        """Collective. See ``Recipe``. The calibration samples are not used.

        Raises:
            ConfigError: the model cannot be exported, or has no linear layer.
        """
        linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
        weights = sum(module.weight.numel() for module in linear)
        total = sum(parameter.numel() for parameter in model.parameters())
        if not linear:
            raise ConfigError(
                f"{type(model).__name__} has 0 linear layers and dynamic int8 quantizes nothing else; use "
                "quantizer=int8_static"
            )

        def write() -> dict[str, Any]:
            with one_thread():
                program = Program(model, tuple(input_shape), calibration.input_dtype, dynamic=self._scheme)
                return self._backend.write(program, path)

        written = world.main(write, name="quantization.write")
        share = weights / total
        note = (
            ""
            if share >= 0.5
            else (
                f" They hold only {share:.1%} of the parameters, so little is gained; quantizer=int8_static quantizes "
                "convolutions too."
            )
        )
        return {
            "recipe": self.name,
            "backend": self._backend.name,
            "activations": "uint8 asymmetric, ranges at run time",
            "weights": f"int{7 if self._scheme.reduce_range else 8} per "
            f"{'channel' if self._scheme.per_channel else 'tensor'}",
            "layers": {"linear": len(linear)},
            "linear_share_of_parameters": share,
            "note": f"Only linear layers are quantized; convolutions stay float32.{note}",
            **written,
        }


def convert(prepared: GraphModule) -> nn.Module:
    """The graph with quantize and dequantize operations in place of its observers."""
    from horovod_jobs.quantization.annotation import convert_pt2e

    converted: nn.Module = convert_pt2e(prepared)
    return converted


def _checked(backend: Backend | None) -> Backend:
    """What a config gave as the backend, or the default."""
    from horovod_jobs.quantization.onnx_backend import OnnxRuntime

    if backend is None:
        return OnnxRuntime()
    if not hasattr(backend, "write"):
        raise ConfigError(
            f"quantizer.backend={backend} is no backend; name a class that is one, as in "
            f"quantizer.backend._target_={OnnxRuntime.__module__}.{OnnxRuntime.__qualname__}"
        )
    return backend
