"""What the integration tests share: start jobs as a person would, wait for what they report, and see that nothing is left."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from horovod_jobs.launch.base import _MARKS as WORLD_MARKS

ROOT = Path(__file__).resolve().parents[2]
CONF = ROOT / "tests" / "integration" / "conf"
BIN = Path(sys.executable).parent
TINY = (f"--config-dir={CONF}", "experiment=tiny")
JOB = (sys.executable, "-m", "horovod_jobs")
MARK = "HOROVOD_JOBS_TEST_MARK"  # HOROVOD_ is a prefix that the launcher passes on.
MPIRUN = (str(BIN / "mpirun"), "--bind-to", "none", "--map-by", "slot:OVERSUBSCRIBE")
PAIR_OF = ("graph=pair", "~stages.teacher", "stages.student.needs.teacher=%s")  # a student of the model at a path
WORLD = ("launch=local", "launch.np=2")
LIMIT_S = 200.0  # For a machine that does ten other things; a quiet one takes a few seconds for a job of two ranks.
T = TypeVar("T")


@dataclass(frozen=True)
class Done:
    """A job that has ended."""

    code: int
    out: str
    err: str
    seconds: float

    @property
    def text(self) -> str:
        """Everything it said, for a failing test's message."""
        return f"exit code {self.code} after {self.seconds:.1f} s\n--- stdout\n{self.out}\n--- stderr\n{self.err}"

    @property
    def errors(self) -> list[str]:
        """The lines that tell an error."""
        return [line for line in self.err.splitlines() if "error: " in line]


def environment(mark: str = "", **changes: str) -> dict[str, str]:
    """This process's environment without the marks of a world it may itself be in, plus ``changes``."""
    env = {
        name: value for name, value in os.environ.items() if not name.startswith((*WORLD_MARKS, "PYTEST_", "HYDRA_"))
    }
    env.update(OMP_NUM_THREADS="1", OMPI_ALLOW_RUN_AS_ROOT="1", OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1")
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [env.get("PYTHONPATH")])])
    env["PATH"] = f"{BIN}{os.pathsep}{env.get('PATH', os.defpath)}"
    if mark:
        env[MARK] = mark
    return {**env, **changes}


def processes(mark: str) -> dict[int, str]:
    """Living processes that carry the mark in their environment, with their command lines."""
    found = {}
    wanted = f"{MARK}={mark}".encode()
    for path in Path("/proc").iterdir():
        if not path.name.isdigit():
            continue
        try:
            if wanted in (path / "environ").read_bytes().split(b"\0"):
                state = (path / "stat").read_text().rpartition(")")[2].split()[0]
                if state != "Z":
                    found[int(path.name)] = (
                        (path / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                    )
        except OSError:
            continue
    return found


def ranks(mark: str) -> dict[int, int]:
    """Rank -> process id, of the marked ranks that run now."""
    found = {}
    for pid, command in processes(mark).items():
        if "horovod_jobs" not in command:
            continue
        variables = _environ(pid)
        rank = variables.get("OMPI_COMM_WORLD_RANK") or variables.get("HOROVOD_RANK")
        if rank is not None and "mpirun" not in command and "horovodrun" not in command and "/bin/sh" not in command:
            found[int(rank)] = pid
    return found


def wait_for(look: Callable[[], T | None], *, what: str, timeout_s: float = LIMIT_S) -> T:
    """The first thing that ``look`` gives that is neither None nor False; asked again until the deadline."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        found = look()
        if found is not None and found is not False:
            return found
        time.sleep(0.005)
    raise AssertionError(f"waited {timeout_s:g} s for {what}")


@dataclass
class Running:
    """A job under way, with everything that belongs to it found by its mark."""

    process: subprocess.Popen[bytes]
    directory: Path
    mark: str
    out: Path
    err: Path
    started: float
    before: list[Path]  # run directories that were there when it started

    def wait(self, *, timeout_s: float = LIMIT_S) -> Done:
        """Wait for its end; a job that does not end in time is killed and fails the test."""
        try:
            code = self.process.wait(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            shown = self.err.read_text(errors="replace")[-3000:]
            left = processes(self.mark)
            self.kill()
            raise AssertionError(f"the job did not end within {timeout_s:g} s; running were {left}\n{shown}") from None
        seconds = time.monotonic() - self.started
        return Done(code, self.out.read_text(errors="replace"), self.err.read_text(errors="replace"), seconds)

    def kill(self) -> None:
        """End every process of this job."""
        deadline = time.monotonic() + 10
        while (left := processes(self.mark)) and time.monotonic() < deadline:
            for pid in left:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            time.sleep(0.02)
        self.process.wait(timeout=10)

    def ranks(self) -> dict[int, int]:
        """Rank -> process id, of the ranks that run now."""
        return ranks(self.mark)

    def nothing_left(self, *, timeout_s: float = 20.0) -> None:
        """Fail where a process of this job lives on."""
        try:
            wait_for(lambda: not processes(self.mark), what="the job's processes to end", timeout_s=timeout_s)
        except AssertionError:
            raise AssertionError(f"processes are left: {processes(self.mark)}") from None


def _environ(pid: int) -> dict[str, str]:
    try:
        entries = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return {}
    return dict(entry.decode(errors="replace").split("=", 1) for entry in entries if b"=" in entry)


def start(*arguments: str, cwd: Path, launcher: Sequence[str] = (), env: Mapping[str, str] | None = None) -> Running:
    """Start ``launcher... python -m horovod_jobs arguments...`` in a session of its own."""
    mark = uuid.uuid4().hex
    before = run_directories(cwd)
    out, err = cwd / f"out-{mark[:6]}.txt", cwd / f"err-{mark[:6]}.txt"
    with out.open("wb") as stdout, err.open("wb") as stderr:
        process = subprocess.Popen(
            [*launcher, *JOB, *arguments],
            cwd=cwd,
            env=environment(mark, **(env or {})),
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            start_new_session=True,
        )
    return Running(process, cwd, mark, out, err, time.monotonic(), before)


def run(
    *arguments: str,
    cwd: Path,
    launcher: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
    timeout_s: float = LIMIT_S,
) -> Done:
    """Run a job to its end, and see that nothing of it is left."""
    running = start(*arguments, cwd=cwd, launcher=launcher, env=env)
    done = running.wait(timeout_s=timeout_s)
    running.nothing_left()
    return done


@dataclass
class Forks:
    """Jobs of one process each, as forks of a process that has imported everything (see ``forkserver``)."""

    process: subprocess.Popen[str]
    directory: Path
    count: int = field(default=0)

    def run(
        self,
        *arguments: str,
        cwd: Path,
        env: Mapping[str, str] | None = None,
        file_bytes: int | None = None,
        timeout_s: float = LIMIT_S,
    ) -> Done:
        """Run a job to its end. ``file_bytes`` limits the size of every file it writes."""
        self.count += 1
        out, err = self.directory / f"{self.count}.out", self.directory / f"{self.count}.err"
        order = {"argv": arguments, "cwd": str(cwd), "out": str(out), "err": str(err), "timeout_s": timeout_s}
        order |= {"env": dict(env or {}), "file_bytes": file_bytes}
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        text = [path.read_text(errors="replace") for path in (out, err)]
        assert answer["code"] is not None, f"the job did not end within {timeout_s:g} s\n{text[1]}"
        return Done(answer["code"], *text, answer["seconds"])


@contextmanager
def forks(directory: Path) -> Iterator[Forks]:
    """A fork server for the time of the body."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.integration.forkserver"],
        cwd=directory,
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline(), "the fork server did not start"
        yield Forks(process, directory)
    finally:
        assert process.stdin is not None
        process.stdin.close()
        process.wait(timeout=30)
        assert process.stdout is not None
        process.stdout.close()


