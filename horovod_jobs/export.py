"""Torch modules as ONNX files with a batch of any size, through ``torch.export`` (no TorchScript)."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from horovod_jobs.errors import ConfigError
from horovod_jobs.storage import storage_errors

if TYPE_CHECKING:
    import onnx
    import torch
    from torch import Tensor, nn

_MAX_BATCH = 65536
# Logger -> beginning of messages that say nothing about the model being exported.
_KNOWN_MESSAGES = {
    # The exporter looks for torchvision's operators in every export; no model here needs them to be there.
    "torch.onnx._internal.exporter._registration": "torchvision is not installed",
}


@contextmanager
def known_messages_hidden(known: dict[str, str]) -> Iterator[None]:
    """Drop log messages by logger and beginning while the body runs."""
    filters: list[tuple[logging.Logger, Any]] = []
    for name, beginning in known.items():
        logger = logging.getLogger(name)

        def keep(record: logging.LogRecord, beginning: str = beginning) -> bool:
            return not record.getMessage().startswith(beginning)

        logger.addFilter(keep)
        filters.append((logger, keep))
    try:
        yield
    finally:
        for logger, keep in filters:
            logger.removeFilter(keep)


@contextmanager
def one_thread() -> Iterator[None]:
    """Run the body with one torch thread: tracing gains nothing from more, and other ranks use the cores."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def capture(module: nn.Module, example: Tensor, *, owned: bool = False) -> torch.export.ExportedProgram:
    """The module's graph in evaluation mode for a batch of any size; ``example`` ``[B, ...]`` gives shape and dtype.

    The module is copied first, unless it is ``owned``: what is done to an exported graph can reach the original's
    weights.

    Raises:
        ConfigError: the graph depends on values, or on the size of the batch.
    """
    import torch

    # Two samples at least: torch.export takes a size of one as a constant.
    inputs = (example.detach()[:1].repeat(2, *[1] * (example.ndim - 1)).contiguous(),)
    batch = torch.export.Dim("batch", min=1, max=_MAX_BATCH)
    if not owned:
        module = copy.deepcopy(module).cpu().eval()
    try:
        with torch.no_grad(), warnings.catch_warnings():
            # Internal to torch 2.13: unpickling of its own tree specs uses its own deprecated class.
            warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)` is deprecated")
            return torch.export.export(module, inputs, dynamic_shapes=({0: batch},), strict=False)
    except Exception as error:  # torch.export raises many types, none of them public as a base.
        raise ConfigError(
            f"{type(module).__name__} cannot be exported for a batch of any size ({_first_line(error)}); write its "
            "forward without Python branches on values and with sizes taken from the inputs"
        ) from error


def to_onnx(program: torch.export.ExportedProgram) -> onnx.ModelProto:
    """The captured graph as ONNX, input ``inputs``, output ``logits``, stripped of what only debuggers read.

    Raises:
        ConfigError: an operator that has no ONNX form.
    """
    import torch

    try:
        with torch.no_grad(), warnings.catch_warnings(), known_messages_hidden(_KNOWN_MESSAGES):
            warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)` is deprecated")
            exported = torch.onnx.export(
                program, (), dynamo=True, input_names=["inputs"], output_names=["logits"], verbose=False
            )
    except Exception as error:
        raise ConfigError(
            f"the model cannot be written as ONNX ({_first_line(error)}); change the operator it names"
        ) from error
    assert exported is not None  # dynamo=True always returns a program.
    model: onnx.ModelProto = exported.model_proto
    strip(model)
    return model


def strip(model: onnx.ModelProto) -> None:
    """Remove traces of the exporter from the file: stack traces and shapes that a runtime infers itself."""
    model.ClearField("metadata_props")
    model.graph.ClearField("metadata_props")
    model.graph.ClearField("value_info")
    for entry in (*model.graph.node, *model.graph.input, *model.graph.output, *model.graph.initializer):
        entry.ClearField("metadata_props")
        entry.ClearField("doc_string")


def write_onnx(model: onnx.ModelProto, path: Path) -> None:
    """Check a model and write it as one file.

    Raises:
        ConfigError: it is larger than one file can be.
        StorageError: no space or no permission.
    """
    import onnx

    try:
        onnx.checker.check_model(model)
        data = model.SerializeToString()
    except ValueError as error:  # Protobuf's limit of 2 GiB.
        raise ConfigError(
            f"the ONNX model does not fit in one file ({_first_line(error)}); export a smaller model"
        ) from error
    with storage_errors("write", path):
        path.write_bytes(data)


def export_onnx(module: nn.Module, path: Path, *, input_shape: Sequence[int], input_dtype: str = "float32") -> None:
    """Write a torch module as float32 ONNX with a batch of any size; ``input_dtype`` is that of its inputs.

    Raises:
        ConfigError: the model cannot be exported.
        StorageError: no space or no permission.
    """
    import torch

    with one_thread():
        write_onnx(to_onnx(capture(module, torch.zeros(2, *input_shape, dtype=getattr(torch, input_dtype)))), path)


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__
