"""A job on a terminal: one that is a pseudo-terminal, whose every byte is kept."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from tests.integration.support import TINY, run

# Everything that the terminal gets comes out as this process's standard output.
PTY = (sys.executable, "-c", "import os, pty, sys; sys.exit(os.waitstatus_to_exitcode(pty.spawn(sys.argv[1:])))")


def test_a_terminal_shows_a_bar_for_the_training_and_takes_it_away(tmp_path: Path) -> None:
    done = run(*TINY, "run.progress=bars", cwd=tmp_path, launcher=PTY)
    assert done.code == 0, done.text
    total = r"(\d+)/(\d+)"
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", done.out)
    bars = re.findall(rf"model +[\u2501\u2578\u257a]+ +{total} .*", shown)
    assert bars, done.text
    assert all(int(steps) <= int(of) for steps, of in bars)
    assert "samples/s" in shown
    assert "\x1b[2K" in done.out, "a bar is wiped away when its work is done"
