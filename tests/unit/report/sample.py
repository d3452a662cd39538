"""A run directory with invented figures, for unit tests only."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from horovod_jobs import manifest as manifests
from horovod_jobs.artifacts import ArtifactStore
from horovod_jobs.storage import digest_of

CLASSES = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]
CONFIG = {
    "model": {"_target_": "horovod_jobs.models.cnn.StridedCnn"},
    "num_classes": 10,
    "input_shape": [1, 28, 28],
    "class_names": CLASSES,
    "parameters": 23_530,
    "preprocessing": {"scale": 255.0, "mean": 0.286041, "std": 0.353024},
}
METHOD = "estimated: RAM by installed memory, CPU by load x TDP of 65 W (CodeCarbon); job's share of busy CPU time"
BASIS = {
    "hosts": 1,
    "carbon_intensity_g_per_kwh": 380.95,
    "country": "DEU",
    "region": None,
    "pue": 1.0,
    "usd_per_kwh": 0.25,
    "usd_per_host_hour": 0.0,
    "cpu_model": "Invented CPU",
    "cpu_tdp_w": 65,
    "ram_w": 10.0,
    "scope": "job",
}
NEEDS: dict[str, dict[str, str]] = {
    "teacher": {},
    "plain": {},
    "student": {"teacher": "teacher"},
    "int8": {"model": "student"},
    "eval_teacher": {"model": "teacher"},
    "eval_plain": {"model": "plain"},
    "eval_student": {"model": "student"},
    "eval_int8": {"model": "int8"},
    "export": {"model": "student"},
    "report": {
        "teacher": "eval_teacher",
        "student without distillation": "eval_plain",
        "student": "eval_student",
        "int8 student": "eval_int8",
        "export": "export",
    },
}
KINDS = {
    "teacher": "train",
    "plain": "train",
    "student": "distill",
    "int8": "quantize",
    "export": "export",
    "report": "report",
}
OUTPUTS = {"train": "model", "distill": "model", "quantize": "quantized", "evaluate": "evaluation", "export": "export"}
MODELS: dict[str, tuple[int, float, float, float, float]] = {  # parameters, seconds, accuracy, latency at 1 and 64
    "teacher": (242_762, 152.3, 0.9142, 0.61, 14.2),
    "plain": (23_530, 41.7, 0.8911, 0.19, 2.9),
    "student": (23_530, 66.0, 0.9012, 0.19, 2.9),
    "int8": (23_530, 9.4, 0.8997, 0.11, 1.31),
}


def confusion_of(accuracy: float) -> list[list[int]]:
    """1000 samples a class; class 6 (Shirt) is the hard one, and errors go to a neighbour."""
    rows = []
    for true in range(10):
        right = round(1000 * (accuracy - (0.2 if true == 6 else -0.02)))
        row = [0] * 10
        row[true] = right
        row[(true + 2) % 10] += (1000 - right) // 2
        row[(true + 4) % 10] += 1000 - right - (1000 - right) // 2
        rows.append(row)
    return rows


def history(epochs: int, final: float) -> list[dict[str, Any]]:
    return [
        {
            "epoch": e,
            "step": e * 100,
            "train_loss": 0.2 + 0.8 / e,
            "validation_accuracy": final - 0.15 / e,
            "lr": 0.1,
            "samples_per_s": 9000.0,
        }
        for e in range(1, epochs + 1)
    ]


def safetensors(parameters: int) -> bytes:
    header = json.dumps({"w": {"dtype": "F32", "shape": [parameters], "data_offsets": [0, 4 * parameters]}}).encode()
    return struct.pack("<Q", len(header)) + header + bytes(4 * parameters)


def write_sample(
    root: Path,
    *,
    only: set[str] | None = None,
    status: str = "done",
    run_id: str = "20260101-120000-ab12",
    **overrides: Any,
) -> Path:
    """Write a run under ``root/runs`` and its artifacts under ``root/artifacts``; ``only`` keeps some of the stages."""
    store = ArtifactStore(root / "artifacts")
    needs = {
        name: {role: source for role, source in wanted.items() if only is None or source in only}
        for name, wanted in NEEDS.items()
        if only is None or name in only
    }
    config: dict[str, Any] = {
        "name": "fashion_mnist_compress",
        "seed": 0,
        "data": {"_target_": "horovod_jobs.data.fashion_mnist.FashionMNIST", "root": None},
        "stages": {name: {"kind": kind_of(name), "needs": wanted} for name, wanted in needs.items()},
        **overrides,
    }
    entries, made = [], {}
    for name in needs:
        if name == "report" and status == "running":
            entries.append(empty(name, needs[name], "running"))
            continue
        made[name] = publish(store, name, needs[name], made)
        entries.append(entry_of(name, needs[name], made[name]))
    manifest = {
        "schema_version": 1,
        "run_id": run_id,
        "name": config["name"],
        "status": status,
        "started_at": "2026-01-01T12:00:00+00:00",
        "ended_at": None if status == "running" else "2026-01-01T12:05:10+00:00",
        "command": ["horovod-jobs", "experiment=main", "launch=local", "launch.np=2", "name=a b"],
        "error": None if status in ("done", "running") else "the loss is not finite (step 12)",
        "exit_code": {"done": 0, "running": None}.get(status, 8),
        "store": "../../artifacts",
        "world": {"size": 2, "hosts": 1, "controller": "mpi"},
        "versions": {
            "python": "3.11.7",
            "horovod_jobs": "0.1.0",
            "torch": "2.13.0",
            "horovod": "0.28.1",
            "mpi4py": None,
        },
        "config_digest": digest_of(config),
        "origin": {"data_digest": "ab" * 32, "git_commit": "cd" * 20 + "-dirty", "environment": {"PYTHONPATH": "a b"}},
        "stages": entries,
        "totals": totals(entries),
    }
    run_dir = root / "runs" / run_id
    run_dir.mkdir(parents=True)
    import yaml

    (run_dir / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    manifests.write(run_dir, manifest)
    return run_dir


def kind_of(name: str) -> str:
    return KINDS.get(name, "evaluate")


def totals(entries: list[dict[str, Any]]) -> dict[str, Any]:
    sums = {key: sum(entry[key] or 0.0 for entry in entries) for key in ("energy_kwh", "co2_kg", "cost_usd")}
    return {"seconds": 310.0, **sums, "artifacts": sums}


def empty(name: str, needs: dict[str, str], status: str) -> dict[str, Any]:
    figures = (
        "artifact",
        "seconds",
        "parameters",
        "model_bytes",
        "latency_ms",
        "energy_kwh",
        "co2_kg",
        "cost_usd",
        "footprint_method",
    )
    rest = dict.fromkeys((*figures, "resumed_from_step", "reason"))
    return {"name": name, "kind": kind_of(name), "needs": needs, "status": status, "metrics": {}, **rest}


def publish(store: ArtifactStore, name: str, needs: dict[str, str], made: dict[str, Any]) -> Any:
    kind = kind_of(name)
    output = OUTPUTS.get(kind, "report")
    fingerprint = digest_of([name, needs])
    staging = store.staging(output, fingerprint)
    meta = meta_of(name, kind, needs, made)
    if output in ("model", "quantized"):
        parameters = MODELS[name][0]
        file = "model.safetensors" if output == "model" else "model.onnx"
        (staging / file).write_bytes(safetensors(parameters) if output == "model" else onnx_bytes(parameters))
        (staging / "config.json").write_text(json.dumps(CONFIG | {"format": "torch" if output == "model" else "onnx"}))
        meta["model_bytes"] = (staging / file).stat().st_size
    else:
        (staging / f"{output}.json").write_text("{}")
    if output == "evaluation":
        meta["model_bytes"] = made[needs["model"]].meta["model_bytes"]
    return store.publish(staging, kind=output, fingerprint=fingerprint, meta=meta)


def onnx_bytes(parameters: int) -> bytes:
    """An ONNX file with int8 weights and a graph of Identity nodes that makes up most of it."""
    from onnx import TensorProto, helper

    weights = helper.make_tensor("w", TensorProto.INT8, [parameters], bytes(parameters), raw=True)
    nodes = [helper.make_node("Identity", ["w"], [f"out_{i}_" + "x" * 200]) for i in range(120)]
    graph = helper.make_graph(nodes, "g", [], [], initializer=[weights])
    return helper.make_model(graph).SerializeToString()


def meta_of(name: str, kind: str, needs: dict[str, str], made: dict[str, Any]) -> dict[str, Any]:
    source = needs.get("model", name) if kind == "evaluate" else name
    parameters, seconds, accuracy, one, many = MODELS.get(source, (0, 1.4, 0.0, 0.0, 0.0))
    if kind == "evaluate":
        seconds = 6.5
    metrics: dict[str, float] = {}
    details: dict[str, Any] = {}
    latency = None
    if kind in ("train", "distill"):
        details["history"] = history(12, accuracy)
        metrics = {"train_loss": 0.27, "validation_accuracy": accuracy, "epochs": 12}
    if kind == "evaluate":
        counts = confusion_of(accuracy)
        per_class = [counts[i][i] / 1000 for i in range(10)]
        metrics = {"accuracy": sum(per_class) / 10, "top_5": 0.99, "loss": 0.3, "worst_class_accuracy": per_class[6]}
        details = {
            "latency": {"cpu": "Measured CPU"},
            "worst_class": "Shirt",
            "per_class_accuracy": per_class,
            "confusion": counts,
            "class_names": CLASSES,
        }
        latency = {"1": {"p50": one, "p95": one * 1.2}, "64": {"p50": many, "p95": many * 1.1}}
    energy = seconds * 55 / 3.6e6
    footprint = {
        "seconds": seconds,
        "energy_kwh": energy,
        "co2_kg": energy * 0.38095,
        "cost_usd": energy * 0.25,
        "method": METHOD,
        "details": BASIS,
    }
    return {
        "stage": name,
        "stage_kind": kind,
        "created_at": "2026-01-01T12:00:00+00:00",
        "seconds": seconds,
        "metrics": metrics,
        "parameters": parameters or None,
        "model_bytes": None,
        "latency_ms": latency,
        "details": details,
        "footprint": footprint,
        "inputs": {role: {"ref": made[s].ref, "stage": s, "kind": made[s].kind} for role, s in needs.items()},
        "config": {
            "kind": kind,
            "split": "test",
            "latency_runs": 50,
            "latency_threads": 1,
            "seed": 0,
            "fit": {"global_batch": 128, "precision": "fp32"},
        },
    }


def entry_of(name: str, needs: dict[str, str], artifact: Any) -> dict[str, Any]:
    meta = artifact.meta
    footprint = meta["footprint"]
    return {
        **empty(name, needs, "reused" if name == "teacher" else "ran"),
        "artifact": artifact.ref,
        **{key: meta[key] for key in ("seconds", "metrics", "parameters", "model_bytes", "latency_ms")},
        **{key: footprint[key] for key in ("energy_kwh", "co2_kg", "cost_usd")},
        "footprint_method": footprint["method"],
    }
