"""A model on disk: the directory with config.json and its weights, found by path or by run and stage. No torch here."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from horovod_jobs.artifacts import INDEX, Artifact, open_artifact
from horovod_jobs.errors import ArtifactError, ConfigError
from horovod_jobs.preprocessing import Preprocessing
from horovod_jobs.runtimes import FORMATS, Format

WEIGHTS = FORMATS["torch"].file
ONNX_FILE = FORMATS["onnx"].file
CONFIG = "config.json"
INPUT_DTYPES = ("float32", "int64", "int32", "int16", "int8", "uint8", "bool")


@dataclass(frozen=True)
class ModelConfig:
    """What config.json says of a model."""

    format: str
    model: dict[str, Any]
    num_classes: int
    input_shape: tuple[int, ...]
    class_names: tuple[str, ...]
    parameters: int
    directory: Path
    input_dtype: str = "float32"
    fields: tuple[tuple[str, int, int], ...] = ()  # (name, number of ids, columns), where inputs are rows of ids
    preprocessing: Preprocessing | None = None  # of raw samples, where the data set told it

    @property
    def model_arguments(self) -> dict[str, Any]:
        """What the model's constructor is offered besides its config."""
        known = {"num_classes": self.num_classes, "input_shape": self.input_shape}
        return {**known, "fields": self.fields} if self.fields else known

    def to_json(self) -> dict[str, Any]:
        """What ``read_config`` reads back."""
        return {
            "format": self.format,
            "model": self.model,
            "num_classes": self.num_classes,
            "input_shape": list(self.input_shape),
            "input_dtype": self.input_dtype,
            **({"fields": [list(field) for field in self.fields]} if self.fields else {}),
            **({"preprocessing": self.preprocessing.to_json()} if self.preprocessing else {}),
            "class_names": list(self.class_names),
            "parameters": self.parameters,
        }

    @property
    def kept_as(self) -> Format:
        """The format, as this package knows it.

        Raises:
            ArtifactError: it does not.
        """
        if self.format not in FORMATS:
            raise ArtifactError(
                f"{self.directory} has format {self.format!r}; this version reads {' and '.join(FORMATS)}, so load it with the one "
                "that made it"
            )
        return FORMATS[self.format]

    @property
    def file(self) -> Path:
        """The model's file."""
        return self.directory / self.kept_as.file

    def in_format(self, form: str | None) -> ModelConfig:
        """The same model from the file of another format that lies beside it; None: as it is.

        Raises:
            ConfigError: an unknown format.
            ArtifactError: there is no such file here.
        """
        if form is None:
            return self
        if form not in FORMATS:
            raise ConfigError(f"format={form} is not known; use one of {', '.join(FORMATS)}, or null")
        other = replace(self, format=form)
        if not other.file.is_file():
            raise ArtifactError(
                f"{self.directory} has no {other.file.name}, which format={form} needs; give an export made with onnx=true"
            )
        return other


def read_config(path: str | Path | Artifact, *, verify: bool = True) -> ModelConfig:
    """The config of a model artifact, of an export bundle, or of the bundle that a file of a model (model.onnx) lies in.

    Raises:
        ArtifactError: there is no model, or it is damaged.
    """
    if isinstance(path, Artifact):
        return _read_directory(path.path)
    path = resolve(path)
    if path.is_file():
        config = _read_directory(path.parent, verify=verify)
        forms = [form.name for form in FORMATS.values() if Path(form.file).suffix == path.suffix]
        return replace(config, format=forms[0]) if forms else config
    return _read_directory(path, verify=verify)


def resolve(path: str | Path) -> Path:
    """``runs/latest:student`` is the artifact of that run's stage; any other path is itself.

    Raises:
        ArtifactError: no such run or stage, or a stage that made nothing.
    """
    run, colon, stage = str(path).rpartition(":")
    if not colon or Path(path).exists():
        return Path(path)
    manifest_path = Path(run) / "manifest.json"
    try:
        manifest = json.loads(manifest_path.read_text(encoding="utf-8"))
        stages = {entry["name"]: entry["artifact"] for entry in manifest["stages"]}
        store = Path(run) / manifest["store"]
    except FileNotFoundError as error:
        raise ArtifactError(
            f"no run at {run} (there is no manifest.json); give a run's directory before the colon"
        ) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(
            f"{manifest_path} cannot be read ({error}); give the path of an artifact instead"
        ) from error
    if stages.get(stage) is None:
        made = ", ".join(name for name, ref in stages.items() if ref) or "none"
        raise ArtifactError(f"run {run} has no artifact of a stage {stage!r}; those with one: {made}")
    return store / str(stages[stage])


def _read_directory(directory: Path, *, verify: bool = False) -> ModelConfig:
    if verify and (directory / INDEX).exists():
        open_artifact(directory)  # Checks every digest; a bundle that was copied elsewhere has no index.
    try:
        raw = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
        dtype = raw.get("input_dtype", "float32")
        if dtype not in INPUT_DTYPES:
            raise ValueError(f"input_dtype {dtype!r} is not one of {', '.join(INPUT_DTYPES)}")
        return ModelConfig(
            format=str(raw["format"]),
            model=dict(raw["model"]),
            num_classes=int(raw["num_classes"]),
            input_shape=tuple(int(size) for size in raw["input_shape"]),
            class_names=tuple(str(name) for name in raw["class_names"]),
            parameters=int(raw["parameters"]),
            directory=directory,
            input_dtype=dtype,
            fields=tuple((str(name), int(size), int(columns)) for name, size, columns in raw.get("fields", ())),
            preprocessing=Preprocessing.of(raw["preprocessing"]) if raw.get("preprocessing") else None,
        )
    except FileNotFoundError as error:
        raise ArtifactError(
            f"no model at {directory} (there is no {CONFIG}); give a model, quantized or export artifact, or RUN:STAGE"
        ) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(
            f"{directory / CONFIG} cannot be read ({error!r}); run its job again to make it anew"
        ) from error
