"""Every error this package raises on purpose, and the exit code a shell sees.

    JobError                         1
    ├── ConfigError                  2   a key, a value or a graph that cannot work
    ├── DataError                    3   a data set that is missing, damaged or does not fit
    ├── ArtifactError                4   an artifact that is missing, damaged or of the wrong kind
    ├── SetupError                   5   something is not installed, or a launcher cannot start
    ├── StorageError                 6   no space, no permission, a path that cannot be used
    ├── GateError                    7   a quality gate that the result does not pass
    ├── NonFiniteError               8   a loss, weights or outputs that are NaN or infinite
    ├── WorldError                   9   ranks that do not agree, or one that failed while the others went on
    └── Interrupted                 75   stopped on request with a checkpoint: the same command goes on (EX_TEMPFAIL)
        └── InterruptedByUser      130   the same, by Ctrl-C

A ``JobError`` reaches the user as one line, ``error: what (value); remedy``, without a traceback. Anything else is a bug and shows one.
"""

from __future__ import annotations


class JobError(Exception):
    """Base of all errors a user can mend. Its message says what, the value and the remedy."""

    exit_code = 1


class ConfigError(JobError):
    """A key, a value or a graph that cannot work."""

    exit_code = 2


class DataError(JobError):
    """A data set that is missing, damaged or does not fit."""

    exit_code = 3


class ArtifactError(JobError):
    """An artifact that is missing, damaged or of the wrong kind."""

    exit_code = 4


class SetupError(JobError):
    """Something is not installed, or a launcher cannot start."""

    exit_code = 5


class StorageError(JobError):
    """No space, no permission, or a path that cannot be used."""

    exit_code = 6


class GateError(JobError):
    """A quality gate that the result does not pass."""

    exit_code = 7


class NonFiniteError(JobError):
    """A loss, weights or outputs that are NaN or infinite."""

    exit_code = 8


class WorldError(JobError):
    """Ranks that do not agree, or one that failed while the others went on."""

    exit_code = 9


class Interrupted(JobError):  # noqa: N818
    """Stopped on request after a checkpoint; the same command goes on from there."""

    exit_code = 75


class InterruptedByUser(Interrupted):
    """Stopped by Ctrl-C after a checkpoint; the same command goes on from there."""

    exit_code = 130


BY_NAME: dict[str, type[JobError]] = {
    cls.__name__: cls
    for cls in (
        JobError,
        ConfigError,
        DataError,
        ArtifactError,
        SetupError,
        StorageError,
        GateError,
        NonFiniteError,
        WorldError,
        Interrupted,
        InterruptedByUser,
    )
}
