"""A Hugging Face style model card: YAML metadata and Markdown, about the run's final model.

Metadata fields: the hub's model card specification (huggingface/hub-docs, modelcard.md) and its page on CO2 emissions.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from horovod_jobs import formats
from horovod_jobs.bundle import read_config
from horovod_jobs.errors import ArtifactError
from horovod_jobs.report import words
from horovod_jobs.report.collect import ModelRow, ReportData, StageView
from horovod_jobs.report.measures import measure
from horovod_jobs.report.table import main_table, methods_note
from horovod_jobs.usage import example, inputs_sentence

# The hub's names of metrics, where they are not ours.
_METRIC_TYPES = {"auc": "roc_auc"}


def render_model_card(data: ReportData) -> str:
    """The card of the run's final model, in Markdown."""
    import yaml
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("horovod_jobs.report", "templates"),
        # Markdown is no HTML: the filter `md` escapes what would break a table or a line.
        autoescape=False,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["md"] = _markdown
    metadata = yaml.safe_dump(card_metadata(data), sort_keys=False, allow_unicode=True, width=1000)
    final = data.final
    return environment.get_template("model_card.md.j2").render(
        metadata=metadata.rstrip(),
        data=data,
        final=final,
        table=main_table(data) if data.models else None,
        sentences=words.summary_sentences(data),
        notes=[n for n in (words.interval_note(data.models), methods_note(data), words.bytes_note(data)) if n],
        footprint_note=words.footprint_note(data),
        command=words.command_line(data),
        training=[_training(stage) for stage in _lineage_stages(data) if stage.entry["kind"] in ("train", "distill")],
        classes=list(zip(final.class_names, map(formats.percent, final.per_class), strict=True))
        if final and len(final.class_names) == len(final.per_class)
        else [],
        usage=_usage(data),
        origin=words.origin_facts(data),
        versions=[(name, version) for name, version in data.manifest["versions"].items() if version],
    )


def card_metadata(data: ReportData) -> dict[str, Any]:
    """The card's YAML block as a dictionary; a field without a figure is left out."""
    final = data.final
    kinds = {stage.entry["kind"] for stage in _lineage_stages(data)}
    tags = ["horovod", "image-classification"] if _task_type(data) == "image-classification" else ["horovod"]
    tags += [tag for kind, tag in (("distill", "knowledge-distillation"), ("quantize", "quantized")) if kind in kinds]
    metadata: dict[str, Any] = {
        "license": data.license,
        "library_name": "onnx" if final and final.format == "onnx" else "pytorch",
        "tags": tags,
    }
    dataset = dataset_name(data)
    if dataset:
        metadata["datasets"] = [dataset]
    if final and final.score is not None:
        metadata["metrics"] = [_METRIC_TYPES.get(final.primary, final.primary)]
        metadata["model-index"] = [
            {"name": data.manifest["name"], "results": [_result(data, final, dataset or "unknown")]}
        ]
    emissions = _emissions(data)
    if emissions:
        metadata["co2_eq_emissions"] = emissions
    return metadata


def dataset_name(data: ReportData) -> str | None:
    """The data set's name in snake case, from what the config names: FashionMNIST -> fashion_mnist."""
    node = data.config.get("data") or {}
    name = str(node.get("_target_", "")).rpartition(".")[2]
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower() or None


def _result(data: ReportData, row: ModelRow, dataset: str) -> dict[str, Any]:
    primary = {
        "type": _METRIC_TYPES.get(row.primary, row.primary),
        "value": row.score,
        "name": measure(row.primary).title,
    }
    metrics = [primary]
    for key, name in (("top_5", "Top-5 accuracy"), ("worst_class_accuracy", "Accuracy of the worst class")):
        if row.metrics.get(key) is not None:
            metrics.append({"type": "accuracy", "value": row.metrics[key], "name": name})
    return {
        "task": {"type": _task_type(data)},
        "dataset": {"type": dataset, "name": dataset, "split": row.split},
        "metrics": metrics,
    }


