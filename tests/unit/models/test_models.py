import copy
import importlib
from pathlib import Path

import pytest
import torch
import yaml

from horovod_jobs.errors import ConfigError
from horovod_jobs.models.cnn import StridedCnn
from horovod_jobs.models.mlp import Mlp
from horovod_jobs.models.resnet import ResNet
from horovod_jobs.models.vit import VisionTransformer

CONF = Path(__file__).parents[3] / "conf" / "model"
# Models of pictures; test_wide_deep.py is about the one that takes ids.
CONFIGS = sorted({path.stem for path in CONF.glob("*.yaml")} - {"wide_deep"})


def from_config(name, *, input_shape=(1, 28, 28), num_classes=10):
    node = yaml.safe_load((CONF / f"{name}.yaml").read_text())
    module, _, cls = node.pop("_target_").rpartition(".")
    torch.manual_seed(0)
    return getattr(importlib.import_module(module), cls)(num_classes=num_classes, input_shape=input_shape, **node)


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def test_every_model_of_the_guide_has_a_config():
    assert {"mlp", "cnn_teacher", "cnn_student", "resnet20", "resnet32", "resnet56", "vit_tiny"} <= set(CONFIGS)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_parameter_learns_and_the_input_is_left_alone(name):
    model = from_config(name, input_shape=(3, 8, 8), num_classes=4)
    inputs = torch.randn(6, 3, 8, 8)
    before = inputs.clone()
    logits = model(inputs)
    assert logits.shape == (6, 4)
    torch.nn.functional.cross_entropy(logits, torch.arange(6) % 4).backward()
    assert torch.equal(inputs, before)
    silent = [key for key, value in model.named_parameters() if value.grad is None or not value.grad.abs().sum() > 0]
    assert silent == []


@pytest.mark.parametrize("name", CONFIGS)
def test_an_empty_batch_gives_zero_gradients_and_keeps_the_buffers(name):
    model = from_config(name, input_shape=(1, 8, 8)).train()
    before = copy.deepcopy(dict(model.named_buffers()))
    logits = model(torch.zeros(0, 1, 8, 8))
    assert logits.shape == (0, 10)
    logits.sum().backward()
    for key, value in model.named_parameters():
        assert value.grad is not None, key
        assert value.grad.eq(0).all(), key
    for key, value in model.named_buffers():
        assert key.endswith("num_batches_tracked") or torch.equal(value, before[key]), key


@pytest.mark.parametrize("name", CONFIGS)
def test_export_with_a_dynamic_batch_gives_the_same_logits(name):
    model = from_config(name).eval()
    batch = torch.export.Dim("batch", min=1, max=4096)
    exported = torch.export.export(model, (torch.randn(3, 1, 28, 28),), dynamic_shapes=({0: batch},)).module()
    for size in (2, 7):
        inputs = torch.randn(size, 1, 28, 28)
        torch.testing.assert_close(exported(inputs), model(inputs))


@pytest.mark.parametrize(("name", "millions"), [("resnet20", 0.27), ("resnet32", 0.46), ("resnet56", 0.85)])
def test_resnets_have_the_papers_parameter_counts(name, millions):
    model = from_config(name, input_shape=(3, 32, 32))
    assert round(parameters(model) / 1e6, 2) == millions
    convolutions = sum(isinstance(part, torch.nn.Conv2d) for part in model.modules())
    assert convolutions + 1 == int(name.removeprefix("resnet"))


def test_the_student_has_at_most_a_tenth_of_the_teacher():
    teacher, student = parameters(from_config("cnn_teacher")), parameters(from_config("cnn_student"))
    assert (teacher, student) == (196_106, 12_082)
    assert 10 * student <= teacher


def test_separable_blocks_have_fewer_weights():
    options = {"num_classes": 10, "input_shape": (1, 28, 28), "widths": [16, 32, 64], "strides": [2, 1, 2]}
    full, separable = StridedCnn(**options), StridedCnn(**options, separable=True)
    assert parameters(separable) * 4 < parameters(full)
    assert separable(torch.randn(2, 1, 28, 28)).shape == (2, 10)


def test_option_a_shortcut_takes_every_second_pixel_and_adds_zero_channels():
    model = ResNet(num_classes=2, input_shape=(1, 8, 8), depth=8, width=4)
    block = model.blocks[2]
    inputs = torch.randn(2, 4, 8, 8)
    shortcut = block._shortcut(inputs)
    assert shortcut.shape == (2, 8, 4, 4)
    assert torch.equal(shortcut[:, 2:6], inputs[:, :, ::2, ::2])
    assert shortcut[:, :2].eq(0).all()
    assert shortcut[:, 6:].eq(0).all()


def test_attention_against_its_definition():
    model = VisionTransformer(num_classes=2, input_shape=(1, 4, 4), patch=2, width=6, depth=1, heads=2)
    attention = model.blocks[0].attention
    inputs = torch.randn(3, 5, 6)
    query, key, value = attention.query_key_value(inputs).split(6, dim=-1)
    heads = []
    for head in (slice(0, 3), slice(3, 6)):
        weights = (query[..., head] @ key[..., head].transpose(1, 2) / 3**0.5).softmax(-1)
        heads.append(weights @ value[..., head])
    torch.testing.assert_close(attention(inputs), attention.output(torch.cat(heads, dim=-1)))


def test_mlp_without_hidden_layers_is_linear():
    model = Mlp(num_classes=3, input_shape=(2, 2), hidden=[])
    assert parameters(model) == 4 * 3 + 3
    one, two = torch.randn(1, 2, 2), torch.randn(1, 2, 2)
    zero = model(torch.zeros(1, 2, 2))
    torch.testing.assert_close(model(one + two) - zero, model(one) - zero + model(two) - zero)


PICTURE = {"num_classes": 2, "input_shape": (1, 28, 28)}


@pytest.mark.parametrize(
    ("cls", "options", "message"),
    [
        (StridedCnn, {**PICTURE, "widths": [8, 8], "strides": [2]}, r"widths=\[8, 8\] and strides=\[2\]"),
        (StridedCnn, {**PICTURE, "widths": [], "strides": []}, "widths=\\[\\]"),
        (StridedCnn, {"num_classes": 2, "input_shape": (5,), "widths": [8], "strides": [2]}, r"samples of shape \[5\]"),
        (Mlp, {**PICTURE, "hidden": [0]}, r"hidden=\[0\]"),
        (ResNet, {**PICTURE, "depth": 18}, "depth=18 is not 6n"),
        (VisionTransformer, {**PICTURE, "patch": 5}, "patch=5 does not tile pictures of 28x28"),
        (VisionTransformer, {**PICTURE, "width": 10, "heads": 3}, "width=10 does not divide by heads=3"),
    ],
)
def test_bad_settings(cls, options, message):
    with pytest.raises(ConfigError, match=message):
        cls(**options)
