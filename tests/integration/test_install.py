"""The set-up scripts: what they refuse, what they leave alone. The real build takes minutes and is not done here."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "launch"
SCRIPTS = [*sorted(LAUNCH.glob("*.sh")), ROOT / ".ci" / "run"]
# Programs the scripts use before they install anything; a PATH of links to them hides everything else.
BASE_TOOLS = (
    *("awk", "bash", "basename", "cat", "cp", "cut", "date", "df", "dirname", "du", "env", "grep", "head", "id", "ls"),
    *("mkdir", "mktemp", "mv", "rm", "sed", "sha256sum", "sleep", "sort", "stat", "tail", "tr"),
)

FAKE_PIP = """
import os, sys
with open(os.environ["FAKE_LOG"], "a") as log:
    log.write(" ".join(sys.argv[1:]) + "\\n")
if "torch==2.13.0" in sys.argv and os.environ.get("FAKE_SLEEP"):
    import time
    time.sleep(float(os.environ["FAKE_SLEEP"]))
"""


def tools(folder: Path, *names: str) -> Path:
    """A folder of links to the named programs."""
    folder.mkdir()
    for name in names:
        found = shutil.which(name)
        if found:
            (folder / name).symlink_to(found)
    return folder


def run(*command: str | Path, **environ: str) -> subprocess.CompletedProcess[str]:
    kept = {name: os.environ[name] for name in ("HOME", "LANG", "TMPDIR") if name in os.environ}
    return subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        env={**kept, **environ},
        timeout=120,
        check=False,
    )


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of what install.sh reads, as if freshly cloned."""
    root = tmp_path / "tree"
    shutil.copytree(LAUNCH, root / "launch", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", root)
    return root


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_valid_bash(script: Path) -> None:
    assert run("bash", "-n", script, PATH=os.environ["PATH"]).stderr == ""
    if shutil.which("shellcheck"):
        checked = run("shellcheck", "-x", "-P", ROOT, script, PATH=os.environ["PATH"])
        assert checked.stdout == ""


@pytest.mark.parametrize("script", ["install.sh", "build_horovod.sh"])
def test_help_and_wrong_arguments(script: str) -> None:
    shown = run(LAUNCH / script, "--help", PATH=os.environ["PATH"])
    assert shown.returncode == 0
    assert "HOROVOD_GPU_OPERATIONS" in shown.stdout
    assert "set -euo" not in shown.stdout
    assert run(LAUNCH / script, "--wrong", PATH=os.environ["PATH"]).returncode == 2


def test_everything_missing_is_named_at_once_and_nothing_is_made(tree: Path, tmp_path: Path) -> None:
    path = tools(tmp_path / "bin", *BASE_TOOLS, "apt-get")
    done = run(tree / "launch" / "install.sh", PATH=str(path), PYTHON=sys.executable, NEED_VENV_MB="999999999")
    assert done.returncode == 5
    assert "a C++ compiler (c++)" in done.stderr
    assert "make, which builds Horovod" in done.stderr
    assert "disk space" in done.stderr
    assert "install -y g++" in done.stderr or "conda install" in done.stderr or "gcc-c++" in done.stderr
    assert not (tree / ".venv").exists()


def test_one_process_needs_no_compiler(tree: Path, tmp_path: Path) -> None:
    path = tools(tmp_path / "bin", *BASE_TOOLS)
    done = run(
        tree / "launch" / "install.sh", PATH=str(path), PYTHON=sys.executable, NEED_VENV_MB="999999999", EXTRAS="dev"
    )
    assert "compiler" not in done.stderr
    assert "disk space" in done.stderr


def test_an_old_python_is_refused(tree: Path, tmp_path: Path) -> None:
    path = tools(tmp_path / "bin", *BASE_TOOLS)
    old = tmp_path / "python3"
    old.write_text('#!/bin/bash\n[ "$1" = -V ] && echo Python 3.9.18 && exit 0\nexit 1\n', encoding="utf-8")
    old.chmod(0o755)
    done = run(tree / "launch" / "install.sh", PATH=str(path), PYTHON=str(old))
    assert done.returncode == 5
    assert "Python 3.9.18 and 3.10 or newer is needed" in done.stderr


def test_no_python_at_all(tree: Path, tmp_path: Path) -> None:
    done = run(tree / "launch" / "install.sh", PATH=str(tools(tmp_path / "bin", *BASE_TOOLS)))
    assert done.returncode == 5
    assert "no Python 3.10 or newer on PATH" in done.stderr


def test_a_folder_that_is_no_environment_is_left_alone(tree: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years", encoding="utf-8")
    done = run(tree / "launch" / "install.sh", PATH=os.environ["PATH"], PYTHON=sys.executable, VENV=str(mine))
    assert done.returncode == 5
    assert "is there and is not one" in done.stderr
    assert (mine / "thesis.txt").read_text(encoding="utf-8") == "years"


@pytest.fixture
def fake(tree: Path, tmp_path: Path) -> dict[str, str]:
    """An environment for install.sh whose pip only writes down what it was asked for; no Horovod, no data."""
    site = tmp_path / "site"
    (site / "pip").mkdir(parents=True)
    (site / "pip" / "__init__.py").touch()
    (site / "pip" / "__main__.py").write_text(FAKE_PIP, encoding="utf-8")
    info = site / "torch-2.13.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.13.0\n", encoding="utf-8")
    python = tmp_path / "python3"
    # `-m venv DIR` makes a folder with this same script in it; the rest goes to the real Python with the fake pip.
    python.write_text(
        '#!/bin/bash\nif [ "$1 $2" = "-m venv" ]; then\n'
        '  mkdir -p "$3/bin" && touch "$3/pyvenv.cfg" && cp "$0" "$3/bin/python"\n'
        f'else PYTHONPATH={site} exec {sys.executable} "$@"; fi\n',
        encoding="utf-8",
    )
    python.chmod(0o755)
    return {
        "PATH": os.environ["PATH"],
        "PYTHON": str(python),
        "EXTRAS": "dev",
        "FETCH_DATA": "0",
        "NEED_VENV_MB": "1",
        "HOROVOD_JOBS_CACHE": str(tmp_path / "cache"),
        "FAKE_LOG": str(tmp_path / "pip.log"),
    }


def test_second_call_does_nothing_and_a_change_is_noticed(tree: Path, fake: dict[str, str]) -> None:
    script, log = tree / "launch" / "install.sh", Path(fake["FAKE_LOG"])
    first = run(script, **fake)
    assert first.returncode == 0, first.stderr
    assert first.stdout.splitlines()[-1] == "Run the main job with: make run"
    asked = log.read_text(encoding="utf-8").splitlines()
    assert "install torch==2.13.0" in asked[0]
    assert all("-c" in line.split() for line in asked if line.split()[-1].endswith("[dev]"))
    assert (tree / ".venv/share/horovod_jobs/constraints.txt").read_text(encoding="utf-8").splitlines()[
        -1
    ] == "torch==2.13.0"

    began = time.monotonic()
    second = run(script, **fake)
    assert time.monotonic() - began < 1.0
    assert second.stdout == f"The environment in {tree}/.venv is up to date.\n"
    assert log.read_text(encoding="utf-8").splitlines() == asked

    with (tree / "pyproject.toml").open("a", encoding="utf-8") as file:
        file.write("# changed\n")
    assert run(script, **fake).returncode == 0
    assert len(log.read_text(encoding="utf-8").splitlines()) == 2 * len(asked)
    assert run(script, **{**fake, "TORCH_REQUIREMENT": "torch==2.12.0 --pre"}).returncode == 0
    assert "install torch==2.12.0 --pre" in log.read_text(encoding="utf-8")


def test_an_interrupted_installation_is_made_again(tree: Path, fake: dict[str, str]) -> None:
    script, log = tree / "launch" / "install.sh", Path(fake["FAKE_LOG"])
    with subprocess.Popen(
        [str(script)], env={**fake, "HOME": os.environ["HOME"], "FAKE_SLEEP": "60"}, stderr=subprocess.PIPE
    ) as process:
        deadline = time.monotonic() + 30
        while not log.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        stderr = process.communicate(timeout=20)[1].decode()
    assert process.returncode == 143
    assert "The installation is not finished" in stderr
    (tree / ".venv" / "half-written").touch()
    again = run(script, **fake)
    assert again.returncode == 0, again.stderr
    assert "an earlier installation was interrupted" in again.stdout
    assert not (tree / ".venv" / "half-written").exists()


def test_two_installations_at_once_do_the_work_once(tree: Path, fake: dict[str, str]) -> None:
    environ = {**fake, "HOME": os.environ["HOME"], "FAKE_SLEEP": "2"}
    command = [str(tree / "launch" / "install.sh")]
    processes = [subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    texts = sorted((process.communicate(timeout=60)[0] for process in processes), key=len)
    assert [process.returncode for process in processes] == [0, 0]
    assert "another installation has just finished" in texts[0]
    assert "ready:" in texts[1]
    assert Path(fake["FAKE_LOG"]).read_text(encoding="utf-8").count("install torch==2.13.0") == 1


def test_an_environment_somebody_else_made_is_not_deleted(tree: Path, fake: dict[str, str]) -> None:
    venv = tree / ".venv"
    subprocess.run([fake["PYTHON"], "-m", "venv", str(venv)], check=True)
    (venv / "theirs").touch()
    assert run(tree / "launch" / "install.sh", **fake).returncode == 0
    assert (venv / "theirs").exists()


@pytest.mark.skipif(importlib.util.find_spec("hatchling") is None, reason="hatchling is not installed (extra: dev)")
def test_the_wheel_contains_the_configuration(tmp_path: Path) -> None:
    done = run(
        *(
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "-q",
            "--no-deps",
            "--no-build-isolation",
            "--no-index",
            "-w",
            tmp_path,
            ROOT,
        ),
        PATH=os.environ["PATH"],
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("horovod_jobs-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {f"horovod_jobs/{path.relative_to(ROOT)}" for path in (ROOT / "conf").rglob("*.yaml")}
    assert expected
    assert expected <= names
    assert "horovod_jobs/errors.py" in names
    assert not [name for name in names if name.startswith(("tests/", "launch/"))]
