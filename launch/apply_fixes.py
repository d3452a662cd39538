"""Apply the source changes listed in a ``.fixes`` file to an unpacked source tree, and print each one.

Usage: ``python apply_fixes.py FIXES SOURCE_DIR``. It uses the standard library only, so any Python runs it.
Nothing is written unless every change fits: a line that is missing, or that occurs more than once, ends it with code 5.
"""

from __future__ import annotations

import configparser
import dataclasses
import sys
from pathlib import Path


class FixError(Exception):
    """A change that cannot be applied as it is written."""


@dataclasses.dataclass(frozen=True)
class Fix:
    """One change: in ``file``, relative to the source tree, the text ``old`` becomes ``new``."""

    name: str
    file: str
    old: str
    new: str
    reason: str


def read_fixes(path: Path) -> list[Fix]:
    """Read a ``.fixes`` file.

    Raises:
        FixError: a section lacks a key, has one too many, or there is no section.
    """
    parser = configparser.ConfigParser(interpolation=None, delimiters=("=",), strict=True)
    parser.read_string(path.read_text(encoding="utf-8"), source=str(path))
    wanted = {field.name for field in dataclasses.fields(Fix)} - {"name"}
    fixes = []
    for name in parser.sections():
        values = dict(parser[name])
        if set(values) != wanted:
            raise FixError(f"{path.name}: section [{name}] has the keys {sorted(values)}; it needs {sorted(wanted)}")
        fixes.append(Fix(name=name, **values))
    if not fixes:
        raise FixError(f"{path.name}: no change is listed")
    return fixes


def apply_fixes(fixes: list[Fix], *, source: Path) -> list[str]:
    """Change the files below ``source`` and return one line ``file:number: old -> new`` for each change.

    Raises:
        FixError: a file or a line is missing or ambiguous; then no file has been changed.
    """
    texts: dict[Path, str] = {}
    lines = []
    for fix in fixes:
        path = source / fix.file
        if path not in texts:
            if not path.is_file():
                raise FixError(
                    f"[{fix.name}] {fix.file} is not in {source}; is this the release the list was written for?"
                )
            texts[path] = path.read_text(encoding="utf-8")
        count = texts[path].count(fix.old)
        if count != 1:
            raise FixError(
                f"[{fix.name}] {fix.file} has the text {fix.old!r} {count} times, not once; correct the list of changes"
            )
        number = texts[path][: texts[path].index(fix.old)].count("\n") + 1
        texts[path] = texts[path].replace(fix.old, fix.new)
        lines.append(f"{fix.file}:{number}: {fix.old} -> {fix.new}")
    for path, text in texts.items():
        path.write_text(text, encoding="utf-8")
    return lines


def main(argv: list[str]) -> int:
    """Command line: ``FIXES SOURCE_DIR``; the exit code is 0, 2 for a wrong call, 5 for a change that does not fit."""
    if len(argv) != 2:
        print("usage: apply_fixes.py FIXES SOURCE_DIR", file=sys.stderr)
        return 2
    try:
        fixes = read_fixes(Path(argv[0]))
        lines = apply_fixes(fixes, source=Path(argv[1]))
    except (FixError, configparser.Error, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 5
    for fix, line in zip(fixes, lines, strict=True):
        print(f"        {line}\n            why: {fix.reason}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
