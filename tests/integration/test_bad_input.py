"""What a person gets wrong: one line with the value and the remedy, the exit code of its class, no traceback, no rank that hangs."""

# ruff: noqa: E501 (a row of the table is easier to read on one line)

from __future__ import annotations

import gzip
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.integration.support import (
    PAIR_OF,
    TINY,
    WORLD,
    Forks,
    check,
    damage,
    events,
    left_behind,
    model_in,
    run,
    run_directories,
    stage,
    valid_manifest,
    weights,
)

SHIFT = "data.augment={_target_: horovod_jobs.data.augment.ShiftFlipCrop, shift: 1}"
EVALUATE = "+stages.e={kind: evaluate, needs: {model: model}%s}"
QUANTIZE = "+stages.q={kind: quantize, needs: {model: model}, calibration_samples: %s}"
OWN_MODEL = ("model=mlp", "~model.hidden", "~model.dropout")

# fmt: off
TABLE: dict[str, tuple[tuple[str, ...], int, str]] = {
    # what is wrong: overrides, exit code, what the line says
    "unknown key": (("fit.epoch=1",), 2, r"fit\.epoch is not a key \(did you mean fit\.epochs\?\); fit has epochs, "),
    "unknown section": (("fot.epochs=1",), 2, r"fot\.epochs is not a key \(did you mean fit\.epochs\?\); the job has name, title, seed"),
    "unknown section and key": (("fot.epoch=1",), 2, r"fot\.epoch is not a key \(did you mean fit\.epochs\?\)"),
    "unknown key below a section": (("launch.slrm.nodes=1",), 2, r"launch\.slrm\.nodes is not a key \(did you mean launch\.slurm\.nodes\?\); launch has kind"),
    "unknown key of a part": (("footprint=codecarbon", "footprint.usd_per_kw=1"), 2, r"footprint\.usd_per_kw is not a key \(did you mean footprint\.usd_per_kwh\?\)"),
    "unknown key of a stage without a plus": (("stages.model.sed=1",), 2, r"stages\.model\.sed is not a key \(did you mean stages\.model\.seed\?\)"),
    "unknown stage": (("stages.modle.seed=1",), 2, r"stages\.modle\.seed is not a key \(did you mean stages\.model\.seed\?\); stages has model"),
    "key like no other": (("fit.zzzz=1",), 2, r"fit\.zzzz is not a key; fit has epochs, "),
    "key of a part that stages share": (("stages.model.optimizer.lr=1",), 2, r"stages\.model\.optimizer is the job's optimizer; set optimizer\.lr for all stages"),
    "need without a plus": (("stages.model.needs.init=./a",), 2, r"needs\.init is not a key; .*write \+stages\.model\.needs\.init="),
    "unknown key with a plus": (("+epochs=1",), 2, r"epochs=1 is not a key; the job has name, title, seed"),
    "unknown key of a section": (("+fit.epoch=3",), 2, r"fit\.epoch=3 is not a key \(did you mean epochs\?\); fit has epochs"),
    "unknown key of a stage": (("+stages.model.epochs=3",), 2, r"stages\.model\.epochs is not a key of a train stage.*it has .*fit"),
    "unknown key of a stage's fit": (("+stages.model.fit.epoch=3",), 2, r"stages\.model\.fit\.epoch=3 is not a key \(did you mean epochs"),
    "unknown group": (("modle=mlp",), 2, r"modle is not a key \(did you mean model\?\); the job has name, title, seed"),
    "unknown option": (("model=mpl",), 2, r"'model/mpl' Available options in 'model': .*mlp.*resnet20"),
    "unknown option of launch": (("launch=cloud",), 2, r"'launch/cloud' Available options in 'launch': docker hosts local mpijob none slurm trainjob"),
    "null for a group that is needed": (("data=null",), 2, r"group override must be a string"),
    "not an override": (("fit.epochs",), 2, r"'fit\.epochs' missing EQUAL"),
    "no such config directory": (("--config-dir=/nowhere",), 2, r"'/nowhere' not found"),
    "wrong type, a word": (("fit.epochs=many",), 2, r"fit\.epochs=many is not a whole number; use one such as 3"),
    "wrong type, a list": (("allow_targets=tests",), 2, r"allow_targets"),
    "wrong type in a stage": (("stages.model.enabled=maybe",), 2, r"stages\.model\.enabled=maybe is neither true nor false"),
    "no value": (("fit.global_batch=null",), 2, r"fit\.global_batch=null is no value for this key"),
    "interpolation that leads nowhere": (("fit.epochs=${nothing.here}",), 2, r"fit\.epochs.*'nothing\.here' not found"),
    "too few epochs": (("fit.epochs=0",), 2, r"fit\.epochs=0 is too small; use 1 or more"),
    "unknown precision": (("fit.precision=fp8",), 2, r"fit\.precision=fp8 is not known; use one of fp32, bf16, fp16"),
    "unknown device": (("fit.device=tpu",), 2, r"fit\.device=tpu is not known; use auto, cpu or cuda"),
    "unknown choice of weights": (("fit.publish=worst",), 2, r"fit\.publish=worst is not known; use last or best"),
    "decay out of range": (("fit.ema_decay=2",), 2, r"fit\.ema_decay=2\.0 is not between 0 and 1; use 0\.999"),
    "best weights by no split": (("+data.without_validation=true", "fit.publish=best"), 2, r"stages\.model\.fit\.publish=best goes by the validation split, and the data set has none"),
    "early stopping by no split": (("+data.without_validation=true", "fit.early_stop_epochs=2"), 2, r"fit\.early_stop_epochs=2 goes by the validation split, and the data set has none; give it one"),
    "early stopping by a split that is not looked at": (("fit.validate_every_epochs=0", "fit.early_stop_epochs=2"), 2, r"early_stop_epochs=2 .* fit\.validate_every_epochs=0 .* use 1, say"),
    "clipping at nothing": (("fit.clip_norm=0",), 2, r"fit\.clip_norm=0\.0 is not positive"),
    "not a number": (("fit.clip_norm=nan",), 2, r"fit\.clip_norm=nan is not a finite number"),
    "not a finite number": (("optimizer.lr=inf",), 2, r"optimizer\.lr=inf is not a finite number"),
    "not a number in a list": (("+optimizer.betas=[0.9,nan]",), 2, r"optimizer\.betas\[1\]=nan is not a finite number"),
    "no workers at all": (("fit.workers=-1",), 2, r"fit\.workers=-1 is negative; use 0 or more"),
    "no accumulation": (("fit.accumulate=0",), 2, r"fit\.accumulate=0 is too small; use 1 or more"),
    "no steps": (("fit.max_steps=0",), 2, r"fit\.max_steps=0 is too small; use 1 or more, or null"),
    "validation before the start": (("fit.validate_every_epochs=-1",), 2, r"fit\.validate_every_epochs=-1 is negative; use 0 or more"),
    "checkpoints before the start": (("fit.checkpoint_every_s=-1",), 2, r"fit\.checkpoint_every_s=-1\.0 is negative; use 0 or more, or null"),
    "seed of too many digits": (("seed=99999999999999999999",), 2, r"seed=99999999999999999999 is too large; use a whole number of at most 18 digits"),
    "no threads": (("launch.threads=0",), 2, r"launch\.threads=0 is too small; use 1 or more, or null"),
    "negative grace": (("launch.grace_s=-1",), 2, r"launch\.grace_s=-1\.0 is negative; use 0 or more"),
    "no nodes": (("launch.slurm.nodes=0",), 2, r"launch\.slurm\.nodes=0 is too small; use 1 or more, or null"),
    "lease of nothing": (("launch.elastic.lease_s=0",), 2, r"launch\.elastic\.lease_s=0\.0 is not positive; use more than 0"),
    "no processors": (("launch.docker.cpus=0",), 2, r"launch\.docker\.cpus=0\.0 is not positive; use more than 0, or null"),
    "no pods": (("launch.kubernetes.slots=0",), 2, r"launch\.kubernetes\.slots=0 is too small; use 1 or more"),
    "no silence": (("run.silent_limit_s=0",), 2, r"run\.silent_limit_s=0\.0 is not positive; use more than 0, or null"),
    "no stages at a time": (("run.parallel_stages=0",), 2, r"run\.parallel_stages=0 is not a number of stages; use 1 or more"),
    "predivision by nothing": (("strategy.predivide=0",), 2, r"strategy\.predivide=0 is not positive; use 1 for none"),
    "country that is none": (("footprint=codecarbon", "footprint.country_iso_code=XYZ"), 2, r"footprint\.country_iso_code='XYZ' is not among the \d+ countries"),
    "batch not divisible": (("fit.accumulate=7",), 2, r"global_batch=24 does not divide by .* 7 accumulation steps.*use 21 or 28"),
    "batch larger than the data": (("fit.global_batch=1000", "fit.drop_last=true"), 2, r"drop_last=true leaves no batch of global_batch=1000 in 240"),
    "no ranks": (("launch.np=0",), 2, r"launch\.np=0 is not a number of ranks; use 1 or more"),
    "unknown launcher": (("launch.kind=rsh",), 2, r"launch\.kind=rsh is not known; use none or local"),
    "unknown controller": (("launch.controller=nccl",), 2, r"launch\.controller=nccl is not known; use auto, mpi or gloo"),
    "variable that is not set": (("launch=local", "launch.env=[NO_SUCH_VARIABLE]"), 2, r"NO_SUCH_VARIABLE, which is not set here"),
    "run id with a slash": (("run.id=a/b",), 2, r"run\.id=a/b is not a directory name"),
    "run id that is the link": (("run.id=latest",), 2, r"run\.id=latest is not a directory name"),
    "unknown log level": (("run.log_level=loud",), 2, r"run\.log_level=loud is not known; use debug"),
    # the graph
    "no stages": (("~stages.model",), 2, r"stages is empty; choose a graph"),
    "unknown stage kind": (("+stages.x={kind: distil}",), 2, r"kind=distil is not a stage kind \(did you mean distill\?\); use one of train"),
    "not a stage": (("++stages.model=5",), 2, r"stages\.model"),
    "cycle": (("+stages.a={kind: train, needs: {init: b}}", "+stages.b={kind: train, needs: {init: a}}"), 2, r"in a circle \(a -> b -> a\)"),
    "need of itself": (("+stages.model.needs={init: model}",), 2, r"in a circle \(model -> model\)"),
    "missing need": (("+stages.e={kind: evaluate}",), 2, r"stages\.e\.needs\.model is missing; name a stage"),
    "need that is no stage": (("+stages.e={kind: evaluate, needs: {model: nobody}}",), 2, r"needs\.model=nobody names no stage; there are model, e"),
    "role that does not exist": (("+stages.model.needs={teacher: model}",), 2, r"train stage has no input 'teacher'; it takes init"),
    "wrong kind of input": ((EVALUATE % "", "+stages.f={kind: evaluate, needs: {model: e}}"), 2, r"stages\.f\.needs\.model=e: an evaluate stage makes an evaluation"),
    "unknown split": ((EVALUATE % ", split: train2",), 2, r"stages\.e\.split=train2 is not a split; use test, validation or train"),
    "empty evaluation batch": ((EVALUATE % ", batch: 0",), 2, r"stages\.e\.batch=0 is too small; use 1 or more"),
    "empty latency batch": ((EVALUATE % ", latency_batches: [0]",), 2, r"stages\.e\.latency_batches=\[0\] is too small; use 1 or more"),
    "no latency batch": ((EVALUATE % ", latency_batches: []",), 2, r"stages\.e\.latency_batches=\[\] is empty; use numbers such as \[1\]"),
    "no latency runs": ((EVALUATE % ", latency_runs: 0",), 2, r"stages\.e\.latency_runs=0 is too small; use 1 or more"),
    "no latency threads": ((EVALUATE % ", latency_threads: 0",), 2, r"stages\.e\.latency_threads=0 is too small; use 1 or more"),
    "tolerance of nothing": (("+stages.x={kind: export, needs: {model: model}, tolerance: 0}",), 2, r"stages\.x\.tolerance=0\.0 is not positive; use the largest difference you accept, 1e-4"),
    "empty calibration batch": ((QUANTIZE % "9, calibration_batch: 0",), 2, r"stages\.q\.calibration_batch=0 is too small; use 1 or more"),
    "nothing to check": ((QUANTIZE % "9, check_samples: 0",), 2, r"stages\.q\.check_samples=0 is too small; use 1 or more, or null"),
    "more to check than there is": ((QUANTIZE % "9, check_samples: 41",), 2, r"stages\.q\.check_samples=41 does not fit the validation split of 40 samples; use 1 to 40, or null"),
    "negative drop": ((QUANTIZE % "9, max_drop: -1",), 2, r"stages\.q\.max_drop=-1\.0 is negative; use percentage points from 0 on, or null"),
    "calibration set empty": ((QUANTIZE % 0,), 2, r"stages\.q\.calibration_samples=0 is too small; use 1 or more"),
    "calibration set too large": ((QUANTIZE % 241,), 2, r"calibration_samples=241 does not fit .*use 1 to 240"),
    # parts
    "target not allowed": (("model._target_=os.system",), 2, r"os\.system is not allowed .*allow_targets=\[os\]"),
    "target behind an allowed name": (("model._target_=horovod_jobs.storage.os.system",), 2, r"system is not allowed"),
    "target that is not there": (("model._target_=tests.nothing.Model",), 2, r"tests\.nothing\.Model: tests has no 'nothing'"),
    "target that is no model": ((*OWN_MODEL, "model._target_=tests.integration.parts.not_a_model"), 2, r"gives a list; name a torch\.nn\.Module"),
    "model refuses its argument": ((*OWN_MODEL, "model._target_=tests.integration.parts.Refuses", "+model.width=3"), 2, r"refused its arguments \(width 3 is odd\)"),
    "model argument unknown": (("+model.depth=3",), 2, r"stages\.model\.model\.depth=3: tests\.support\.SmallNet has no argument 'depth'; it takes dropout"),
    "model does not fit the pictures": (("data.side=8",), 2, r"does not fit inputs of shape \[1, 8, 8\]"),
    "optimizer refuses its argument": (("optimizer.lr=-1",), 2, r"SGD refused its arguments \(Invalid learning rate: -1\)"),
    "schedule out of range": (("schedule.peak_at=2",), 2, r"schedule\.peak_at=2 is not between 0 and 1"),
    "unknown compression": (("strategy.compression=int3",), 2, r"compression=int3 is not known; use one of none, fp16, bf16, topk, randomk, onebit, sign, qsgd, powersgd"),
    "label smoothing out of range": (("task.label_smoothing=2",), 2, r"label_smoothing=2 is out of range"),
    "a word in place of a group's option": (("graph=pair", "student=mlp"), 2, r"stages\.student\.model=mlp names nothing to build; choose one \(model@student="),
    "temperature below zero": (("graph=pair", "distiller.temperature=-1"), 2, r"temperature=-1 is not positive"),
    "no distillation term": (("graph=pair", "distiller.terms.soft.weight=0", "distiller.terms.hard.weight=0"), 2, r"has no term with a weight"),
    "teacher cache with augmentation": (("graph=pair", "distiller.cache=true", "stages.student.augment=true", SHIFT), 2, r"distiller\.cache=true keeps .*set stages\.student\.augment=false, or distiller\.cache=false"),
    # data
    "data of another signature": (("data._target_=horovod_jobs.data.digits.digits",), 2, r"data\.samples=240: .*has no argument 'samples'; it takes test_samples"),
    "labels outside the classes": (("+data.labels_up_to=6",), 3, r"target [45] of sample \d+ is not a class from 0 to 3"),
    # artifacts by path
    "no artifact at the path": (("+stages.model.needs.init=./nothing",), 4, r"no artifact at nothing .*give the path of an artifact directory"),
    # places
    "run directory under a file": (("run.root=/dev/null/x",), 6, r"cannot make the run directory /dev/null/x/.*choose another directory \(run\.root="),
    "store under a file": (("run.store=/dev/null/x",), 6, r"/dev/null/x.*choose another directory"),
    "run directory that nobody can make": (("run.root=/proc/x",), 6, r"cannot make the run directory /proc/x.* \(No such file or directory\); choose another directory \(run\.root=\.\.\.\)"),
    "store that nobody can make": (("run.store=/proc/x",), 6, r"cannot make the store /proc/x \(No such file or directory\); choose another directory \(run\.store=\.\.\.\)"),
    "plan of a run directory that nobody can make": (("run.root=/proc/x", "plan=true"), 6, r"cannot write to /proc/x \(No such file or directory\); choose another directory \(run\.root=\.\.\.\)"),
    "empty store": (("run.store=",), 2, r"run\.store= is empty; name a directory, or leave it out for artifacts"),
    # sweeps
    "last job of a sweep": (("-m", "seed=3,-1", "fit.epochs=1,0"), 2, r"job 2 of 4 \(seed=3 fit\.epochs=0\): stages\.model\.fit\.epochs=0 is too small; use 1 or more; none of the 4 jobs was started"),
    "job of a sweep, found when it runs": (("-m", "optimizer.lr=-1,-2"), 2, r"job 1 of 2 \(optimizer\.lr=-1\): .*Invalid learning rate: -1.*; 1 more not tried"),
    # training
    "loss that blows up": (("optimizer.lr=1e30",), 8, r"not finite in stage model at step \d+ \(epoch 1\) on rank 0, training samples \d+.*lower optimizer\.lr.*Nothing was published"),
    "sample that is not finite": (("+data.not_finite=3",), 8, r"inputs of 3 are not finite themselves"),
}
# fmt: on


