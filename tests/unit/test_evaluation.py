"""Every sample exactly once, whatever the shares."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from horovod_jobs.comm.world import SingleWorld
from horovod_jobs.config import EvaluateStage
from horovod_jobs.data.base import TensorSplit
from horovod_jobs.errors import DataError, NonFiniteError
from horovod_jobs.evaluation import evaluate
from horovod_jobs.predict import save_model
from horovod_jobs.stages import evaluate as evaluate_stage
from horovod_jobs.tasks.classification import Classification
from tests.support import SMALL_NET, SmallNet, blob_data, blobs, context

TASK = Classification(num_classes=3, top_k=[2])


class RankOf(SingleWorld):
    """One of several ranks, alone: what it would add to the sums."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size


def model() -> SmallNet:
    torch.manual_seed(0)
    net = SmallNet(num_classes=3, input_shape=(1, 6, 6))
    net.eval()
    return net


@pytest.mark.parametrize("size", [1, 2, 3, 60])
def test_ranks_sums_add_up_to_one_process(size: int) -> None:
    inputs, targets = blobs(50)
    split, net = TensorSplit(inputs, targets), model()
    whole = TASK.evaluation_sums(net(inputs), split.fetch(torch.arange(50)))
    shares = [evaluate(net, split, TASK, world=RankOf(rank, size), batch=7, name="test") for rank in range(size)]
    for key, value in whole.items():
        torch.testing.assert_close(sum(share[key] for share in shares), value, rtol=1e-6, atol=1e-6)
    assert sum(int(share["count"]) for share in shares) == 50


def test_the_same_figures_as_by_hand() -> None:
    data, net = blob_data(), model()
    found = TASK.summary(evaluate(net, data.test, TASK, world=SingleWorld(), batch=16, name="test"))
    batch = data.test.fetch(torch.arange(len(data.test)))
    right = (net(batch.inputs).argmax(1) == batch.targets).float().mean().item()
    assert found["accuracy"] == pytest.approx(right)
    assert sum(map(sum, found["confusion"])) == 50  # type: ignore[arg-type]


def test_no_gradient_is_kept() -> None:
    grads: list[bool] = []

    def predict(inputs: Tensor) -> Tensor:
        outputs: Tensor = model()(inputs)
        grads.append(outputs.requires_grad)
        return outputs

    evaluate(predict, blob_data().test, TASK, world=SingleWorld(), batch=50, name="test")
    assert grads == [False]


def test_a_model_that_gives_nan_is_refused_by_name(tmp_path: Path) -> None:
    ctx = context(tmp_path)
    net = model()
    net.head.weight.data[0, 0] = float("nan")
    save_model(
        ctx.staging, net, model_node=SMALL_NET, num_classes=3, input_shape=(1, 6, 6), class_names=("a", "b", "c")
    )
    bad = ctx.store.publish(ctx.staging, kind="model", fingerprint="cd" * 32, meta={"stage": "model"})
    with pytest.raises(
        NonFiniteError, match=rf"{bad.ref} gives for the split test is not finite \(loss=nan\); look at"
    ):
        evaluate_stage.run(context(tmp_path, name="evaluation", inputs={"model": bad}), EvaluateStage())


def test_an_empty_split_is_refused() -> None:
    empty = TensorSplit(torch.zeros(0, 1, 6, 6), torch.zeros(0, dtype=torch.int64))
    with pytest.raises(DataError, match="0 samples"):
        evaluate(model(), empty, TASK, world=SingleWorld(), batch=4, name="test")
