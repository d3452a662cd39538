"""How many bytes of a model's file are numbers: the rest is the graph, names and padding."""

from __future__ import annotations

import json
import math
from pathlib import Path

from horovod_jobs.errors import ArtifactError


def weights_bytes(path: Path) -> int | None:
    """Bytes of all tensors in a safetensors or ONNX file; None for another format.

    Raises:
        ArtifactError: the file cannot be read.
    """
    try:
        if path.suffix == ".safetensors":
            return _safetensors(path)
        if path.suffix == ".onnx":
            return _onnx(path)
    except (OSError, ValueError, KeyError) as error:
        raise ArtifactError(f"{path.name} in {path.parent.name} cannot be read ({error}); run its job again") from error
    return None


def _safetensors(path: Path) -> int:
    """From the header: 8 bytes of length, then JSON with each tensor's begin and end."""
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if not 0 < length <= path.stat().st_size - 8:
            raise ValueError(f"header of {length} bytes")
        header = json.loads(stream.read(length))
    return sum(
        entry["data_offsets"][1] - entry["data_offsets"][0] for name, entry in header.items() if name != "__metadata__"
    )


def _onnx(path: Path) -> int | None:
    try:
        import onnx
        from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
    except ImportError:  # A reader of reports need not have it; the figure is then left out.
        return None
    try:
        model = onnx.load(str(path), load_external_data=False)
    except DecodeError as error:
        raise ValueError(str(error)) from error
    tensors = list(model.graph.initializer)
    for node in model.graph.node:
        tensors += [attribute.t for attribute in node.attribute if attribute.type == onnx.AttributeProto.TENSOR]
    return sum(math.ceil(math.prod(t.dims) * _bits(onnx, t.data_type) / 8) for t in tensors)


def _bits(onnx: object, data_type: int) -> int:
    helper = onnx.helper  # type: ignore[attr-defined]
    name = onnx.TensorProto.DataType.Name(data_type)  # type: ignore[attr-defined]
    if name in ("INT4", "UINT4", "FLOAT4E2M1"):
        return 4
    return int(helper.tensor_dtype_to_np_dtype(data_type).itemsize * 8)
