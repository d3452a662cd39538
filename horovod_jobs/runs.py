"""``horovod-runs``: list, show, compare and report runs, and say what this installation can do.

It reads run directories and changes nothing, but for the page that ``report`` writes and the manifest that ``fetch`` gets; ``suspend``
and ``resume`` change a job in a cluster. It never imports torch or Hydra.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from horovod_jobs import formats
from horovod_jobs import manifest as manifests
from horovod_jobs.comparing import compare
from horovod_jobs.errors import ArtifactError, DataError, JobError, StorageError
from horovod_jobs.launch.kubernetes.parser import add_cluster_commands
from horovod_jobs.living import is_gone
from horovod_jobs.manifest import Manifest
from horovod_jobs.tables import print_table, terminal

_ROOT = "runs"  # Where no job has run yet it is not there, and that is no error.
EXAMPLES = """\
examples:
  horovod-runs ls                        all runs under ./runs, the newest last
  horovod-runs show latest               the stages of the newest run
  horovod-runs show 20260131 --json      a run by the beginning of its id, for machines
  horovod-runs compare RUN_A RUN_B       what differs: figures by stage, and config keys
  horovod-runs report runs/20260131-...  make report.html and model_card.md again
  horovod-runs doctor                    what this installation can do, and how to add the rest

