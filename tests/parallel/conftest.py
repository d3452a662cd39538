"""Tests in this folder run inside a world (``python -m tests.in_world -np 2 tests/parallel``)."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from horovod_jobs.comm.world import World


@pytest.fixture(scope="session")
def world() -> World:
    """The world that ``tests.in_world`` joined."""
    module = sys.modules.get("tests.in_world")
    found = getattr(module, "world", None)
    if found is None:
        pytest.skip("not in a world; run: python -m tests.in_world -np 2 tests/parallel")
    return found  # type: ignore[no-any-return]


@pytest.fixture(autouse=True)
def _right_size(request: pytest.FixtureRequest, world: World) -> None:
    marker = request.node.get_closest_marker("world_size")
    if marker is not None and world.size not in marker.args:
        pytest.skip(f"wants {' or '.join(map(str, marker.args))} ranks, and there are {world.size}")


@pytest.fixture
def shared_dir(world: World, tmp_path: Path) -> Path:
    """One temporary directory for all ranks: rank 0's."""
    return Path(world.broadcast_json(str(tmp_path), name="test.shared_dir"))
