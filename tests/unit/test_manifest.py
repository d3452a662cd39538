"""The manifest's schema accepts every state of a run and refuses planted mistakes; reader, writer and look-up."""

from __future__ import annotations

import copy
import json
from typing import Any

import jsonschema
import pytest

from horovod_jobs import manifest as manifests
from horovod_jobs.errors import ArtifactError, ConfigError

SPENT: dict[str, Any] = {"energy_kwh": 0.01, "co2_kg": 0.004, "cost_usd": None}


def stage(status: str = "ran", **values: Any) -> dict[str, Any]:
    made = status in ("ran", "reused")
    return {
        "name": "teacher",
        "kind": "train",
        "needs": {},
        "status": status,
        "reason": None,
        "artifact": "model-" + "a" * 16 if made else None,
        "seconds": 12.5 if made else None,
        "metrics": {"train_loss": 0.3} if made else {},
        "parameters": 10 if made else None,
        "model_bytes": 40 if made else None,
        "latency_ms": {"1": {"p50": 0.1, "p95": 0.2}} if made else None,
        **(SPENT if made else dict.fromkeys(SPENT)),
        "footprint_method": "measured: RAPL" if made else None,
        "resumed_from_step": None,
        **values,
    }


def manifest(status: str = "done", **values: Any) -> dict[str, Any]:
    ended = status != "running"
    return {
        "schema_version": 1,
        "run_id": "20260101-000000-abcd",
        "name": "job",
        "status": status,
        "started_at": "2026-01-01T00:00:00+00:00",
        "ended_at": "2026-01-01T00:01:00+00:00" if ended else None,
        "command": ["horovod-jobs", "seed=1"],
        "error": None if status in ("done", "running") else "it broke",
        "exit_code": {"done": 0, "failed": 7, "interrupted": 75, "running": None}[status],
        "store": "../../artifacts",
        "world": {"size": 2, "hosts": 1, "controller": "mpi"},
        "versions": {"python": "3.11.1", "horovod": None},
        "config_digest": "0" * 64,
        "stages": [stage(), stage("pending", name="b"), stage("skipped", name="c", reason="enabled=false")],
        "totals": {"seconds": 60.0, **SPENT, "artifacts": SPENT},
        **values,
    }


def errors(value: dict[str, Any]) -> list[str]:
    validator = jsonschema.Draft202012Validator(manifests.schema())
    return [error.message for error in validator.iter_errors(value)]


def test_schema_is_valid_and_describes_every_field():
    schema = manifests.schema()
    jsonschema.Draft202012Validator.check_schema(schema)

    def walk(node: dict[str, Any]) -> None:
        for name, field in node.get("properties", {}).items():
            assert field.get("description"), name
            walk(field)

    walk(schema)
    walk(schema["$defs"]["stage"])
    assert set(schema["required"]) == manifests.Manifest.__required_keys__
    assert set(schema["properties"]) == set(manifests.Manifest.__annotations__)
    described = schema["$defs"]["stage"]
    assert set(described["required"]) == set(described["properties"]) == set(manifests.StageEntry.__annotations__)


@pytest.mark.parametrize("status", ["done", "failed", "interrupted", "running"])
def test_schema_accepts_every_status(status):
    stages = [stage("ran"), stage("reused", name="r"), stage({"running": "running"}.get(status, "pending"), name="x")]
    assert errors(manifest(status, stages=stages)) == []


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("status",), "finished"),
        (("extra",), 1),
        (("schema_version",), 2),
        (("started_at",), "yesterday"),
        (("started_at",), "2026-01-01T00:00:00+02:00"),
        (("ended_at",), None),
        (("exit_code",), 3),
        (("config_digest",), "abc"),
        (("world", "size"), 0),
        (("world", "ranks"), 2),
        (("stages", 0, "status"), "reran"),
        (("stages", 0, "artifact"), None),
        (("stages", 0, "artifact"), "model-xyz"),
        (("stages", 0, "seconds"), -1),
        (("stages", 0, "note"), "x"),
        (("stages", 0, "latency_ms"), {"one": {"p50": 1, "p95": 2}}),
        (("stages", 0, "latency_ms"), {"1": {"p50": 1}}),
        (("stages", 0, "metrics"), {"accuracy": "high"}),
        (("stages", 1, "artifact"), "model-" + "a" * 16),
        (("totals", "artifacts"), {"energy_kwh": 1}),
        (("run_id",), "a/b"),
    ],
)
def test_schema_refuses_planted_mistakes(path, value):
    broken = copy.deepcopy(manifest())
    node: Any = broken
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    assert errors(broken)


@pytest.mark.parametrize("key", sorted(manifests.Manifest.__required_keys__))
def test_schema_refuses_a_missing_field(key):
    broken = manifest()
    del broken[key]
    assert errors(broken)


def test_write_and_read(tmp_path):
    manifests.write(tmp_path, manifest())
    assert manifests.read(tmp_path) == manifest()
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]


def test_a_failed_write_keeps_the_old_one(tmp_path):
    manifests.write(tmp_path, manifest())
    with pytest.raises(ValueError, match="JSON compliant"):
        manifests.write(tmp_path, manifest(totals={"seconds": float("nan")}))
    assert manifests.read(tmp_path) == manifest()
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "damaged"), ("[]", "damaged"), ('{"schema_version": 1}', "lacks"), ('{"schema_version": 9}', "version 9")],
)
def test_read_names_what_is_wrong(tmp_path, text, message):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(ArtifactError, match=message):
        manifests.read(tmp_path)


def test_read_without_a_run(tmp_path):
    with pytest.raises(ArtifactError, match="no run at"):
        manifests.read(tmp_path)


def test_find_run(tmp_path):
    for name in ("20260101-a", "20260101-b", "20260202-c"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text(json.dumps(manifest()))
    (tmp_path / "not-a-run").mkdir()
    (tmp_path / "latest").symlink_to("20260101-b")
    assert [path.name for path in manifests.list_runs(tmp_path)] == ["20260101-a", "20260101-b", "20260202-c"]
    assert manifests.find_run(tmp_path, "20260101-a").name == "20260101-a"
    assert manifests.find_run(tmp_path, "202602").name == "20260202-c"
    assert manifests.find_run(tmp_path, "latest").name == "20260101-b"
    assert manifests.find_run("elsewhere", str(tmp_path / "20260202-c")).name == "20260202-c"
    (tmp_path / "latest").unlink()
    assert manifests.find_run(tmp_path, "latest").name == "20260202-c"


@pytest.mark.parametrize(
    ("name", "message"), [("2026", "begins 2 runs"), ("x", "no run 'x'"), ("", "no run"), ("a/b", "no run at a/b")]
)
def test_find_run_errors(tmp_path, name, message):
    for run in ("2026-a", "2026-b"):
        (tmp_path / run).mkdir()
        (tmp_path / run / "manifest.json").write_text("{}")
    with pytest.raises(ConfigError, match=message):
        manifests.find_run(tmp_path, name)


def test_find_run_in_an_empty_root(tmp_path):
    with pytest.raises(ConfigError, match="run a job first"):
        manifests.find_run(tmp_path / "none", "latest")
