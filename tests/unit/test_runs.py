"""``horovod-runs``: tables, JSON, errors with exit codes, pipes, and no torch."""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import io
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from horovod_jobs import manifest as manifests
from horovod_jobs.runs import main

REPOSITORY = Path(__file__).parents[2]
SAMPLE = Path(__file__).parent / "report" / "sample.py"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    spec = importlib.util.spec_from_file_location("runs_sample", SAMPLE)
    sample = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sample)
    base = tmp_path_factory.mktemp("runs")
    sample.write_sample(base, run_id="20260101-a")
    other = sample.write_sample(base, run_id="20260102-b", seed=1, extra={"key": None})
    manifest = manifests.read(other)
    manifest["stages"][0].update(seconds=100.0, status="ran")
    manifests.write(other, manifest)
    sample.write_sample(base, run_id="20260103-c", status="failed", only={"teacher"})
    damaged = base / "runs" / "20260104-d"
    damaged.mkdir()
    (damaged / "manifest.json").write_text("{")
    (base / "runs" / "latest").symlink_to("20260102-b")
    return base / "runs"


@pytest.fixture
def run(root, capsys):
    def call(*arguments):
        code = main([*arguments, "--root", str(root)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def shell(root, *arguments, **environment):
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), **environment}
    command = [sys.executable, "-W", "error", "-m", "horovod_jobs.runs", *arguments, "--root", str(root)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60, check=False)


def test_ls(run):
    code, out, _ = run("ls")
    assert code == 0
    lines = [line for line in out.splitlines() if "2026" in line]
    assert [line.split()[0] for line in lines] == ["20260101-a", "20260102-b", "20260103-c", "20260104-d"]
    assert "10/10" in lines[0]
    assert "failed" in lines[2]
    assert "damaged" in lines[3]


def test_ls_json(run):
    _, out, _ = run("ls", "--json")
    runs = json.loads(out)
    assert [r["run_id"] for r in runs][:3] == ["20260101-a", "20260102-b", "20260103-c"]
    assert runs[0]["totals"]["energy_kwh"] > 0
    assert "damaged" in runs[3]["error"]


def test_ls_without_runs(tmp_path, capsys):
    assert main(["ls", "--root", str(tmp_path)]) == 0
    assert "No runs under" in capsys.readouterr().out


def test_ls_of_a_root_that_is_no_directory(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["ls"]) == 0, "no job has run yet"
    (tmp_path / "runs").touch()
    for arguments in (["ls"], ["ls", "--root", "nowhere"], ["ls", "--root", __file__, "--json"]):
        capsys.readouterr()
        assert main(arguments) == 6
        told = capsys.readouterr()
        assert told.out == ""
        assert told.err.startswith("error: --root ")
        assert "is not a directory; give the one that holds the runs" in told.err


@pytest.mark.parametrize("json_too", [[], ["--json"]])
@pytest.mark.parametrize("text", ["", "hello\n"])
def test_watch_of_something_else_than_a_job(text, json_too, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    assert main(["watch", "-", *json_too]) == 3
    told = capsys.readouterr()
    assert told.out.strip() == ""
    assert told.err.startswith(
        "error: standard input has no line of a job that runs with run.progress=json; pipe one in: "
    )
    assert told.err.count("\n") == 1


@pytest.mark.parametrize("name", ["20260101-a", "20260101", "latest"])
def test_show(run, name):
    code, out, _ = run("show", name)
    assert code == 0
    for text in ("teacher", "2 rank(s) on 1 host(s), controller mpi", "242,762", "'name=a b'", "energy estimated"):
        assert text in out


def test_show_json_is_the_manifest(run, root):
    _, out, _ = run("show", "latest", "--json")
    assert json.loads(out) == manifests.read(root / "20260102-b")


def test_show_a_failed_run(run):
    _, out, _ = run("show", "20260103")
    assert "error: the loss is not finite (step 12) (exit code 8)" in out


def test_show_by_path(root, capsys):
    assert main(["show", str(root / "20260101-a")]) == 0
    assert "20260101-a" in capsys.readouterr().out


def test_compare(run):
    code, out, _ = run("compare", "20260101-a", "20260102-b")
    assert code == 0
    assert "a = 20260101-a" in out
    assert "−52.3" in out
    assert "seed" in out
    assert "(absent)" in out


def test_compare_json(run):
    _, out, _ = run("compare", "20260101-a", "20260102-b", "--json")
    result = json.loads(out)
    teacher = next(stage for stage in result["stages"] if stage["name"] == "teacher")
    assert teacher["figures"]["seconds"] == {"a": 152.3, "b": 100.0, "difference": pytest.approx(-52.3)}
    assert teacher["figures"]["status"] == {"a": "reused", "b": "ran", "difference": None}
    evaluated = next(stage for stage in result["stages"] if stage["name"] == "eval_int8")
    assert evaluated["figures"]["latency_ms.1.p50"]["difference"] == 0
    assert evaluated["figures"]["accuracy"]["a"] == pytest.approx(0.898)
    assert result["config"] == {"seed": {"a": 0, "b": 1}, "extra.key": {"b": None}}


def test_compare_with_a_run_that_has_fewer_stages(run):
    _, out, _ = run("compare", "20260101-a", "20260103-c", "--json")
    result = json.loads(out)
    student = next(stage for stage in result["stages"] if stage["name"] == "student")
    assert student["figures"]["seconds"] == {"a": 66.0, "b": None, "difference": None}


def test_compare_a_run_with_itself(run):
    _, out, _ = run("compare", "20260101-a", "20260101-a")
    assert "The configs are the same." in out


def test_report(run, root):
    code, out, _ = run("report", "20260101-a")
    assert code == 0
    assert (root / "20260101-a" / "report.html").read_text().startswith("<!DOCTYPE html>")
    assert (root / "20260101-a" / "model_card.md").read_text().startswith("---\n")
    assert "int8 student" in out
    assert f"Report: {root / '20260101-a' / 'report.html'}" in out


def test_report_json(run):
    _, out, _ = run("report", "latest", "--json")
    assert json.loads(out)["models"] == 4


def test_doctor_shows_what_the_module_tells(run, monkeypatch):
    doctor = pytest.importorskip("horovod_jobs.doctor")
    monkeypatch.setattr(doctor, "collect", lambda: {"python": "3"})
    monkeypatch.setattr(doctor, "render", lambda info: f"python {info['python']}")
    assert run("doctor")[:2] == (0, "python 3\n")
    assert json.loads(run("doctor", "--json")[1]) == {"python": "3"}


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("show", "nothing"), 2, "no run 'nothing'"),
        (("show", "2026"), 2, "begins 4 runs"),
        (("show", "20260104-d"), 4, "is damaged"),
        (("compare", "20260101-a", "x/y"), 2, "no run at x/y"),
        (("report", "20260104-d"), 4, "is damaged"),
    ],
)
def test_errors_are_one_line_with_their_class_code(run, arguments, code, message):
    got, out, err = run(*arguments)
    assert got == code
    assert out == ""
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1


