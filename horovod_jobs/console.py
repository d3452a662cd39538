"""What a person sees: progress, log lines, events. Rank 0 speaks on the console; every rank has a file."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

LOGGER = "horovod_jobs"
TERMINAL_VARIABLE = "HOROVOD_JOBS_TERMINAL"


def forwarded_terminal() -> int | None:
    """Columns of the terminal that the process which started this rank sits on, where it passes one on."""
    text = os.environ.get(TERMINAL_VARIABLE, "")
    return int(text) if text.isdigit() else None


def say_json(told: Mapping[str, Any]) -> None:
    """A line for ``horovod-runs watch -`` on standard error."""
    _say(json.dumps({"time": round(time.time(), 3), **told}))


def _say(line: str) -> None:
    sys.stderr.write(
        line + "\n"
    )  # In one piece: more than one thread speaks, and print writes the end of a line by itself.
    sys.stderr.flush()


class Progress(Protocol):
    """A bar or lines for one piece of work."""

    def update(self, done: int, note: str = "") -> None: ...


class _Silent:
    def update(self, done: int, note: str = "") -> None:
        """Nobody looks."""


class _Lines:
    """A line every few seconds, for a console that is not a terminal."""

    def __init__(self, label: str, total: int, *, every_s: float = 5.0) -> None:
        self._label, self._total, self._every_s = label, total, every_s
        self._last = time.monotonic()

    def update(self, done: int, note: str = "") -> None:
        now = time.monotonic()
        if now - self._last >= self._every_s or done >= self._total:
            self._last = now
            logging.getLogger(LOGGER).info("%s %d/%d %s", self._label, done, self._total, note)


class _Json:
    """A JSON line every few seconds on standard error, for ``horovod-runs watch -``."""

    def __init__(self, label: str, total: int, *, every_s: float = 2.0) -> None:
        self._label, self._total, self._every_s = label, total, every_s
        self._last = float("-inf")

    def update(self, done: int, note: str = "") -> None:
        now = time.monotonic()
        if now - self._last >= self._every_s or done >= self._total:
            self._last = now
            told = {"event": "progress", "stage": self._label, "done": done, "total": self._total, "note": note}
            say_json(told)


class _Bar:
    def __init__(self, bars: Any, task: Any) -> None:
        self._bars, self._task = bars, task

    def update(self, done: int, note: str = "") -> None:
        self._bars.update(self._task, completed=done, note=note)


Doing = tuple[str | None, int, int, str]  # label, done, total, note


class _Noted:
    """Passes progress on to what shows it, and notes it for whoever asks what this rank is doing."""

    def __init__(self, shown: Progress, console: Console, label: str, total: int) -> None:
        self._shown, self._console, self._label, self._total = shown, console, label, total

    def update(self, done: int, note: str = "") -> None:
        self._console.note((self._label, done, self._total, note))
        self._shown.update(done, note)


class Console:
    """Opened once a job by the runner; ``progress()`` is for stages.

    Attributes:
        now: what this rank is doing: label, done, out of how many, and a note.
    """

    def __init__(self, *, is_main: bool, mode: str, above: Console | None = None) -> None:
        if mode == "auto":
            mode = "bars" if sys.stderr.isatty() or forwarded_terminal() else "lines"
        self._mode = mode if is_main else "none"
        self._above = above  # the whole world's console, where this is a part's
        self.now: Doing = (None, 0, 0, "")
        self.listener: Callable[[Doing], None] | None = None  # hears of every step (chaos)

    def note(self, doing: Doing) -> None:
        self.now = doing
        if self.listener is not None:
            self.listener(doing)
        if self._above is not None:
            self._above.note(doing)

    @contextmanager
    def progress(self, label: str, total: int) -> Iterator[Progress]:
        """Show how far ``label`` is, out of ``total``."""
        self.note((label, 0, total, ""))
        try:
            with self._shown(label, total) as shown:
                yield _Noted(shown, self, label, total)
        finally:
            self.note((None, 0, 0, ""))

    @contextmanager
    def _shown(self, label: str, total: int) -> Iterator[Progress]:
        if self._mode == "none":
            yield _Silent()
        elif self._mode == "lines":
            yield _Lines(label, total)
        elif self._mode == "json":
            yield _Json(label, total)
        else:
            from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.completed}/{task.total}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
            )
            with Progress(*columns, console=_terminal(), transient=True, refresh_per_second=4) as bars:
                yield _Bar(bars, bars.add_task(label, total=total, note=""))


class EventLog:
    """Facts as JSON lines in ``<run>/events.jsonl``; rank 0 writes, others hold one without a path.

    On a full disk they wait for room: the job ends where all ranks agree on it, at the next thing that it cannot do without.

    ``echo``: the same lines on standard error.
    """

    def __init__(self, path: Path | None, *, echo: bool = False) -> None:
        self._stream = path.open("ab", buffering=0) if path else None
        self._echo = echo
        self._waiting = bytearray()

    def emit(self, event: str, **fields: Any) -> None:
        if self._stream is not None:
            line = json.dumps({"time": round(time.time(), 3), "event": event, **fields})
            self._waiting += line.encode() + b"\n"
            with contextlib.suppress(OSError):
                while self._waiting:
                    del self._waiting[: self._stream.write(self._waiting)]
            if self._echo:
                _say(line)

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()


class _LogFile(logging.FileHandler):
    """A rank's log. A full disk does not end the job here, as for events; Python would tell each line's error with a traceback."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)

    def close(self) -> None:
        with contextlib.suppress(OSError):  # What it could not write it tries once more.
            super().close()


@contextmanager
def logging_to(directory: Path, *, rank: int, level: str) -> Iterator[logging.Logger]:
    """Send this package's log to ``rank-<rank>.log`` and, on rank 0, to the console; taken back at the end."""
    logger = logging.getLogger(LOGGER)
    logger.propagate = False
    before = logger.level
    logger.setLevel(level.upper())
    handlers: list[logging.Handler] = [_LogFile(directory / f"rank-{rank}.log", encoding="utf-8")]
    handlers[0].setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    if rank == 0:
        handlers.append(_console_handler())
    for handler in handlers:
        logger.addHandler(handler)
    try:
        yield logger
    finally:
        for handler in handlers:
            logger.removeHandler(handler)
            handler.close()
        logger.setLevel(before)


@lru_cache(maxsize=1)
def _terminal() -> Any:
    """The one rich console of this process: bars and log lines must share it, or they tear each other apart."""
    from rich.console import Console as RichConsole

    return RichConsole(stderr=True, force_terminal=True, width=forwarded_terminal())


def result_console() -> Any:
    """A rich console on stdout for tables. A rank's own stdout may be a pseudo-terminal that nobody sees."""
    from rich.console import Console as RichConsole

    if launched := os.environ.get("HOROVOD_JOBS_LAUNCH_DIR"):
        columns = forwarded_terminal()
        return RichConsole(force_terminal=bool(launched and columns), no_color=not columns, width=columns or 160)
    return RichConsole(width=None if sys.stdout.isatty() else 160)


def _console_handler() -> logging.Handler:
    if sys.stderr.isatty() or forwarded_terminal():
        from rich.logging import RichHandler

        return RichHandler(console=_terminal(), show_path=False, show_level=False, markup=False, rich_tracebacks=False)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    return handler
