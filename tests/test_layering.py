"""The house's walls: imports point one way, only comm/ knows Horovod, and what should start fast imports nothing heavy."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "horovod_jobs"
MODULES = {
    str(path.relative_to(ROOT).with_suffix("")).replace(os.sep, ".").removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
}
# From the bottom to the top: a module may import from its own floor and those below (docs of the design: app -> runner -> stages ->
# training, distillation, quantization, report -> strategy -> comm, with artifacts, graph, errors and config at the bottom).
FLOORS: tuple[tuple[str, ...], ...] = (
    ("early", "errors", "storage", "versions", "formats", "tables", "preprocessing", "origin", "runtimes"),
    ("config", "artifacts", "instantiate", "bundle", "manifest", "console"),
    ("graph", "limits", "schedule", "usage"),
    ("comm",),
    (
        "footprint",
        "tracking",
        "interrupt",
        "pulse",
        "chaos",
        "data",
        "models",
        "tasks",
        "latency",
        "predict",
        "runtimes.pytorch",
        "runtimes.onnx",
        "launch",
        "evaluation",
    ),
    ("strategy",),
    ("stages.base", "spending", "export"),
    ("training", "distillation", "quantization", "report"),
    ("stages",),
    ("job", "composing", "sweeping"),
    ("planning", "record", "turns"),
    ("lifecycle",),
    ("parallel",),
    ("runner",),
    ("comparing", "doctor", "living", "watching"),
    ("runs", "app"),
    ("__main__",),
)
# Leaves: what a user may copy or replace. They import errors and each other's kind only.
LEAVES = {
    "data": ("errors", "data", "preprocessing"),
    "models": ("errors", "models"),
    "tasks": ("errors", "tasks", "data.base"),
    "footprint": ("errors", "footprint", "comm.world", "storage"),
}


def imports(path: Path, *, module_level: bool = False) -> Iterator[tuple[int, str]]:
    """Every module that a file imports, with its line; not those for type checking only, which never run."""

    def walk(node: ast.AST) -> Iterator[tuple[int, str]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            if module_level and isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                continue
            if isinstance(child, ast.Import):
                yield from ((child.lineno, alias.name) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{path}:{child.lineno} imports relatively"
                assert child.module is not None
                for alias in child.names:
                    full = f"{child.module}.{alias.name}"
                    yield child.lineno, full if full in MODULES else child.module
            yield from walk(child)

    yield from walk(ast.parse(path.read_text(encoding="utf-8")))


def floor(module: str) -> int:
    """The floor of a module: that of the longest name that fits."""
    name = module.removeprefix("horovod_jobs").lstrip(".")
    found = [
        (len(entry), level)
        for level, entries in enumerate(FLOORS)
        for entry in entries
        if name == entry or name.startswith(entry + ".")
    ]
    assert found, f"{module} has no floor yet; give it one in FLOORS"
    return max(found)[1]


@pytest.mark.parametrize("module", sorted(set(MODULES) - {"horovod_jobs"}))
def test_imports_point_down(module: str) -> None:
    wrong = [
        f"{MODULES[module].relative_to(ROOT)}:{line} imports {name}"
        for line, name in imports(MODULES[module])
        if name.startswith("horovod_jobs.") and floor(name) > floor(module)
    ]
    assert wrong == []


@pytest.mark.parametrize("leaf", LEAVES)
def test_leaves_know_errors_only(leaf: str) -> None:
    allowed = tuple(f"horovod_jobs.{name}" for name in LEAVES[leaf])
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for module, path in MODULES.items()
        if module.startswith(f"horovod_jobs.{leaf}")
        for line, name in imports(path)
        if name.startswith("horovod_jobs") and not any(name == one or name.startswith(one + ".") for one in allowed)
    ]
    assert wrong == []


def test_only_comm_knows_horovod() -> None:
    found = {
        str(path.relative_to(PACKAGE))
        for path in MODULES.values()
        for _, name in imports(path)
        if name.split(".")[0] in ("horovod", "mpi4py")
    }
    assert {str(Path(name).parent) for name in found if not name.startswith("doctor")} == {"comm"}


def test_no_pickle() -> None:
    """torch.load only with weights_only=True, and nothing that pickles or unpickles; naming pickle's exceptions is fine."""
    wrong = []
    for path in MODULES.values():
        wrong += [
            f"{path.name}:{line} {name}"
            for line, name in imports(path)
            if name.split(".")[0] in ("cloudpickle", "dill", "joblib", "shelve")
        ]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            if called.startswith("pickle."):
                wrong.append(f"{path.name}:{node.lineno} {called}")
            if called == "torch.load":
                safe = [
                    word for word in node.keywords if word.arg == "weights_only" and ast.unparse(word.value) == "True"
                ]
                wrong += [] if safe else [f"{path.name}:{node.lineno} torch.load"]
    assert wrong == []


@pytest.mark.parametrize(
    "path", sorted([*MODULES.values(), *(ROOT / "tests").rglob("*.py")]), ids=lambda path: str(path.relative_to(ROOT))
)
def test_a_file_can_be_held_in_the_head(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= 450, f"{path.relative_to(ROOT)} has {lines} lines; split it by meaning"


HEAVY = ("torch", "numpy", "onnx", "onnxruntime", "matplotlib", "codecarbon", "mpi4py", "horovod", "sklearn", "mlflow")


@pytest.mark.parametrize(
    "start",
    [
        "from horovod_jobs.runs import main; main(['ls'])",
        "import sys; sys.argv[1:] = ['--help']; from horovod_jobs.app import main; main()",
        "import sys; sys.argv[1:] = ['--cfg', 'job']; from horovod_jobs.app import main; main()",
        "import horovod_jobs",
    ],
    ids=["horovod-runs ls", "horovod-jobs --help", "horovod-jobs --cfg job", "import"],
)
def test_what_should_be_quick_imports_nothing_heavy(start: str, tmp_path: Path) -> None:
    program = (
        "import atexit, sys\n"
        f"atexit.register(lambda: print('HEAVY', [name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr))\n"
        f"try:\n    {start}\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "HEAVY []" in done.stderr, done.stderr
