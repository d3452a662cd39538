"""What a run says of itself while its disk is full."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from horovod_jobs.console import EventLog, logging_to

FULL = Path("/dev/full")
needs_full = pytest.mark.skipif(not FULL.exists(), reason="there is no /dev/full here")


@needs_full
def test_events_wait_for_room(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    log = EventLog(path)
    assert log._stream is not None
    with FULL.open("ab", buffering=0) as full, path.open("ab", buffering=0) as room:
        for number, disk in enumerate((full, full, room)):
            os.dup2(disk.fileno(), log._stream.fileno())
            log.emit("epoch", epoch=number)
    log.close()
    assert [json.loads(line)["epoch"] for line in path.read_text().splitlines()] == [0, 1, 2]


@needs_full
def test_a_log_file_that_cannot_be_written_ends_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "rank-1.log").symlink_to(FULL)
    with logging_to(tmp_path, rank=1, level="info") as log:
        log.warning("nobody reads this")
    assert capfd.readouterr().err == ""
