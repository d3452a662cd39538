"""What a ``_target_`` may name, and how wrong arguments are reported."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from horovod_jobs.errors import ConfigError
from horovod_jobs.instantiate import accepted, bind, code_digests, instantiate, locate, targets_in


@pytest.fixture
def user_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "their_code.py"
    path.write_text(
        "import os\nclass Net:\n    def __init__(self, *, width, inner=None): self.width, self.inner = width, inner\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "their_code", raising=False)
    return path


@pytest.mark.parametrize(
    "target",
    ["os.system", "builtins.eval", "subprocess.Popen", "torch.load", "torch.hub.load", "torch.nn.modules.module.torch.load",
     "horovod_jobs.launch.process.subprocess.run", "torch.nn.functional.torch.os.system"],
)  # fmt: skip
def test_code_that_is_not_allowed_is_refused(target: str) -> None:
    with pytest.raises(ConfigError, match="is not allowed"):
        locate(target)


def test_torch_and_package_are_allowed() -> None:
    assert locate("torch.optim.SGD") is torch.optim.SGD
    assert isinstance(instantiate({"_target_": "torch.nn.Linear", "in_features": 2}, out_features=3), torch.nn.Linear)


def test_a_users_module_needs_to_be_named(user_module: Path) -> None:
    node = {"_target_": "their_code.Net", "width": 3, "inner": {"_target_": "their_code.Net", "width": 1}}
    with pytest.raises(ConfigError, match=r"allow_targets=\[their_code\]"):
        instantiate(node)
    net = instantiate(node, allow=["their_code"])
    assert (net.width, net.inner.width) == (3, 1)
    with pytest.raises(ConfigError, match="is not allowed"):
        locate("their_code.os.system", allow=["their_code"])


def test_what_the_node_says_wins_over_what_is_injected(user_module: Path) -> None:
    assert instantiate({"_target_": "their_code.Net", "width": 3}, allow=["their_code"], width=9).width == 3
    assert accepted({"_target_": "their_code.Net"}, {"width": 1, "num_classes": 2}, allow=["their_code"]) == {
        "width": 1
    }


@pytest.mark.parametrize(
    ("node", "message"),
    [
        (
            {"_target_": "torch.nn.Linear", "in_features": 1, "out_features": 1, "fan": 2},
            "model.fan=2.*has no argument 'fan'",
        ),
        ({"_target_": "torch.nn.Linear", "in_features": 1}, "model.out_features is missing"),
        ({"_target_": "torch.nn.Linearr"}, "has no 'Linearr'"),
        ({"_target_": "torch.nnn.Linear"}, "is not allowed"),
        ({"_target_": "horovod_jobs.nothing.Here"}, "has no 'nothing'"),
        ({"_target_": "torch.nn"}, "is not a class|is not allowed"),
        ({"_target_": "torch.nn; import os"}, "is not a dotted Python name"),
        ({"width": 3}, "names nothing to build"),
    ],
)
def test_wrong_nodes_are_named_before_anything_is_built(node: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        bind(node, where="model")


def test_a_missing_user_module_tells_about_pythonpath() -> None:
    with pytest.raises(ConfigError, match="no module named 'not_there'.*PYTHONPATH"):
        locate("not_there.Net", allow=["not_there"])


def test_edited_source_changes_the_digest(user_module: Path) -> None:
    from horovod_jobs import instantiate as module

    node = {"a": [{"_target_": "their_code.Net", "width": 1}], "o": {"_target_": "torch.optim.SGD"}}
    assert targets_in(node) == ["their_code.Net", "torch.optim.SGD"]
    first = code_digests(node, allow=["their_code"])
    assert list(first) == ["their_code.Net"]
    user_module.write_text(user_module.read_text() + "# edited\n")
    module._source_digest.cache_clear()
    assert code_digests(node, allow=["their_code"]) != first
