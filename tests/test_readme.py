"""What the documents tell a person to type composes, and what they link to is there."""

from __future__ import annotations

import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from horovod_jobs.app import conf_dir
from horovod_jobs.graph import build
from horovod_jobs.job import register_schema, resolve

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted(
    path
    for pattern in ("*.md", "docs/*.md", "launch/*.md", "examples/**/*.md", "tests/integration/conf/*.md")
    for path in ROOT.glob(pattern)
)
# Programs whose lines start something else than a job; what they do is tested where they are.
OTHERS = (
    "make",
    "launch/install.sh",
    "launch/build_horovod.sh",
    "pip",
    "python",
    "cd",
    ".",
    "sudo",
    "apt",
    "git",
    "horovod-runs",
    "ulimit",
)
# A directory that the reader is told to make: its options exist nowhere, so only the rest of the line can be held to something.
READERS_OWN = ("my_conf", "conf")


def blocks(text: str) -> Iterator[str]:
    """The code blocks of a document: indented ones and those fenced as shell; joined where a line goes on."""
    fenced = re.findall(r"^```(?:bash|sh|console)\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    rest = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    indented = "\n".join(line[4:] if line.startswith("    ") else "" for line in rest.splitlines())
    for block in (*fenced, indented):
        yield block.replace("\\\n", " ")


def jobs() -> list[tuple[str, str]]:
    """Every line in a code block that starts a job, with its document."""
    found = []
    for path in DOCUMENTS:
        for block in blocks(path.read_text(encoding="utf-8")):
            found += [
                (str(path.relative_to(ROOT)), " ".join(line.split()))
                for line in block.splitlines()
                if re.search(r"(^|[\s/])horovod-jobs(\s|$)", line.split(" #")[0])
            ]
    return sorted(set(found))


def overrides(line: str) -> tuple[list[str], Path | None]:
    """The overrides of a job's line, a sweep's first value for each, and the directory of its own configs."""
    words = shlex.split(line, comments=True)
    words = words[max(index for index, word in enumerate(words) if word.endswith("horovod-jobs")) + 1 :]
    directory = None
    taken = []
    while words:
        word = words.pop(0)
        if word == "--config-dir":
            directory = Path(words.pop(0))
        elif word.startswith("--config-dir="):
            directory = Path(word.split("=", 1)[1])
        elif word in ("--cfg",):
            words.pop(0)
        elif word not in ("...", "-m", "--multirun", "--help") and "[,...]" not in word:
            key, _, value = word.partition("=")
            swept = "," in value and value[0] not in "[{'\"("
            taken.append(f"{key}={value.split(',')[0]}" if swept else word)
    return taken, directory


def test_there_are_documents_and_commands() -> None:
    names = {document for document, _ in jobs()}
    assert {"README.md", "docs/graph.md", "examples/own_code/README.md"} <= names
    assert len(jobs()) > 20


@pytest.mark.parametrize(("document", "line"), jobs())
def test_every_job_in_a_document_composes(document: str, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    taken, directory = overrides(line)
    extra = []
    if directory is not None:
        real = (ROOT / document).parent / directory
        if real.is_dir() and real != Path(conf_dir()):
            extra = [f"hydra.searchpath=[file://{real}]"]
            monkeypatch.syspath_prepend(real.parent)
        else:
            assert str(directory) in READERS_OWN, (
                f"{document} names {directory}, which is neither there nor known as the reader's own"
            )
            # What the reader's directory would add: a group's option that this package does not have.
            ours = {f"{path.parent.name}={path.stem}" for path in Path(conf_dir()).glob("*/*.yaml")}
            groups = {path.parent.name for path in Path(conf_dir()).glob("*/*.yaml")}
            taken = [word for word in taken if word.split("=")[0].split("@")[0] not in groups or word in ours]
    register_schema()
    GlobalHydra.instance().clear()
    with initialize_config_dir(conf_dir(), version_base="1.3"):
        job = resolve(compose("config", overrides=[*taken, *extra]))
    assert build(job.stages)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_command_is_one_we_know(document: Path) -> None:
    """A fenced shell block holds jobs, or what another test runs: nothing that nobody looks at."""
    unknown = []
    for block in re.findall(
        r"^```(?:bash|sh|console)\n(.*?)^```", document.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL
    ):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words and "horovod-jobs" not in words and words[0] not in OTHERS:
                unknown.append(line)
    assert unknown == []


def anchors(path: Path) -> set[str]:
    """The names of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {
        re.sub(r"[^\w\- ]", "", re.sub(r"\[(.*?)\]\(.*?\)", r"\1", heading).lower()).strip().replace(" ", "-")
        for heading in headings
    }


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_relative_link_leads_somewhere(document: Path) -> None:
    broken = []
    for target in re.findall(r"!?\[[^\]]*\]\(([^)\s]+)[^)]*\)", document.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        there = (document.parent / name) if name else document
        if not there.exists() or (anchor and there.suffix == ".md" and anchor not in anchors(there)):
            broken.append(target)
    assert broken == []


def test_horovod_runs_has_the_subcommands_that_the_documents_name() -> None:
    told = set()
    for path in DOCUMENTS:
        told |= set(re.findall(r"^ {0,4}horovod-runs ([a-z]+)", path.read_text(encoding="utf-8"), flags=re.MULTILINE))
    shown = subprocess.run(
        [sys.executable, "-m", "horovod_jobs.runs", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    ).stdout
    assert told
    assert told <= set(re.findall(r"[a-z]+", shown)), shown


def test_the_exit_codes_of_the_readme_are_those_of_the_code() -> None:
    from horovod_jobs.errors import BY_NAME

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    told = {
        int(code)
        for code in re.findall(r"^\| (\d+) \|", text.split("## Exit codes")[1].split("\n## ")[0], flags=re.MULTILINE)
    }
    assert told == {0, 128 + signal.SIGTERM, *(error.exit_code for error in BY_NAME.values())}
