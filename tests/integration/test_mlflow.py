"""tracker=mlflow: both kinds of store without a server, read back, and an address where nobody answers."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.integration.support import TINY, WORLD, run

pytest.importorskip("mlflow", reason="the extra mlflow is not installed")
pytestmark = pytest.mark.filterwarnings(
    "ignore:The .*noload.* loader strategy:DeprecationWarning"
)  # MLflow reads its own store by what SQLAlchemy deprecates.


@pytest.mark.parametrize("world", [(), WORLD], ids=["one process", "two ranks"])
@pytest.mark.parametrize("uri", ["sqlite:///{}/mlflow.db", "file://{}/mlruns"])
def test_scalars_can_be_read_back(
    tmp_path: Path, uri: str, world: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = uri.format(tmp_path)
    done = run(*TINY, "tracker=mlflow", f"tracker.uri={store}", *world, cwd=tmp_path)
    assert done.code == 0, done.text
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # To read it; the job sets it for itself.
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=store)
    experiment = client.get_experiment_by_name("horovod_jobs")
    runs = client.search_runs([experiment.experiment_id])
    assert [run.info.status for run in runs] == ["FINISHED"], "one for the job, whatever the number of ranks"
    history = client.get_metric_history(runs[0].info.run_id, "model/validation_accuracy")
    assert history
    assert all(0 <= entry.value <= 1 for entry in history)
    assert runs[0].data.params["seed"] == "0"


def test_a_store_that_cannot_be_opened_is_one_line(tmp_path: Path) -> None:
    done = run(*TINY, "tracker=mlflow", "tracker.uri=http://me:secret@127.0.0.1:9/", cwd=tmp_path, timeout_s=100)
    assert done.code == 5, done.text
    assert len(done.errors) == 1, done.text
    assert "tracker.uri=http://***@127.0.0.1:9/ cannot be used" in done.errors[0]
    assert "secret" not in done.text
    assert "Traceback" not in done.text
