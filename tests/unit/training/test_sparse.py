import pytest
import torch
from torch import nn

from horovod_jobs.errors import ConfigError
from horovod_jobs.training.sparse import has_sparse_gradients, prepare_for_sparse_gradients


def test_tables_with_sparse_gradients_are_found():
    for table in (nn.Embedding, nn.EmbeddingBag):
        assert has_sparse_gradients(nn.Sequential(nn.Linear(1, 1), nn.Sequential(table(3, 2, sparse=True))))
        assert not has_sparse_gradients(nn.Sequential(nn.Linear(1, 1), table(3, 2)))


@pytest.mark.parametrize(
    "make",
    [
        lambda params: torch.optim.Adagrad(params, lr=0.1),
        lambda params: torch.optim.SGD(params, lr=0.1),
    ],
    ids=["Adagrad", "SGD"],
)
def test_optimizers_that_take_them(make):
    prepare_for_sparse_gradients(make, clip_norm=None, where="stages.model")


@pytest.mark.parametrize(
    "make",
    [
        lambda params: torch.optim.AdamW(params),
        lambda params: torch.optim.Adagrad(params, weight_decay=0.1),
        lambda params: torch.optim.SparseAdam(params),
        lambda params: torch.optim.SGD(params, weight_decay=0.1),
    ],
    ids=["AdamW", "Adagrad with weight decay", "SparseAdam takes no dense ones", "SGD with weight decay"],
)
def test_optimizers_that_do_not(make):
    with pytest.raises(ConfigError, match=r"stages.model.optimizer does not take sparse gradients.*optimizer=adagrad"):
        prepare_for_sparse_gradients(make, clip_norm=None, where="stages.model")


def test_clipping_works_or_says_that_it_does_not():
    made = lambda params: torch.optim.SGD(params, lr=0.1)  # noqa: E731
    with pytest.raises(ConfigError, match=r"clip_norm=1.0 cannot clip sparse gradients"):
        prepare_for_sparse_gradients(made, clip_norm=1.0, where="stages.model")