@pytest.mark.parametrize("what", TABLE)
def test_one_process_says_it_in_one_line(what: str, forks: Forks, tmp_path: Path) -> None:
    overrides, code, pattern = TABLE[what]
    done = forks.run(*TINY, *overrides, cwd=tmp_path)
    check(done, code=code, pattern=pattern)
    assert weights(tmp_path) == {}
    assert left_behind(tmp_path) == []
    if what not in ("labels outside the classes", "loss that blows up", "sample that is not finite"):
        assert run_directories(tmp_path) == [], "it is found before anything runs"
    for directory in run_directories(tmp_path):
        told = valid_manifest(tmp_path, run=directory.name)
        assert (told["status"], told["exit_code"]) == ("failed", code)


def test_the_manifest_says_why_it_failed(forks: Forks, tmp_path: Path) -> None:
    line = check(forks.run(*TINY, "optimizer.lr=1e30", cwd=tmp_path), code=8, pattern="not finite")
    told = valid_manifest(tmp_path)
    assert line == f"error: {told['error']}"
    assert stage(told, "model")["status"] == "failed"
    event = next(entry for entry in events(tmp_path) if entry["event"] == "non_finite")
    assert len(event["samples"]) == 24


def test_a_group_of_ones_own_that_is_no_yaml(forks: Forks, tmp_path: Path) -> None:
    (tmp_path / "conf" / "model").mkdir(parents=True)
    (tmp_path / "conf" / "model" / "mine.yaml").write_text("hidden: [1, 2\nwidth: {", encoding="utf-8")
    done = forks.run(f"--config-dir={tmp_path / 'conf'}", "model=mine", cwd=tmp_path)
    check(done, code=2, pattern=r"mine\.yaml")


