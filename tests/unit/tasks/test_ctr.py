import math

import pytest
import torch
from sklearn.metrics import log_loss, roc_auc_score

from horovod_jobs.comm.world import SingleWorld
from horovod_jobs.data.base import Batch
from horovod_jobs.data.categorical import Field, IdSplit
from horovod_jobs.errors import ConfigError, DataError, NonFiniteError
from horovod_jobs.evaluation import evaluate
from horovod_jobs.tasks.ctr import ClickThrough, auc_standard_error, binned_auc, score


def batch(targets, *, start=0):
    count = len(targets)
    return Batch(torch.zeros(count, 1, dtype=torch.int64), targets, torch.arange(start, start + count))


def logits_of(scores, *, common=0.0):
    """Two logits whose difference is the score: exactly, where they have nothing in common."""
    return torch.stack([torch.full_like(scores, common), common + scores], dim=1)


def drawn(samples, *, seed=0, digits=None):
    """Scores that have something to do with the clicks; ``digits`` rounds them, which makes ties."""
    generator = torch.Generator().manual_seed(seed)
    targets = (torch.rand(samples, generator=generator) < 0.3).long()
    scores = torch.randn(samples, generator=generator) + targets - 1
    return scores if digits is None else (scores * 10**digits).round() / 10**digits, targets


def figures(scores, targets, *, parts=1, **settings):
    task = ClickThrough(**settings)
    totals = {}
    for scored, clicked in zip(scores.chunk(parts), targets.chunk(parts), strict=True):
        for key, value in task.evaluation_sums(logits_of(scored), batch(clicked)).items():
            totals[key] = totals.get(key, 0) + value
    return task.summary(totals)


@pytest.mark.parametrize("digits", [None, 1, 0], ids=["few ties", "some ties", "mostly ties"])
@pytest.mark.parametrize("seed", range(5))
def test_figures_are_scikit_learns(digits, seed):
    scores, targets = drawn(2000, seed=seed, digits=digits)
    found = figures(scores, targets, parts=3)
    exact = roc_auc_score(targets.numpy(), scores.numpy())
    assert abs(found["auc"] - exact) <= found["auc_error_bound"]
    if digits is not None:  # Every distinct score has a bin of its own, so ties are ties and nothing else is.
        assert found["auc"] == pytest.approx(exact, abs=1e-12)
    assert found["auc_error_bound"] < (0.5 if digits is not None else 1e-3)
    probabilities = scores.double().sigmoid()
    assert found["loss"] == pytest.approx(log_loss(targets.numpy(), probabilities.numpy()), abs=1e-6)
    assert found["accuracy"] == pytest.approx(((scores > 0) == (targets == 1)).double().mean().item())
    assert found["calibration"] == pytest.approx(probabilities.sum().item() / targets.sum().item())
    assert (found["count"], found["clicks"]) == (2000, int(targets.sum()))


def test_the_bound_holds_where_bins_are_few_and_it_is_needed():
    scores, targets = drawn(500)
    exact = roc_auc_score(targets.numpy(), scores.numpy())
    errors = []
    for bins in (2, 8, 32, 128, 4096):
        found = figures(scores, targets, auc_bins=bins)
        errors.append(abs(found["auc"] - exact))
        assert errors[-1] <= found["auc_error_bound"]
    assert errors[0] > 0.01, "two bins cannot be exact"
    assert errors[-1] < 1e-3


def test_order_decides_and_not_the_size_of_the_scores():
    targets = torch.tensor([0, 0, 1, 1])
    assert figures(torch.tensor([-100.0, -1.0, 1.0, 100.0]), targets)["auc"] == 1.0
    assert figures(torch.tensor([100.0, 1.0, -1.0, -100.0]), targets)["auc"] == 0.0
    assert figures(torch.zeros(4), targets)["auc"] == 0.5
    assert figures(torch.zeros(4), targets)["auc_error_bound"] == 0.5


