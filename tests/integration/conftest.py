"""Shared by the integration tests: they start jobs as subprocesses, in temporary directories."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration import support


@pytest.fixture(scope="session")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[support.Forks]:
    """Jobs of one process without the seconds of imports."""
    with support.forks(tmp_path_factory.mktemp("forks")) as server:
        yield server


@pytest.fixture(scope="session")
def trained(forks: support.Forks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a store that holds one model of four classes."""
    directory = tmp_path_factory.mktemp("trained")
    done = forks.run(*support.TINY, "fit.epochs=1", cwd=directory)
    assert done.code == 0, done.text
    return directory