def test_a_data_set_without_a_test_split(forks: Forks, tmp_path: Path) -> None:
    (tmp_path / "conf" / "data").mkdir(parents=True)
    (tmp_path / "conf" / "data" / "mine.yaml").write_text(
        "_target_: tests.integration.parts.NoTest\n", encoding="utf-8"
    )
    done = forks.run(
        f"--config-dir={tmp_path / 'conf'}",
        "data=mine",
        "graph=train",
        "model=mlp",
        "allow_targets=[tests]",
        cwd=tmp_path,
    )
    check(done, code=3, pattern=r"NoTest.*has no attribute 'test'")


# --- data sets that are missing or damaged -------------------------------------------------------------------------------


def test_missing_data_names_the_ways_to_get_it(forks: Forks, tmp_path: Path) -> None:
    done = forks.run(*TINY, "data=fashion_mnist", f"data.root={tmp_path}", cwd=tmp_path)
    line = check(done, code=3, pattern=r"data\.root=.* has no train-images-idx3-ubyte\.gz")
    for way in ("apt install dataset-fashion-mnist", "HOROVOD_JOBS_DATA", "data.root", "data.download=true"):
        assert way in line


def test_a_damaged_data_file_is_named(forks: Forks, tmp_path: Path) -> None:
    content = gzip.compress(os.urandom(50_000))
    for name in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        (tmp_path / f"{name}-ubyte.gz").write_bytes(content)
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(content[:20_000])
    done = forks.run(*TINY, "data=fashion_mnist", f"data.root={tmp_path}", cwd=tmp_path)
    check(done, code=3, pattern=r"train-images-idx3-ubyte\.gz is damaged")
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(content)
    done = forks.run(*TINY, "data=fashion_mnist", f"data.root={tmp_path}", cwd=tmp_path)
    check(done, code=3, pattern=r"train-images-idx3-ubyte\.gz")


