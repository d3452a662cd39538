"""How to use a model, as the text of documents: what an export's README.md and a model card tell their reader to type."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from horovod_jobs.bundle import ModelConfig
from horovod_jobs.instantiate import PACKAGE_PREFIXES


def inputs_sentence(config: ModelConfig) -> str:
    """What a caller must put in."""
    if config.fields:
        columns = ", ".join(
            f"{name} (0 to {size - 1}{f', {many} columns' if many > 1 else ''})" for name, size, many in config.fields
        )
        return f"The columns are ids, as the data set gave them in training, 0 for none: {columns}."
    if config.preprocessing is None:
        return "Inputs must be prepared (normalised, say) as they were in training."
    return f"Raw values become inputs by `{_formula(config)}`, which `model.prepare` does."


def example(config: ModelConfig, path: str, *, allowed: Sequence[str]) -> str:
    """Python that loads the model from ``path`` and predicts; ``allowed`` is the job's ``allow_targets``."""
    own = own_modules(config, allowed)
    arguments = f'"{path}"' + (f", allow_targets={_list(own)}" if own else "")
    note = "  # its code must be importable: put it on PYTHONPATH" if own else ""
    shape = ", ".join(str(size) for size in (1, *config.input_shape))
    if config.preprocessing is None:
        dtype = "" if config.input_dtype == "float32" else f", dtype=torch.{config.input_dtype}"
        call = [f"logits = model(torch.zeros({shape}{dtype}))  # [B, {config.num_classes}]"]
    else:
        raw, told = (
            (f"{shape}, dtype=torch.uint8", f"whole numbers, 0 to {config.preprocessing.scale:g}")
            if config.preprocessing.scale != 1
            else (shape, "as the data set holds them")
        )
        call = [
            f"raw = torch.zeros({raw})  # your samples: {told}",
            f"logits = model(model.prepare(raw))  # [B, {config.num_classes}]",
        ]
    lines = ["import horovod_jobs", "import torch", "", f"model = horovod_jobs.load({arguments}){note}", *call]
    return "\n".join([*lines, "print(model.class_names[int(logits.argmax(1))])"])


def onnx_example(config: ModelConfig) -> str:
    """Python that runs ``model.onnx`` without this package."""
    shape = ", ".join(str(size) for size in (1, *config.input_shape))
    if config.preprocessing is None:
        inputs = [f"inputs = np.zeros(({shape}), np.{config.input_dtype})"]
    else:
        raw = "uint8" if config.preprocessing.scale != 1 else "float32"
        inputs = [f"raw = np.zeros(({shape}), np.{raw})", f"inputs = ({_formula(config)}).astype(np.float32)"]
    return "\n".join(
        [
            "import numpy as np",
            "import onnxruntime",
            "",
            'session = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])',
            *inputs,
            'logits = session.run(["logits"], {"inputs": inputs})[0]',
        ]
    )


def own_modules(config: ModelConfig, allowed: Sequence[str]) -> list[str]:
    """Of ``allowed`` what loading this model needs: nothing for ONNX, or where only this package and torch take part."""
    if config.format != "torch":
        return []
    foreign = [target for target in _targets(config.model) if not _within(target, PACKAGE_PREFIXES)]
    given = [
        [prefix for prefix in allowed if _within(target, [prefix])][:1] or [target.split(".")[0]] for target in foreign
    ]
    return list(dict.fromkeys(prefix for prefixes in given for prefix in prefixes))


def _within(target: str, prefixes: Sequence[str]) -> bool:
    return any(target == prefix or target.startswith(f"{prefix}.") for prefix in prefixes)


def _targets(node: Any) -> Iterator[str]:
    """Every ``_target_`` of a node, those of nested nodes too."""
    if isinstance(node, dict):
        if "_target_" in node:
            yield str(node["_target_"])
        for value in node.values():
            yield from _targets(value)
    elif isinstance(node, list):
        for value in node:
            yield from _targets(value)


def _formula(config: ModelConfig) -> str:
    """The preprocessing in NumPy's words."""
    how = config.preprocessing
    assert how is not None  # Callers look first.
    trailing = "".join(", 1" for _ in config.input_shape[1:])
    mean, std = (
        f"np.reshape({_list(value)}, (-1{trailing}))" if isinstance(value, tuple) else repr(value)
        for value in (how.mean, how.std)
    )
    return f"({'raw' if how.scale == 1 else f'raw / {how.scale:g}'} - {mean}) / {std}"


def _list(values: Sequence[Any]) -> str:
    return "[" + ", ".join(f'"{value}"' if isinstance(value, str) else repr(value) for value in values) + "]"
