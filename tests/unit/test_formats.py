"""Figures as text."""

from __future__ import annotations

import pytest

from horovod_jobs.formats import throughput


@pytest.mark.parametrize(
    ("value", "text"),
    [(19990.4, "19,990"), (811.3, "811"), (99.96, "100"), (12.345, "12.3"), (0.25, "0.25"), (0.0, "0")],
)
def test_samples_a_second_have_no_exponent(value: float, text: str) -> None:
    assert throughput(value) == f"{text} samples/s"
