"""``launch=mpijob`` and ``launch=trainjob``: the manifests, held to golden files, to the operators' own schemas, and to Kubernetes' own."""

from __future__ import annotations

import copy
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from horovod_jobs.app import conf_dir
from horovod_jobs.config import ElasticConfig, KubernetesConfig, LaunchConfig
from horovod_jobs.errors import ConfigError
from horovod_jobs.job import register_schema, resolve
from horovod_jobs.launch.base import JobCommand
from horovod_jobs.launch.kubernetes import manifests, mpijob, trainjob
from tests.unit.launch.support_launch import ENVIRON, HOST, golden, job

ROOT = Path(__file__).resolve().parents[3]
FULL = KubernetesConfig(
    name="demo", namespace="ml", image="registry.example/jobs:1", pull_policy="Always", pull_secrets=["registry"], slots=2, cpu="7500m",
    memory="32Gi", gpus=2, shm="8Gi", runs_claim="runs", store_claim="artifacts", data_claim="data", secret_env={"TOKEN": "tracker/token"},
    labels={"kueue.x-k8s.io/queue-name": "team"}, node_selector={"pool": "gpu"}, tolerations=[{"key": "gpu", "operator": "Exists"}],
    service_account="jobs", priority_class="high", gang="volcano", gang_queue="team", clean_pods="None", backoff_limit=1, deadline_s=7200,
    ttl_s=600, suspend=True, open_egress=True,
)  # fmt: skip


def plain(**changes: Any) -> KubernetesConfig:
    """What several workers need, and the defaults."""
    return KubernetesConfig(**{"runs_claim": "runs", "store_claim": "artifacts", **changes})


MODULES = {"mpijob": mpijob, "trainjob": trainjob}


def render(
    kind: str, config: KubernetesConfig | None = None, *, run: dict[str, Any] | None = None, **changes: Any
) -> str:
    launch = LaunchConfig(**{"kind": kind, "np": 4, "kubernetes": config or plain(), **changes})
    command = JobCommand(
        "main",
        (),
        ("horovod-jobs", "experiment=main"),
        {"name": "main", "run": run or dict(job().config["run"]), "launch": {"np": 4}},
    )
    (text,) = MODULES[kind].plan_job(launch, job=command, host=HOST, environ=ENVIRON).files.values()  # type: ignore[attr-defined]
    return str(text)


def rendered(kind: str, config: KubernetesConfig | None = None, **changes: Any) -> dict[str, dict[str, Any]]:
    return {entry["kind"]: entry for entry in yaml.safe_load_all(render(kind, config, **changes))}


