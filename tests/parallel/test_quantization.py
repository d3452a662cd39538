"""Quantization, evaluation and export over ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from horovod_jobs.comm.world import SingleWorld, World
from horovod_jobs.config import EvaluateStage, ExportStage, QuantizeStage
from horovod_jobs.data.base import TensorSplit
from horovod_jobs.errors import ConfigError, GateError, StorageError
from horovod_jobs.evaluation import evaluate
from horovod_jobs.models.cnn import StridedCnn
from horovod_jobs.quantization.base import Calibration, Program
from horovod_jobs.quantization.calibration import observe, ranges
from horovod_jobs.quantization.quantizer import StaticInt8
from horovod_jobs.stages import evaluate as evaluate_stage
from horovod_jobs.stages import export, quantize, train
from horovod_jobs.tasks.classification import Classification
from tests.support import blob_data, blobs, context, fit_config, train_stage

SHAPE = (1, 6, 6)
STATIC = {"_target_": "horovod_jobs.quantization.quantizer.StaticInt8"}


def model() -> StridedCnn:
    torch.manual_seed(0)
    net = StridedCnn(num_classes=3, input_shape=SHAPE, widths=[8, 16], strides=[1, 2])
    with torch.no_grad():
        net(blobs(64)[0])
    net.eval()
    return net


# 1 batch: a rank that has none. 5: ranks that have not the same number. The last batch is partial.
@pytest.mark.parametrize("samples", [20, 150])
@pytest.mark.parametrize("symmetric", [False, True])
def test_scales_and_zero_points_equal_one_processs(world: World, samples: int, symmetric: bool) -> None:
    split = TensorSplit(*blobs(200, seed=7))
    batches = list(torch.arange(samples).split(32))
    found: list[dict[str, Any]] = []
    for observer_world in (world, SingleWorld()):
        prepared, _ = StaticInt8(symmetric_activations=symmetric).prepare(model(), input_shape=SHAPE)
        observe(prepared, split, batches, world=observer_world)
        found.append({name: module.calculate_qparams() for name, module in ranges(prepared).items()})
    assert len(found[0]) == 7, "3 weights and 4 activations"
    assert found[0].keys() == found[1].keys()
    for name, (scale, zero) in found[0].items():
        assert torch.equal(scale, found[1][name][0]), name
        assert torch.equal(zero, found[1][name][1]), name


def test_the_written_file_is_the_same_to_the_byte(world: World, shared_dir: Path) -> None:
    split = TensorSplit(*blobs(200, seed=7))
    calibration = Calibration(split, list(torch.randperm(200, generator=torch.Generator().manual_seed(1)).split(32)))
    together, alone = shared_dir / "together.onnx", shared_dir / "alone.onnx"
    told = StaticInt8().quantize(model(), input_shape=SHAPE, calibration=calibration, world=world, path=together)
    assert len({str(sorted(one)) for one in world.gather_json(list(told), name="test.told")}) == 1

    def compare() -> None:
        StaticInt8().quantize(model(), input_shape=SHAPE, calibration=calibration, world=SingleWorld(), path=alone)
        assert together.read_bytes() == alone.read_bytes()

    world.main(compare, name="test.compare")


class NoSpace:
    name = "no space"

    def write(self, program: Program, path: Path) -> dict[str, Any]:
        raise StorageError("no space left (0 bytes); free some")


def test_an_error_while_rank_0_writes_is_raised_everywhere(world: World, tmp_path: Path) -> None:
    calibration = Calibration(TensorSplit(*blobs(32)), [torch.arange(32)])
    with pytest.raises(StorageError, match="no space left"):
        StaticInt8(backend=NoSpace()).quantize(
            model(), input_shape=SHAPE, calibration=calibration, world=world, path=tmp_path / "m.onnx"
        )


@pytest.mark.parametrize("samples", [1, 7, 50])
def test_evaluation_counts_every_sample_once(world: World, samples: int) -> None:
    split, task, net = TensorSplit(*blobs(samples)), Classification(num_classes=3), model()
    together = evaluate(net, split, task, world=world, batch=4, name="test.together")
    alone = evaluate(net, split, task, world=SingleWorld(), batch=4, name="test.alone")
    assert int(together["count"]) == samples
    assert torch.equal(together["confusion"], alone["confusion"])
    torch.testing.assert_close(together["loss"], alone["loss"])


def test_a_prediction_that_fails_on_one_rank_fails_on_all(world: World) -> None:
    def predict(inputs: torch.Tensor) -> torch.Tensor:
        if world.rank == world.size - 1:
            raise ConfigError("broken (1); mend it")
        return torch.zeros(len(inputs), 3)

    with pytest.raises(ConfigError, match="broken"):
        evaluate(
            predict, TensorSplit(*blobs(20)), Classification(num_classes=3), world=world, batch=4, name="test.fail"
        )


def test_the_stages_agree_on_every_rank(world: World, shared_dir: Path) -> None:
    data = blob_data(400)
    ctx = context(shared_dir, world=world, name="train", data=data)
    train.run(ctx, train_stage(fit=fit_config(epochs=3)))

    def publish(kind: str, stage: Any, mark: str) -> Any:
        world.main(
            lambda: str(stage.store.publish(stage.staging, kind=kind, fingerprint=mark * 32, meta={}).path),
            name=f"test.publish.{kind}",
        )
        return stage.store.lookup(kind, mark * 32)

    source = publish("model", ctx, "ab")
    results = {}
    ctx = context(shared_dir, world=world, name="int8", data=data, inputs={"model": source})
    settings: dict[str, Any] = {"seed": 0, "quantizer": STATIC, "calibration_samples": 96, "max_drop": 10.0}
    results["int8"] = quantize.run(ctx, QuantizeStage(**settings))
    integer = publish("quantized", ctx, "cd")
    ctx = context(shared_dir, world=world, name="eval", data=data, inputs={"model": integer})
    results["eval"] = evaluate_stage.run(ctx, EvaluateStage(seed=0, latency_batches=[1], latency_runs=2))
    ctx = context(shared_dir, world=world, name="export", data=data, inputs={"model": source})
    results["export"] = export.run(ctx, ExportStage(seed=0))
    told = world.gather_json({name: result.metrics for name, result in results.items()}, name="test.metrics")
    assert all(one == told[0] for one in told)

    ctx = context(shared_dir, world=world, name="gate", data=data, inputs={"model": source})
    with pytest.raises(ConfigError, match="calibration_samples=0"):
        quantize.run(ctx, QuantizeStage(**{**settings, "calibration_samples": 0}))
    with pytest.raises(GateError, match="tolerance=1e-12"):
        export.run(ctx, ExportStage(seed=0, tolerance=1e-12))
