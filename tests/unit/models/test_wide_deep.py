import pytest
import torch
from torch import nn

from horovod_jobs.errors import ConfigError
from horovod_jobs.models.wide_deep import WideDeep

FIELDS = (("user", 7, 1), ("item", 5, 1), ("genres", 4, 3))


def model(seed=0, **settings):
    torch.manual_seed(seed)
    made = WideDeep(**{"num_classes": 2, "fields": FIELDS, "embedding_dim": 4, "hidden": [8], **settings})
    with torch.no_grad():  # Tables that begin at zero would hide what is added to what.
        for table in (made.wide, made.cross):
            if table is not None:
                table.weight.normal_()
    return made


def rows():
    return torch.tensor([[1, 2, 1, 2, 0], [6, 4, 3, 0, 0], [0, 0, 0, 0, 0], [1, 2, 2, 1, 0]])


def test_the_first_logit_is_zero_and_the_second_differs():
    logits = model()(rows())
    assert logits.shape == (4, 2)
    assert logits[:, 0].eq(0).all()
    assert len(set(logits[:3, 1].tolist())) == 3


def by_hand(made, row):
    """The score of one row, by loops: what forward does in matrices."""
    start, at, vectors, wide = 0, 0, [], 0.0
    for _, size, columns in FIELDS:
        ids = [int(value) for value in row[at : at + columns]]
        kept = [value for value in ids if value != 0] if columns > 1 else ids
        there = [made.embedding.weight[start + value] for value in kept]
        vectors.append(sum(there) / len(there) if there else torch.zeros(made.embedding.embedding_dim))
        wide = wide + (sum(made.wide.weight[start + value] for value in kept) / max(1, len(kept)))
        start, at = start + size, at + columns
    dots = [vectors[0] @ vectors[1], vectors[0] @ vectors[2], vectors[1] @ vectors[2]]
    return made.head(made.deep(torch.cat([*vectors, torch.stack(dots)]))) + wide


def test_forward_is_what_the_papers_say():
    made = model()
    expected = torch.stack([by_hand(made, row) for row in rows()])[:, 0]
    torch.testing.assert_close(made(rows())[:, 1], expected)


def test_the_order_of_several_values_and_their_padding_do_not_matter():
    made = model(crosses=[["user", "genres"]], buckets=64)
    logits = made(rows())
    torch.testing.assert_close(logits[0], logits[3])
    with torch.no_grad():  # The embedding of "no genre".
        made.embedding.weight[7 + 5].add_(100.0)
        made.wide.weight[7 + 5].add_(100.0)
    torch.testing.assert_close(made(rows()), logits)


def test_sparse_and_dense_gradients_are_the_same_and_sparse_ones_hold_touched_rows_only():
    settings = {"crosses": [["user", "item"]], "buckets": 1000}
    dense, sparse = model(**settings), model(sparse=True, **settings)
    for made in (dense, sparse):
        (made(rows())[:, 1] * torch.tensor([1.0, -2.0, 3.0, 0.5])).sum().backward()
    for (key, one), other in zip(dense.named_parameters(), sparse.parameters(), strict=True):
        assert other.grad.is_sparse == (key.split(".")[0] in ("embedding", "wide", "cross")), key
        torch.testing.assert_close(other.grad.to_dense() if other.grad.is_sparse else other.grad, one.grad)
    touched = sparse.cross.weight.grad.coalesce().indices()[0]
    assert len(touched) <= 4, "one row a combination, of a thousand"


def test_every_parameter_learns_and_the_input_is_left_alone():
    made, inputs = model(crosses=[["user", "item"], ["item", "genres"]], buckets=50), rows()
    made(inputs)[:, 1].square().sum().backward()
    assert torch.equal(inputs, rows())
    assert [key for key, value in made.named_parameters() if value.grad.abs().sum() == 0] == []


@pytest.mark.parametrize("sparse", [False, True])
def test_an_empty_batch_gives_zero_gradients(sparse):
    made = model(sparse=sparse, crosses=[["user", "item"]], buckets=50)
    logits = made(torch.zeros(0, 5, dtype=torch.int64))
    assert logits.shape == (0, 2)
    logits.sum().backward()
    for key, value in made.named_parameters():
        assert value.grad is not None, key
        assert (value.grad._nnz() == 0) if value.grad.is_sparse else value.grad.eq(0).all(), key


def test_crosses_of_the_same_values_go_to_other_rows():
    """All pairs of 300 x 300 values in 2^16 rows: no more shared rows than a random function would have."""
    fields = (("a", 301, 1), ("b", 301, 1))
    made = WideDeep(num_classes=2, fields=fields, crosses=[["a", "b"]], buckets=2**16, sparse=True, hidden=[])
    pairs = torch.cartesian_prod(torch.arange(1, 301), torch.arange(1, 301))
    made(pairs)[:, 1].sum().backward()
    used = len(made.cross.weight.grad.coalesce().indices()[0])
    random = 2**16 * (1 - (1 - 2**-16) ** len(pairs))
    assert used > 0.9 * random


def test_export_with_a_dynamic_batch_gives_the_same_logits():
    made = model(crosses=[["user", "genres"]], buckets=40).eval()
    batch = torch.export.Dim("batch", min=1, max=4096)
    exported = torch.export.export(made, (rows(),), dynamic_shapes=({0: batch},)).module()
    for size in (2, 4):
        torch.testing.assert_close(exported(rows()[:size]), made(rows()[:size]))


def test_dropout_is_for_training_only():
    made = model(dropout=0.5).eval()
    assert torch.equal(made(rows()), made(rows()))
    made.train()
    assert not torch.equal(made(rows()), made(rows()))


def test_a_table_can_be_a_hundred_times_the_rest():
    made = WideDeep(num_classes=2, fields=FIELDS, crosses=[["user", "item"]], buckets=50_000)
    table = made.cross.weight.numel()
    assert table > 100 * (sum(parameter.numel() for parameter in made.parameters()) - table)
    assert isinstance(made.cross, nn.Embedding)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fields": ()}, "needs samples of categorical fields"),
        ({"num_classes": 10}, "the data set has 10"),
        ({"embedding_dim": 0}, "embedding_dim=0"),
        ({"hidden": [8, 0]}, r"hidden=\[8, 0\]"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"crosses": [["user", "nobody"]], "buckets": 4}, "'nobody'.*user, item, genres"),
        ({"crosses": [["user"]], "buckets": 4}, "not a pair"),
        ({"crosses": [["user", "item"]]}, "buckets=0 rows for 1 crosses"),
        ({"buckets": 10}, "buckets=10 rows for 0 crosses"),
    ],
)
def test_what_cannot_be_used(settings, message):
    with pytest.raises(ConfigError, match=message):
        WideDeep(**{"num_classes": 2, "fields": FIELDS, **settings})
