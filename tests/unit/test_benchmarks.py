"""The statistics that the benchmarks print, on numbers worked out by hand."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from benchmarks.common import Ratio, conclude, paired, spread, table


def test_ratios_are_taken_within_a_round_so_that_drift_cancels() -> None:
    # The machine is half as fast in the second half; ours takes 0.9 of the other's time throughout, 0.8 in one round.
    theirs = [10.0, 10.0, 20.0, 20.0, 20.0]
    ours = [9.0, 9.0, 18.0, 16.0, 18.0]
    assert paired(ours, theirs) == Ratio(
        median=pytest.approx(0.9), low=pytest.approx(0.8), high=pytest.approx(0.9), rounds=5
    )


def test_the_median_of_an_even_number_of_rounds_is_between_the_middle_two() -> None:
    assert paired([1.0, 2.0, 3.0, 10.0], [1.0, 1.0, 1.0, 1.0]).median == pytest.approx(2.5)


@pytest.mark.parametrize(("ours", "theirs"), [([], []), ([1.0], [1.0, 2.0])])
def test_rounds_that_cannot_be_paired_are_refused(ours: list[float], theirs: list[float]) -> None:
    with pytest.raises(ValueError, match="rounds cannot be paired"):
        paired(ours, theirs)


def test_what_is_shown() -> None:
    assert spread([3.0, 1.0, 2.26], digits=1) == "2.3 (1.0..3.0)"
    assert str(Ratio(0.91234, 0.9, 1.0, 3)) == "0.912 (0.900..1.000)"
    assert table(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"


def test_the_record_names_the_machine_and_says_when_it_was_quick(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "figures.json"
    args = argparse.Namespace(quick=True, json=path)
    conclude("Title", "text", figures={"ratio": paired([1.0], [2.0]), "ms": [1.0]}, args=args)
    record = json.loads(path.read_text())
    assert record["figures"] == {"ratio": {"median": 0.5, "low": 0.5, "high": 0.5, "rounds": 1}, "ms": [1.0]}
    assert record["quick"] is True
    assert {"processor", "cores", "torch", "horovod", "mpi"} <= record["machine"].keys()
    shown = capsys.readouterr().out
    assert "## Title" in shown
    assert "too few steps for figures to quote" in shown


def test_a_figure_that_json_cannot_hold_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="Path"):
        conclude("t", "t", figures={"a": Path()}, args=argparse.Namespace(quick=False, json=tmp_path / "x.json"))
