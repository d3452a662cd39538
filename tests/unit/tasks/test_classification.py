import math

import pytest
import torch
import torch.nn.functional as F
from sklearn import metrics

from horovod_jobs.data.base import Batch
from horovod_jobs.errors import ConfigError, DataError
from horovod_jobs.tasks.classification import Classification


def batch_of(targets):
    return Batch(torch.zeros(len(targets), 1), targets, torch.arange(len(targets)) + 50)


@pytest.fixture
def scored():
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(0, 7, (203,), generator=generator)
    logits = torch.randn(203, 7, generator=generator) + 1.5 * F.one_hot(targets, 7)
    return logits, targets


def test_summary_against_scikit_learn(scored):
    logits, targets = scored
    task = Classification(7, top_k=(3, 5))
    result = task.summary(task.evaluation_sums(logits, batch_of(targets)))
    predicted, truth, shares = logits.argmax(1).numpy(), targets.numpy(), logits.double().softmax(1).numpy()
    assert result["accuracy"] == pytest.approx(metrics.accuracy_score(truth, predicted))
    assert result["loss"] == pytest.approx(metrics.log_loss(truth, shares, labels=range(7)), rel=1e-5)
    for k in (3, 5):
        assert result[f"top_{k}"] == pytest.approx(metrics.top_k_accuracy_score(truth, shares, k=k, labels=range(7)))
    recalls = metrics.recall_score(truth, predicted, average=None)
    assert result["per_class_accuracy"] == pytest.approx(recalls.tolist())
    assert result["worst_class"] == int(recalls.argmin())
    assert result["worst_class_accuracy"] == pytest.approx(recalls.min())
    assert result["confusion"] == metrics.confusion_matrix(truth, predicted).tolist()
    assert result["count"] == 203
    assert task.primary in result


@pytest.mark.parametrize("cuts", [[1], [100], [0, 1, 50, 203]])
def test_sums_add_up_over_uneven_and_empty_parts(scored, cuts):
    logits, targets = scored
    task = Classification(7)
    whole = task.evaluation_sums(logits, batch_of(targets))
    parts = zip(logits.tensor_split(cuts), targets.tensor_split(cuts), strict=True)
    sums = [task.evaluation_sums(part, batch_of(labels)) for part, labels in parts]
    for name, total in whole.items():
        assert total.dtype == torch.float64
        torch.testing.assert_close(sum(part[name] for part in sums), total, rtol=1e-6, atol=0)
    assert task.sums(logits, batch_of(targets))["correct"] == whole["correct"]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_is_one_number_a_sample(scored, smoothing):
    logits, targets = scored
    losses = Classification(7, label_smoothing=smoothing).loss(logits.bfloat16(), batch_of(targets))
    assert losses.shape == (203,)
    assert losses.dtype == torch.float32
    logs = logits.bfloat16().float().log_softmax(1)
    expected = -((1 - smoothing) * logs[torch.arange(203), targets] + smoothing * logs.mean(1))
    torch.testing.assert_close(losses, expected)


def test_loss_of_an_empty_batch_has_a_gradient():
    logits = torch.zeros(0, 3, requires_grad=True)
    Classification(3).loss(logits, batch_of(torch.zeros(0, dtype=torch.int64))).sum().backward()
    assert logits.grad.shape == (0, 3)


def test_an_absent_class_is_none_and_not_the_worst():
    task = Classification(3)
    sums = task.evaluation_sums(torch.eye(3)[[0, 1, 0]], batch_of(torch.tensor([0, 1, 1])))
    result = task.summary(sums)
    assert result["per_class_accuracy"] == [1.0, 0.5, None]
    assert (result["worst_class"], result["worst_class_accuracy"]) == (1, 0.5)
    assert "top_5" not in result


def test_uniform_logits_cost_log_c():
    task = Classification(4)
    sums = task.evaluation_sums(torch.zeros(6, 4), batch_of(torch.zeros(6, dtype=torch.int64)))
    assert task.summary(sums)["loss"] == pytest.approx(math.log(4))


@pytest.mark.parametrize(
    ("targets", "message"), [([0, 3, 1], "target 3 of sample 51"), ([0, 1, -1], "target -1 of sample 52")]
)
def test_targets_out_of_range(targets, message):
    task, logits = Classification(3), torch.zeros(3, 3)
    for method in (task.loss, task.evaluation_sums):
        with pytest.raises(DataError, match=f"{message} is not a class from 0 to 2"):
            method(logits, batch_of(torch.tensor(targets)))


def test_shapes_that_do_not_fit():
    task = Classification(3)
    with pytest.raises(DataError, match=r"shape \[2, 4\], but the task has 3 classes"):
        task.loss(torch.zeros(2, 4), batch_of(torch.zeros(2, dtype=torch.int64)))
    with pytest.raises(DataError, match=r"targets are torch.float32"):
        task.loss(torch.zeros(2, 3), batch_of(torch.zeros(2)))


def test_nothing_evaluated():
    task = Classification(3)
    with pytest.raises(DataError, match="count=0"):
        task.summary(task.evaluation_sums(torch.zeros(0, 3), batch_of(torch.zeros(0, dtype=torch.int64))))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 1}, "num_classes=1"),
        ({"label_smoothing": 1.0}, "label_smoothing=1.0"),
        ({"top_k": [0]}, r"top_k=\[0\]"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ConfigError, match=message):
        Classification(**{"num_classes": 3, **options})
