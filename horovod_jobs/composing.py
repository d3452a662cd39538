"""What Hydra and OmegaConf refuse while a config is composed, as one line for the person who typed it."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence

from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from horovod_jobs.job import one_line

_TAKE_A_VALUE = ("--cfg", "-c", "--package", "-p", "--config-path", "-cp", "--config-name", "-cn", "--config-dir", "-cd",
                 "--experimental-rerun")  # fmt: skip
_INFO = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")
_UNKNOWN = re.compile(r"Could not override '([^']+)'")
_MERGED = re.compile(r"Error merging override (.+)")
# What OmegaConf says of a value that its key does not take, and what to tell the person who typed it.
_WANTED = {
    "could not be converted to Integer": "not a whole number; use one such as 3",
    "could not be converted to Float": "not a number; use one such as 0.5",
    "is not a valid bool": "neither true nor false; use one of the two",
    "is not Optional": "no value for this key, which cannot be null; leave it out for its default",
    "is not a ListConfig": "not a list; write it as [A,B]",
    "to string": "not a text; give a single value",
    "is not a subclass of": "not a section; set one of its keys instead",
}


def options_first(words: Sequence[str]) -> list[str]:
    """A command line with Hydra's options before the overrides: its parser refuses an option that stands between two of them."""
    left = list(words)
    options: list[str] = []
    overrides: list[str] = []
    while left:
        word = left.pop(0)
        takes = word in _TAKE_A_VALUE
        if word == "--" or (takes and not left):
            return [*options, *overrides, word, *left]  # A value that is missing is left to the parser to miss.
        if not word.startswith("-"):
            overrides.append(word)
            continue
        options.append(word)
        if takes or (word in ("--info", "-i") and left and left[0] in _INFO):
            options.append(left.pop(0))
    return options + overrides


def composing_error(error: Exception) -> str:
    """The error's line: what, the value and the remedy."""
    if isinstance(error, OmegaConfBaseException) and not isinstance(error, HydraException):
        return one_line(error)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(line for line in lines if not line.startswith(("Config search path", "provider=")))
    cause = error.__cause__ or error.__context__
    if isinstance(cause, OmegaConfBaseException):
        unknown, parent = _UNKNOWN.match(text), getattr(cause, "parent_node", None)
        if unknown is not None and isinstance(parent, DictConfig):
            return unknown_key(unknown[1], parent, reached=str(getattr(cause, "full_key", "") or ""))
        if merged := _MERGED.fullmatch(text):
            for said, wanted in _WANTED.items():
                if said in str(cause):
                    return f"{merged[1]} is {wanted}"
        text += f" ({one_line(cause)})"
    return text if ";" in text else f"{text}; horovod-jobs --help lists what can be set"


def unknown_key(typed: str, parent: DictConfig, *, reached: str) -> str:
    """What to say of a key that is not there. ``parent`` is the last section that is, ``reached`` the first key that is not."""
    depth = reached.count(".") if reached else typed.count(".")
    parts = typed.split(".")
    section = ".".join(parts[:depth])
    if (shared := _shared_by(parent)) is not None and depth == len(parts) - 1:
        return (
            f"{typed} is not a key: {section} is the job's {shared}; set {shared}.{parts[-1]} for all stages, or give this stage "
            f"a whole part: {section}={{_target_: ...}}"
        )
    where, known = section or "the job", ", ".join(str(key) for key in parent if key not in ("hydra", "_target_"))
    meant = _nearest(parent, parts[depth:])
    said = f" (did you mean {'.'.join([*parts[:depth], *meant])}?)" if meant else ""
    text = f"{typed} is not a key{said}; {where} has {known or 'no keys'}"
    # A part (model, optimizer, ...) and a mapping take keys that the config does not show; a section of the schema never does.
    takes_more = not _is_schema(parent) and depth == len(parts) - 1
    return f"{text}; to add it all the same, write +{typed}=..." if takes_more else text


def _shared_by(node: DictConfig) -> str | None:
    """The job's part that a stage takes where it says nothing: ``optimizer`` for ``stages.teacher.optimizer``."""
    above = node._get_parent()
    default = getattr(OmegaConf.get_type(above), str(node._key()), None) if isinstance(above, DictConfig) else None
    return default[2:-1] if isinstance(default, str) and default.startswith("${") and not len(node) else None


def _is_schema(node: DictConfig) -> bool:
    return OmegaConf.get_type(node) is not dict


def _nearest(node: object, parts: list[str]) -> list[str]:
    """The keys that the parts of a mistyped one may stand for, as far down as they go; empty where none is like them."""
    if not parts:
        return []
    if not isinstance(node, Mapping | DictConfig):
        return []
    known = [str(key) for key in node]
    close = [parts[0]] if parts[0] in known else difflib.get_close_matches(parts[0], known, n=1)
    if not close:
        return []
    below = node._get_node(close[0]) if isinstance(node, DictConfig) else node[close[0]]
    rest = _nearest(below, parts[1:])
    return [close[0], *rest] if rest or len(parts) == 1 else []
