"""Runs jobs in forks of one process that has imported everything once: a job of its own each, without seconds of imports.

It reads one order a line from stdin, ``{"argv": [...], "cwd": ..., "out": path, "err": path, "timeout_s": ...}``, and answers with
``{"code": ..., "seconds": ...}``. ``code`` is null where the job did not end in time and was killed.
"""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import resource
import signal
import sys
import time
import traceback
from typing import Any

_SLOW = ("torch", "numpy", "yaml", "hydra", "sklearn.datasets", "onnxruntime", "rich.table", "safetensors.torch")


def _import_everything() -> None:
    for name in _SLOW:
        importlib.import_module(name)
    import horovod_jobs
    import horovod_jobs.stages
    import horovod_jobs.training

    for name in ("app", "runner", "planning"):
        importlib.import_module(f"horovod_jobs.{name}")
    for package in (horovod_jobs.stages, horovod_jobs.training):
        for module in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
            importlib.import_module(module.name)


def _job(order: dict[str, Any]) -> int:
    for stream, path in ((sys.stdout, order["out"]), (sys.stderr, order["err"])):
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        os.dup2(handle, stream.fileno())
    os.chdir(order["cwd"])
    os.environ.update(order.get("env", {}))
    if order.get("file_bytes") is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (order["file_bytes"], order["file_bytes"]))
    sys.argv = ["horovod-jobs", *order["argv"]]
    from horovod_jobs.app import main

    try:
        main()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _run(order: dict[str, Any]) -> dict[str, Any]:
    started = time.monotonic()
    pid = os.fork()
    if pid == 0:
        os.setsid()
        code = _job(order)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    code: int | None = None
    while time.monotonic() - started < order["timeout_s"]:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            code = os.waitstatus_to_exitcode(status)
            break
        time.sleep(0.005)
    else:
        os.killpg(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return {"code": code, "seconds": time.monotonic() - started}


def main() -> None:
    """Serve until stdin ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    _import_everything()
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(_run(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