def pods(made: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Role -> pod template, wherever the kind keeps it."""
    if "MPIJob" in made:
        return {role.lower(): spec["template"] for role, spec in made["MPIJob"]["spec"]["mpiReplicaSpecs"].items()}
    entries = made["TrainingRuntime"]["spec"]["template"]["spec"]["replicatedJobs"]
    return {
        "worker" if entry["name"] == "node" else entry["name"]: entry["template"]["spec"]["template"]
        for entry in entries
    }


@pytest.mark.parametrize("kind", MODULES)
def test_the_manifests(kind: str) -> None:
    golden(f"{kind}.yaml", render(kind))


@pytest.mark.parametrize("kind", MODULES)
def test_the_manifests_with_everything(kind: str) -> None:
    golden(f"{kind}_full.yaml", render(kind, FULL, env=["MY_TOKEN"]))


def elastic_manifests() -> str:
    """The launcher runs the driver: it reads the operator's discovery script, and starts ranks on the workers by ssh."""
    launch = LaunchConfig(kind="mpijob", np=4, kubernetes=plain(), elastic=ElasticConfig(min_np=2, reset_limit=3))
    config = {
        "run": dict(job().config["run"]),
        "stages": {"train": {"strategy": {"_target_": "horovod_jobs.strategy.elastic.Elastic"}}},
    }
    assert manifests.is_elastic(config)
    command = JobCommand("main", (), ("horovod-jobs", "strategy=elastic"), config)
    (text,) = mpijob.plan_job(launch, job=command, host=HOST, environ=ENVIRON).files.values()
    return text


def test_the_manifests_of_an_elastic_job() -> None:
    golden("mpijob_elastic.yaml", elastic_manifests())


# --- held to the schemas of those who read them ------------------------------------------------------------------------------
CRDS = {
    "MPIJob": ("kubeflow.org_mpijobs.yaml", "v2beta1"),
    "TrainJob": ("trainer.kubeflow.org_trainjobs.yaml", "v1alpha1"),
    "TrainingRuntime": ("trainer.kubeflow.org_trainingruntimes.yaml", "v1alpha1"),
}


def schema(kind: str) -> dict[str, Any]:
    """The operator's own schema of a kind, with unknown fields refused, which the API server only drops."""
    name, version = CRDS[kind]
    places = (
        [Path(os.environ["HOROVOD_JOBS_CRDS"])]
        if "HOROVOD_JOBS_CRDS" in os.environ
        else [ROOT.parent / "shared" / "k8s"]
    )
    path = next((place / name for place in places if (place / name).is_file()), None)
    if path is None:
        pytest.skip(
            f"{name} is not in {places[0]}: put the operators' custom resource definitions there, or set HOROVOD_JOBS_CRDS"
        )
    crd = yaml.load(path.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    found = next(entry for entry in crd["spec"]["versions"] if entry["name"] == version)
    return closed(found["schema"]["openAPIV3Schema"])


def closed(node: Any, *, top: bool = True) -> Any:
    if isinstance(node, dict):
        node = {key: closed(value, top=False) if key != "enum" else value for key, value in node.items()}
        if (
            "properties" in node
            and not node.get("x-kubernetes-preserve-unknown-fields")
            and isinstance(node["properties"], dict)
        ):
            node.setdefault("additionalProperties", False)
    elif isinstance(node, list):
        node = [closed(entry, top=False) for entry in node]
    return node


def faults(made: dict[str, Any]) -> list[str]:
    import jsonschema

    validator = jsonschema.Draft202012Validator(schema(made["kind"]))
    return [
        f"{'.'.join(map(str, error.absolute_path))}: {error.message[:200]}" for error in validator.iter_errors(made)
    ]


def every_manifest() -> Iterator[tuple[str, dict[str, Any]]]:
    for kind in MODULES:
        for label, config in (("plain", None), ("full", FULL), ("gang", plain(gang="coscheduling"))):
            for name, manifest in rendered(kind, config).items():
                yield f"{kind}-{label}-{name}", manifest
    for manifest in yaml.safe_load_all(elastic_manifests()):
        yield f"mpijob-elastic-{manifest['kind']}", manifest


@pytest.mark.parametrize(
    ("label", "made"), [pytest.param(*entry, id=entry[0]) for entry in every_manifest() if entry[1]["kind"] in CRDS]
)
def test_the_operators_schema_takes_it(label: str, made: dict[str, Any]) -> None:
    assert faults(made) == []


def test_the_schema_sees_what_is_wrong() -> None:
    """The check can fail: a field with a typo, a word for a number, a word that is none of the operator's."""
    made = rendered("mpijob")["MPIJob"]
    for path, value, said in (
        (("spec", "runPolicy", "cleanPodPolicies"), "Running", "'cleanPodPolicies' was unexpected"),
        (("spec", "mpiReplicaSpecs", "Worker", "template", "spec", "tolerationz"), [], "'tolerationz' was unexpected"),
        (("spec", "slotsPerWorker"), "two", "'two' is not of type 'integer'"),
        (("spec", "mpiImplementation"), "OpenMpi", "'OpenMpi' is not one of"),
    ):
        changed = copy.deepcopy(made)
        node = changed
        for key in path[:-1]:
            node = node[key]
        node[path[-1]] = value
        assert said in " ".join(faults(changed))


@pytest.mark.parametrize(
    ("label", "made"), [pytest.param(*entry, id=entry[0]) for entry in every_manifest() if entry[1]["kind"] not in CRDS]
)
def test_kubernetes_own_schema_takes_it(label: str, made: dict[str, Any]) -> None:
    validate = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")
    validate.validate(made, validate.latest_version(), strict=True)


@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize("config", [plain(), FULL], ids=["plain", "full"])
def test_the_pods_are_pods(kind: str, config: KubernetesConfig) -> None:
    validate = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")
    for role, template in pods(rendered(kind, config)).items():
        pod = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": role, **template["metadata"]},
            "spec": template["spec"],
        }
        validate.validate(pod, validate.latest_version(), strict=True)
    with pytest.raises(validate.ValidationError, match="automountServiceAccountTokens"):
        validate.validate(
            {**pod, "spec": {**pod["spec"], "automountServiceAccountTokens": False}},
            validate.latest_version(),
            strict=True,
        )


# --- what they say -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", MODULES)
def test_nothing_runs_as_root_or_may_become_it(kind: str) -> None:
    """The restricted Pod Security Standard."""
    for template in pods(rendered(kind, FULL)).values():
        spec = template["spec"]
        assert spec["securityContext"] | {"runAsNonRoot": True, "runAsUser": 1000} == spec["securityContext"]
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert spec["automountServiceAccountToken"] is False
        for container in spec["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
            }
            assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec)