# --- what a job leaves behind ------------------------------------------------------------------------------------------


def events(cwd: Path, *, run: str = "latest") -> list[dict[str, Any]]:
    """The run's events so far; a line that is being written is left out."""
    try:
        lines = (cwd / "runs" / run / "events.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    except OSError:
        return []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def manifest(cwd: Path, *, run: str = "latest") -> dict[str, Any]:
    """The run's manifest."""
    value: dict[str, Any] = json.loads((cwd / "runs" / run / "manifest.json").read_text(encoding="utf-8"))
    return value


def valid_manifest(cwd: Path, *, run: str = "latest") -> dict[str, Any]:
    """The run's manifest, held to its JSON Schema."""
    import jsonschema

    from horovod_jobs.manifest import schema

    value = manifest(cwd, run=run)
    jsonschema.validate(value, schema(), cls=jsonschema.Draft202012Validator)
    return value


def stage(value: Mapping[str, Any], name: str) -> dict[str, Any]:
    """One stage of a manifest."""
    found: dict[str, Any] = next(entry for entry in value["stages"] if entry["name"] == name)
    return found


def weights(cwd: Path, *, store: str = "artifacts") -> dict[str, str]:
    """SHA-256 of model.safetensors of every model in the store, by reference."""
    return {
        path.parent.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted((cwd / store).glob("model-*/model.safetensors"))
    }


def run_directories(cwd: Path) -> list[Path]:
    """The run directories, without the link to the latest."""
    root = cwd / "runs"
    return sorted(path for path in root.iterdir() if path.is_dir() and not path.is_symlink()) if root.is_dir() else []


def left_behind(cwd: Path) -> list[str]:
    """What stands in the directory that a job has no business to leave: Hydra's own directories and notes, half-made artifacts."""
    names = [name for name in ("outputs", "multirun", "multirun.yaml", ".hydra") if (cwd / name).exists()]
    return (
        names
        + [str(path) for path in cwd.glob("artifacts/.staging-*")]
        + [str(path) for path in cwd.glob("artifacts/.old-*")]
    )


def model_in(directory: Path) -> Path:
    """The one model artifact of a store."""
    (found,) = (directory / "artifacts").glob("model-*")
    return found


def damage(path: Path, how: str) -> None:
    """Damage a file: cut it short, flip one bit in its middle, or take it away."""
    content = bytearray(path.read_bytes())
    if how == "gone":
        path.unlink()
    elif how == "flipped":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    else:
        path.write_bytes(content[: len(content) // 2])


def check(done: Done, *, code: int, pattern: str) -> str:
    """The one line of a job that failed as it should."""
    assert done.code == code, done.text
    assert "Traceback" not in done.err + done.out, done.text
    assert len(done.errors) == 1, done.text
    line = done.errors[0]
    assert line.startswith("error: "), done.text
    assert re.search(pattern, line), line
    return line
