"""A run's manifest in the launcher's log: the image's entry point prints it when the job has ended, as lines that are put together here.

A pod that has ended can still be asked for its log, and for nothing else.
"""

from __future__ import annotations

import base64
import binascii
import json
import zlib
from collections.abc import Iterable
from typing import Any

from horovod_jobs.errors import ArtifactError

MARK = "HOROVOD_JOBS_MANIFEST"
_LIMIT_BYTES = 64 * 1024 * 1024


def is_part(line: str) -> bool:
    """Whether a line of the log is a part of the manifest and not for a person."""
    return line.startswith(f"{MARK} ")


def manifest_in(lines: Iterable[str]) -> dict[str, Any] | None:
    """The last whole manifest of a log; None where there is none.

    Raises:
        ArtifactError: what is there cannot be read.
    """
    parts: list[str] = []
    whole: str | None = None
    for line in lines:
        if not is_part(line):
            continue
        _, count, text = (*line.split(), "", "")[:3]
        number, _, total = count.partition("/")
        if number == "1":
            parts = []
        parts.append(text)
        if number == total and str(len(parts)) == total:
            whole = "".join(parts)
    if whole is None:
        return None
    try:
        unpacked = zlib.decompressobj().decompress(base64.b64decode(whole, validate=True), _LIMIT_BYTES)
        value = json.loads(unpacked)
    except (binascii.Error, zlib.error, ValueError) as error:
        raise ArtifactError(
            f"the manifest in the log is damaged ({error}); read it on the volume of the runs"
        ) from error
    if not isinstance(value, dict):
        raise ArtifactError("the manifest in the log is not a mapping; read it on the volume of the runs")
    return value