def test_the_policy_lets_only_the_jobs_pods_in() -> None:
    made = rendered("mpijob")
    policy = made["NetworkPolicy"]["spec"]
    mine = {"podSelector": {"matchLabels": {"horovod-jobs/job": "main"}}}
    assert policy["ingress"] == [{"from": [mine]}]
    assert policy["egress"][0] == {"to": [mine]}
    assert {entry["port"] for entry in policy["egress"][1]["ports"]} == {53}
    assert all(
        policy["podSelector"]["matchLabels"].items() <= pod["metadata"]["labels"].items() for pod in pods(made).values()
    )
    assert "NetworkPolicy" not in rendered("mpijob", plain(network_policy=False))


@pytest.mark.parametrize("kind", MODULES)
def test_only_named_variables_travel_and_secrets_stay_secret(kind: str) -> None:
    text = render(kind, plain(secret_env={"TOKEN": "tracker/token"}))
    assert "AWS_SECRET_ACCESS_KEY" not in text
    assert "MY_TOKEN" not in text
    for template in pods(rendered(kind, plain(secret_env={"TOKEN": "tracker/token"}))).values():
        (entry,) = [entry for entry in template["spec"]["containers"][0]["env"] if entry["name"] == "TOKEN"]
        assert entry["valueFrom"] == {"secretKeyRef": {"name": "tracker", "key": "token"}}


def test_the_kubelet_replaces_nothing_in_a_value_that_was_given() -> None:
    made = mpijob.manifests(LaunchConfig(np=1, env=["ODD"]), job=job(), environ={"ODD": "a$(HOME)b"})
    (entry,) = [
        entry
        for entry in made[-1]["spec"]["mpiReplicaSpecs"]["Worker"]["template"]["spec"]["containers"][0]["env"]
        if entry["name"] == "ODD"
    ]
    assert entry["value"] == "a$$(HOME)b"


def test_trainer_refuses_four_variables_and_wants_one_name_of_containers() -> None:
    with pytest.raises(ConfigError, match="launch.env names OMPI_MCA_plm_rsh_args, which the operator sets itself"):
        trainjob.manifests(
            LaunchConfig(env=["OMPI_MCA_plm_rsh_args"]), job=job(), environ={"OMPI_MCA_plm_rsh_args": "x"}
        )
    made = pods(rendered("trainjob", FULL))
    assert [container["name"] for pod in made.values() for container in pod["spec"]["containers"]] == ["node", "node"]
    names = {
        entry["name"] for pod in made.values() for container in pod["spec"]["containers"] for entry in container["env"]
    }
    assert not names & set(manifests.RESERVED)


def test_runs_and_artifacts_are_where_the_job_writes_them() -> None:
    def mounts(run: dict[str, Any], config: KubernetesConfig) -> dict[str, str]:
        (container,) = pods(rendered("mpijob", config, run=run))["worker"]["spec"]["containers"]
        return {
            entry["name"]: entry["mountPath"]
            for entry in container["volumeMounts"]
            if entry["name"] in ("runs", "artifacts", "jobs")
        }

    assert mounts({"root": "runs", "store": "/srv/store"}, plain()) == {
        "runs": "/home/jobs/runs",
        "artifacts": "/srv/store",
    }
    both = KubernetesConfig(runs_claim="one", store_claim="one")
    assert mounts({"root": "/jobs/runs", "store": "/jobs/artifacts"}, both) == {"jobs": "/jobs"}
    with pytest.raises(
        ConfigError, match="are both one, which can be mounted once: use two claims, or a directory for both"
    ):
        mounts({"root": "runs", "store": "artifacts"}, both)


