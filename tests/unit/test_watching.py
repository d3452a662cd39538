"""``horovod-runs watch``: what is shown, from a run's files and from lines."""

from __future__ import annotations

import contextlib
import io
import json
import os
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from horovod_jobs import runs, watching
from horovod_jobs.living import GONE_AFTER_BEATS, Sightings, is_gone
from horovod_jobs.storage import locked

EVENTS = [
    {"time": 1.0, "event": "stage_start", "stage": "teacher", "kind": "train"},
    {"time": 2.0, "event": "progress", "stage": "teacher", "done": 5, "total": 20, "note": "loss 0.5, 900 samples/s"},
    {"time": 3.0, "event": "epoch", "stage": "teacher", "epoch": 1, "step": 10, "train_loss": 0.5, "validation_accuracy": 0.75},
    {"time": 4.0, "event": "checkpoint", "stage": "teacher", "step": 10, "energy_kwh": 0.002},
]  # fmt: skip


def make_run(root: Path, *, status: str = "running", stage: str = "running", beat_age_s: float = 0.0) -> Path:
    run_dir = root / "r1"
    (run_dir / "ranks").mkdir(parents=True)
    entry = {"name": "teacher", "kind": "train", "needs": {}, "status": stage, "reason": None, "artifact": None,
             "seconds": None, "metrics": {}, "parameters": None, "model_bytes": None, "latency_ms": None, "energy_kwh": None,
             "co2_kg": None, "cost_usd": None, "footprint_method": None, "resumed_from_step": None}  # fmt: skip
    manifest: dict[str, Any] = {"schema_version": 1, "run_id": "r1", "name": "job", "status": status,
                "started_at": "2026-01-01T00:00:00+00:00", "ended_at": None, "command": [], "error": None, "exit_code": None,
                "store": "../artifacts", "world": {"size": 2, "hosts": 1, "controller": "mpi"}, "versions": {},
                "config_digest": "x", "stages": [entry, {**entry, "name": "report", "status": "pending"}],
                "totals": {"seconds": 12.0, "energy_kwh": None, "co2_kg": None, "cost_usd": None}}  # fmt: skip
    (run_dir / "manifest.json").write_text(json.dumps(manifest))
    (run_dir / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in EVENTS) + '{"event": "ep')
    sign = {"rank": 0, "host": "a", "pid": 7, "beat": 9, "time": 5.0, "every_s": 2.0, "doing": "teacher", "done": 12,
            "total": 20, "note": "loss 0.25", "waiting_in": "gradients", "waiting_s": 14.0, "ended": False}  # fmt: skip
    path = run_dir / "ranks" / "rank-0.json"
    path.write_text(json.dumps(sign))
    if beat_age_s:
        old = path.stat().st_mtime - beat_age_s
        os.utime(path, (old, old))
    return run_dir


def shown(view: watching.RunView) -> str:
    console = Console(file=io.StringIO(), width=200, record=True)
    console.print(watching.render(view))
    return console.export_text()


def test_a_running_run(tmp_path: Path) -> None:
    view = watching.of_directory(make_run(tmp_path))
    text = shown(view)
    assert "r1  job  running  1 of 2 ranks alive  2 Wh so far" in " ".join(text.split("\n")[0].split(" "))
    assert "12/20" in text
    assert "loss 0.25" in text
    assert "train loss 0.5, validation accuracy 0.75" in text
    assert "waiting in gradients for 14 s" in text
    assert "no sign of life yet" in text


def test_a_rank_that_has_gone_quiet_is_shown_as_silent(tmp_path: Path) -> None:
    view = watching.of_directory(make_run(tmp_path, beat_age_s=60.0))
    assert [rank.alive for rank in view.ranks] == [False, False]
    assert "SILENT" in shown(view)


def test_a_run_that_has_ended_shows_no_ranks(tmp_path: Path) -> None:
    text = shown(watching.of_directory(make_run(tmp_path, status="done", stage="ran")))
    assert "r1  job  done" in text
    assert "last seen" not in text


