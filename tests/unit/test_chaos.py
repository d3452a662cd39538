"""Faults on purpose: the same for the same seed, one after another over starts, and written down before they strike."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

from horovod_jobs import storage
from horovod_jobs.chaos import Chaos, Strike, Striker, strikes
from horovod_jobs.comm.world import SingleWorld
from horovod_jobs.errors import ConfigError, StorageError


def test_a_seed_decides_everything() -> None:
    chaos = Chaos(faults=["kill", "stop"], times=4, every_steps=10, seed=3)
    drawn = [chaos.next_strike(number=number, ranks=4) for number in range(5)]
    assert drawn[4] is None
    assert drawn == [
        Chaos(faults=["kill", "stop"], times=4, every_steps=10, seed=3).next_strike(number=n, ranks=4) for n in range(5)
    ]
    assert drawn != [
        Chaos(faults=["kill", "stop"], times=4, every_steps=10, seed=4).next_strike(number=n, ranks=4) for n in range(5)
    ]
    for strike in drawn[:4]:
        assert strike is not None
        assert 1 <= strike.steps <= 20
        assert 0 <= strike.rank < 4
        assert strike.fault in ("kill", "stop")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"faults": ["flood"]}, "fault 'flood' is not known; use kill"),
        ({"times": -1}, "chaos.times=-1"),
        ({"schedule": [{"fault": "kill", "rank": 0}]}, "is not a fault; give fault, rank, step"),
        ({"schedule": [{"fault": "kill", "rank": 0, "step": 1, "when": 2}]}, "is not a fault"),
    ],
)
def test_what_is_no_fault_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Chaos(**arguments)


def test_a_schedule_strikes_one_by_one_over_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[int] = []
    monkeypatch.setattr("os.kill", lambda pid, number: sent.append(number))
    chaos = Chaos(
        schedule=[
            {"fault": "kill", "rank": 0, "step": 3, "stage": "teacher"},
            {"fault": "exception", "rank": 0, "step": 2},
            {"fault": "term", "rank": 1, "step": 1},  # Another rank's.
        ]
    )
    assert chaos.schedule[1] == Strike("exception", 0, 2)
    first = Striker(chaos, SingleWorld(), root=tmp_path)
    for step in range(1, 6):
        first(("student", step, 10, ""))
        first((None, 0, 0, ""))
    assert sent == []
    for step in range(1, 6):
        first(("teacher", step, 10, ""))
    assert sent == [signal.SIGKILL]
    second = Striker(chaos, SingleWorld(), root=tmp_path)
    second(("teacher", 4, 10, ""))
    with pytest.raises(RuntimeError, match="chaos: fault 1 strikes rank 0"):
        second(("teacher", 5, 10, ""))
    third = Striker(chaos, SingleWorld(), root=tmp_path)
    for step in range(1, 6):
        third(("teacher", step, 10, ""))
    told = strikes(tmp_path / "chaos.jsonl")
    assert [(entry["number"], entry["fault"], entry["stage"], entry["step"]) for entry in told] == [
        (0, "kill", "teacher", 3),
        (1, "exception", "teacher", 5),
    ]


def test_a_full_disk_strikes_every_rank_and_is_told_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "_full", False)
    fault = {"fault": "disk", "rank": 1, "step": 2}
    striker = Striker(Chaos(schedule=[fault]), SingleWorld(), root=tmp_path)  # This is rank 0.
    striker(("teacher", 1, 10, ""))
    storage.write_text(tmp_path / "before", "there is room")
    striker(("teacher", 2, 10, ""))
    with pytest.raises(StorageError, match=r"cannot write .*after \(No space left on device\); free some space"):
        storage.write_text(tmp_path / "after", "there is none")
    assert strikes(tmp_path / "chaos.jsonl") == [], "the rank that is named tells of it"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["before"]