def test_every_attempt_has_a_run_of_its_own_unless_one_is_named() -> None:
    launcher = pods(rendered("mpijob"))["launcher"]["spec"]["containers"][0]
    assert launcher["args"][-1] == "run.id=$(HOROVOD_JOBS_POD)"
    named = pods(rendered("mpijob", run={"root": "runs", "store": "artifacts", "id": "mine"}))["launcher"]["spec"][
        "containers"
    ][0]
    assert not [word for word in named["args"] if word.startswith("run.id")]
    assert {"name": "HOROVOD_JOBS_RUN_DIR", "value": "/home/jobs/runs/mine"} in named["env"]


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        ({"name": "Über"}, {}, "launch.kubernetes.name=Über is no name for a job in a cluster; use at most 40 of a-z"),
        ({"name": "x" * 41}, {}, "is no name for a job in a cluster"),
        (
            {"slots": 3},
            {},
            "launch.np=4 does not fill workers of launch.kubernetes.slots=3 ranks; use a multiple of it",
        ),
        ({"slots": 0}, {}, "launch.kubernetes.slots=0 is not a number of ranks"),
        (
            {"memory": "4 GB"},
            {},
            "launch.kubernetes.memory=4 GB is not a quantity; write 2 or 500m for cores, 4Gi for bytes",
        ),
        ({"clean_pods": "running"}, {}, "launch.kubernetes.clean_pods=running is not known; use Running, All, None"),
        ({"gang": "kueue"}, {}, "launch.kubernetes.gang=kueue is not known; use coscheduling, volcano"),
        ({"store_claim": None}, {}, "launch.kubernetes.store_claim is not set, and 4 workers must share .*slots=4"),
        ({"backoff_limit": -1}, {}, "launch.kubernetes.backoff_limit=-1 is negative; use 0 or more"),
        ({"secret_env": {"A": "b"}}, {}, "launch.kubernetes.secret_env.A=b is not SECRET/KEY"),
        ({}, {"env": ["NOT_SET"]}, "launch.env names NOT_SET, which is not set here"),
        ({}, {"controller": "gloo"}, "launch.controller=gloo cannot be used with launch=(mpijob|trainjob)"),
    ],
)
@pytest.mark.parametrize("kind", MODULES)
def test_what_a_cluster_would_refuse_is_said_before(
    kind: str, config: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        render(kind, plain(**config), **changes)


def test_a_config_that_no_config_map_takes_is_said() -> None:
    large = JobCommand("main", (), (), {"run": dict(job().config["run"]), "data": {"text": "x" * 1_000_001}})
    with pytest.raises(ConfigError, match="and a ConfigMap takes 1000000; put what is large into a file"):
        mpijob.manifests(LaunchConfig(np=1), job=large, environ={})


@pytest.mark.parametrize(
    ("text", "number"),
    [("2", 2.0), ("500m", 0.5), ("4Gi", 4 * 2**30), ("1.5G", 1.5e9), ("64Ki", 65536.0), ("3k", 3000.0)],
)
def test_quantities(text: str, number: float) -> None:
    assert manifests.quantity(text, where="x") == number


# --- the whole way -----------------------------------------------------------------------------------------------------------
def test_the_dry_run_prints_what_kubectl_takes_and_the_config_in_it_is_the_jobs(tmp_path: Path) -> None:
    """What the pods will read composes, without the launcher, to the very config that was resolved here."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    typed = [sys.executable, "-m", "horovod_jobs", "experiment=main", "seed=7", "fit.epochs=3", "run.root=/srv/runs"]
    printed = subprocess.run(
        [*typed, "launch=mpijob", "launch.kubernetes.slots=2", "launch.dry_run=true"],
        capture_output=True,
        text=True,
        timeout=120,
        env=env,
        cwd=tmp_path,
        check=True,
    )
    made = {entry["kind"]: entry for entry in yaml.safe_load_all(printed.stdout)}
    assert list(made) == ["ConfigMap", "NetworkPolicy", "MPIJob"]
    assert "dry_run" not in printed.stdout, "what is shown is what would run"
    (tmp_path / "job.yaml").write_text(made["ConfigMap"]["data"]["job.yaml"])

    def composed(directory: str, name: str, overrides: list[str]) -> dict[str, Any]:
        register_schema()
        GlobalHydra.instance().clear()
        with initialize_config_dir(directory, version_base="1.3"):
            return resolve(compose(name, overrides=overrides)).resolved

    inside = composed(str(tmp_path), "job", ["launch=none", f"hydra.searchpath=[file://{conf_dir()}]"])
    outside = composed(
        conf_dir(), "config", ["experiment=main", "seed=7", "fit.epochs=3", "run.root=/srv/runs", "launch=none"]
    )
    assert inside == outside
    assert (inside["seed"], inside["stages"]["teacher"]["fit"]["epochs"]) == (7, 3)


# --- launch/kubernetes -------------------------------------------------------------------------------------------------------
BASE = ROOT / "launch" / "kubernetes" / "base"


def base_files() -> dict[str, str]:
    """The two generated files of the base: what ``launch=mpijob`` makes of the main job, but for the config, which the image has."""
    config = KubernetesConfig(name="main", runs_claim="runs", store_claim="artifacts", data_claim="data")
    made = rendered("mpijob", config, np=2)
    spec = made["MPIJob"]["spec"]["mpiReplicaSpecs"]
    args = spec["Launcher"]["template"]["spec"]["containers"][0]["args"]
    spec["Launcher"]["template"]["spec"]["containers"][0]["args"] = [
        *(word for word in args if not word.startswith(("--config-", "run.id"))),
        "experiment=main",
        args[-1],
    ]
    worker = spec["Worker"]["template"]["spec"]
    worker["volumes"] = [volume for volume in worker["volumes"] if volume["name"] != "config"]
    mounts = worker["containers"][0]["volumeMounts"]
    worker["containers"][0]["volumeMounts"] = [mount for mount in mounts if mount["name"] != "config"]
    note = "# Made from launch=mpijob by tests/unit/launch/test_kubernetes.py; HOROVOD_JOBS_WRITE_GOLDEN=1 writes it again.\n"
    return {
        f"{name}.yaml": note + manifests.text([made[kind]], namespace=None)
        for name, kind in (("mpijob", "MPIJob"), ("network_policy", "NetworkPolicy"))
    }


@pytest.mark.parametrize("name", ["mpijob.yaml", "network_policy.yaml"])
def test_the_kustomize_base_is_what_the_launcher_makes(name: str) -> None:
    golden(str(BASE / name), base_files()[name])


def test_the_kustomize_files_name_files_that_are_there_and_patch_what_is_there() -> None:
    for path in (ROOT / "launch" / "kubernetes").rglob("kustomization.yaml"):
        for resource in yaml.safe_load(path.read_text())["resources"]:
            assert (path.parent / resource).exists(), f"{path}: {resource}"
    overlay = yaml.safe_load((ROOT / "launch/kubernetes/overlays/gpu/kustomization.yaml").read_text())
    made = yaml.safe_load((BASE / "mpijob.yaml").read_text())
    for change in yaml.safe_load(overlay["patches"][0]["patch"]):
        *parents, last = [word.replace("~1", "/") for word in change["path"].strip("/").split("/")]
        node = made
        for key in parents:
            node = node[int(key)] if isinstance(node, list) else node[key]
        assert change["op"] == "add" or last in node, change["path"]
        node[last] = change["value"]
    assert faults(made) == []
    for name in ("namespace.yaml", "volumes.yaml", "submitter.yaml"):
        validate = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")
        for entry in yaml.safe_load_all((BASE / name).read_text()):
            validate.validate(entry, validate.latest_version(), strict=True)


def test_kustomize_builds_both() -> None:
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("kubectl is not installed; kustomize is a part of it")
    for place, image in (("base", "horovod-jobs:latest"), ("overlays/gpu", "horovod-jobs:cuda")):
        command = [kubectl, "kustomize", str(ROOT / "launch" / "kubernetes" / place)]
        made = list(
            yaml.safe_load_all(subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout)
        )
        (mpi_job,) = [entry for entry in made if entry["kind"] == "MPIJob"]
        assert faults(mpi_job) == []
        assert {pod["spec"]["containers"][0]["image"] for pod in pods({"MPIJob": mpi_job}).values()} == {image}
        assert {entry["metadata"].get("namespace") for entry in made if entry["kind"] != "Namespace"} == {
            "horovod-jobs"
        }
