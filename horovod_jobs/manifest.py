"""``runs/<run_id>/manifest.json``: the record of a run that other programs read. Its JSON Schema is ``schema()``.

The runner writes it at every stage's end, atomically, so a killed run leaves a true one. Standard library only: the
``horovod-runs`` command reads it without importing torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict, cast

from horovod_jobs.errors import ArtifactError, ConfigError
from horovod_jobs.storage import write_json

SCHEMA_VERSION = 1
NAME = "manifest.json"


class _Ranks(TypedDict):
    size: int
    hosts: int
    controller: str


class WorldEntry(_Ranks, total=False):
    """The world of ranks a run had when it began, and rank and host of those that died and without which the others went on."""

    lost: list[dict[str, Any]]


class StageEntry(TypedDict):
    """One stage of a run. The figures are what it cost to make its artifact, also where it is reused."""

    name: str
    kind: str
    needs: dict[str, str]
    status: str
    reason: str | None
    artifact: str | None
    seconds: float | None
    metrics: dict[str, float]
    parameters: int | None
    model_bytes: int | None
    latency_ms: dict[str, dict[str, float]] | None
    energy_kwh: float | None
    co2_kg: float | None
    cost_usd: float | None
    footprint_method: str | None
    resumed_from_step: int | None


class Spent(TypedDict):
    """Energy, carbon and money."""

    energy_kwh: float | None
    co2_kg: float | None
    cost_usd: float | None


class Totals(Spent):
    """What this run spent, and (``artifacts``) what everything it used cost to make, whenever that was."""

    seconds: float
    artifacts: Spent


class Origin(TypedDict):
    """What it takes, beside the command, to repeat a run."""

    data_digest: str
    git_commit: str | None
    environment: dict[str, str]


class _Whole(TypedDict):
    schema_version: int
    run_id: str
    name: str
    status: str
    started_at: str
    ended_at: str | None
    command: list[str]
    error: str | None
    exit_code: int | None
    store: str
    world: WorldEntry
    versions: dict[str, str | None]
    config_digest: str
    stages: list[StageEntry]
    totals: Totals


class Manifest(_Whole, total=False):
    """The whole of ``manifest.json``. A run of an older version has no ``origin``."""

    origin: Origin


def schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) that every manifest obeys."""
    return cast(
        dict[str, Any], json.loads(Path(__file__).with_name("manifest.schema.json").read_text(encoding="utf-8"))
    )


def write(run_dir: Path, manifest: Mapping[str, Any]) -> None:
    """Replace the run's manifest atomically.

    Raises:
        StorageError: it cannot be written; the one before stays.
    """
    write_json(run_dir / NAME, dict(manifest))


def read(run_dir: str | Path) -> Manifest:
    """The manifest of a run.

    Raises:
        ArtifactError: there is none, it is damaged, or another version of this package wrote it.
    """
    path = Path(run_dir) / NAME
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        version = value["schema_version"]
        missing = Manifest.__required_keys__ - set(value)
    except FileNotFoundError as error:
        raise ArtifactError(f"no run at {path.parent} (there is no {NAME}); horovod-runs ls lists the runs") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{path} is damaged ({type(error).__name__}: {error}); run the job again") from error
    if version != SCHEMA_VERSION:
        raise ArtifactError(
            f"{path} has schema version {version}, this package reads {SCHEMA_VERSION}; run the job again"
        )
    if missing:
        raise ArtifactError(f"{path} is damaged (it lacks {', '.join(sorted(missing))}); run the job again")
    return cast(Manifest, value)


def store_of(run_dir: Path, manifest: Manifest) -> Path:
    """The artifact store of a run; a relative path counts from the run's directory."""
    return Path(run_dir, manifest["store"])


def list_runs(root: str | Path) -> list[Path]:
    """The run directories under ``root``, the oldest first, whatever their names."""
    try:
        found = [path for path in Path(root).iterdir() if not path.is_symlink() and (path / NAME).is_file()]
        return sorted(found, key=lambda path: (_started_at(path), path.name))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise ArtifactError(f"cannot read {root} ({error.strerror}); choose a directory that you may read") from error


def _started_at(run_dir: Path) -> str:
    try:
        return str(json.loads((run_dir / NAME).read_text(encoding="utf-8"))["started_at"])
    except (OSError, ValueError, KeyError, TypeError):
        return "~"  # Damaged, and shown last; reading it says so.


def find_run(root: str | Path, name: str) -> Path:
    """The directory of a run, by its id, a unique beginning of it, ``latest``, or its path.

    Raises:
        ConfigError: nothing or more than one run is meant.
    """
    root = Path(root)
    if name and (root / name / NAME).is_file():
        return (root / name).resolve()
    if "/" in name or name in (".", ".."):
        if (Path(name) / NAME).is_file():
            return Path(name).resolve()
        raise ConfigError(f"no run at {name} (there is no {NAME}); give a run's directory, or its id and --root")
    runs = list_runs(root)
    if name == "latest" and runs:  # The link is gone or points nowhere.
        return runs[-1].resolve()
    matches = [path for path in runs if name and path.name.startswith(name)]
    if len(matches) == 1:
        return matches[0].resolve()
    if matches:
        shown = ", ".join(path.name for path in matches[:5]) + (", ..." if len(matches) > 5 else "")
        raise ConfigError(f"{name!r} begins {len(matches)} runs ({shown}); give more of the id")
    there = f"it has {len(runs)}; horovod-runs ls lists them" if runs else "it has none; run a job first or give --root"
    raise ConfigError(f"no run {name!r} under {root} ({there})")
