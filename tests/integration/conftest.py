"""Shared by the integration tests: they start jobs as subprocesses, in temporary directories."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.integration import support


@pytest.fixture(scope="session")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[support.Forks]:
    """Jobs of one process without the seconds of imports."""
    with support.forks(tmp_path_factory.mktemp("forks")) as server:
        yield server
