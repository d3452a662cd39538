"""A raw sample becomes the very values that the data set gives, wherever the model travels."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import horovod_jobs
from horovod_jobs.bundle import read_config
from horovod_jobs.data.base import TensorSplit, as_data_module
from horovod_jobs.errors import ArtifactError, DataError
from horovod_jobs.export import export_onnx
from horovod_jobs.predict import save_model
from horovod_jobs.preprocessing import Preprocessing, prepare
from tests.support import SMALL_NET, SmallNet

SHAPE = (1, 6, 6)
RAW = torch.randint(256, (7, *SHAPE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
HOW = Preprocessing(255.0, 0.286041, 0.353024)


@pytest.mark.parametrize("form", ["torch", "onnx"])
def test_a_raw_picture_is_prepared_as_the_data_set_does(tmp_path: Path, form: str) -> None:
    split = TensorSplit(RAW, torch.zeros(7), mean=0.286041, std=0.353024)
    assert split.preprocessing == HOW
    net = SmallNet(num_classes=3, input_shape=SHAPE).eval()
    save_model(
        tmp_path,
        net,
        model_node=SMALL_NET,
        num_classes=3,
        input_shape=SHAPE,
        class_names="abc",
        preprocessing=split.preprocessing,
    )
    export_onnx(net, tmp_path / "model.onnx", input_shape=SHAPE)
    model = horovod_jobs.load(tmp_path if form == "torch" else tmp_path / "model.onnx", allow_targets=["tests"])
    expected = split.fetch(torch.arange(7)).inputs
    for raw in (RAW, RAW.numpy(), RAW[:, 0], RAW[:, 0].numpy().astype("int64")):
        assert torch.equal(model.prepare(raw), expected)
    for raw in (RAW[3], RAW[3, 0], RAW[3:4]):
        assert torch.equal(model.prepare(raw), expected[3:4])
    assert model(model.prepare(RAW)).shape == (7, 3)


def test_one_number_a_channel() -> None:
    raw = torch.rand(4, 3, 5, 5)
    split = TensorSplit(raw, torch.zeros(4), mean=[0.1, 0.2, 0.3], std=[1.0, 0.5, 0.25])
    before = raw.clone()
    found = prepare(raw, how=split.preprocessing, input_shape=(3, 5, 5))
    assert torch.equal(found, split.fetch(torch.arange(4)).inputs)
    assert torch.equal(raw, before), "the caller's samples are left as they are"
    assert split.preprocessing is not None
    assert Preprocessing.of(json.loads(json.dumps(split.preprocessing.to_json()))) == split.preprocessing


def test_a_split_that_does_nothing_says_nothing() -> None:
    """Floats without mean and std may have been normalised before: nobody knows."""
    assert TensorSplit(torch.rand(4, 2), torch.zeros(4)).preprocessing is None


def test_a_data_set_of_ones_own_tells_it() -> None:
    pairs = [(torch.rand(2), 0), (torch.rand(2), 1)]
    told = {"scale": 255, "mean": 0.5, "std": 0.5}
    data = as_data_module(SimpleNamespace(train=pairs, test=pairs, preprocessing=told), name="mine")
    assert data.preprocessing == Preprocessing(255.0, 0.5, 0.5)
    assert as_data_module(SimpleNamespace(train=pairs, test=pairs), name="mine").preprocessing is None
    for wrong in ({"scale": 255}, {**told, "std": 0}, {**told, "mean": "x"}):
        with pytest.raises(DataError, match="data set mine"):
            as_data_module(SimpleNamespace(train=pairs, test=pairs, preprocessing=wrong), name="mine")


@pytest.mark.parametrize(
    ("raw", "how", "message"),
    [
        (RAW, None, "does not say how its inputs were prepared"),
        (RAW.float() / 255, HOW, "whole numbers from 0 to 255 are due"),
        (RAW[:, :, :5], HOW, r"the model takes \[B, 1, 6, 6\]"),
        (RAW[None], HOW, r"the model takes \[B, 1, 6, 6\]"),
    ],
)
def test_what_cannot_be_prepared_is_refused(raw: torch.Tensor, how: Preprocessing | None, message: str) -> None:
    with pytest.raises(DataError, match=message):
        prepare(raw, how=how, input_shape=SHAPE)


def test_a_damaged_record_is_noticed(tmp_path: Path) -> None:
    net = SmallNet(num_classes=3, input_shape=SHAPE)
    save_model(tmp_path, net, model_node=SMALL_NET, num_classes=3, input_shape=SHAPE, class_names="abc")
    assert "preprocessing" not in json.loads((tmp_path / "config.json").read_text())
    config = read_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config.to_json(), "preprocessing": {"scale": 0}}))
    with pytest.raises(ArtifactError, match="preprocessing has scale"):
        read_config(tmp_path)