def test_lines_of_a_job_elsewhere(capsys: pytest.CaptureFixture[str]) -> None:
    lines = ["[0]<stderr>:" + json.dumps(event) for event in EVENTS]
    lines += [
        "12:00:01 teacher: epoch 1",
        "{not json",
        json.dumps({"no": "event"}),
        json.dumps({"event": "job_end", "status": "done"}),
    ]
    watching.watch_lines(lines, console=Console(file=io.StringIO()), as_json=True)
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(told) == len(EVENTS) + 1
    assert told[1]["stages"][0] | {"metrics": {}} == {
        "name": "teacher", "kind": "train", "status": "running", "done": 5, "total": 20, "note": "loss 0.5, 900 samples/s",
        "seconds": None, "energy_kwh": None, "metrics": {}}  # fmt: skip
    assert told[-1]["status"] == "done"
    assert told[-1]["energy_kwh"] == 0.002


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path, status="done", stage="ran")
    assert runs.main(["watch", "nothing", "--root", str(tmp_path), "--once"]) == 2
    assert runs.main(["watch", "latest", "--root", str(tmp_path), "--once"]) == 0
    capsys.readouterr()
    assert runs.main(["watch", "r1", "--root", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["status"] == "done"
    assert runs.main(["watch", "r1", "--root", str(tmp_path)]) == 0
    assert "teacher" in capsys.readouterr().out


LIMIT_S = GONE_AFTER_BEATS * 2.0


def test_gone_is_counted_on_the_watchers_clock_from_the_last_change(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path, beat_age_s=1e6)  # The file's time tells nothing: that host's clock is wrong.
    sign = run_dir / "ranks" / "rank-0.json"
    sightings = Sightings(run_dir)
    for now in (1000.0, 1000.0 + LIMIT_S):
        sightings.look(now)
        assert not sightings.gone(now)
    sign.write_text(json.dumps(json.loads(sign.read_text()) | {"beat": 10}))
    changed = 1000.0 + LIMIT_S + 1
    sightings.look(changed)
    assert not sightings.gone(changed)
    assert sightings.age_s(0, changed + 3) == 3
    sightings.look(changed + LIMIT_S)
    assert not sightings.gone(changed + LIMIT_S)
    sightings.look(changed + LIMIT_S + 1)
    assert sightings.gone(changed + LIMIT_S + 1)


def test_a_world_that_is_started_again_is_not_gone(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path)
    sign = run_dir / "ranks" / "rank-0.json"
    sightings = Sightings(run_dir)
    sightings.look(0.0)
    text = sign.read_text()
    sign.unlink()  # as the runner does at a new start
    sightings.look(LIMIT_S + 1)
    assert not sightings.gone(LIMIT_S + 1)
    sign.write_text(json.dumps(json.loads(text) | {"beat": 1}))
    sightings.look(LIMIT_S + 2)
    assert not sightings.gone(LIMIT_S + 2)
    sign.unlink()
    sightings.look(LIMIT_S + 3)
    sightings.look(2 * LIMIT_S + 4)
    assert sightings.gone(2 * LIMIT_S + 4), "no sign at all for as long"


def test_one_rank_alive_or_a_held_lock_is_enough(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path, beat_age_s=LIMIT_S + 10)
    assert is_gone(run_dir)
    with locked(run_dir / ".lock", busy="held"):
        assert not is_gone(run_dir)
    assert is_gone(run_dir)
    (run_dir / "ranks" / "rank-1.json").write_text((run_dir / "ranks" / "rank-0.json").read_text())
    assert not is_gone(run_dir)


def test_a_job_may_take_a_lock_that_somebody_looks_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    path = tmp_path / ".lock"
    with contextlib.ExitStack() as looking:
        fcntl.flock(looking.enter_context(path.open("w")), fcntl.LOCK_SH)
        monkeypatch.setattr("horovod_jobs.storage.time.sleep", lambda _: looking.close())
        with locked(path, busy="held"):
            pass


@pytest.mark.parametrize("how", [["--once"], ["--once", "--json"]])
def test_watch_ends_with_a_line_where_the_run_is_gone(
    how: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(tmp_path, beat_age_s=LIMIT_S + 10)
    assert runs.main(["watch", "r1", "--root", str(tmp_path), *how]) == 9
    told = capsys.readouterr()
    assert told.err.startswith("error: run r1 is gone: no rank gives signs of life")
    if "--json" in how:
        assert (json.loads(told.out)["status"], json.loads(told.out)["gone"]) == ("running", True)
    else:
        assert told.out.startswith("r1  job  gone")
    assert runs.main(["ls", "--root", str(tmp_path)]) == 0
    assert "r1 gone job" in " ".join(capsys.readouterr().out.split())
    assert runs.main(["ls", "--root", str(tmp_path), "--json"]) == 0
    (told_run,) = json.loads(capsys.readouterr().out)
    assert (told_run["status"], told_run["gone"]) == ("running", True)
    assert runs.main(["show", "r1", "--root", str(tmp_path)]) == 0
    assert "gone: killed outright" in capsys.readouterr().out


def test_ranks_alive_of_a_job_elsewhere(capsys: pytest.CaptureFixture[str]) -> None:
    lines = [json.dumps({"event": "ranks", "size": 3, "silent": silent}) for silent in ([], [2])]
    watching.watch_lines(lines, console=Console(file=io.StringIO()), as_json=True)
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(one["ranks_alive"], one["ranks_silent"]) for one in told] == [(3, []), (2, [2])]
    view = watching.RunView("r")
    for event in watching.lines_to_events(lines):
        view.take(event)
    assert "2 of 3 ranks alive  silent: 2" in shown(view)
