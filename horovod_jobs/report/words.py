"""What a report says in sentences, each computed from the figures."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence

from horovod_jobs import formats
from horovod_jobs.report.collect import ModelRow, ReportData, StageView
from horovod_jobs.report.measures import measure
from horovod_jobs.runtimes import runtime_of


def summary_sentences(data: ReportData) -> list[str]:
    """The result in plain words, a sentence an entry."""
    return [
        s
        for s in (_run_sentence(data), *_model_sentences(data), _distillation_sentence(data), _cost_sentence(data))
        if s
    ]


def _run_sentence(data: ReportData) -> str:
    manifest = data.manifest
    world = manifest["world"]
    where = f"{world['size']} ranks on {_count(world['hosts'], 'host')}" if world["size"] > 1 else "one process"
    counts = [
        f"{number} {word if word in ('ran', 'failed') else ('was ' if number == 1 else 'were ') + word}"
        for word, statuses in (
            ("ran", ("ran",)),
            ("reused", ("reused",)),
            ("skipped", ("skipped",)),
            ("failed", ("failed",)),
        )
        if (number := sum(stage_status(s, data) in statuses for s in data.stages))
    ]
    ended = {"done": "finished", "failed": "failed", "interrupted": "was interrupted", "running": "is not finished"}
    sentence = f"The job “{manifest['name']}” {ended[data.status]} on {where}; "
    sentence += f"of its {len(data.stages)} stages {', '.join(counts) or 'none ran yet'}."
    for lost in world.get("lost", []):
        sentence += f" Rank {lost['rank']} on {lost['host']} ended on the way, and the others went on without it."
    return sentence + (
        f" The error was: {manifest['error']}" if manifest["status"] == "failed" and manifest["error"] else ""
    )


def _model_sentences(data: ReportData) -> list[str]:
    final, reference = data.final, data.reference
    if final is None or final.score is None:
        return []
    by, counted = measure(final.primary), final.primary == "accuracy"
    if counted:
        first = f"The final model ({final.label}) classifies {by.show(final.score)} of the {_samples(final)} correctly"
    else:
        first = f"The final model ({final.label}) reaches {by.noun} {by.show(final.score)} on the {_samples(final)}"
    if reference is None or reference.score is None or reference.primary != final.primary:
        return [first + _worst(final) + "."]
    change = final.score - reference.score
    if abs(change) < by.smallest:
        first += f", as {'many' if counted else 'much'} as the {_named(reference)}"
    else:
        word = ("more" if change > 0 else "fewer") if counted else ("more" if change > 0 else "less")
        first += f", {by.difference(change)} {word} than the {_named(reference)} ({by.show(reference.score)})"
    ratios = [
        _ratio(final.parameters, reference.parameters, "parameters", ("fewer", "more")),
        _ratio(final.file_bytes, reference.file_bytes, "bytes on disk", ("fewer", "more")),
    ]
    said = [ratio for ratio in ratios if ratio]
    sentences = [first + (f", with {' and '.join(said)}" if said else "") + _worst(final) + "."]
    return [*sentences, _latency_sentence(final, _like(final, data.models) or reference)]


def _like(final: ModelRow, models: Sequence[ModelRow]) -> ModelRow | None:
    """The other model of the same size in the same runtime: what its latency differs by is not the runtime's doing."""
    same = [row for row in models if (row.format, row.parameters) == (final.format, final.parameters)]
    return next((row for row in reversed(same) if row is not final), None)


def _latency_sentence(final: ModelRow, other: ModelRow) -> str:
    batch = next((b for b in final.latency_ms if b in other.latency_ms), None)
    if batch is None:
        return ""
    new, old = final.latency_ms[batch]["p50"], other.latency_ms[batch]["p50"]
    ours, theirs = (runtime_of(row.format) for row in (final, other))
    return (
        f"At batch {batch} its median latency is {formats.milliseconds(new)} ms in {ours}; the {_named(other)}'s is "
        f"{formats.milliseconds(old)} ms {'there' if ours == theirs else f'in {theirs}'}."
    )


