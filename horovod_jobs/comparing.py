"""What differs between two runs: the figures of each stage, and the config keys."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from horovod_jobs import manifest as manifests
from horovod_jobs.errors import ArtifactError
from horovod_jobs.manifest import StageEntry
from horovod_jobs.storage import flatten

FIGURES = ("status", "seconds", "energy_kwh", "co2_kg", "cost_usd", "parameters", "model_bytes")
IGNORED = ("run.id",)


def compare(a: Path, b: Path) -> dict[str, Any]:
    """The comparison of two run directories as a JSON value.

    ``stages``: for every stage of either run its figures ``{"a", "b", "difference"}``, where ``difference`` is b - a
    for numbers; a figure that neither run has is left out. ``config``: the keys that differ, by dotted name.

    Raises:
        ArtifactError: a manifest or config cannot be read.
    """
    first, second = manifests.read(a), manifests.read(b)
    entries_a = {stage["name"]: stage for stage in first["stages"]}
    entries_b = {stage["name"]: stage for stage in second["stages"]}
    names = list(dict.fromkeys([*entries_a, *entries_b]))
    return {
        "a": first["run_id"],
        "b": second["run_id"],
        "stages": [{"name": name, "figures": _figures(entries_a.get(name), entries_b.get(name))} for name in names],
        "config": _config_differences(_flat_config(a), _flat_config(b)),
    }


def _figures(a: StageEntry | None, b: StageEntry | None) -> dict[str, dict[str, Any]]:
    flat_a, flat_b = dict(_flat_figures(a)), dict(_flat_figures(b))
    compared = {}
    for key in dict.fromkeys([*flat_a, *flat_b]):
        old, new = flat_a.get(key), flat_b.get(key)
        numbers = isinstance(old, int | float) and isinstance(new, int | float)
        compared[key] = {"a": old, "b": new, "difference": new - old if numbers else None}  # type: ignore[operator]
    return compared


def _flat_figures(entry: StageEntry | None) -> Iterator[tuple[str, Any]]:
    if entry is None:
        return
    for key in FIGURES:
        if entry[key] is not None:  # type: ignore[literal-required]
            yield key, entry[key]  # type: ignore[literal-required]
    yield from entry["metrics"].items()
    for batch, timing in (entry["latency_ms"] or {}).items():
        for quantile in ("p50", "p95"):
            yield f"latency_ms.{batch}.{quantile}", timing[quantile]


def _config_differences(a: dict[str, Any], b: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """By key the sides that have it; an absent side is absent here too, which null is not."""
    differences = {}
    for key in sorted({*a, *b}):
        sides = {side: config[key] for side, config in (("a", a), ("b", b)) if key in config}
        if key not in IGNORED and (len(sides) == 1 or sides["a"] != sides["b"]):
            differences[key] = sides
    return differences


def _flat_config(run_dir: Path) -> dict[str, Any]:
    import yaml

    # libyaml's loader is ten times faster, where PyYAML was built with it.
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    path = run_dir / "config.yaml"
    try:
        value = yaml.load(path.read_text(encoding="utf-8"), Loader=loader)
    except (OSError, yaml.YAMLError) as error:
        raise ArtifactError(f"{path} cannot be read ({error}); compare runs that have their config") from error
    return dict(flatten(value))