def test_help_has_examples(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert "horovod-runs compare RUN_A RUN_B" in out
    with pytest.raises(SystemExit) as stop:
        main(["frobnicate"])
    assert stop.value.code == 2


@pytest.mark.parametrize("columns", [40, 80])
def test_narrow_terminals(root, columns):
    told, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    environment = {key: value for key, value in os.environ.items() if key != "COLUMNS"} | {
        "PYTHONPATH": str(REPOSITORY),
        "NO_COLOR": "1",
        "TERM": "xterm",
    }
    command = [sys.executable, "-m", "horovod_jobs.runs", "show", "20260101-a", "--root", str(root)]
    process = subprocess.Popen(command, stdout=terminal, env=environment)
    os.close(terminal)
    text = re.sub(r"\x1b\[[0-9;]*m", "", read_to_the_end(told))
    assert process.wait(timeout=60) == 0, text
    table = [line for line in text.splitlines() if line.startswith(" ")]
    assert max(map(len, table)) <= columns
    assert any(line.split()[:1] == ["teacher"] for line in table), "the first column is not folded"


def read_to_the_end(descriptor: int) -> str:
    """What was written to a pseudo-terminal, which answers EIO when its last writer has gone."""
    pieces = []
    with os.fdopen(descriptor, "rb", buffering=0) as stream, contextlib.suppress(OSError):
        while piece := stream.read(4096):
            pieces.append(piece)
    return b"".join(pieces).decode()


def test_a_pipe_is_as_wide_as_what_goes_through_it(root):
    result = shell(root, "ls", COLUMNS="40")
    assert result.returncode == 0, result.stderr
    assert any(line.split()[:2] == ["20260101-a", "done"] for line in result.stdout.splitlines())


def test_a_reader_that_leaves_is_no_error(root):
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-u", "-m", "horovod_jobs.runs", "show", "20260101-a", "--json", "--root", str(root)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait(timeout=60) == 0


@pytest.mark.parametrize("command", [("ls",), ("show", "20260101-a"), ("compare", "20260101-a", "20260102-b")])
def test_no_heavy_import(root, command):
    code = (
        "import sys; from horovod_jobs.runs import main; code = main(sys.argv[1:]); "
        "heavy = {'torch', 'numpy', 'hydra', 'omegaconf', 'matplotlib', 'jinja2', 'codecarbon', 'onnx'} & set(sys.modules); "
        "sys.exit(code or (f'imported {sorted(heavy)}' if heavy else 0))"
    )
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    arguments = [sys.executable, "-c", code, *command, "--root", str(root)]
    result = subprocess.run(arguments, capture_output=True, text=True, env=environment, timeout=60, check=False)
    assert result.returncode == 0, result.stderr


def test_fast(root):
    """The best of several, as other programs share the machine: ls and show in 0.3 s over Python's own start."""
    times = {}
    for name, arguments in (("ls", ("ls",)), ("show", ("show", "20260101-a"))):
        durations = []
        for _ in range(5):
            start = time.perf_counter()
            assert shell(root, *arguments).returncode == 0
            durations.append(time.perf_counter() - start)
        times[name] = min(durations)
    assert max(times.values()) < 0.6, times
