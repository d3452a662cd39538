"""Load any model artifact and predict with it; write the artifact of a torch model.

    import horovod_jobs
    model = horovod_jobs.load("runs/latest:student")
    inputs = model.prepare(pictures)                    # raw samples, uint8 [B, 28, 28] say -> [B, *model.input_shape]
    logits = model(inputs)                              # float32 [B, model.num_classes]

Torch is imported when a call needs it, so that a process which only runs ONNX does not carry it.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from horovod_jobs.bundle import CONFIG, WEIGHTS, ModelConfig, read_config
from horovod_jobs.errors import ArtifactError, ConfigError, DataError
from horovod_jobs.preprocessing import Preprocessing
from horovod_jobs.storage import write_json

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn

    from horovod_jobs.artifacts import Artifact


class Predictor(Protocol):
    """A model that is ready to predict, whatever runs it.

    ``format`` is one of ``runtimes.FORMATS``; ``parameters`` counts those of the model as it was trained; ``preprocessing`` is
    None where the data set did not tell it.
    """

    format: str
    input_shape: tuple[int, ...]
    input_dtype: str
    fields: tuple[tuple[str, int, int], ...]
    num_classes: int
    class_names: tuple[str, ...]
    parameters: int
    preprocessing: Preprocessing | None

    def prepare(self, raw: Any) -> Tensor:
        """Raw samples (a tensor or array, as the data set holds them) as inputs; see ``preprocessing.prepare``.

        Raises:
            DataError: it is not known how, the shape is another, or fractions came where bytes are due.
        """
        ...

    def __call__(self, inputs: Tensor) -> Tensor:
        """Logits ``[B, num_classes]`` (float32, CPU) of inputs ``[B, *input_shape]`` (``input_dtype``); B may be 0.

        Raises:
            DataError: inputs of another shape, or fractions where the model takes whole numbers.
        """
        ...

    def caller(self, inputs: np.ndarray[Any, Any]) -> Callable[[], Any]:
        """A function that runs the model once on these inputs, and does nothing else: what a latency is of."""
        ...


def save_model(
    directory: Path,
    model: nn.Module,
    *,
    model_node: Mapping[str, Any],
    num_classes: int,
    input_shape: Sequence[int],
    class_names: Sequence[str],
    input_dtype: str = "float32",
    fields: Sequence[tuple[str, int, int]] = (),
    preprocessing: Preprocessing | None = None,
) -> None:
    """Write model.safetensors and config.json, from which ``load`` builds the model again.

    ``model_node`` is the ``_target_`` node that built it; ``fields`` and ``preprocessing`` are those of the data set, if it
    has any. Tensors that share memory are written once.

    Raises:
        StorageError: no space or no permission.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_model as write_weights

    try:
        # One key: safetensors writes several in a random order, and the same weights must be the same file.
        write_weights(model, str(directory / WEIGHTS), metadata={"format": "pt"})
    except SafetensorError as error:  # Its own type, where others raise OSError.
        number = re.search(r"os error (\d+)", str(error))
        code = int(number[1]) if number else errno.EIO
        raise OSError(code, os.strerror(code) if number else str(error)) from error
    config = ModelConfig(
        format="torch",
        model=dict(model_node),
        num_classes=num_classes,
        input_shape=tuple(input_shape),
        class_names=tuple(class_names),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        directory=directory,
        input_dtype=input_dtype,
        fields=tuple(fields),
        preprocessing=preprocessing,
    )
    write_json(directory / CONFIG, config.to_json())


def load_module(path: str | Path | Artifact, *, allow_targets: Sequence[str] = ()) -> nn.Module:
    """The torch module of a model artifact, on the CPU, in evaluation mode.

    Raises:
        ArtifactError: an artifact without a torch model, or weights that do not fit the model it names.
        ConfigError: its ``_target_`` is not allowed.
    """
    config = read_config(path)
    if config.format != "torch":
        raise ArtifactError(
            f"{config.directory} holds an {config.format} model; give a torch model (stage train or distill)"
        )
    return build_module(config, allow_targets=allow_targets)


def build_module(config: ModelConfig, *, allow_targets: Sequence[str]) -> nn.Module:
    """The torch module that a config names, with its weights. Raises: see ``load_module``."""
    from safetensors import SafetensorError
    from safetensors.torch import load_model as read_weights
    from torch import nn

    from horovod_jobs.instantiate import accepted, instantiate

    arguments = accepted(config.model, config.model_arguments, allow=allow_targets)
    module = instantiate(config.model, allow=allow_targets, where=f"{config.directory.name}.model", **arguments)
    if not isinstance(module, nn.Module):
        raise ArtifactError(
            f"{config.directory} names {config.model.get('_target_')}, which is no torch.nn.Module; train it again"
        )
    try:
        read_weights(module, str(config.file), strict=True)
    except FileNotFoundError as error:
        raise ArtifactError(f"{config.directory} has no {WEIGHTS}; give a torch model artifact") from error
    except (RuntimeError, SafetensorError) as error:
        what = "; ".join(line.strip() for line in str(error).splitlines()[:3])
        raise ArtifactError(
            f"the weights of {config.directory} do not fit {config.model.get('_target_')} ({what}); "
            "run its job again with the model's present code"
        ) from error
    return module.eval()


def load(
    path: str | Path,
    *,
    threads: int | None = None,
    device: str = "cpu",
    allow_targets: Sequence[str] = (),
) -> Predictor:
    """Load a model of any format: an artifact's directory, an export bundle, a model.onnx in one, or ``RUN:STAGE``.

    threads: CPU threads; for a torch model this sets torch's number for the whole process. None: as torch has it.
    device: where a torch model runs, such as ``cuda``.
    allow_targets: modules of yours that a model's ``_target_`` may name; only those you trust.

    Raises:
        ArtifactError: there is no model, it is damaged, or it does not fit its code.
        ConfigError: its ``_target_`` is not allowed, or a value cannot be used.
    """
    if threads is not None and threads < 1:
        raise ConfigError(f"threads={threads} is not a positive number; use at least 1")
    config = read_config(path)
    predictor: Predictor = config.kept_as.load(config, threads=threads, device=device, allow_targets=allow_targets)
    return predictor


def load_config(config: ModelConfig, *, allow_targets: Sequence[str] = ()) -> Predictor:
    """The predictor of a model whose config has been read, on the CPU. Raises: see ``load``."""
    predictor: Predictor = config.kept_as.load(config, allow_targets=allow_targets)
    return predictor


def check_inputs(inputs: Tensor, expected: tuple[int, ...], dtype: str) -> None:
    """Refuse inputs that a model does not take: ``expected`` is the shape of one sample, ``dtype`` the model's.


    Raises:
        DataError: another shape, or fractions where the model takes whole numbers.
    """
    shape = inputs.shape
    if inputs.is_floating_point() and dtype != "float32":
        raise DataError(f"inputs are {inputs.dtype}, but the model takes whole numbers (torch.{dtype}); convert them")
    if tuple(shape[1:]) != expected or len(shape) != len(expected) + 1:
        wanted = ", ".join(str(size) for size in ("B", *expected))
        raise DataError(f"inputs have shape {list(shape)}, but the model takes [{wanted}]; reshape them")
