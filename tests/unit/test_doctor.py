from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from horovod_jobs import doctor

TORCH = {"version": "2.13.0", "cuda": None, "hip": None, "devices": [], "threads": 2}


def test_import_loads_neither_torch_nor_horovod() -> None:
    code = "import sys, horovod_jobs.doctor; print([m for m in ('torch', 'horovod', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_ask_returns_the_last_line_as_an_object() -> None:
    assert doctor.ask("print('noise'); print('{\"a\": 1}')") == {"a": 1}


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("raise ImportError('libmpi.so.40: cannot open shared object file')", "libmpi.so.40: cannot open"),
        ("import os; os.kill(os.getpid(), 11)", "SIGSEGV"),
        ("print('not json')", "not a JSON object"),
        ("print([1])", "not a JSON object"),
        ("pass", "not a JSON object"),
    ],
)
def test_ask_reports_what_went_wrong(code: str, text: str) -> None:
    assert text in doctor.ask(code)["error"]


def test_ask_ends_a_process_that_does_not_answer() -> None:
    assert doctor.ask("import time; time.sleep(60)", timeout_s=0.5) == {"error": "no answer within 0 s"}


def test_broken_horovod_is_reported_with_its_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_version", lambda _: "0.28.1")
    (check,) = doctor._horovod({"error": "undefined symbol: x"}, None, TORCH)
    assert not check.ok
    assert "undefined symbol: x" in check.detail
    assert check.remedy == doctor.BUILD_HOROVOD


def test_absent_horovod_names_the_build_script(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_version", lambda _: None)
    (check,) = doctor._horovod({"error": "No module named 'horovod'"}, None, TORCH)
    assert check.detail.startswith("not installed")
    assert check.remedy == doctor.BUILD_HOROVOD


@pytest.mark.parametrize(("built_for", "ok"), [("2.13.0", True), ("2.12.0", False)])
def test_build_record_is_held_against_the_installed_torch(built_for: str, ok: bool) -> None:
    record = {
        "torch": {"version": built_for},
        "mpi": {"kind": "wheel"},
        "flags": {"HOROVOD_GPU_OPERATIONS": "NCCL"},
        "fixes": [{}],
    }
    checks = {c.name: c for c in doctor._horovod({"version": "0.28.1", "built": ["mpi", "nccl"]}, record, TORCH)}
    assert checks["build record"].ok is ok
    assert "HOROVOD_GPU_OPERATIONS=NCCL" in checks["build record"].detail
    assert checks["NCCL operations"].ok
    assert not checks["Gloo controller"].ok


def test_build_record_is_read_or_none(tmp_path: Path) -> None:
    path = tmp_path / "share" / "horovod_jobs" / "horovod_build.json"
    assert doctor.build_record(tmp_path) is None
    path.parent.mkdir(parents=True)
    path.write_text("{", encoding="utf-8")
    assert doctor.build_record(tmp_path) is None
    path.write_text('{"key": "abc"}', encoding="utf-8")
    assert doctor.build_record(tmp_path) == {"key": "abc"}


def test_data_is_found_only_when_all_four_files_are_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOROVOD_JOBS_DATA", str(tmp_path))
    monkeypatch.setattr(doctor, "DEBIAN_DATA", tmp_path / "absent")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    folder = tmp_path / "fashion-mnist"
    folder.mkdir()
    for name in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3"):
        (folder / f"{name}-ubyte.gz").touch()
    missing = doctor._data()[0]
    assert (missing.ok, bool(missing.remedy)) == (False, True)
    (folder / "t10k-labels-idx1-ubyte.gz").touch()
    assert doctor._data()[0] == doctor.Check("fashion_mnist", True, str(folder))


def test_both_layouts_of_movielens_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOROVOD_JOBS_DATA", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(doctor.util, "find_spec", lambda name: None)
    cache = tmp_path / "home" / ".cache" / "horovod_jobs" / "data" / "ml-100k"
    for folder, names in (
        (cache, ("u.data", "u.item", "u.user")),
        (tmp_path / "ml-100k", ("ml-100k.inter", "ml-100k.item", "ml-100k.user")),
    ):
        folder.mkdir(parents=True)
        for name in names[:2]:
            (folder / name).touch()
        assert doctor.movielens_folder() != folder
        (folder / names[2]).touch()
        assert doctor.movielens_folder() == folder
    assert next(check for check in doctor._data() if check.name == "movielens").ok


def test_host_name_that_does_not_resolve_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_: str) -> str:
        raise OSError("Name or service not known")

    monkeypatch.setattr(doctor.socket, "gethostname", lambda: "lost")
    monkeypatch.setattr(doctor.socket, "gethostbyname", fails)
    check = next(c for c in doctor._machine() if c.name == "host name")
    assert not check.ok
    assert "127.0.1.1 lost" in check.remedy


def test_rapl_counters_are_counted(tmp_path: Path) -> None:
    assert doctor.rapl_meters(tmp_path) == (0, 0)
    for name in ("intel-rapl:0", "intel-rapl:0:0", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "energy_uj").write_text("1", encoding="utf-8")
    assert doctor.rapl_meters(tmp_path) == (2, 2)


def test_collect_is_json_and_every_missing_thing_has_a_remedy() -> None:
    info = doctor.collect()
    assert json.loads(json.dumps(info)) == info
    checks = [check for section in info["sections"].values() for check in section]
    assert [check["name"] for check in checks if not check["ok"] and not check["remedy"]] == []
    assert next(check for check in checks if check["name"] == "torch")["ok"]
    text = doctor.render(info)
    assert all(check["detail"] in text for check in checks)
    assert all(title in text.splitlines() for title in info["sections"])
