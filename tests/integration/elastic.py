"""What the tests of elastic jobs share: the job, its journal, and which process has which rank."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from horovod_jobs.data.augment import ShiftFlipCrop
from tests.integration.support import TINY, Running, run_directories, wait_for


class Slowly(ShiftFlipCrop):
    """Augmentation that takes its time, so that something can happen to a job of few steps."""

    def __init__(self, *, shift: int, seconds: float) -> None:
        super().__init__(shift=shift)
        self._seconds = seconds

    def __call__(self, inputs: Tensor, *, seed: int, epoch: int, indices: Tensor) -> Tensor:
        time.sleep(self._seconds)
        return super().__call__(inputs, seed=seed, epoch=epoch, indices=indices)


def slowly(seconds: float) -> str:
    """The override for a job whose steps take at least so long."""
    return f"data.augment={{_target_: tests.integration.elastic.Slowly, shift: 1, seconds: {seconds}}}"


# Batch norm and dropout, whose numbers depend on the rank: equal bytes mean that nothing was repeated, lost or drawn anew.
EXACT = (*TINY, "fit.epochs=10", "fit.ema_decay=0.9")
# The same but for rounding whatever the number of ranks.
ROUNDED = (*TINY, "model=mlp", "model.hidden=[32]", "model.dropout=0", "fit.epochs=20")
ELASTIC = ("strategy=elastic", "launch=local", "launch.np=2", "launch.elastic.beat_s=0.1", "launch.elastic.cooldown_s=0",
           "launch.elastic.discovery_every_s=0.2")  # fmt: skip


def journal(cwd: Path) -> list[dict[str, Any]]:
    """What the driver wrote, of all runs in the order in which they began; a line under way is left out."""
    lines = [
        line
        for path in run_directories(cwd)
        if (path / "elastic.jsonl").exists()
        for line in (path / "elastic.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    ]
    return [json.loads(line) for line in lines if line.endswith("\n")]


def told(cwd: Path, event: str) -> list[dict[str, Any]]:
    """The journal's entries of one kind."""
    return [entry for entry in journal(cwd) if entry["event"] == event]


def world(running: Running, number: int) -> dict[int, int]:
    """Wait for the world of this number, counted over all runs: rank -> process id."""

    def look() -> dict[int, int] | None:
        assert running.process.poll() is None, running.err.read_text(errors="replace")
        found = told(running.directory, "world")
        return dict(enumerate(rank["pid"] for rank in found[number]["ranks"])) if len(found) > number else None

    return wait_for(look, what=f"world {number}")


def worlds(cwd: Path) -> list[int]:
    """The sizes of the worlds that there were."""
    return [entry["size"] for entry in told(cwd, "world")]


def events(cwd: Path, event: str) -> list[dict[str, Any]]:
    """The run's events of one kind, of all runs."""
    lines = [
        line
        for path in run_directories(cwd)
        if (path / "events.jsonl").exists()
        for line in (path / "events.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    ]
    return [
        entry for entry in map(json.loads, (line for line in lines if line.endswith("\n"))) if entry["event"] == event
    ]


def at_epoch(running: Running, number: int) -> None:
    """Wait until so many epochs have ended in all."""

    def look() -> bool:
        assert running.process.poll() is None, running.err.read_text(errors="replace")
        return max((entry["epoch"] for entry in events(running.directory, "epoch")), default=0) >= number

    wait_for(look, what=f"epoch {number}")


def tensors(cwd: Path) -> dict[str, torch.Tensor]:
    """The weights of the one model in the store."""
    (path,) = (cwd / "artifacts").glob("model-*/model.safetensors")
    return load_file(path)


def nearly_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """The same but for what sums of another order leave."""
    return one.keys() == other.keys() and all(
        torch.allclose(one[name].double(), other[name].double(), rtol=1e-4, atol=1e-5) for name in one
    )


def hosts_script(path: Path, hosts: str) -> str:
    """A discovery program that prints a file, which ``tell`` rewrites."""
    tell(path, hosts)
    script = path.with_suffix(".sh")
    script.write_text(f"#!/bin/sh\ncat {path}\n", encoding="utf-8")
    script.chmod(0o755)
    return str(script)


def tell(path: Path, hosts: str) -> None:
    """From now on these are the hosts. Replaced at once: a program may be reading it."""
    new = path.with_suffix(".new")
    new.write_text(hosts, encoding="utf-8")
    new.replace(path)