def _worst(row: ModelRow) -> str:
    value = row.metrics.get("worst_class_accuracy")
    return (
        f"; accuracy is lowest for {row.worst_class}, {formats.percent(value)}"
        if row.worst_class and value is not None and value < 1
        else ""
    )


def _distillation_sentence(data: ReportData) -> str:
    distilled = next((row for row in data.models if row.kind == "distill"), None)
    plain = next(
        (
            r
            for r in data.models
            if distilled and r.kind == "train" and not r.is_teacher and r.parameters == distilled.parameters
        ),
        None,
    )
    if distilled is None or plain is None or distilled.score is None or plain.score is None:
        return ""
    by, change = measure(distilled.primary), distilled.score - plain.score
    margin = interval(distilled)
    sure = "" if margin is None or abs(change) > margin else ", which is within the sampling error of this split"
    if abs(change) < by.smallest:
        return (
            f"Distillation did not change the student's {by.noun} against the same student trained without a teacher."
        )
    word = "raised" if change > 0 else "lowered"
    return (
        f"Distillation {word} the student's {by.noun} by {by.difference(change).replace('percentage ', '')} against the "
        f"same student trained without a teacher{sure}."
    )


def _cost_sentence(data: ReportData) -> str:
    used = [s.entry for s in data.stages if s.entry["status"] in ("ran", "reused")]
    times = [entry["seconds"] for entry in used if entry["seconds"] is not None]
    if not times:
        return ""
    totals = data.manifest["totals"]["artifacts"]
    parts = [
        text
        for text, value in (
            (formats.energy(totals["energy_kwh"]), totals["energy_kwh"]),
            (formats.mass(totals["co2_kg"]) + " of CO2 equivalent", totals["co2_kg"]),
            (formats.money(totals["cost_usd"]), totals["cost_usd"]),
        )
        if value is not None
    ]
    methods = list(
        dict.fromkeys(e["footprint_method"] for e in used if e["footprint_method"] and e["energy_kwh"] is not None)
    )
    # How exactly the energy was found is long, and stands under the table.
    found = {method.partition(":")[0] for method in methods}
    known = f" ({found.pop()})" if len(found) == 1 else ""
    sentence = f"Making all of it took {formats.duration(sum(times))}"
    sentence += f" and {_and(parts)}{known}" if parts else ""
    if any(entry["status"] == "reused" for entry in used):
        sentence += (
            f", reused stages included (this run itself: {formats.duration(data.manifest['totals']['seconds'])})"
        )
    return sentence + ("." if methods else "; energy was not metered.")


def bytes_note(data: ReportData) -> str:
    """How much of each model's file is weights; empty without figures."""
    known = [row for row in data.models if row.file_bytes and row.weights_bytes is not None]
    if not known:
        return ""
    lines = [
        f"{row.label}: {formats.integer(row.file_bytes)} bytes, of which {formats.integer(row.weights_bytes)} "
        f"({100 * (row.weights_bytes or 0) / (row.file_bytes or 1):.0f} %) are tensors"
        for row in known
    ]
    text = (
        "A model's file holds its tensors and, in an ONNX file, the graph that computes with them. "
        + "; ".join(lines)
        + "."
    )
    heavy = [row.label for row in known if (row.weights_bytes or 0) < (row.file_bytes or 0) / 2]
    if heavy:
        text += f" In {_and(heavy)} the graph outweighs the tensors."
    small = next((row for row in known if row.kind == "quantize"), None)
    sources = [row for row in known if small and row.format == "torch" and row.ref in small.lineage]
    large = max(sources, key=lambda row: small.lineage.index(row.ref)) if small and sources else None
    if small and large and small.weights_bytes and large.weights_bytes and small.file_bytes and large.file_bytes:
        tensors, file = large.weights_bytes / small.weights_bytes, large.file_bytes / small.file_bytes
        text += (
            f" From {large.label} to {small.label} the tensors shrink {tensors:.1f}-fold and the file {file:.1f}-fold."
        )
    return text


