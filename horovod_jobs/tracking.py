"""Where scalars go while a job runs. One tracker a job, on rank 0; the others hold a null tracker."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, Protocol

from horovod_jobs.errors import SetupError
from horovod_jobs.storage import flatten


class Tracker(Protocol):
    """Takes named scalars. ``open`` is called once a job, ``close`` at its end or its failure."""

    def open(self, *, run_dir: Path, run_id: str, config: dict[str, Any]) -> None: ...
    def scalar(self, name: str, value: float, *, step: int) -> None: ...
    def close(self, *, failed: bool = False) -> None: ...


class NullTracker:
    """Keeps nothing."""

    def open(self, *, run_dir: Path, run_id: str, config: dict[str, Any]) -> None:
        """Nothing to open."""

    def scalar(self, name: str, value: float, *, step: int) -> None:
        """Nothing is kept."""

    def close(self, *, failed: bool = False) -> None:
        """Nothing to close."""


class TensorBoard:
    """Event files in ``<run>/tensorboard``; read them with ``tensorboard --logdir runs``."""

    def __init__(self, *, flush_s: int = 10) -> None:
        self._flush_s = flush_s
        self._writer: Any = None

    def open(self, *, run_dir: Path, run_id: str, config: dict[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run_dir / "tensorboard"), flush_secs=self._flush_s)

    def scalar(self, name: str, value: float, *, step: int) -> None:
        self._writer.add_scalar(name, value, step)

    def close(self, *, failed: bool = False) -> None:
        if self._writer is not None:
            self._writer.close()


_MLFLOW_SETTINGS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",  # Nothing leaves the machine unless the user says so.
    "MLFLOW_ALLOW_FILE_STORE": "true",  # It was asked for by name.
    # A server that is not there is told in seconds, not minutes.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
}


def _without_password(uri: str) -> str:
    return re.sub(r"//[^/@]*@", "//***@", uri)


class MLflow:
    """An MLflow store: ``sqlite:///PATH`` or ``file:PATH`` without a server, or a server's address. Needs the extra ``mlflow``."""

    def __init__(self, *, uri: str, experiment: str = "horovod_jobs") -> None:
        self._uri = uri
        self._experiment = experiment
        self._client: Any = None
        self._run_id = ""

    def open(self, *, run_dir: Path, run_id: str, config: dict[str, Any]) -> None:
        for name, value in _MLFLOW_SETTINGS.items():
            os.environ.setdefault(name, value)
        try:
            from mlflow.tracking import MlflowClient
        except ImportError as error:
            raise SetupError(
                f"tracker=mlflow needs mlflow-skinny ({error}); install it: pip install 'horovod-jobs[mlflow]'"
            ) from error
        try:
            client = MlflowClient(tracking_uri=self._uri)
            found = client.get_experiment_by_name(self._experiment)
            experiment_id = found.experiment_id if found else client.create_experiment(self._experiment)
            self._run_id = client.create_run(experiment_id, run_name=run_id).info.run_id
        except Exception as error:  # MLflow's, SQLAlchemy's and requests' errors have no base class of their own.
            what = (str(error).strip().splitlines() or [type(error).__name__])[0][:200].replace(self._uri, "it")
            raise SetupError(
                f"tracker.uri={_without_password(self._uri)} cannot be used as an MLflow store ({what}); use "
                "sqlite:///runs/mlflow.db, file:./runs/mlflow, or the address of a server that runs"
            ) from error
        self._client = client
        for key, value in flatten(config):
            if value == {}:
                continue
            self._client.log_param(self._run_id, key, str(value)[:500])

    def scalar(self, name: str, value: float, *, step: int) -> None:
        self._client.log_metric(self._run_id, name, value, step=step)

    def close(self, *, failed: bool = False) -> None:
        if self._client is not None:
            self._client.set_terminated(self._run_id, status="FAILED" if failed else "FINISHED")