def test_pairs_by_hand():
    """Bins 0, 1, 2: of 3 x 4 pairs, those of click 2 win over others 0 and 1, ties count a half."""
    auc, bound = binned_auc(
        torch.tensor([1.0, 0.0, 2.0], dtype=torch.float64), torch.tensor([2.0, 1.0, 1.0], dtype=torch.float64)
    )
    assert auc == pytest.approx((1 * 2 / 2 + 2 * 3 + 2 * 1 / 2) / 12)
    assert bound == pytest.approx((2 + 2) / 2 / 12)


def test_the_standard_error_is_what_samples_show():
    """Against the spread of the AUC over many samples of one population."""
    aucs = [roc_auc_score(*(part.numpy() for part in drawn(400, seed=seed)[::-1])) for seed in range(300)]
    spread = torch.tensor(aucs).std().item()
    mean = sum(aucs) / len(aucs)
    assert auc_standard_error(mean, clicks=120, others=280) == pytest.approx(spread, rel=0.2)


def test_the_loss_is_binary_cross_entropy_of_the_difference():
    scores, targets = torch.tensor([0.0, 2.0, -3.0]), torch.tensor([1, 1, 0])
    expected = [-math.log(0.5), -math.log(1 / (1 + math.exp(-2))), -math.log(1 - 1 / (1 + math.exp(3)))]
    losses = ClickThrough().loss(logits_of(scores, common=1.5), batch(targets))
    assert losses.tolist() == pytest.approx(expected, abs=1e-6)
    assert score(logits_of(scores, common=1.5)).tolist() == pytest.approx(scores.tolist(), abs=1e-6)
    assert ClickThrough().sums(logits_of(scores), batch(targets))["correct"].item() == 2


def test_an_empty_batch_has_the_names_and_shapes_of_the_sums():
    task = ClickThrough(auc_bins=16)
    empty = task.evaluation_sums(torch.zeros(0, 2), batch(torch.zeros(0, dtype=torch.int64)))
    full = task.evaluation_sums(torch.zeros(3, 2), batch(torch.tensor([0, 1, 1])))
    assert {key: value.shape for key, value in empty.items()} == {key: value.shape for key, value in full.items()}
    assert all(value.sum() == 0 for value in empty.values())


def test_evaluation_of_a_split():
    scores, targets = drawn(300)
    split = IdSplit(torch.arange(300).unsqueeze(1), targets, fields=[Field("row", 300)])
    sums = evaluate(
        lambda ids: logits_of(scores)[ids[:, 0]], split, ClickThrough(), world=SingleWorld(), batch=7, name="t"
    )
    found = ClickThrough().summary(sums)
    assert abs(found["auc"] - roc_auc_score(targets.numpy(), scores.numpy())) <= found["auc_error_bound"] < 1e-3


@pytest.mark.parametrize(
    ("logits", "targets", "message"),
    [
        (torch.zeros(2, 3), torch.tensor([0, 1]), r"shape \[2, 3\].*two logits"),
        (torch.zeros(2, 2), torch.tensor([0.0, 1.0]), "float32 .* needs 1 for a click"),
        (torch.zeros(2, 2), torch.tensor([0, 4]), "target 4 of sample 1"),
        (torch.zeros(2, 2), torch.tensor([0, -1]), "target -1 of sample 1"),
    ],
)
def test_what_does_not_fit(logits, targets, message):
    for use in (ClickThrough().loss, ClickThrough().evaluation_sums):
        with pytest.raises(DataError, match=message):
            use(logits, batch(targets))


def test_a_score_that_is_not_finite_names_its_sample():
    logits = torch.zeros(3, 2)
    logits[1, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="score of sample 1 is not finite"):
        ClickThrough().evaluation_sums(logits, batch(torch.tensor([0, 1, 1])))


@pytest.mark.parametrize("targets", [[0, 0], [1, 1], []])
def test_one_class_has_no_auc(targets):
    clicked = torch.tensor(targets, dtype=torch.int64)
    with pytest.raises(DataError, match="there is no AUC"):
        figures(torch.zeros(len(targets)), clicked)


@pytest.mark.parametrize(
    ("settings", "message"), [({"num_classes": 10}, "10 classes"), ({"auc_bins": 1}, "auc_bins=1")]
)
def test_settings_that_cannot_be_used(settings, message):
    with pytest.raises(ConfigError, match=message):
        ClickThrough(**settings)