# --- places where nothing can be written ---------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["run.root", "run.store"])
def test_a_directory_that_may_not_be_written(key: str, forks: Forks, tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    if os.geteuid() == 0:  # Root may write everywhere but to a file system that is read-only.
        with small_disk(closed, options="ro"):
            done = forks.run(*TINY, f"{key}={closed}/here", cwd=tmp_path)
    else:
        closed.mkdir(mode=0o555)
        done = forks.run(*TINY, f"{key}={closed}/here", cwd=tmp_path)
    reason = r"(Permission denied\); choose a|Read-only file system\); .*choose another) directory"
    check(done, code=6, pattern=rf"{re.escape(str(closed))}.*{reason} .*\({re.escape(key)}=")


def test_a_file_that_may_not_grow_leaves_the_checkpoints_before_it(forks: Forks, tmp_path: Path) -> None:
    settings = (
        *TINY,
        "model=mlp",
        "fit.checkpoint_every_steps=5",
    )  # Its weights are larger than any text a run writes.
    done = forks.run(*settings, cwd=tmp_path, file_bytes=16_000)
    check(done, code=6, pattern=r"cannot write a checkpoint to .*File too large")
    assert weights(tmp_path) == {}
    assert left_behind(tmp_path) == []
    assert [path.name for path in (tmp_path / "artifacts" / ".work").rglob(".new-*")] == []
    again = forks.run(*settings, cwd=tmp_path)
    assert again.code == 0, again.text


@contextmanager
def small_disk(path: Path, *, options: str) -> Iterator[None]:
    """A file system of its own at ``path``, for the time of the body."""
    path.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "none", str(path)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"a small file system cannot be mounted here ({mounted.stderr.strip()})")
    try:
        yield
    finally:
        subprocess.run(["umount", str(path)], check=True)


