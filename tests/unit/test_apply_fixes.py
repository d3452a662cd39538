"""The list of changes to Horovod's source, and what applies it."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

LAUNCH = Path(__file__).resolve().parents[2] / "launch"


def apply(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=60, check=False)


SOURCE = {"CMakeLists.txt": "project(x)\nset(STANDARD 14)\n", "deep/b.cc": "reserve(size_);\n"}
FIXES = """
[one]
file = CMakeLists.txt
old = set(STANDARD 14)
new = set(STANDARD 17)
reason = Because.

[two]
file = deep/b.cc
old = reserve(size_);
new = resize(size_);
reason = Because.
"""


def fix(tmp_path: Path, *, fixes: str = FIXES, **changed: str) -> tuple[subprocess.CompletedProcess[str], Path]:
    source = tmp_path / "source"
    own = {key.replace("__", "/").replace("_", "."): text for key, text in changed.items()}
    for name, text in {**SOURCE, **own}.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(text, encoding="utf-8")
    (tmp_path / "x.fixes").write_text(fixes, encoding="utf-8")
    return apply(sys.executable, LAUNCH / "apply_fixes.py", tmp_path / "x.fixes", source), source


def test_fixes_are_applied_and_shown(tmp_path: Path) -> None:
    done, source = fix(tmp_path)
    assert done.returncode == 0, done.stderr
    assert "CMakeLists.txt:2: set(STANDARD 14) -> set(STANDARD 17)" in done.stdout
    assert (source / "CMakeLists.txt").read_text(encoding="utf-8") == "project(x)\nset(STANDARD 17)\n"
    assert (source / "deep/b.cc").read_text(encoding="utf-8") == "resize(size_);\n"


@pytest.mark.parametrize("text", ["", "reserve(size_); reserve(size_);\n"], ids=["missing", "twice"])
def test_a_fix_that_does_not_fit_stops_and_changes_nothing(tmp_path: Path, text: str) -> None:
    done, source = fix(tmp_path, deep__b_cc=text)
    assert done.returncode == 5
    assert f"[two] deep/b.cc has the text 'reserve(size_);' {text.count('reserve')} times, not once" in done.stderr
    assert (source / "CMakeLists.txt").read_text(encoding="utf-8") == SOURCE["CMakeLists.txt"]


@pytest.mark.parametrize(
    "fixes", ["", FIXES.replace("reason = Because.", "", 1), FIXES.replace("deep/b.cc", "gone.cc")]
)
def test_a_list_of_fixes_that_is_wrong_stops(tmp_path: Path, fixes: str) -> None:
    done, _ = fix(tmp_path, fixes=fixes)
    assert done.returncode == 5
    assert done.stderr.startswith("error: ")


def test_the_fixes_fit_the_real_source(tmp_path: Path) -> None:
    sdist = os.environ.get("HOROVOD_SDIST")
    if not sdist:
        pytest.skip("HOROVOD_SDIST does not name horovod-0.28.1.tar.gz; the build itself checks this too")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    fixes = LAUNCH / "horovod-0.28.1.fixes"
    done = apply(sys.executable, LAUNCH / "apply_fixes.py", fixes, tmp_path / "horovod-0.28.1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("why:") == fixes.read_text(encoding="utf-8").count("\nreason = ")
