"""ONNX files in onnxruntime on the CPU. Torch is imported when a call needs it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from horovod_jobs.errors import ArtifactError, ConfigError, SetupError
from horovod_jobs.predict import check_inputs
from horovod_jobs.preprocessing import prepare

try:
    import onnxruntime
except ImportError:  # Told by who wants to open a model.
    onnxruntime = None

if TYPE_CHECKING:
    from torch import Tensor

    from horovod_jobs.bundle import ModelConfig


def load(config: ModelConfig, *, threads: int | None, device: str, allow_targets: Sequence[str]) -> OnnxPredictor:
    """See ``Format.load``. An ONNX file names no code, so ``allow_targets`` is not needed."""
    if device != "cpu":
        raise ConfigError(f"device={device}: this ONNX model runs on the CPU; use device=cpu")
    if threads is None:
        import torch

        threads = torch.get_num_threads()
    return OnnxPredictor(config, threads=threads)


class OnnxPredictor:
    """An ONNX file with the input ``inputs`` and the output ``logits``."""

    format = "onnx"

    def __init__(self, config: ModelConfig, *, threads: int) -> None:
        self.input_shape, self.num_classes = config.input_shape, config.num_classes
        self.input_dtype, self.fields = config.input_dtype, config.fields
        self.class_names, self.parameters = config.class_names, config.parameters
        self.preprocessing = config.preprocessing
        self._session = open_session(config.file, threads=threads)

    def prepare(self, raw: Any) -> Tensor:
        """See ``Predictor``."""
        return prepare(raw, how=self.preprocessing, input_shape=self.input_shape)

    def __call__(self, inputs: Tensor) -> Tensor:
        """See ``Predictor``."""
        import torch

        check_inputs(inputs, self.input_shape, self.input_dtype)
        if len(inputs) == 0:  # Not every kernel of onnxruntime takes an empty batch.
            return torch.empty(0, self.num_classes)
        taken = inputs.detach().to("cpu", getattr(torch, self.input_dtype))
        return torch.from_numpy(self.caller(taken.contiguous().numpy())())

    def caller(self, inputs: Any) -> Callable[[], Any]:
        """See ``Predictor``."""
        return lambda: self._session.run(["logits"], {"inputs": inputs})[0]


def open_session(path: Path, *, threads: int, optimized: Path | None = None) -> Any:
    """An onnxruntime session on the CPU; ``optimized`` is where it writes the graph that it really runs.

    Raises:
        ArtifactError: the file is missing or is no ONNX model that this onnxruntime runs.
        SetupError: onnxruntime is not installed.
    """
    if onnxruntime is None:
        raise SetupError("an ONNX model needs onnxruntime, which is not installed; pip install onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # Errors; it warns of any initializer that it folds away.
    # Ranks share the cores: a thread that spins between batches takes them from a neighbour.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    if not path.is_file():
        raise ArtifactError(f"{path.parent} has no {path.name}; give an artifact or a bundle with an ONNX model")
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions share no public base class.
        raise ArtifactError(
            f"onnxruntime {onnxruntime.__version__} cannot load {path} ({str(error).splitlines()[0]}); make it anew"
        ) from error