@pytest.mark.parametrize("where", ["checkpoint", "publish"])
def test_a_full_disk_publishes_nothing_and_goes_on_when_there_is_room(where: str, forks: Forks, tmp_path: Path) -> None:
    """The store's disk fills up before a checkpoint, or before the artifact; run.root lies elsewhere."""
    if shutil.which("mount") is None:
        pytest.skip("there is no mount command here")
    disk = tmp_path / "disk"
    steps = ("fit.epochs=4", "fit.checkpoint_every_steps=5") if where == "checkpoint" else ("fit.epochs=1",)
    job = (*TINY, "model=mlp", *steps)
    reference = forks.run(*job, "run.store=whole", cwd=tmp_path)
    assert reference.code == 0, reference.text
    (size,) = (path.stat().st_size for path in (tmp_path / "whole").glob("model-*/model.safetensors"))
    with small_disk(disk, options=f"size={12 * size}"):
        # A checkpoint is the weights and the momentum: one fits and the next does not. Without any, the best weights of the one epoch
        # fit, and the model does not.
        fill(disk, leave=3 * size if where == "checkpoint" else size + size // 2)
        done = forks.run(*job, f"run.store={disk}/store", cwd=tmp_path)
        what = "write a checkpoint to" if where == "checkpoint" else "write the model to"
        check(done, code=6, pattern=rf"cannot {what} .*No space left on device.*free some space")
        assert valid_manifest(tmp_path)["status"] == "failed"
        assert weights(disk, store="store") == {}
        assert not list((disk / "store").glob(".staging-*"))
        (disk / "filler").unlink()
        again = forks.run(*job, f"run.store={disk}/store", cwd=tmp_path)
        assert again.code == 0, again.text
        assert stage(valid_manifest(tmp_path), "model")["resumed_from_step"] == (5 if where == "checkpoint" else None)
        assert weights(disk, store="store") == weights(tmp_path, store="whole"), "as if nothing had happened"


def test_a_disk_without_room_for_the_run_itself(forks: Forks, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    with small_disk(disk, options="size=200k"):
        fill(disk, leave=0)
        done = forks.run(*TINY, f"run.root={disk}/runs", cwd=tmp_path)
        check(done, code=6, pattern=r"cannot lock .*No space left on device.*free some space")


def test_a_full_disk_ends_every_rank(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    with small_disk(disk, options="size=200k"):
        fill(disk, leave=20_000)
        done = run(*TINY, *WORLD, "model=mlp", f"run.store={disk}/store", cwd=tmp_path)
        check(done, code=6, pattern=r"cannot write a checkpoint to .*No space left on device.*free some space")
        assert valid_manifest(tmp_path)["status"] == "failed"
        assert weights(disk, store="store") == {}
        (disk / "filler").unlink()
        fill(disk, leave=0)
        done = run(*TINY, *WORLD, "model=mlp", f"run.store={disk}/store2", "run.root=other", cwd=tmp_path)
        check(done, code=6, pattern=r"cannot make the store .*No space left on device.*free some space")
        assert not (tmp_path / "other").exists()


def fill(disk: Path, *, leave: int) -> None:
    """Use the disk up but for ``leave`` bytes."""
    space = os.statvfs(disk)
    size = max(0, space.f_bavail * space.f_frsize - leave)
    with (disk / "filler").open("wb") as stream:
        os.posix_fallocate(stream.fileno(), 0, size)


# --- the same in a world -------------------------------------------------------------------------------------------------

# fmt: off
IN_A_WORLD: dict[str, tuple[tuple[str, ...], int, str]] = {
    "batch not divisible": (("fit.global_batch=25",), 2, r"global_batch=25 does not divide by 2 ranks.*use 24 or 26"),
    "unknown key": (("fit.epoch=1",), 2, r"fit\.epoch is not a key \(did you mean fit\.epochs\?\)"),
    "unknown stage kind": (("+stages.x={kind: distil}",), 2, r"kind=distil is not a stage kind \(did you mean distill\?\)"),
    "calibration set empty": ((QUANTIZE % 0,), 2, r"calibration_samples=0 is too small; use 1 or more"),
    "calibration set too large": ((QUANTIZE % 241,), 2, r"calibration_samples=241 does not fit the training split of 240 samples"),
    "country that is none": (("footprint=codecarbon", "footprint.country_iso_code=XYZ"), 2, r"footprint\.country_iso_code='XYZ' is not among the \d+ countries"),
    "teacher with other classes": ((*PAIR_OF, "data.classes=3"), 2, r"teacher model-\w+ \(stage model\) has 4 classes .*the data set 3 classes"),
    "damaged artifact": (("+stages.model.needs.init=%s/damaged",), 4, r"artifact model-\w+ is damaged \(model\.safetensors: "),
    "target not allowed": (("model._target_=os.system",), 2, r"os\.system is not allowed"),
    "missing data": (("data=fashion_mnist", "data.root=."), 3, r"data\.root=\. has no train-images"),
    "store under a file": (("run.store=/dev/null/x",), 6, r"/dev/null/x.*choose another directory"),
    "loss that blows up": (("optimizer.lr=1e30",), 8, r"not finite in stage model at step \d+ \(epoch 1\) on rank (0|0, 1), training samples"),
    "sample that is not finite": (("+data.not_finite=3",), 8, r"on rank [01](, 1)?, training samples .*the inputs of 3 are not finite themselves"),
    "more ranks than samples": (("data.samples=2", "launch.np=3", "fit.global_batch=3"), 3, r"the training split has 2 samples for 3 ranks; start at most 2 ranks"),
}
# fmt: on


@pytest.mark.parametrize("controller", ["mpi", "gloo"])
@pytest.mark.parametrize("what", IN_A_WORLD)
def test_a_world_says_it_once_and_ends(what: str, controller: str, trained: Path, tmp_path: Path) -> None:
    if controller == "gloo" and what not in ("batch not divisible", "sample that is not finite"):
        pytest.skip("one configuration error and one in training are enough for the second controller")
    overrides, code, pattern = IN_A_WORLD[what]
    model = model_in(trained)
    if what == "damaged artifact":
        model = tmp_path / "copy"
        shutil.copytree(model_in(trained), model / "damaged")
        damage(model / "damaged" / "model.safetensors", "flipped")
    overrides = tuple(text.replace("%s", str(model)) for text in overrides)
    done = run(*TINY, *WORLD, *overrides, f"launch.controller={controller}", cwd=tmp_path)
    assert done.code == code, done.text
    assert "Traceback" not in done.err + done.out, done.text
    assert len(done.errors) == 1, done.text
    assert re.search(pattern, done.errors[0]), done.text
    assert weights(tmp_path) == {}
    assert left_behind(tmp_path) == []
    if code != 8:
        assert run_directories(tmp_path) == [], "a job that cannot run leaves no run"
        return
    (directory,) = run_directories(tmp_path)
    told = valid_manifest(tmp_path)
    assert (told["status"], told["exit_code"], told["run_id"]) == ("failed", code, directory.name)


def test_an_unwritable_run_directory_ends_every_rank(tmp_path: Path) -> None:
    done = run(*TINY, *WORLD, "run.root=/dev/null/x", cwd=tmp_path)
    assert done.code == 6, done.text
    assert len(done.errors) == 1, done.text
    assert "Traceback" not in done.err, done.text
