"""Submitting, showing, following, fetching and suspending: the real ``kubernetes`` client against a test double of the API server."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from horovod_jobs import runs
from horovod_jobs.config import KubernetesConfig, LaunchConfig
from horovod_jobs.errors import ConfigError, SetupError
from horovod_jobs.launch.kubernetes import jobs, mpijob, trainjob
from horovod_jobs.launch.kubernetes.client import Cluster
from tests.unit.launch.support_cluster import FakeCluster, fake_cluster
from tests.unit.launch.support_launch import ENVIRON, HOST, job
from tests.unit.launch.test_entrypoint import entrypoint

pytest.importorskip(
    "kubernetes", reason="the kubernetes package is not installed (pip install 'horovod-jobs[kubernetes]')"
)


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCluster]:
    with fake_cluster(tmp_path) as made:
        monkeypatch.setenv("KUBECONFIG", str(made.kube_config))
        # The client reads the variable when it is imported.
        monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(made.kube_config))
        yield made


def submit(kind: str = "mpijob", **changes: Any) -> int:
    launch = LaunchConfig(kind=kind, np=2, kubernetes=KubernetesConfig(name="demo", slots=2, **changes))
    module = mpijob if kind == "mpijob" else trainjob
    return module.start(launch, module.plan_job(launch, job=job(), host=HOST, environ=ENVIRON))


@pytest.mark.parametrize(
    ("kind", "plurals"),
    [
        ("mpijob", ["configmaps", "networkpolicies", "mpijobs"]),
        ("trainjob", ["configmaps", "networkpolicies", "trainingruntimes", "trainjobs"]),
    ],
)
def test_a_job_is_submitted_with_what_it_needs(
    cluster: FakeCluster, capsys: pytest.CaptureFixture[str], kind: str, plurals: list[str]
) -> None:
    assert submit(kind) == 0
    assert [plural for _, plural, _ in cluster.objects] == plurals
    assert {namespace for namespace, _, _ in cluster.objects} == {"ml"}
    *others, made = cluster.objects.values()
    owner = {"apiVersion": made["apiVersion"], "kind": made["kind"], "name": "demo", "uid": "uid-demo"}
    assert [entry["metadata"]["ownerReferences"] for entry in others] == [[owner]] * len(others), "they go with the job"
    posts = [line for line in cluster.asked if line.startswith("POST")]
    assert all("fieldValidation=Strict" in line for line in posts), "the cluster is to refuse what it does not know"
    assert all(line.endswith("application/merge-patch+json") for line in cluster.asked if line.startswith("PATCH"))
    assert "horovod-runs pods demo --namespace ml" in capsys.readouterr().out


def test_nothing_is_left_of_a_job_that_is_refused(cluster: FakeCluster) -> None:
    cluster.refuse["mpijobs"] = (422, 'MPIJob "demo" is invalid: spec.slotsPerWorker')
    with pytest.raises(
        ConfigError, match=r'cannot make MPIJob demo: MPIJob "demo" is invalid: spec.slotsPerWorker \(status 422\)'
    ):
        submit()
    assert cluster.objects == {}


def test_a_name_that_is_taken_is_said_and_the_earlier_job_stays(cluster: FakeCluster) -> None:
    submit()
    before = json.dumps(list(cluster.objects.values()))
    with pytest.raises(ConfigError, match="already exists; delete the earlier job .* or set launch.kubernetes.name"):
        submit()
    assert json.dumps(list(cluster.objects.values())) == before


def test_a_cluster_without_the_operator_is_said(cluster: FakeCluster) -> None:
    cluster.kinds = ("configmaps", "networkpolicies")
    with pytest.raises(
        SetupError, match="cannot make MPIJob demo: .*; it needs Kubeflow's MPI operator in the cluster"
    ):
        submit()
    assert cluster.objects == {}


def test_a_right_that_is_missing_is_said(cluster: FakeCluster) -> None:
    cluster.refuse["configmaps"] = (403, 'configmaps is forbidden: User "me" cannot create resource')
    with pytest.raises(SetupError, match="is forbidden.*ask for the right, or choose another context or namespace"):
        submit()


def test_a_cluster_that_does_not_answer_is_said(cluster: FakeCluster) -> None:
    cluster.kube_config.write_text(cluster.kube_config.read_text().replace(cluster.url, "http://127.0.0.1:1"))
    with pytest.raises(SetupError, match="cannot make ConfigMap demo-job: the cluster does not answer"):
        submit()


def test_no_configuration_and_no_package_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "none"))
    with pytest.raises(SetupError, match="no cluster is configured .*; see that kubectl works here, or set KUBECONFIG"):
        Cluster()
    monkeypatch.setitem(sys.modules, "kubernetes", None)
    with pytest.raises(SetupError, match=r"pip install 'horovod-jobs\[kubernetes\]'.*kubectl apply -f -"):
        Cluster()


def running(cluster: FakeCluster) -> None:
    submit()
    cluster.objects["ml", "mpijobs", "demo"]["status"] = {
        "conditions": [{"type": "Running", "status": "True", "message": "it runs"}]
    }
    ended = {"state": {"terminated": {"exitCode": 137, "reason": "OOMKilled"}}}
    cluster.add_pod(
        "demo-launcher-a", "launcher", phase="Failed", **{"state": {"terminated": {"exitCode": 9, "reason": "Error"}}}
    )
    cluster.add_pod("demo-worker-0", "worker", restartCount=2, lastState=ended["state"])
    cluster.add_pod(
        "demo-worker-1",
        "worker",
        phase="Pending",
        state={"waiting": {"reason": "ImagePullBackOff", "message": "no such\nimage"}},
    )
    cluster.add_pod("demo-launcher-b", "launcher")
    cluster.add_pod("other-launcher", "launcher", job="other")


def test_pods_are_shown_with_why_they_do_not_run(cluster: FakeCluster, capsys: pytest.CaptureFixture[str]) -> None:
    running(cluster)
    capsys.readouterr()
    assert runs.main(["pods", "demo"]) == 0
    text = capsys.readouterr().out
    assert "MPIJob demo  Running  it runs" in text
    assert "ImagePullBackOff: no such image" in text
    assert "exit code 9, Error" in text
    assert "other-launcher" not in text
    assert runs.main(["pods", "demo", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["state"], [pod["restarts"] for pod in told["pods"]]) == ("Running", [0, 2, 0, 0])


def test_logs_are_those_of_the_latest_launcher_and_for_a_person(
    cluster: FakeCluster, capsys: pytest.CaptureFixture[str]
) -> None:
    running(cluster)
    cluster.logs = {
        "demo-launcher-b": ["epoch 1", "épreuve", *entrypoint.chunks(b"{}"), "done"],
        "demo-worker-0": ["sshd"],
    }
    cluster.log_pause_s = 0.05
    capsys.readouterr()
    assert runs.main(["logs", "demo", "--follow"]) == 0
    assert capsys.readouterr().out == "epoch 1\népreuve\ndone\n"
    assert any("/pods/demo-launcher-b/log?follow=" in line for line in cluster.asked)
    assert runs.main(["logs", "demo", "--pod", "demo-worker-0"]) == 0
    assert capsys.readouterr().out == "sshd\n"


def test_the_manifest_is_fetched_and_shown(
    cluster: FakeCluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    running(cluster)
    value = {"run_id": "demo-launcher-b", "name": "demo", "stages": []}
    cluster.logs = {"demo-launcher-b": ["epoch 1", *entrypoint.chunks(json.dumps(value).encode())]}
    assert runs.main(["fetch", "demo", "--root", str(tmp_path / "runs")]) == 0
    assert json.loads((tmp_path / "runs/demo-launcher-b/manifest.json").read_text()) == value
    cluster.logs = {"demo-launcher-b": ["epoch 1"]}
    capsys.readouterr()
    assert runs.main(["fetch", "demo", "--root", str(tmp_path / "runs")]) == 4
    assert "the log of demo-launcher-b has no manifest (the job is Running)" in capsys.readouterr().err


def test_a_run_id_that_leads_out_of_the_directory_is_not_written(cluster: FakeCluster, tmp_path: Path) -> None:
    running(cluster)
    cluster.logs = {"demo-launcher-b": entrypoint.chunks(b'{"run_id": "../outside"}')}
    assert runs.main(["fetch", "demo", "--root", str(tmp_path / "runs")]) == 2
    assert not (tmp_path / "outside").exists()


@pytest.mark.parametrize(("kind", "plural"), [("mpijob", "mpijobs"), ("trainjob", "trainjobs")])
def test_suspend_and_resume(cluster: FakeCluster, kind: str, plural: str) -> None:
    submit(kind, suspend=True)
    for command, wanted in (("resume", False), ("suspend", True)):
        assert runs.main([command, "demo"]) == 0
        spec = cluster.objects["ml", plural, "demo"]["spec"]
        assert (spec["runPolicy"] if kind == "mpijob" else spec)["suspend"] is wanted


def test_a_job_that_is_not_there_is_said(cluster: FakeCluster, capsys: pytest.CaptureFixture[str]) -> None:
    assert runs.main(["pods", "nothing", "--namespace", "elsewhere"]) == 2
    assert "there is no MPIJob or TrainJob nothing in the namespace elsewhere" in capsys.readouterr().err
    submit()
    assert runs.main(["logs", "demo"]) == 2
    assert "the job demo has no launcher now: it is Created" in capsys.readouterr().err


def test_following_shows_every_attempt_and_gives_the_jobs_code(
    cluster: FakeCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit()
    shown: list[str] = []
    cluster.logs = {"demo-launcher-a": ["first"], "demo-launcher-b": ["second"]}

    def later(seconds: float) -> None:
        """What a cluster does between two looks."""
        if not cluster.pods:
            cluster.add_pod("demo-launcher-a", "launcher", phase="Failed", state={"terminated": {"exitCode": 137}})
        elif len(cluster.pods) == 1:
            cluster.add_pod("demo-launcher-b", "launcher", phase="Failed", state={"terminated": {"exitCode": 9}})
        else:
            cluster.objects["ml", "mpijobs", "demo"]["status"] = {
                "conditions": [{"type": "Failed", "status": "True", "message": "too often"}]
            }

    assert jobs.follow(Cluster(), "demo", show=shown.append, sleep=later) == 9
    assert shown == ["the job demo is Created; waiting for its launcher", "first", "second"]
    cluster.objects["ml", "mpijobs", "demo"]["status"] = {"conditions": [{"type": "Succeeded", "status": "True"}]}
    assert jobs.follow(Cluster(), "demo", show=shown.append, sleep=later) == 0


def test_horovod_runs_stays_fast() -> None:
    """The client takes a second to import: only the commands that need it do."""
    import subprocess

    heavy = ("kubernetes", "torch", "yaml")
    script = f"import sys; from horovod_jobs import runs; runs._parser(); print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "[]\n"