RUN is a run's id, a beginning of it that is unique, `latest`, or the path of its directory.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code (0, or the code of the error's class)."""
    arguments = _parser().parse_args(argv)
    command: Callable[[argparse.Namespace], None] = arguments.run_command
    try:
        command(arguments)
        sys.stdout.flush()
    except JobError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        # The reader (head, less) has seen enough. Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="horovod-runs",
        description="Read the runs of horovod-jobs.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def add(name: str, run: Callable[[argparse.Namespace], None], text: str, *names: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        for entry in names:
            sub.add_argument(entry.lower(), metavar=entry, help="id, unique beginning of it, `latest`, or path")
        sub.add_argument("--root", default=_ROOT, metavar="DIR", help="directory of the runs (default: %(default)s)")
        sub.add_argument("--json", action="store_true", help="print JSON instead of tables")
        sub.set_defaults(run_command=run)
        return sub

    add("ls", _ls, "list the runs, the newest last")
    add("show", _show, "show a run's stages and figures", "RUN")
    live = add(
        "watch", _watch, "follow a run while it goes; RUN - reads the lines of a job with run.progress=json", "RUN"
    )
    live.add_argument("--once", action="store_true", help="show it as it is now and end")
    add("compare", _compare, "compare two runs: figures by stage, and the config keys that differ", "A", "B")
    add("report", _report, "make a run's report.html and model_card.md again, from its manifest and artifacts", "RUN")
    add("doctor", _doctor, "say what this installation can do, and how to add the rest")
    add_cluster_commands(commands.add_parser, table=print_table)
    return parser


def _ls(arguments: argparse.Namespace) -> None:
    if not Path(arguments.root).is_dir() and (arguments.root != _ROOT or os.path.lexists(_ROOT)):
        raise StorageError(
            f"--root {arguments.root} is not a directory; give the one that holds the runs (run.root of their jobs)"
        )
    found: list[tuple[Path, Manifest | ArtifactError]] = []
    for path in manifests.list_runs(arguments.root):
        try:
            found.append((path, manifests.read(path)))
        except ArtifactError as error:
            found.append((path, error))
    if arguments.json:
        keys = ("run_id", "name", "status", "started_at", "ended_at", "world", "totals")
        _print_json(
            [
                {"run_id": path.name, "error": str(m)}
                if isinstance(m, ArtifactError)
                else {**{key: m[key] for key in keys}, "gone": _is_gone(path, m)}  # type: ignore[literal-required]
                for path, m in found
            ]
        )
        return
    if not found:
        print(f"No runs under {arguments.root}. Run a job first (horovod-jobs), or give another directory with --root.")
        return
    rows = [[path.name, "damaged", str(m)] if isinstance(m, ArtifactError) else _ls_row(path, m) for path, m in found]
    print_table(
        ["run", "status", "name", "started (UTC)", "ranks", "stages", "time", "energy"],
        rows,
        right=range(4, 8),
        text=[2],
        spare=["ranks", "energy", "stages", "started (UTC)"],
    )


def _is_gone(run_dir: Path, manifest: Manifest) -> bool:
    return manifest["status"] == "running" and is_gone(run_dir)


def _ls_row(run_dir: Path, manifest: Manifest) -> list[str]:
    statuses = [stage["status"] for stage in manifest["stages"]]
    over = sum(status in ("ran", "reused", "skipped") for status in statuses)
    return [
        manifest["run_id"],
        "gone" if _is_gone(run_dir, manifest) else manifest["status"],
        manifest["name"],
        manifest["started_at"][:16].replace("T", " "),
        str(manifest["world"]["size"]),
        f"{over}/{len(statuses)}",
        formats.duration(manifest["totals"]["seconds"]),
        formats.energy(manifest["totals"]["energy_kwh"]),
    ]


def _show(arguments: argparse.Namespace) -> None:
    run_dir = manifests.find_run(arguments.root, arguments.run)
    manifest = manifests.read(run_dir)
    if arguments.json:
        _print_json(manifest)
        return
    world, totals = manifest["world"], manifest["totals"]
    print(f"{manifest['run_id']}  {manifest['name']}  {manifest['status']}")
    if manifest["error"]:
        print(f"error: {manifest['error']} (exit code {manifest['exit_code']})")
    started = manifest["started_at"][:19].replace("T", " ")
    print(f"started {started} UTC{_age(run_dir, manifest)}")
    print(f"world {world['size']} rank(s) on {world['hosts']} host(s), controller {world['controller']}")
    print(f"command {shlex.join(manifest['command'])}")
    rows = [
        [
            stage["name"],
            stage["kind"],
            stage["status"],
            formats.duration(stage["seconds"]),
            formats.energy(stage["energy_kwh"]),
            formats.integer(stage["parameters"]),
            formats.size(stage["model_bytes"]),
            _metrics(stage["metrics"]),
        ]
        for stage in manifest["stages"]
    ]
    print_table(
        ["stage", "kind", "status", "time", "energy", "parameters", "model+config", "metrics"],
        rows,
        right=range(3, 7),
        text=[7],
        spare=["kind", "parameters", "model+config", "energy"],
    )
    for line in _staleness(run_dir, manifest):
        print(line)
    spent = ", ".join(
        text
        for text, value in (
            (formats.energy(totals["energy_kwh"]), totals["energy_kwh"]),
            (formats.mass(totals["co2_kg"]) + " CO2e", totals["co2_kg"]),
            (formats.money(totals["cost_usd"]), totals["cost_usd"]),
        )
        if value is not None
    )
    print(f"this run: {formats.duration(totals['seconds'])}" + (f", {spent}" if spent else ""))
    for method in dict.fromkeys(stage["footprint_method"] for stage in manifest["stages"] if stage["footprint_method"]):
        print(f"energy {method}")
    page = run_dir / "report.html"
    print(f"report: {page}" if page.is_file() else f"no report yet: horovod-runs report {manifest['run_id']}")


def _staleness(run_dir: Path, manifest: Manifest) -> list[str]:
    """What the servers of stages with a parameter server counted, a line a stage."""
    from horovod_jobs.artifacts import open_artifact
    from horovod_jobs.report.staleness import of_stage

    store, lines = manifests.store_of(run_dir, manifest), []
    for stage in manifest["stages"]:
        if stage["kind"] in ("train", "distill") and stage["artifact"]:
            with contextlib.suppress(ArtifactError):
                record = of_stage(stage["name"], open_artifact(store / stage["artifact"], verify=False).meta)
                lines += [record.text] if record else []
    return lines


def _watch(arguments: argparse.Namespace) -> None:
    from horovod_jobs import watching

    if arguments.run == "-":
        if not watching.watch_lines(watching.standard_input(), console=terminal(), as_json=arguments.json):
            raise DataError(
                "standard input has no line of a job that runs with run.progress=json; pipe one in: "
                "horovod-jobs ... run.progress=json 2>&1 | horovod-runs watch -"
            )
        return
    run_dir = manifests.find_run(arguments.root, arguments.run)
    watching.watch(run_dir, console=terminal(), once=arguments.once, as_json=arguments.json)


def _age(run_dir: Path, manifest: Manifest) -> str:
    """For a run that has not ended: how long ago it began, and whether it is gone."""
    if manifest["status"] != "running":
        return ""
    started = datetime.fromisoformat(manifest["started_at"].replace("Z", "+00:00"))
    how = "gone: killed outright" if is_gone(run_dir) else "still going"
    return f" ({formats.duration((datetime.now(timezone.utc) - started).total_seconds())} ago; {how})"


def _metrics(metrics: dict[str, float]) -> str:
    wanted = (
        "auc",
        "accuracy",
        "worst_class_accuracy",
        "validation_auc",
        "validation_accuracy",
        "train_loss",
        "int8_auc",
        "int8_accuracy",
        "drop_points",
        "samples_per_s",
    )
    shown = [key for key in wanted if key in metrics] or list(metrics)[:3]
    return ", ".join(f"{key} {formats.significant(metrics[key], digits=4)}" for key in shown)


def _compare(arguments: argparse.Namespace) -> None:
    a, b = (manifests.find_run(arguments.root, name) for name in (arguments.a, arguments.b))
    result = compare(a, b)
    if arguments.json:
        _print_json(result)
        return
    print(f"a = {result['a']}\nb = {result['b']}")
    rows = [
        [stage["name"], key, _figure(values["a"]), _figure(values["b"]), _figure(values["difference"], signed=True)]
        for stage in result["stages"]
        for key, values in stage["figures"].items()
    ]
    if rows:
        print_table(["stage", "figure", "a", "b", "b - a"], rows, right=range(2, 5), text=[])
    if result["config"]:
        print_table(
            ["config key", "a", "b"],
            [[key, _value(values, "a"), _value(values, "b")] for key, values in result["config"].items()],
        )
    else:
        print("The configs are the same.")


def _figure(value: Any, *, signed: bool = False) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return formats.DASH if value is None else str(value)
    text = formats.integer(value) if isinstance(value, int) else formats.significant(value, digits=4)
    return f"+{text}" if signed and value > 0 else text


def _value(values: dict[str, Any], side: str) -> str:
    return json.dumps(values[side], ensure_ascii=False) if side in values else "(absent)"


def _report(arguments: argparse.Namespace) -> None:
    from horovod_jobs.report import collect, render_html, render_model_card, render_terminal_table
    from horovod_jobs.storage import write_text

    run_dir = manifests.find_run(arguments.root, arguments.run)
    data = collect(run_dir)
    page, card = run_dir / "report.html", run_dir / "model_card.md"
    write_text(page, render_html(data))
    write_text(card, render_model_card(data))
    if arguments.json:
        _print_json({"run_id": run_dir.name, "report": str(page), "model_card": str(card), "models": len(data.models)})
        return
    if table := render_terminal_table(data):
        print(table)
    print(f"Report: {page}\nModel card: {card}")


def _doctor(arguments: argparse.Namespace) -> None:
    from horovod_jobs import doctor

    info = doctor.collect()
    if arguments.json:
        _print_json(info)
    else:
        print(doctor.render(info))


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=1, ensure_ascii=False))


if __name__ == "__main__":
    sys.exit(main())