def _task_type(data: ReportData) -> str:
    stage = next((s for s in data.stages if s.artifact and s.artifact.kind in ("model", "quantized")), None)
    if stage is None or stage.artifact is None:
        return "other"
    config = _model_config(stage)
    if "fields" in config:
        return "tabular-classification"
    return "image-classification" if len(config.get("input_shape") or []) == 3 else "other"


def _model_config(stage: StageView) -> dict[str, Any]:
    """What the artifact of a model says of it; empty where that cannot be read."""
    if stage.artifact is None:
        return {}
    try:
        return dict(json.loads(stage.artifact.file("config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


def _usage(data: ReportData) -> dict[str, str] | None:
    """What the final model takes, and code that loads and calls it; None where its artifact cannot be read."""
    path = data.final.path if data.final else None
    if path is None:
        return None
    try:
        config = read_config(path, verify=False)
    except ArtifactError:
        return None
    here, absolute = Path.cwd(), Path(os.path.normpath(path.absolute()))
    shown = absolute.relative_to(here) if absolute.is_relative_to(here) else absolute
    allowed = [str(prefix) for prefix in data.config.get("allow_targets") or []]
    return {"inputs": inputs_sentence(config), "code": example(config, shown.as_posix(), allowed=allowed)}


def _lineage_stages(data: ReportData) -> list[StageView]:
    """The stages that led to the final model, in order."""
    lineage = data.final.lineage if data.final else []
    return [stage for ref in lineage for stage in data.stages if stage.entry["artifact"] == ref]


def _emissions(data: ReportData) -> dict[str, Any]:
    """What making the final model emitted, its teachers included; empty where a part is unknown."""
    stages = _lineage_stages(data)
    masses = [stage.entry["co2_kg"] for stage in stages]
    if not data.final or len(stages) < len(data.final.lineage) or not masses or None in masses:
        return {}
    found = data.footprint
    hardware = list(
        dict.fromkeys([*(found.get("gpu_models") or []), *([found["cpu_model"]] if found.get("cpu_model") else [])])
    )
    place = ", ".join(str(part) for part in (found.get("region"), found.get("country")) if part)
    methods = list(
        dict.fromkeys(stage.entry["footprint_method"] for stage in stages if stage.entry["footprint_method"])
    )
    emissions: dict[str, Any] = {
        "emissions": sum(mass * 1000 for mass in masses if mass is not None),  # grams
        "source": " / ".join(methods),
        "training_type": "fine-tuning" if any("init" in stage.entry["needs"] for stage in stages) else "pre-training",
    }
    if place:
        emissions["geographical_location"] = place
    if hardware:
        emissions["hardware_used"] = ", ".join(map(str, hardware))
    return emissions


def _training(stage: StageView) -> dict[str, str]:
    config = stage.meta.get("config") or {}
    fit, metrics = config.get("fit") or {}, stage.entry["metrics"] or {}
    facts = {
        "Model": _target(config.get("model")),
        "Optimizer": _target(config.get("optimizer")),
        "Schedule": _target(config.get("schedule")),
        "Distiller": _target(config.get("distiller")),
        "Epochs": formats.significant(metrics.get("epochs", fit.get("epochs"))),
        "Global batch": str(fit.get("global_batch") or ""),
        "Precision": str(fit.get("precision") or ""),
        "Seed": str(config.get("seed", "")),
        "Time": formats.duration(stage.entry["seconds"]),
    }
    return {
        "stage": stage.entry["name"],
        **{key: value for key, value in facts.items() if value not in ("", formats.DASH)},
    }


def _target(node: Any) -> str:
    if not isinstance(node, dict) or "_target_" not in node:
        return ""
    arguments = ", ".join(
        f"{key}={value}" for key, value in node.items() if key != "_target_" and not isinstance(value, dict)
    )
    return f"{str(node['_target_']).rpartition('.')[2]}({arguments})"


def _markdown(text: Any) -> str:
    """Text that stays text in a Markdown table: no line break, column, tag or emphasis."""
    return re.sub(r"([\\|*_`<>\[\]])", r"\\\1", " ".join(str(text).split()))