def interval(row: ModelRow) -> float | None:
    """Half of the 95 % interval of the primary figure: an accuracy's by the binomial, others by the standard error they bring."""
    if row.score is None or not row.samples:
        return None
    error = row.metrics.get(f"{row.primary}_standard_error")
    if row.primary == "accuracy":
        error = math.sqrt(row.score * (1 - row.score) / row.samples)
    return None if error is None else 1.96 * error


def interval_note(models: Sequence[ModelRow]) -> str:
    """What differences of the primary figure mean, given the number of samples."""
    row, half = next(((row, half) for row in models if (half := interval(row))), (None, 0.0))
    if row is None:
        return ""
    by = measure(row.primary)
    width = by.difference(half).replace("percentage ", "")
    return (
        f"With {formats.integer(row.samples)} samples the 95 % interval of an {by.noun} of {by.show(row.score)} is "
        f"± {width}; smaller differences may be chance."
    )


def footprint_note(data: ReportData) -> str:
    """What energy, carbon and cost rest on."""
    found = data.footprint
    if not data.metered:
        return "No meter was configured, so energy, carbon and cost are unknown."
    parts = []
    if found.get("carbon_intensity_g_per_kwh") is not None:
        place = ", ".join(str(p) for p in (found.get("country"), found.get("region")) if p)
        intensity = formats.significant(found["carbon_intensity_g_per_kwh"])
        parts.append(f"carbon intensity {intensity} g/kWh{f' ({place})' if place else ''}")
    parts.append(f"PUE {found.get('pue', 1.0)}")
    if found.get("usd_per_kwh") is not None:
        parts.append(f"{found['usd_per_kwh']} USD/kWh and {found.get('usd_per_host_hour', 0.0)} USD an hour for a host")
    if found.get("cpu_model"):
        tdp = (
            f", TDP taken as {found['cpu_tdp_w']} W for the whole machine" if found.get("cpu_tdp_w") is not None else ""
        )
        parts.append(f"CPU {found['cpu_model']}{tdp}")
    if found.get("ram_w") is not None:
        parts.append(f"RAM taken as {found['ram_w']} W")
    if found.get("gpu_models"):
        parts.append("GPUs " + ", ".join(map(str, found["gpu_models"])))
    text = "Each machine is counted once, however many ranks ran on it. Basis: " + "; ".join(parts) + "."
    if found.get("scope") == "job":
        text += " CPU and RAM are the job's share of the machine's energy, by busy CPU time."
    return text


def command_line(data: ReportData) -> str:
    """The command to repeat the run with the variables it needs, quoted for a shell."""
    variables = data.manifest.get("origin", {}).get("environment", {})
    return " ".join([*(f"{k}={shlex.quote(v)}" for k, v in variables.items()), shlex.join(data.manifest["command"])])


def origin_facts(data: ReportData) -> list[str]:
    """What the command was run on: digests, and the commit of the directory it was typed in."""
    found = data.manifest.get("origin", {})
    commit = found.get("git_commit")
    facts = [f"Config digest: {data.manifest['config_digest']}"]
    if found.get("data_digest"):
        facts.append(f"Data digest: {found['data_digest']}")
    if commit:
        changed = ", with changes that were not committed" if commit.endswith("-dirty") else ""
        facts.append(f"Git commit of the directory the job was started in: {commit.removesuffix('-dirty')}{changed}")
    return facts


def _named(row: ModelRow) -> str:
    return "teacher" if row.is_teacher else f"model “{row.label}”"


def _samples(row: ModelRow) -> str:
    return f"{formats.integer(row.samples)} {row.split} samples" if row.samples else f"{row.split} samples"


def _ratio(new: int | None, old: int | None, what: str, words: tuple[str, str]) -> str:
    if not new or not old or new == old:
        return ""
    ratio = max(new, old) / min(new, old)
    return f"{ratio:.1f} times {words[0] if new < old else words[1]} {what}" if ratio >= 1.05 else ""


def stage_status(stage: StageView, data: ReportData) -> str:
    """A stage's status; the report that is being written counts as ran."""
    status = stage.entry["status"]
    return "ran" if status == "running" and data.status == "done" else status


def _count(number: int, noun: str) -> str:
    return f"one {noun}" if number == 1 else f"{number} {noun}s"


def _and(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]
